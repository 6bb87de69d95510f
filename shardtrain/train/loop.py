"""The training loop. It takes parts, not a config, and reads top to bottom."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from shardtrain.checkpoint import Checkpointer
from shardtrain.data import Loader
from shardtrain.host.closing import close_all
from shardtrain.metrics import Background, MetricsLog, Progress
from shardtrain.nn.model import Batch
from shardtrain.train.callbacks import Callback, Values, check_callbacks, join
from shardtrain.train.evaluation import EvalStep, Evaluation, InterruptedEvaluationError
from shardtrain.train.jitted_step import Compilable, Metrics
from shardtrain.train.skipped_steps import SkippedSteps
from shardtrain.train.state import TrainState
from shardtrain.train.step_timer import PendingStep, Speed, StepTimer

_log = logging.getLogger(__name__)


class Loop:
    """Runs a train step over batches, with checkpoints, evaluation and metrics around it.

    If a step is both saved and evaluated, the save comes first. An evaluation that did not finish, because the run was
    asked to stop or died, is made up for by the run that resumes from that step.

    Args:
      state: where to start; its `step` counts on.
      train_step: `(state, batch) -> (state, metrics)`, from `make_train_step`.
      batches: training batches; its `state` is stored in checkpoints.
      steps: the step to train up to.
      speed: see `Speed`.
      canonical: converts a state to the layout of checkpoints; for a pipeline, `[layers, ...]` in the model's order.
      checkpointer: stores states.
      checkpoint_every: steps from save to save; the last step is always saved.
      extra: stored with each state.
      eval_step: `(state, batch) -> sums`, from `make_eval_step`.
      eval_batches: makes the held-out batches of an evaluation.
      eval_every: steps from evaluation to evaluation; the last step is always evaluated.
      eval_weights: turns the state into the one that is evaluated, see `averaged`.
      log: metrics on disk.
      log_every: steps from line to line; evaluated steps and the last one always have a line.
      norms_every: that of `make_train_step`; these steps have a line, too.
      callbacks: see `Callback`.
      max_skipped: this many non-finite steps in a row, counted from the start of this loop, end the run. No checkpoint
        is written within such a row, except at the end of the run, or when it is asked to stop.
      should_stop: polled with the step's number after every step and before every batch of an evaluation; True saves
        and ends the run early.
      unevaluated: the metrics of the step of `state`, if its evaluation is still to be made: the entry of that name in
        the checkpoint's `extra`.

    Attributes:
      state: the present state; the next step donates it.
      step: the number of steps that were sent to the devices.
      stopped_early: whether the run was asked to stop.
      compiled: the compiled train step, once there is one.
    """

    def __init__(
        self,
        state: TrainState,
        train_step: Compilable[tuple[TrainState, Metrics]],
        batches: Loader,
        *,
        steps: int,
        speed: Speed,
        canonical: Callable[[TrainState], TrainState] = lambda state: state,
        checkpointer: Checkpointer | None = None,
        checkpoint_every: int = 100,
        extra: Mapping[str, Any] | None = None,
        eval_step: EvalStep | None = None,
        eval_batches: Callable[[], Iterable[Batch]] | None = None,
        eval_every: int | None = None,
        eval_weights: Callable[[TrainState], TrainState] = lambda state: state,
        log: MetricsLog | None = None,
        log_every: int = 1,
        norms_every: int | None = None,
        callbacks: Sequence[Callback] = (),
        max_skipped: int = 10,
        should_stop: Callable[[int], bool] = lambda step: False,
        unevaluated: Values | None = None,
    ):
        self.state, self.train_step, self.batches = state, train_step, batches
        self.steps, self.eval_every, self.should_stop = steps, eval_every, should_stop
        self.canonical = canonical
        self.checkpointer, self.checkpoint_every, self.extra = checkpointer, checkpoint_every, dict(extra or {})
        self.log, self.log_every, self.norms_every, self.callbacks = log, log_every, norms_every, tuple(callbacks)
        check_callbacks(self.callbacks)
        self.step = int(state.step)
        self.stopped_early = False
        self.compiled: Any = None
        self._unevaluated = unevaluated
        self._saved = self.step or None
        self._evaluation = None
        if eval_step is not None and eval_batches is not None:
            self._evaluation = Evaluation(eval_step, eval_batches, self.callbacks, eval_weights)
        self._display: Progress | None = None
        self._skipped = SkippedSteps(max_skipped, self.step, self._warn)
        self._timer = StepTimer(speed)

    def fit(self, display: Progress | None = None) -> TrainState:
        """Train to the last step, or until `should_stop`; returns the final state.

        Args:
          display: shows progress.

        Raises:
          UserError: too many non-finite steps in a row, or a save that failed.
        """
        self._display = display
        with Background("report") as reports:
            if self._unevaluated is not None:
                pending = PendingStep(self.step, {}, 0, dict(self._unevaluated))
                pending.values |= self._evaluate_unless_stopped(pending.values)
                self._finish(pending, reports)
            if self.step < self.steps and not self.stopped_early:
                self._train(reports)
        if self.checkpointer is not None:
            self.checkpointer.wait()
        self._skipped.sum_up()
        return self.state

    def close(self) -> None:
        """Close batches, checkpoints and log."""
        close_all(*(part.close for part in (self.batches, self.checkpointer, self.log) if part is not None))

    def _train(self, reports: Background) -> None:
        batches = iter(self.batches)
        batch = next(batches)
        pending: PendingStep | None = None
        compiled_rows: int | None = None
        while True:
            rows = next(iter(batch.values())).shape[0]
            if rows != compiled_rows:  # at first, and whenever the batch grows
                if pending is not None:
                    self._timer.wait_for(pending)
                self.compiled, compiled_rows = self._compile(batch), rows
                self._timer.restart()
            self.state, metrics = self.compiled(self.state, batch)
            self.step += 1
            metrics = dict(metrics)
            if not _due(self.step, self.norms_every):
                metrics.pop("norms", None)
            for callback in self.callbacks:
                join(metrics, callback.on_state(self.step, self.state), callback, "on_state")
            # The step before is fetched only now, while this one runs: two in flight, never more.
            pending, previous = PendingStep(self.step, metrics, rows), pending
            if previous is not None:
                self._finish(previous, reports)
            last = self.step >= self.steps
            evaluates = self._evaluation is not None and (last or _due(self.step, self.eval_every))
            stop = (evaluates or not last) and self._asked_to_stop()
            saves = last or stop or _due(self.step, self.checkpoint_every)
            if saves or evaluates:
                self._pause(pending, reports, saves, evaluates)
                pending = None
            if last or self.stopped_early:
                return
            batch = next(batches)

    def _pause(self, pending: PendingStep, reports: Background, saves: bool, evaluates: bool) -> None:
        """Save, evaluate and finish a step before the next one is sent."""
        self._timer.wait_for(pending)
        if saves and not self.stopped_early and pending.number < self.steps:
            saves = self._skipped.may_be_saved(pending)
        unevaluated = dict(pending.values) if evaluates else None
        if evaluates and not self.stopped_early and not self._skipped.too_many(pending):
            if saves:
                self._save(reports, unevaluated)
            pending.values |= self._evaluate_unless_stopped(pending.values)
        # The line is written before the state, or stored with it: no run that resumes from this step lacks it.
        self._finish(pending, reports)
        if saves or self.stopped_early:
            self._save(reports, unevaluated)
        self._timer.restart()

    def evaluate(self) -> Values:
        """Held-out means of the present state, as `eval_loss` and so on; none without held-out batches."""
        return {} if self._evaluation is None else self._evaluation(self.step, self.state, {})

    def save(self) -> None:
        """Store the present state, unless it is stored already."""
        self._store(None)

    def _save(self, reports: Background, unevaluated: Values | None) -> None:
        """Store the present state once all lines of earlier steps are written."""
        if self.log is not None:
            reports.submit(self.log.flush)
        reports.flush()
        self._store(unevaluated)

    def _store(self, unevaluated: Values | None) -> None:
        if self.checkpointer is not None and self._saved != self.step:
            extra = {**self.extra, "data": self.batches.state, "unevaluated": unevaluated}
            self.checkpointer.save(self.step, self.canonical(self.state), extra)
            self._saved = self.step

    def _evaluate_unless_stopped(self, known: Values) -> Values:
        if self._evaluation is None:
            return {}
        try:
            return self._evaluation(self.step, self.state, known, self._asked_to_stop)
        except InterruptedEvaluationError:
            self.message(f"the evaluation of step {self.step} was interrupted; the resumed run makes it")
            return {}

    def _asked_to_stop(self) -> bool:
        self.stopped_early = self.stopped_early or self.should_stop(self.step)
        return self.stopped_early

    def _compile(self, batch: Batch) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
        start = time.perf_counter()
        self.message("compiling the step ...")
        compiled: Compilable[tuple[TrainState, Metrics]] = self.train_step.lower(self.state, batch).compile()
        self.message(f"compiled in {time.perf_counter() - start:.1f} s")
        return compiled

    def _finish(self, pending: PendingStep, reports: Background) -> None:
        """Show and store a step, in the background."""
        self._timer.wait_for(pending)
        values = pending.values
        for callback in self.callbacks:
            join(values, callback.on_step(pending.number, values), callback, "on_step")
        reports.submit(self._report, pending.number, values)
        self._skipped.check(pending, self._saved)

    def _report(self, step: int, values: Values) -> None:
        due = step == self.steps or _due(step, self.log_every) or _due(step, self.norms_every)
        if self.log is not None and (due or "eval_loss" in values):
            self.log.write(step, values)
        if self._display is not None:
            self._display.update(step, values)

    def _warn(self, text: str) -> None:
        if not self.message(text):
            _log.warning(text)

    def message(self, text: str) -> bool:
        """Show a line, if there is a display; returns whether there is."""
        if self._display is not None:
            self._display.message(text)
        return self._display is not None


def _due(step: int, every: int | None) -> bool:
    return every is not None and step % every == 0
