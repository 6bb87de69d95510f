"""The training loop. It takes parts, not a config, and reads top to bottom."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from shardtrain.checkpoint import Checkpointer
from shardtrain.data import Loader
from shardtrain.metrics import Background, MetricsLog
from shardtrain.nn.model import Batch
from shardtrain.train.arrivals import Arrivals, Step
from shardtrain.train.arrivals import Speed as Speed
from shardtrain.train.callbacks import Callback as Callback
from shardtrain.train.callbacks import Display, Values, join
from shardtrain.train.state import TrainState
from shardtrain.train.step import evaluate
from shardtrain.train.unlearned import Unlearned

_log = logging.getLogger(__name__)


class _StoppedError(Exception):
    """An evaluation was broken off."""


class Loop:
    """Runs a train step over batches, with checkpoints, evaluation and metrics around it.

    Where a step is saved and evaluated, the save comes first. An evaluation that did not end, because the run was asked
    to stop or because it died, is made by the run that resumes from that step.

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
      max_skipped: so many non-finite steps in a row, counted from the start of this loop, end the run. No checkpoint is
        written amid such a row, but for one at the end of the run, or when it is asked to stop.
      should_stop: polled with the step's number after every step and before every batch of an evaluation; True saves
        and ends the run early.
      unevaluated: the metrics of the step that `state` comes from, if its evaluation is still to be made: what the
        checkpoint's `extra` has under this name.
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
        unevaluated: Values | None = None,
    ):
        self.state, self.train_step, self.batches = state, train_step, batches
        self.steps, self.speed, self.should_stop = steps, speed, should_stop
        self.canonical = canonical
        self.checkpointer, self.checkpoint_every, self.extra = checkpointer, checkpoint_every, dict(extra or {})
        self.eval_step, self.eval_batches, self.eval_every = eval_step, eval_batches, eval_every
        self.log, self.log_every, self.display, self.callbacks = log, log_every, display, tuple(callbacks)
        self.step = int(state.step)
        self.stopped_early = False
        self._unevaluated = unevaluated
        self._saved = self.step or None
        self._can_evaluate = eval_step is not None and eval_batches is not None
        self._unlearned = Unlearned(max_skipped, self.step, self._warn)
        self._arrivals = Arrivals(speed)

    def fit(self) -> TrainState:
        """Train to the last step, or until `should_stop`; returns the final state.

        Raises:
          UserError: too many non-finite steps in a row, or a save that failed.
        """
        with Background("report") as reports:
            if self._unevaluated is not None:
                flight = Step(self.step, {}, dict(self._unevaluated))
                flight.values |= self._evaluate_unless_stopped(flight.values)
                self._finish(flight, reports)
            if self.step < self.steps and not self.stopped_early:
                self._train(reports)
        if self.checkpointer is not None:
            self.checkpointer.wait()
        self._unlearned.sum_up()
        return self.state

    def _train(self, reports: Background) -> None:
        batches = iter(self.batches)
        batch = next(batches)
        train_step = self._compile(batch)
        flight: Step | None = None
        self._arrivals.restart()
        while True:
            self.state, metrics = train_step(self.state, batch)
            self.step += 1
            # The step before is fetched only now, while this one runs: two in flight, never more.
            flight, previous = Step(self.step, self._with_those_of_callbacks(metrics)), flight
            if previous is not None:
                self._finish(previous, reports)
            last = self.step >= self.steps
            evaluates = self._can_evaluate and (last or _due(self.step, self.eval_every))
            stop = (evaluates or not last) and self._asked_to_stop()
            saves = last or stop or _due(self.step, self.checkpoint_every)
            if saves or evaluates:
                self._pause(flight, reports, saves, evaluates)
                flight = None
            if last or self.stopped_early:
                return
            batch = next(batches)

    def _pause(self, flight: Step, reports: Background, saves: bool, evaluates: bool) -> None:
        """Save, evaluate and finish a step before the next one is sent."""
        self._arrivals.wait_for(flight)
        if saves and not self.stopped_early and flight.number < self.steps:
            saves = not self._unlearned.keeps_from_saving(flight)
        unevaluated = dict(flight.values) if evaluates else None
        if evaluates and not self.stopped_early and not self._unlearned.too_many(flight):
            if saves:
                self._save(reports, unevaluated)
            flight.values |= self._evaluate_unless_stopped(flight.values)
        # Written down before its state is, or held in it: no run that resumes from this step lacks its line.
        self._finish(flight, reports)
        if saves or self.stopped_early:
            self._save(reports, unevaluated)
        self._arrivals.restart()

    def evaluate(self) -> Values:
        """Held-out means, as `eval_loss` and so on."""
        return self._evaluate(self.eval_batches(), {}) if self.eval_batches is not None and self._can_evaluate else {}

    def save(self) -> None:
        """Store the present state, once."""
        self._store(None)

    def _save(self, reports: Background, unevaluated: Values | None) -> None:
        """Store the present state after all lines of the steps before are written."""
        if self.log is not None:
            reports.submit(self.log.flush)
        reports.flush()
        self._store(unevaluated)

    def _store(self, unevaluated: Values | None) -> None:
        if self.checkpointer is not None and self._saved != self.step:
            extra = {**self.extra, "data": self.batches.state, "unevaluated": unevaluated}
            self.checkpointer.save(self.step, self.canonical(self.state), extra)
            self._saved = self.step

    def _evaluate(self, batches: Iterable[Batch], known: Values) -> Values:
        means = evaluate(self.eval_step, self.state, batches)
        values = {f"eval_{name}": value for name, value in means.items()}
        taken = {**known, **values}
        for callback in self.callbacks:
            more = callback.on_eval(self.step, self.state)
            join(taken, more, callback, "on_eval")
            values |= more
        return values

    def _evaluate_unless_stopped(self, known: Values) -> Values:
        try:
            return self._evaluate(self._until_stopped(self.eval_batches()), known) if self.eval_batches else {}
        except _StoppedError:
            self._message(f"the evaluation of step {self.step} was interrupted; the resumed run makes it")
            return {}

    def _until_stopped(self, batches: Iterable[Batch]) -> Iterator[Batch]:
        for batch in batches:
            if self._asked_to_stop():
                raise _StoppedError
            yield batch

    def _asked_to_stop(self) -> bool:
        self.stopped_early = self.stopped_early or self.should_stop(self.step)
        return self.stopped_early

    def _compile(self, batch: Batch) -> Any:
        start = time.perf_counter()
        self._message("compiling the step ...")
        compiled = self.train_step.lower(self.state, batch).compile()
        self._message(f"compiled in {time.perf_counter() - start:.1f} s")
        return compiled

    def _with_those_of_callbacks(self, metrics: Mapping[str, Any]) -> Mapping[str, Any]:
        if not self.callbacks:
            return metrics
        metrics = dict(metrics)
        for callback in self.callbacks:
            join(metrics, callback.on_state(self.step, self.state), callback, "on_state")
        return metrics

    def _finish(self, flight: Step, reports: Background) -> None:
        """Show and store a step, in the background."""
        self._arrivals.wait_for(flight)
        values = flight.values
        for callback in self.callbacks:
            join(values, callback.on_step(flight.number, values), callback, "on_step")
        reports.submit(self._report, flight.number, values)
        self._unlearned.check(flight, self._saved)

    def _report(self, step: int, values: Values) -> None:
        last = step == self.steps
        if self.log is not None and (last or _due(step, self.log_every) or "eval_loss" in values):
            self.log.write(step, values)
        if self.display is not None:
            self.display.update(step, values)

    def _warn(self, text: str) -> None:
        _log.warning(text) if self.display is None else self.display.message(text)

    def _message(self, text: str) -> None:
        if self.display is not None:
            self.display.message(text)


def _due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0
