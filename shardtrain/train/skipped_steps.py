"""Steps that changed no weight: they are reported, and too many of them end the run."""

from __future__ import annotations

from collections.abc import Callable

from shardtrain.errors import UserError
from shardtrain.train.step_timer import PendingStep


class SkippedSteps:
    """Watches for steps whose loss or gradient is not finite, and for batches without a target.

    Args:
      limit: this many non-finite steps in a row end the run.
      first: the step from which this loop starts. In a row that began earlier, only the steps of this loop count: a run
        that resumes has the whole allowance.
      say: shows a line.
    """

    def __init__(self, limit: int, first: int, say: Callable[[str], None]):
        self._limit, self._first, self._say = limit, first, say
        self._empty = 0

    def too_many(self, step: PendingStep) -> bool:
        """Whether this step is one non-finite step too many."""
        return min(step.values["skipped_in_row"], step.number - self._first) >= self._limit

    def may_be_saved(self, step: PendingStep) -> bool:
        """Whether this step is finite. If not, its weights may be to blame: say that they are not saved."""
        in_row = int(step.values["skipped_in_row"])
        if in_row:
            self._say(f"step {step.number} is not saved: {in_row} steps in a row were not finite, up to this one")
        return in_row == 0

    def check(self, step: PendingStep, saved: int | None) -> None:
        """Examine a step whose metrics have arrived.

        Args:
          step: the step.
          saved: the step of the newest checkpoint.

        Raises:
          UserError: too many non-finite steps in a row.
        """
        if step.values.get("weight") == 0:
            self._empty += 1
            if self._empty == 1:
                self._say(f"the batch of step {step.number} has no target to learn from: all are masked; going on")
        if self.too_many(step):
            intact = "" if saved is None else f"; the checkpoint of step {saved} is intact"
            raise UserError(
                f"loss or gradient was not finite for {int(step.values['skipped_in_row'])} steps in a row, up to step "
                f"{step.number} (limit run.max_skipped_steps={self._limit}); the weights are those of the last "
                f"finite step{intact}: lower optimizer.lr, add warm-up or look at the data"
            )

    def sum_up(self) -> None:
        """Say at the end how many batches had no target, unless it was only the one already reported."""
        if self._empty > 1:
            self._say(f"{self._empty} steps had a batch without a target to learn from")
