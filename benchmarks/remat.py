"""The time that each `model.remat` costs and the memory that it saves, in a training step that differs only in this.

    python benchmarks/remat.py --pairs 10 --out docs/benchmarks    # the committed page and its plot
    python benchmarks/remat.py --mesh fsdp=8
    python benchmarks/remat.py --tiny
    python benchmarks/remat.py --platform cuda                     # Llama 3.2 1B in bfloat16

It writes `remat.md` and `remat.png` to --out, by default $OUT or remat-results.

Temporary memory and matmul FLOPs come from the compiled program and repeat exactly. Times are medians of interleaved
steps of one run, relative to `full`. All policies train the same state, too slowly to change a weight, so that all must
find the same gradient. On a CPU, host and device memory are the same, so `offload` gains nothing there and is shown
with `--platform cuda` only. FLOPs are not shown there, because matmuls are library calls, which XLA does not count.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import math
import os
import platform
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from cases import SHAPES, use_checkout

use_checkout()

from pipeline import flops, interleaved

import floor
from gpu_jax import planned
from programs import random_batch
from shardtrain import MeshSpec, ModelDef, Partitioner, Precision, init_state, make_train_step, optimizer
from shardtrain.models.llama import Llama

SIZES = {"small": floor.Shape(), **SHAPES}
DEFAULTS: dict[str, dict[str, Any]] = {
    "cpu": {"size": "small", "rows": 16, "length": 256, "compute": "float32"},
    "cuda": {"size": "1b", "rows": 4, "length": 4096, "compute": "bfloat16"},
}
#: Largest relative difference between the norms of the same gradient.
TOLERANCE = {"float32": 1e-4, "bfloat16": 1e-2}

#: From keeping everything to keeping only the blocks' inputs.
POLICIES = {
    "none": "none",
    "names, all": "names:query,key,value,attn_mixed,attn_out,mlp_gate,mlp_up",
    "dots": "dots",
    "names, attention": "names:query,key,value,attn_mixed,attn_out",
    "names, mlp": "names:mlp_gate,mlp_up",
    "names, attn_out": "names:attn_out",
    "full": "full",
}
ON_GPU = {"offload": "offload", "offload, attn_out": "offload:attn_out"}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--mesh", default="data=1", help="mesh sizes such as fsdp=4,tensor=2")
    add("--pairs", type=int, default=5, help="interleaved steps of each policy")
    add("--platform", default="cpu", choices=DEFAULTS, help="sets the defaults of:")
    add("--size", choices=SIZES)
    add("--rows", type=int)
    add("--length", type=int)
    add("--compute", choices=("bfloat16", "float32"))
    add("--out", type=Path, default=Path(os.environ.get("OUT", "remat-results")))
    add("--tiny", dest="size", action="store_const", const="tiny", help="to see that the benchmark runs")
    args = parser.parse_args(argv)
    vars(args).update({k: v for k, v in DEFAULTS[args.platform].items() if getattr(args, k) is None})
    jax.config.update("jax_platforms", args.platform)  # the imports above set it to cpu
    shape, precision = SIZES[args.size], Precision(jnp.float32, jnp.dtype(args.compute), jnp.float32)
    mesh = {axis: int(size) for axis, size in (part.split("=") for part in args.mesh.split(","))}
    place = Partitioner(MeshSpec(**mesh).build(jax.devices()[: math.prod(mesh.values())]))
    batch = random_batch(place, args.rows, args.length, shape.vocab_size)
    on_cpu, limit = args.platform == "cpu", (jax.devices()[0].memory_stats() or {}).get("bytes_limit")
    state: Any = None

    def stepper(program: Any) -> Callable[[], float]:
        def step() -> float:
            nonlocal state
            state, metrics = program(state, batch)
            return float(metrics["grad_norm"])

        return step

    policies = POLICIES if on_cpu else POLICIES | ON_GPU
    work: dict[str, tuple[float, int]] = {}
    steps: dict[str, Callable[[], float]] = {}
    for name, remat in policies.items():
        options = {**vars(shape), "tie_embeddings": args.size in SHAPES, "precision": precision, "remat": remat}
        model = ModelDef(lambda rngs, options=options: Llama(**options, rngs=rngs))
        tx = optimizer("adamw", model.weights, lr=1e-30)
        state = init_state(model, tx, place) if state is None else state
        program = make_train_step(model, tx, place).lower(state, batch).compile()
        if limit and planned(program) > limit:
            print(f"{name:18} takes {planned(program) / 1e9:.1f} GB and does not fit", flush=True)
            continue
        count = flops(program.as_text()) if on_cpu else 0.0
        work[name], steps[name] = (count, program.memory_analysis().temp_size_in_bytes), stepper(program)
        print(f"{name:18} {work[name][1] / 1e6:10.1f} MB" + f" {count:.4e} FLOPs" * on_cpu, flush=True)
    wall, cpu, norms = interleaved(steps, args.pairs)
    assert max(norms.values()) / min(norms.values()) < 1 + TOLERANCE[args.compute], norms
    share = {name: f"{count / work['full'][0]:.3f}" if on_cpu else "-" for name, (count, _) in work.items()}
    rows = [
        f"| {name} | `{policies[name]}` | {work[name][1] / 1e6:.1f} | {share[name]} "
        f"| {wall[name] / wall['full']:.3f} | {cpu[name]:.2f} |"
        for name in steps
    ]
    device = jax.devices()[0].device_kind
    text = f"""# Remat: memory against time

{datetime.date.today()}, JAX {jax.__version__}, Python {platform.python_version()}, {device}, mesh {args.mesh}.

    python {" ".join(["benchmarks/remat.py", *sys.argv[1:]])}

A training step of a Llama with {shape.n_layers} layers, d {shape.d_model}, {shape.n_heads} heads, ff {shape.d_ff} and
vocab {shape.vocab_size}, {args.rows} x {args.length} tokens, AdamW, {args.compute}. Temporaries are those of one
device, as counted by XLA. FLOPs are those of matmuls, relative to `full`. Times are medians of {args.pairs} interleaved
steps, relative to `full`, which took {wall["full"] * 1e3:.0f} ms. CPU seconds are the sum over all threads.

| | model.remat | temporaries, MB | FLOPs | step time | CPU s |
|---|---|---|---|---|---|
{chr(10).join(rows)}

![memory against time](remat.png)
"""
    print(text)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "remat.md").write_text(text)
    with contextlib.suppress(ImportError):  # a bare machine has no matplotlib
        draw({name: (work[name][1] / 1e6, wall[name] / wall["full"]) for name in steps}, args.out / "remat.png")


def draw(points: dict[str, tuple[float, float]], path: Path) -> None:
    """Memory across, time upwards."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    ax = figure.add_subplot()
    ordered = sorted(points.items(), key=lambda item: item[1])
    ax.plot(*zip(*(point for _, point in ordered), strict=True), color="#a9c4e4", marker="o", markerfacecolor="#1f5fa8")
    for i, (name, point) in enumerate(ordered):
        ax.annotate(name, point, xytext=(4, 8 if i % 2 else -14), textcoords="offset points", fontsize=9)
    ax.set_xlabel("temporaries, MB")
    ax.set_ylabel("step time over full's")
    ax.set_xlim(left=0)
    ax.margins(x=0.15, y=0.2)
    ax.grid(color="#e6e6e6", linewidth=0.8)
    ax.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)


if __name__ == "__main__":
    main()
