"""The training loop. It takes parts, not a config, and reads top to bottom."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Protocol

import jax
import numpy as np

from shardtrain.checkpoint import Checkpointer
from shardtrain.data import Loader
from shardtrain.errors import UserError
from shardtrain.metrics import Background, MetricsLog, memory_bytes, mfu
from shardtrain.nn.model import Batch
from shardtrain.state import TrainState
from shardtrain.step import evaluate

Values = dict[str, float]
_MEMORY_S = 0.1  # how old the memory reported of a step may be


class Callback:
    """A user's own metrics. Override what you need; what is returned joins the step's line in `metrics.jsonl`."""

    def on_step(self, step: int, metrics: Mapping[str, float]) -> Mapping[str, float]:
        """After the metrics of `step` have arrived, one step late."""
        return {}

    def on_eval(self, step: int, state: TrainState) -> Mapping[str, float]:
        """After an evaluation, with the state after `step`; copy what you keep of it, the next step donates it."""
        return {}


class Display(Protocol):
    """Where progress is shown: messages by the thread that trains, steps by another."""

    def update(self, step: int, values: Mapping[str, float]) -> None:
        """Show the metrics of a step."""

    def message(self, text: str) -> None:
        """Show a line."""


@dataclasses.dataclass(frozen=True)
class Speed:
    """What turns seconds into tokens/s and MFU.

    Attributes:
      tokens_per_step: tokens of the global batch.
      flops_per_token: model FLOPs, forward and backward; `None` when unknown.
      peak_flops: of all devices together, FLOP/s; `None` when unknown (CPU): then no MFU is reported.
    """

    tokens_per_step: int
    flops_per_token: float | None = None
    peak_flops: float | None = None

    def values(self, seconds: float) -> Values:
        """`step_time_s`, `tokens_per_s` and, where known, `mfu`."""
        rate = self.tokens_per_step / seconds
        values = {"step_time_s": seconds, "tokens_per_s": rate}
        if self.flops_per_token and self.peak_flops:
            values["mfu"] = mfu(rate, self.flops_per_token, self.peak_flops, 1)
        return values


@dataclasses.dataclass
class _Step:
    """A dispatched step: `metrics` arrive from the devices, `values` are what is written of it."""

    number: int
    metrics: Mapping[str, jax.Array]
    values: Values = dataclasses.field(default_factory=dict)


class Loop:
    """Runs a train step over batches, with checkpoints, evaluation and metrics around it.

    Args:
      state: where to start; its `step` counts on.
      train_step: `(state, batch) -> (state, metrics)`, as `make_train_step` makes it.
      batches: training batches; its `state` is stored in checkpoints.
      steps: train until the state has seen so many.
      speed: see `Speed`.
      canonical: the state as checkpoints store it; for a pipeline, `[layers, ...]` in the model's order.
      checkpointer: where states go, every `checkpoint_every` steps and at the end; `extra` is stored with them.
      eval_step, eval_batches: held-out evaluation, every `eval_every` steps and at the end.
      log: metrics on disk, every `log_every` steps, with each evaluation and at the end.
      max_skipped: so many non-finite steps in a row end the run.
      should_stop: polled after every step with its number; True saves and ends the run early.
    """

    def __init__(
        self,
        state: TrainState,
        train_step: Any,
        batches: Loader,
        *,
        steps: int,
        speed: Speed,
        canonical: Callable[[TrainState], TrainState] = lambda state: state,
        checkpointer: Checkpointer | None = None,
        checkpoint_every: int = 100,
        extra: Mapping[str, Any] | None = None,
        eval_step: Any = None,
        eval_batches: Callable[[], Iterable[Batch]] | None = None,
        eval_every: int | None = None,
        log: MetricsLog | None = None,
        log_every: int = 1,
        display: Display | None = None,
        callbacks: Sequence[Callback] = (),
        max_skipped: int = 10,
        should_stop: Callable[[int], bool] = lambda step: False,
    ):
        self.state, self.train_step, self.batches = state, train_step, batches
        self.steps, self.speed, self.max_skipped, self.should_stop = steps, speed, max_skipped, should_stop
        self.canonical = canonical
        self.checkpointer, self.checkpoint_every, self.extra = (
            checkpointer,
            checkpoint_every,
            dict(extra or {}),
        )
        self.eval_step, self.eval_batches, self.eval_every = eval_step, eval_batches, eval_every
        self.log, self.log_every, self.display, self.callbacks = log, log_every, display, tuple(callbacks)
        self.step = int(state.step)
        self.stopped_early = False
        self._saved = self.step if self.step else None
        self._clock = self._memory_due = 0.0
        self._memory: int | None = None

    def fit(self) -> TrainState:
        """Train to the last step, or until `should_stop`; returns the final state.

        Raises:
          UserError: too many non-finite steps in a row, or a save that failed.
        """
        if self.step < self.steps:
            with Background("report") as reports:
                self._train(reports)
            if self.checkpointer is not None:
                self.checkpointer.wait()
        return self.state

    def _train(self, reports: Background) -> None:
        batches = iter(self.batches)
        batch = next(batches)
        train_step = self._compile(batch)
        flight: _Step | None = None
        self._clock = time.perf_counter()
        while True:
            self.state, metrics = train_step(self.state, batch)
            self.step += 1
            # The step before is fetched only now, while this one runs: two in flight, never more.
            flight, previous = _Step(self.step, metrics), flight
            if previous is not None:
                self._finish(previous, reports)
            last = self.step >= self.steps
            self.stopped_early = not last and self.should_stop(self.step)
            if last or _due(self.step, self.eval_every):
                flight.values |= self._evaluate(flight)
            if last or self.stopped_early or _due(self.step, self.checkpoint_every):
                # Written down before its state is: a run that resumes from this step never writes its line again.
                self._finish(flight, reports)
                flight = None
                if self.log is not None:
                    reports.submit(self.log.flush)
                reports.flush()
                self.save()
                self._clock = time.perf_counter()
            if last or self.stopped_early:
                break
            batch = next(batches)

    def evaluate(self) -> Values:
        """Held-out means, as `eval_loss` and so on."""
        if self.eval_step is None or self.eval_batches is None:
            return {}
        means = evaluate(self.eval_step, self.state, self.eval_batches())
        values = {f"eval_{name}": value for name, value in means.items()}
        for callback in self.callbacks:
            values |= callback.on_eval(self.step, self.state)
        return values

    def save(self) -> None:
        """Store the present state, once."""
        if self.checkpointer is not None and self._saved != self.step:
            self.checkpointer.save(self.step, self.canonical(self.state), {**self.extra, "data": self.batches.state})
            self._saved = self.step

    def _compile(self, batch: Batch) -> Any:
        start = time.perf_counter()
        self._message("compiling the step ...")
        compiled = self.train_step.lower(self.state, batch).compile()
        self._message(f"compiled in {time.perf_counter() - start:.1f} s")
        return compiled

    def _evaluate(self, flight: _Step) -> Values:
        self._arrive(flight)
        values = self.evaluate()
        self._clock = time.perf_counter()
        return values

    def _arrive(self, flight: _Step) -> None:
        """Wait for a step's metrics and time it, once."""
        if "loss" in flight.values:
            return
        # Reading waits for one device alone; the others of this process may be far behind it.
        metrics = jax.block_until_ready(flight.metrics)
        # Of what is there already, `np.asarray` takes 2 us each on CPU; `jax.device_get` takes 15, `float` 6.
        flight.values |= {name: float(np.asarray(value)) for name, value in metrics.items()}
        now = time.perf_counter()
        flight.values |= self.speed.values(now - self._clock)
        self._clock = now
        if now >= self._memory_due:  # asking takes 50 us on CPU, 5% of a short step
            self._memory, self._memory_due = memory_bytes(), now + _MEMORY_S
        if self._memory is not None:
            flight.values["memory_bytes"] = float(self._memory)

    def _finish(self, flight: _Step, reports: Background) -> None:
        """Show and store a step, in the background."""
        self._arrive(flight)
        values = flight.values
        for callback in self.callbacks:
            values |= callback.on_step(flight.number, values)
        reports.submit(self._report, flight.number, values)
        if values["skipped_in_row"] >= self.max_skipped:
            kept = "" if self._saved is None else f"; the checkpoint of step {self._saved} is intact"
            raise UserError(
                f"loss or gradient was not finite for {int(values['skipped_in_row'])} steps in a row, up to step "
                f"{flight.number} (limit run.max_skipped_steps={self.max_skipped}); the weights are those of the last "
                f"finite step{kept}: lower optimizer.lr, add warm-up or look at the data"
            )

    def _report(self, step: int, values: Values) -> None:
        last = step == self.steps
        if self.log is not None and (last or _due(step, self.log_every) or "eval_loss" in values):
            self.log.write(step, values)
        if self.display is not None:
            self.display.update(step, values)

    def _message(self, text: str) -> None:
        if self.display is not None:
            self.display.message(text)


def _due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0
