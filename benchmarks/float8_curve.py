"""Does training in float8 stay on course? Loss curves of one model on real text, in bfloat16 and in float8.

    python benchmarks/float8_curve.py                                   # on a GPU: the 125M model, 400 steps
    python benchmarks/float8_curve.py --size tiny --seq 64 --batch 16   # on a CPU, by emulation

The text is this repository's own code, byte by byte. Both runs have the same weights and batches; a third in bfloat16
from other weights shows how far apart two runs are anyway.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cases import ADAMW, ROOT, SHAPES, host_batch, use_checkout

use_checkout()

from shardtrain.models.llama import Llama
from shardtrain.nn import Precision
from shardtrain.optim import optimizer
from shardtrain.sharding import Partitioner
from shardtrain.sharding.mesh import MeshSpec
from shardtrain.train.model_def import ModelDef
from shardtrain.train.state import init_state
from shardtrain.train.step import make_train_step

FOLDERS = ("shardtrain", "models", "tests", "configs", "benchmarks")  # not docs, where the results are written down
RUNS = {"bfloat16": ("compute", 0), "float8": ("float8", 0), "bfloat16, other weights": ("compute", 1)}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="125m", choices=SHAPES)
    parser.add_argument("--seq", type=int, default=1024)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--lr", type=float, default=6e-4)
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", "gpu-results")))
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    text, device = corpus(), jax.devices()[0].device_kind
    print(f"jax {jax.__version__} on {device}; {args.size}, {args.batch} x {args.seq} bytes a step")
    print(f"corpus: {len(text)} bytes, sha256 {hashlib.sha256(text).hexdigest()[:12]}")
    curves = {name: curve(args, text, *how) for name, how in RUNS.items()}
    with (args.out / "float8_curve.jsonl").open("w") as file:
        for step, losses in enumerate(zip(*curves.values(), strict=True)):
            file.write(json.dumps({"step": step, **dict(zip(RUNS, losses, strict=True))}) + "\n")
    width = max(args.steps // 10, 1)
    print("mean loss of steps   " + "   ".join(RUNS))
    for first in range(0, args.steps, width):
        means = [np.mean(values[first : first + width]) for values in curves.values()]
        print(f"{first:5} to {min(first + width, args.steps) - 1:5}      " + "   ".join(f"{m:.4f}" for m in means))
    base, float8, other = (np.array(values) for values in curves.values())
    for name, values in (("float8", float8), ("other weights", other)):
        print(f"{name} against bfloat16: mean |difference| {np.abs(values - base).mean():.4f}, ", end="")
        print(f"over the last tenth {(values - base)[-width:].mean():+.4f}", flush=True)


def curve(args: argparse.Namespace, text: np.ndarray, matmul: str, seed: int) -> list[float]:
    """The loss of each step."""
    place = Partitioner(MeshSpec(data=1).build(jax.devices()[:1]))
    shape = dataclasses.replace(SHAPES[args.size], vocab_size=256)
    precision = Precision(jnp.float32, jnp.bfloat16, jnp.float32, matmul)
    model = ModelDef(lambda rngs: Llama(**vars(shape), tie_embeddings=True, precision=precision, rngs=rngs))
    tx = optimizer("adamw", model.weights, **{**ADAMW, "lr": args.lr})
    state, step = init_state(model, tx, place, seed=seed), make_train_step(model, tx, place)
    losses = []
    for index in range(args.steps):
        state, metrics = step(state, batch(text, args.batch, args.seq, index))
        losses.append(metrics["loss"])
        if index % 20 == 0:  # bounds the steps in flight, and shows progress
            print(f"  {matmul} {index}: {float(metrics['loss']):.4f}", flush=True)
    return [float(loss) for loss in losses]


def corpus(root: Path = ROOT) -> np.ndarray:
    """The bytes of the repository's text files, which a run's or an environment's own files are not among."""
    files = sorted(p for f in FOLDERS for p in (root / f).rglob("*") if p.suffix in (".py", ".md", ".yaml"))
    return np.frombuffer(b"\n".join(p.read_bytes() for p in files), np.uint8)


def batch(text: np.ndarray, rows: int, seq: int, index: int) -> dict[str, Any]:
    """Windows of the text, the same for each run at the same step."""
    starts = np.random.default_rng(index).integers(0, len(text) - seq - 1, rows)
    windows = np.stack([text[s : s + seq + 1] for s in starts]).astype(np.int32)
    return {**host_batch(rows, seq, 1), "tokens": windows[:, :-1], "targets": windows[:, 1:]}


if __name__ == "__main__":
    main()
