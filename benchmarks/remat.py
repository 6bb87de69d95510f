"""What each `model.remat` costs in time and saves in memory: one training step, the same but for the policy.

    python benchmarks/remat.py                       # writes docs/benchmarks/remat.md and .png too
    python benchmarks/remat.py --mesh fsdp=8 --pairs 10 --out /tmp/remat
    python benchmarks/remat.py --tiny --out /tmp/remat

Temporary memory and matmul FLOPs are the compiled program's own and repeat exactly; times are medians of interleaved
steps of one run, over those of `full`. On a CPU the host's memory is the device's, so `offload` gains nothing there: it
is shown with `--platform cuda` only.
"""

from __future__ import annotations

import argparse
import datetime
import platform
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
from pipeline import flops, interleaved, stepper

import floor
from programs import random_batch
from shardtrain import MeshSpec, ModelDef, Partitioner, init_state, make_train_step, optimizer
from shardtrain.models.llama import Llama

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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mesh", default="data=1", help="mesh sizes such as fsdp=4,tensor=2")
    parser.add_argument("--pairs", type=int, default=5, help="interleaved steps of each policy")
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--tiny", action="store_true", help="a tiny model, to see that the benchmark runs")
    parser.add_argument("--platform", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--out", type=Path, default=Path(__file__).parent.parent / "docs/benchmarks")
    args = parser.parse_args()
    jax.config.update("jax_platforms", args.platform)  # what is imported above says cpu
    shape = floor.Shape(2, 32, 8, 8, 64, 64) if args.tiny else floor.Shape()
    sizes = {axis: int(size) for axis, size in (part.split("=") for part in args.mesh.split(","))}
    place = Partitioner(MeshSpec(**sizes).build(jax.devices()[: int(np.prod(list(sizes.values())))]))
    batch = random_batch(place, args.rows, args.length, shape.vocab_size)
    policies = POLICIES | (ON_GPU if jax.default_backend() == "gpu" else {})
    work: dict[str, tuple[float, int]] = {}
    steps: dict[str, Any] = {}
    for name, remat in policies.items():
        options: dict[str, Any] = {**shape.__dict__, "remat": remat}
        model = ModelDef(lambda rngs, options=options: Llama(**options, rngs=rngs))
        tx = optimizer("adamw", model.weights, lr=1e-3)
        state = init_state(model, tx, place)
        program = make_train_step(model, tx, place).lower(state, batch).compile()
        # On a GPU matmuls are library calls, whose FLOPs XLA does not count loop by loop: none are shown.
        count = flops(program.as_text()) if jax.default_backend() == "cpu" else float("nan")
        work[name] = count, program.memory_analysis().temp_size_in_bytes
        steps[name] = stepper(program, state, batch)
        print(f"{name:18} {count:.4e} FLOPs {work[name][1] / 1e6:10.1f} MB", flush=True)
    wall, cpu, losses = interleaved(steps, args.pairs)
    assert max(losses.values()) - min(losses.values()) < 1e-3, losses
    rows = [
        f"| {name} | `{policies[name]}` | {work[name][1] / 1e6:.1f} | {work[name][0] / work['full'][0]:.3f} "
        f"| {wall[name] / wall['full']:.3f} | {cpu[name]:.2f} |"
        for name in policies
    ]
    device = jax.devices()[0].device_kind
    text = f"""# Remat: memory against time

{datetime.date.today()}, JAX {jax.__version__}, Python {platform.python_version()}, {device}, mesh {args.mesh}.

    python {" ".join(["benchmarks/remat.py", *sys.argv[1:]])}

A training step of a Llama with {shape.n_layers} layers, d {shape.d_model}, {shape.n_heads} heads, ff {shape.d_ff} and
vocab {shape.vocab_size}, {args.rows} x {args.length} tokens, AdamW. Temporaries are a device's, by XLA's account; FLOPs
are of matmuls; times are medians of {args.pairs} interleaved steps, over those of `full`, which took
{wall["full"] * 1e3:.0f} ms. CPU seconds are those of all threads.

| | model.remat | temporaries, MB | FLOPs | step time | CPU s |
|---|---|---|---|---|---|
{chr(10).join(rows)}

![memory against time](remat.png)
"""
    print(text)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "remat.md").write_text(text)
    draw({name: (work[name][1] / 1e6, wall[name] / wall["full"]) for name in policies}, args.out / "remat.png")


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
