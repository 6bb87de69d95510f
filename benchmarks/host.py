"""What the host costs a step: the loop's own work, waiting for data, metrics, checkpoints and their hashes.

    python benchmarks/host.py                  # a minute or two
    python benchmarks/host.py --tiny           # only to see that it runs

Three tables, each with its own control measured in turns with it:

1. The library's loop (loader, metrics log, TensorBoard) beside a bare `for` loop over the same compiled step with one
   batch that stays on the device; both fetch the metrics one step late. Once with a step of about a millisecond that
   runs beside the loop, as on an accelerator, but for the processor that it takes from the loop's threads; and once
   with a tiny Llama, which XLA on CPU runs within the call, in the loop's own thread: there nothing can overlap.
2. What the loop waits for data, beside what making and sending a batch takes when nothing runs meanwhile.
3. The loop with metrics, TensorBoard and checkpoints beside the same without. On a host whose processors also compute
   the step, wall time mixes two things: the loop standing still, and threads competing for processors. So what is
   counted is the time in which the loop's thread does anything but wait for a step or dispatch one.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)

import jax.numpy as jnp
import numpy as np

from shardtrain import Checkpointer, Loader, MeshSpec, ModelDef, Partitioner, init_state, make_train_step, optimizer
from shardtrain.data import SyntheticTokens, TokenWindows, open_tokens, write_tokens
from shardtrain.metrics import MetricsLog, plot_loss
from shardtrain.models.llama import Llama
from shardtrain.state import TrainState
from shardtrain.trainer import Loop, Speed

SMALL = {"n_layers": 2, "d_model": 32, "n_heads": 4, "d_ff": 64, "vocab_size": 256}
MEDIUM = {"n_layers": 4, "d_model": 128, "n_heads": 4, "n_kv_heads": 2, "d_ff": 512, "vocab_size": 2048}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=500, help="steps of each turn of table 1; tables 2 and 3: a tenth")
    parser.add_argument("--turns", type=int, default=5, help="turns of each kind, interleaved; medians are printed")
    parser.add_argument("--tiny", action="store_true", help="few steps, to see that the benchmark runs")
    args = parser.parse_args()
    steps, turns = (20, 2) if args.tiny else (args.steps, args.turns)
    print(f"jax {jax.__version__}, {time.strftime('%Y-%m-%d')}; microseconds a step; medians of {turns} turns")
    overhead("a step in a thread of its own", one_core(), steps, turns)
    overhead("a tiny Llama on 1 CPU device", llama(SMALL, rows=8, length=16), steps, turns)
    work = llama(SMALL if args.tiny else MEDIUM, rows=16, length=16 if args.tiny else 128, fsdp=4, tensor=2)
    prefetch(work, max(10, steps // 10))
    stalls(work, max(10, steps // 10), turns)


def overhead(name: str, work: SimpleNamespace, steps: int, turns: int) -> None:
    """Table 1."""
    wall, cpu = defaultdict(list), defaultdict(list)
    with tempfile.TemporaryDirectory() as folder, MetricsLog(folder) as log:
        runs: dict[str, Callable[[], None]] = {
            "bare": lambda: bare(work, steps),
            "bare again": lambda: bare(work, steps),
            "loop": lambda: fit(work, steps, log),
        }
        for turn in range(turns + 1):
            for kind in runs if turn % 2 else reversed(runs):
                started, thread = time.perf_counter(), time.thread_time()
                runs[kind]()
                if turn:  # the first warms up
                    wall[kind].append((time.perf_counter() - started) / steps * 1e6)
                    cpu[kind].append((time.thread_time() - thread) / steps * 1e6)
    median = {kind: statistics.median(values) for kind, values in wall.items()}
    extra = statistics.median(cpu["loop"]) - statistics.median(cpu["bare"])
    print(
        f"1. {name}: bare {median['bare']:.0f}, bare again {median['bare again']:.0f}, loop {median['loop']:.0f}: "
        f"x {median['loop'] / median['bare']:.3f} (A/A x {median['bare again'] / median['bare']:.3f}); "
        f"processor time of the loop's thread {extra:+.0f}",
        flush=True,
    )


def prefetch(work: SimpleNamespace, steps: int) -> None:
    """Table 2."""
    with loader(work) as alone:
        next(alone)
        started = time.perf_counter()
        for _ in range(steps):
            jax.block_until_ready(next(alone))
        cost = (time.perf_counter() - started) / steps * 1e6
    loop = fit(work, steps)
    ready = sum(loop.ready) / len(loop.ready)
    print(
        f"2. a batch takes {cost:.0f} to make and send; within the loop (step {loop.total / steps * 1e6:.0f}) it waits "
        f"{loop.spent['data'] / steps * 1e6:.0f} for one; {ready:.0%} of them lay on the devices when asked for",
        flush=True,
    )


def stalls(work: SimpleNamespace, steps: int, turns: int) -> None:
    """Table 3."""
    plain: dict[str, list[float]] = defaultdict(list)
    full: dict[str, list[float]] = defaultdict(list)
    for turn in range(turns + 1):
        with (
            tempfile.TemporaryDirectory() as folder,
            MetricsLog(folder) as log,
            Checkpointer(f"{folder}/checkpoints") as checkpointer,
        ):
            runs = [(plain, fit(work, steps)), (full, fit(work, steps, log, checkpointer, steps // 2))]
            started = time.perf_counter()
            plot_loss(folder)
            plotting = time.perf_counter() - started
        for found, loop in runs if turn else ():
            found["step"].append(loop.total / steps)
            for kind in ("report", "save"):
                found[kind].append(loop.spent[kind] / loop.total)
    of = lambda found, kind: statistics.median(found[kind])  # noqa: E731
    slower = of(full, "step") / of(plain, "step")
    print(
        f"3. share of the loop's time spent on metrics: {of(plain, 'report'):.3%} without log, "
        f"{of(full, 'report'):.3%} with log and TensorBoard; on saving (2 in {steps} steps; the copy to the host, "
        f"never the hashes): {of(full, 'save'):.2%}; wall time x {slower:.3f}, competition for processors included; "
        f"plotting {plotting:.2f} s, after the last step",
        flush=True,
    )


class Timed(Loop):
    """The loop, with the time that its thread spends on each thing."""

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **options)
        self.spent: dict[str, float] = defaultdict(float)
        self.ready: list[bool] = []
        self.total = 0.0
        self.batches = _TimedBatches(self.batches, self)

    def _train(self, reports: Any) -> None:
        started = time.perf_counter()
        super()._train(reports)
        self.total = time.perf_counter() - started

    def _finish(self, flight: Any, reports: Any) -> None:
        with self.timed("waiting for the step"):
            self._arrive(flight)
        with self.timed("report"):
            super()._finish(flight, reports)

    def save(self) -> None:
        with self.timed("save"):
            super().save()

    @contextlib.contextmanager
    def timed(self, what: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.spent[what] += time.perf_counter() - started


class _TimedBatches:
    def __init__(self, batches: Loader, loop: Timed):
        self.batches, self.loop = batches, loop

    @property
    def state(self) -> Any:
        return self.batches.state

    def __iter__(self) -> _TimedBatches:
        return self

    def __next__(self) -> Any:
        self.loop.ready.append(self.batches.ready)
        with self.loop.timed("data"):
            return next(self.batches)


def fit(
    work: SimpleNamespace,
    steps: int,
    log: MetricsLog | None = None,
    checkpointer: Checkpointer | None = None,
    every: int | None = None,
) -> Timed:
    """A run of the library's loop, from the state that the run before left."""
    options: dict[str, Any] = {"log": log, "checkpointer": checkpointer}
    if every:
        options["checkpoint_every"] = every
    with loader(work) as batches:
        start = int(work.state.step)
        compiled = SimpleNamespace(lower=lambda *_: SimpleNamespace(compile=lambda: work.step))
        loop = Timed(work.state, compiled, batches, steps=start + steps, speed=Speed(work.tokens), **options)
        work.state = loop.fit()
    return loop


