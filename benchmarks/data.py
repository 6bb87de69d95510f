"""Does the input pipeline keep up? Tokens/s of the loader, compared with tokens/s that the training step consumes.

    python benchmarks/data.py                  # about a minute
    python benchmarks/data.py --tiny           # only to see that it runs

The loader reads, shuffles, stacks and sends batches to the devices as fast as it can. The step runs over one batch that
is already there. The two take turns in one run. A ratio of 20 leaves room for steps that are 20 times faster than
these, and is the limit even for the turn with the lowest ratio. If it is missed, the exit status is 1.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jax

from shardtrain import Job, Loader, RunConfig, build, load_config, open_source
from shardtrain.data import Source

QUICKSTART = Path(__file__).parent.parent / "configs" / "quickstart.yaml"
#: The shape of the baselines of the project, on fsdp 8.
BASELINE = [
    "mesh.fsdp=8",
    "mesh.tensor=1",
    "model.d_model=256",
    "model.n_heads=8",
    "model.n_kv_heads=8",
    "model.d_ff=1024",
    "data.seq_len=256",
]
LIMIT = 20
TINY = ["model.n_layers=1", "model.d_model=32", "model.d_ff=64", "data.seq_len=32"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--turns", type=int, default=5, help="turns of loader and step; medians are printed")
    parser.add_argument("--batches", type=int, default=200, help="batches of a turn of the loader")
    parser.add_argument("--steps", type=int, default=5, help="steps of a turn of the step")
    parser.add_argument("--tiny", action="store_true", help="a tiny model and few batches, too few to judge times by")
    parser.add_argument("--limit", type=float, help=f"least ratio; default {LIMIT}, with --tiny 0")
    args = parser.parse_args()
    limit = args.limit if args.limit is not None else 0 if args.tiny else LIMIT
    batches, steps, turns = (20, 2, 2) if args.tiny else (args.batches, args.steps, args.turns)
    print(f"jax {jax.__version__}, {time.strftime('%Y-%m-%d')}; million tokens/s, medians of {turns} turns")
    print("config       source        loader      step    ratio    least")
    enough = True
    for name, overrides in (("tiny", TINY),) if args.tiny else (("quickstart", []), ("baseline", BASELINE)):
        config = load_config(str(QUICKSTART), overrides)
        job = build(config)
        step = Step(job)
        for kind in ("corpus", "synthetic"):
            source = opened(config, kind)
            fast, slow = [], []
            for _ in range(turns):
                fast.append(loading(job, source, batches))
                slow.append(step.rate(steps, source))
            loader, trained = statistics.median(fast), statistics.median(slow)
            least = min(a / b for a, b in zip(fast, slow, strict=True))
            enough &= least >= limit
            print(
                f"{name:12} {kind:10} {loader / 1e6:9.3f} {trained / 1e6:9.4f} {loader / trained:8.0f} {least:8.0f}  "
                f"{'pass' if least >= limit else 'FAIL'}",
                flush=True,
            )
    sys.exit(0 if enough else 1)


def opened(config: RunConfig, kind: str) -> Source:
    """Real text, tokenised into a file that is mapped into memory; or tokens made up as they are read."""
    with tempfile.TemporaryDirectory() as folder:  # the open map outlives its name
        vocab = config.model.options["vocab_size"]
        return open_source(kind, seq_len=config.data.seq_len, vocab_size=vocab, directory=folder)[0]


def loader(job: Job, source: Source) -> Loader:
    sharding = job.partitioner.sharding(("batch", "seq"))
    return Loader(source, global_batch=job.config.data.global_batch, seed=0, sharding=sharding)


def loading(job: Job, source: Source, batches: int) -> float:
    """Tokens/s of the loader, with the batches on the devices."""
    data = job.config.data
    with loader(job, source) as made:
        jax.block_until_ready(next(made))
        started = time.perf_counter()
        for _ in range(batches):
            jax.block_until_ready(next(made))
        assert made.state["next_row"] == (batches + 1) * data.global_batch
        return batches * data.global_batch * data.seq_len / (time.perf_counter() - started)


class Step:
    """The training step of a job, compiled once."""

    def __init__(self, job: Job):
        self.job, self.state, self.compiled = job, job.init_state(), None

    def rate(self, steps: int, source: Source) -> float:
        """Tokens/s of the step."""
        data = self.job.config.data
        with loader(self.job, source) as made:
            batch: Any = next(made)
        if self.compiled is None:
            self.compiled = self.job.train_step().lower(self.state, batch).compile()
            self.state, _ = self.compiled(self.state, batch)
        jax.block_until_ready(self.state)
        started = time.perf_counter()
        for _ in range(steps):
            self.state, metrics = self.compiled(self.state, batch)
            jax.block_until_ready(metrics)
        return steps * data.global_batch * data.seq_len / (time.perf_counter() - started)


if __name__ == "__main__":
    main()
