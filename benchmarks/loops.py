"""The loops that `host.py` measures: the library's, over short steps and with the time of each part, and a bare one."""

from __future__ import annotations

import contextlib
import tempfile
import time
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from shardtrain import Checkpointer, Loader, MeshSpec, ModelDef, Partitioner, init_state, make_train_step, optimizer
from shardtrain.data import SyntheticTokens, TokenWindows, open_tokens, write_tokens
from shardtrain.metrics import MetricsLog
from shardtrain.models.llama import Llama
from shardtrain.train.loop import Loop
from shardtrain.train.state import TrainState
from shardtrain.train.step_timer import Speed


class Timed(Loop):
    """The loop, with the seconds that its thread spends on each thing."""

    def __init__(self, *args: Any, **options: Any):
        super().__init__(*args, **options)
        self.spent: dict[str, float] = defaultdict(float)
        self.calls: dict[str, int] = defaultdict(int)
        self.ready: list[bool] = []
        self.total = 0.0
        self.batches = _TimedBatches(self.batches, self)

    def _train(self, reports: Any) -> None:
        reports.flush = self.timed("metrics")(reports.flush)
        with self.timed("all"):
            super()._train(reports)
        self.total = self.spent["all"]

    def _finish(self, flight: Any, reports: Any) -> None:
        self._timer.wait_for(flight)  # waiting for the step
        with self.timed("metrics"):
            super()._finish(flight, reports)

    def _store(self, unevaluated: Any) -> None:
        if self.checkpointer is None:
            return
        with self.timed("hashes"):
            self.checkpointer.wait()
        with self.timed("copy"):
            super()._store(unevaluated)

    @contextlib.contextmanager
    def timed(self, what: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.spent[what] += time.perf_counter() - started
        self.calls[what] += 1


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
    """A step of about a millisecond that keeps one processor busy, in parallel with the loop, on tiny batches."""
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
