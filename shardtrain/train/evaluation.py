"""Evaluation: means over held-out batches."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax

from shardtrain.errors import UserError
from shardtrain.nn.model import Batch
from shardtrain.nn.returned import Sums
from shardtrain.train.callbacks import Callback, Values, join
from shardtrain.train.state import TrainState

EvalStep = Callable[[TrainState, Batch], Sums]


class InterruptedEvaluationError(Exception):
    """The run was asked to stop during an evaluation."""


class Evaluation:
    """The evaluation of a run.

    Args:
      step: `(state, batch) -> sums`, from `make_eval_step`.
      make_batches: makes the held-out batches.
      callbacks: whose `on_eval` is called.
      weights: turns a state into the one that is evaluated, see `averaged`.
    """

    def __init__(
        self,
        step: EvalStep,
        make_batches: Callable[[], Iterable[Batch]],
        callbacks: Sequence[Callback],
        weights: Callable[[TrainState], TrainState],
    ):
        self._step, self._make_batches, self._callbacks, self._weights = step, make_batches, callbacks, weights

    def __call__(
        self, number: int, state: TrainState, known: Values, should_stop: Callable[[], bool] = lambda: False
    ) -> Values:
        """Held-out means, as `eval_loss` and so on, and the metrics of callbacks.

        Args:
          number: of the step that made the state.
          state: the state to evaluate.
          known: metrics of that step, whose names callbacks cannot use.
          should_stop: polled before every batch.

        Raises:
          InterruptedEvaluationError: `should_stop` returned True.
        """

        def batches() -> Iterator[Batch]:
            for batch in self._make_batches():
                if should_stop():
                    raise InterruptedEvaluationError
                yield batch

        means = evaluate(self._step, self._weights(state), batches())
        values = {f"eval_{name}": value for name, value in means.items()}
        taken = {**known, **values}
        for callback in self._callbacks:
            more = callback.on_eval(number, state)
            join(taken, more, callback, "on_eval")
            values |= more
        return values


def evaluate(eval_step: EvalStep, state: TrainState, batches: Any) -> dict[str, float]:
    """Means over all batches of every sum that `eval_step` returns; `loss` among them.

    A metric or an auxiliary term whose weight is 0 over all batches is left out.

    Args:
      eval_step: from `make_eval_step`.
      state: the state of a training run.
      batches: an iterable of global batches.

    Raises:
      UserError: no batches, or a `Loader` that never ends; or none of their targets counts, so that there is no loss.
    """
    sums = total_sums(eval_step, state, batches)
    return {name: float(value / weight) for name, (value, weight) in sums.items() if weight != 0}


def total_sums(eval_step: EvalStep, state: TrainState, batches: Any) -> Sums:
    """The sums of `eval_step`, added up over all batches, on the host. Arguments and errors are those of `evaluate`."""
    if getattr(batches, "endless", False):
        raise UserError(
            "evaluate got a Loader, which never ends; give the Loader epochs=1 (each row counts once), or the batches "
            "that you want: itertools.islice(loader, 20)"
        )
    total: Sums | None = None
    rows = 0
    for batch in batches:
        rows += jax.tree.leaves(batch)[0].shape[0]
        # Fetched each time: at most one evaluation step is in flight.
        sums = jax.device_get(jax.block_until_ready(eval_step(state, batch)))
        total = sums if total is None else jax.tree.map(lambda a, b: a + b, total, sums)
    if total is None:
        raise UserError("evaluation got no batches; give the held-out split at least one global batch of rows")
    if total["loss"][1] == 0:
        raise UserError(
            f"evaluation has no loss: none of the targets in its {rows} rows counts, since loss_mask "
            "is 0 or the target negative everywhere; evaluate on rows with targets that count"
        )
    return total