def bare(work: SimpleNamespace, steps: int) -> None:
    """What anybody would write, with at most two steps in flight."""
    state, before = work.state, None
    for _ in range(steps):
        state, metrics = work.step(state, work.batch)
        if before is not None:
            jax.device_get(before)
        before = metrics
    work.state = jax.block_until_ready(state)


def loader(work: SimpleNamespace) -> Loader:
    return Loader(work.source, global_batch=work.rows, seed=0, sharding=work.sharding)


def llama(shape: dict[str, int], rows: int, length: int, **mesh: int) -> SimpleNamespace:
    """A real training step on real batches."""
    devices = jax.devices()[: int(np.prod(list(mesh.values()) or [1]))]
    place = Partitioner(MeshSpec(**mesh).build(devices))
    model = ModelDef(lambda rngs: Llama(**shape, rngs=rngs))
    tx = optimizer("adamw", model.weights, lr=1e-3)
    with tempfile.TemporaryDirectory() as folder:  # the open map outlives its name
        ids = np.random.default_rng(0).integers(0, shape["vocab_size"], 2_000_000)
        write_tokens(Path(folder) / "tokens.bin", [ids], shape["vocab_size"])
        source = TokenWindows(open_tokens(Path(folder) / "tokens.bin"), length)
    state, sharding = init_state(model, tx, place), place.sharding(("batch", "seq"))
    with Loader(source, global_batch=rows, seed=0, sharding=sharding) as batches:
        batch = next(batches)
    step = make_train_step(model, tx, place).lower(state, batch).compile()
    return SimpleNamespace(
        state=state, step=step, batch=batch, source=source, rows=rows, sharding=sharding, tokens=rows * length
    )


def one_core(rounds: int = 100) -> SimpleNamespace:
    """A step of about a millisecond that keeps one processor busy, beside the loop; batches as small as can be."""
    place = Partitioner(MeshSpec().build(jax.devices()[:1]))
    source, sharding = SyntheticTokens(seq_len=8, vocab_size=16, seed=0), place.sharding(("batch", "seq"))

    def step(state: TrainState, batch: Any) -> Any:
        w = jax.lax.fori_loop(0, rounds, lambda _, w: jnp.sin(w + 1), state.params["w"])
        loss = jnp.tanh(w @ w).mean()  # the product is enough FLOPs for XLA not to run it all in the calling thread
        metrics = dict.fromkeys(("loss", "grad_norm", "lr", "weight", "skipped"), loss)
        metrics["skipped_in_row"] = state.skipped_in_row
        return TrainState(state.step + 1, {"w": w}, {}, (), state.skipped, state.skipped_in_row), metrics

    zero = jax.device_put(jnp.int32(0), place.sharding(()))
    state = TrainState(zero, {"w": jnp.eye(64)}, {}, (), zero + 0, zero + 0)
    with Loader(source, global_batch=1, seed=0, sharding=sharding) as batches:
        batch = next(batches)
    compiled = jax.jit(step).lower(state, batch).compile()
    return SimpleNamespace(state=state, step=compiled, batch=batch, source=source, rows=1, sharding=sharding, tokens=8)


if __name__ == "__main__":
    main()
