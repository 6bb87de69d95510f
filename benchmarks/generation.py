"""The time of a token: with a cache of keys and values, and by a pass over all tokens before it.

    python benchmarks/generation.py                                   # three meshes, 12 tokens each way
    python benchmarks/generation.py --out docs/benchmarks/generation.md
    python benchmarks/generation.py --tiny                            # to see that it runs

Both ways continue the same texts, greedily and in turns, a token each; the tokens are compared. Times are medians, from
one token to the next, drawing and fetching it included. The limit: a token with a cache takes at most a tenth of the
other's time. The exit status is 1 if it is missed, or if tokens differ.
"""

from __future__ import annotations

import argparse
import datetime
import platform
import statistics
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
import optax

from shardtrain import select_devices

DEVICES = select_devices("cpu", emulate=8)

from shardtrain.models.llama import Llama
from shardtrain.pipeline import schedules
from shardtrain.sharding import MeshSpec, Partitioner
from shardtrain.train.model_def import ModelDef
from shardtrain.train.sampler import Sampler
from shardtrain.train.sampling import Sampling
from shardtrain.train.state import TrainState, init_state

MESHES: dict[str, dict[str, int]] = {
    "one device": {},
    "fsdp 4, tensor 2": {"fsdp": 4, "tensor": 2},
    "pipe 2, context 2, tensor 2": {"pipe": 2, "context": 2, "tensor": 2},
}
SIZES = {"n_layers": 4, "d_model": 256, "n_heads": 8, "n_kv_heads": 4, "d_ff": 1024, "vocab_size": 2048}
LIMIT = 0.1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--window", type=int, default=1024)
    parser.add_argument("--tokens", type=int, default=12)
    parser.add_argument("--out", type=Path, help="write a page with the result")
    parser.add_argument("--tiny", action="store_true", help="a window of 64 and 4 tokens, without a limit")
    args = parser.parse_args()
    if args.tiny:
        args.window, args.tokens = 64, 4
    limit = float("inf") if args.tiny else LIMIT
    head = ["mesh", "rows", "with a cache, ms", "without, ms", "ratio", "without, again"]
    rows = [head, ["---"] * len(head)]
    missed = False
    for name, mesh in MESHES.items():
        texts, times = compare(mesh, args.window, args.tokens)
        cached, whole, again = (statistics.median(times[way]) * 1e3 for way in ("cached", "whole", "again"))
        missed |= cached > limit * whole
        figures = [f"{cached:.1f}", f"{whole:.1f}", f"{cached / whole:.3f}", f"{again / whole:.3f}"]
        rows.append([name, str(texts), *figures])
        print(" | ".join(rows[-1]), "FAIL" if cached > limit * whole else "pass", flush=True)
    if args.out is not None:
        args.out.write_text(page(args, rows))
    sys.exit(missed)


def compare(mesh: dict[str, int], window: int, tokens: int) -> tuple[int, dict[str, list[float]]]:
    """The number of texts, and the seconds of each token, with a cache, without, and without again, in turns."""
    devices = DEVICES[: int(np.prod([*mesh.values(), 1]))]
    place = Partitioner(MeshSpec(**mesh).build(devices))
    schedule = schedules.make("1f1b", mesh["pipe"], 4) if "pipe" in mesh else None
    model = ModelDef(lambda rngs: Llama(**SIZES, rngs=rngs), schedule=schedule)
    state = init_state(model, optax.sgd(0.1), place)
    rows = place.shards("batch")
    prompts = np.random.default_rng(0).integers(0, SIZES["vocab_size"], (rows, window - tokens - 1)).tolist()
    cached, whole = (Sampler(model, place, window=window) for _ in range(2))
    whole.uncached = "to compare"
    ways = {"cached": cached, "whole": whole, "again": whole}
    streams = {name: stream(sampler, state, prompts, tokens + 2) for name, sampler in ways.items()}
    times: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(tokens + 2):
        found = []
        for name in [*ways][turn % 3 :] + [*ways][: turn % 3]:  # each is first, second and last equally often
            start = time.perf_counter()
            found.append(next(streams[name]))
            if turn >= 2:  # the first reads the prompt, the second compiles
                times[name].append(time.perf_counter() - start)
        assert all((other == found[0]).all() for other in found), "the tokens differ"
    assert cached.uncached is None
    return rows, times


def stream(sampler: Sampler, state: TrainState, prompts: list[list[int]], tokens: int) -> Iterator[np.ndarray]:
    return sampler.stream(state, prompts, tokens=tokens, sampling=Sampling(temperature=0))


def page(args: argparse.Namespace, rows: list[list[str]]) -> str:
    """The committed page."""
    sizes = ", ".join(f"{name} {size}" for name, size in SIZES.items())
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    return f"""# Generation: a token with a cache and without

{datetime.date.today()}, JAX {jax.__version__}, Python {platform.python_version()}, cpu.

    python benchmarks/generation.py --out docs/benchmarks/generation.md

A Llama ({sizes}) in float32
writes the last {args.tokens} tokens of a window of {args.window:,}. There is one text for each shard of the batch.
Times are medians from one token to the next, measured in turns; the tokens are the same. All emulated devices share
the cores of one machine. Limit: a ratio of {LIMIT:g}.

{table}
"""


if __name__ == "__main__":
    main()
