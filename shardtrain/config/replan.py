"""The effect of another number of steps on a learning rate that was planned to decay, in numbers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from shardtrain.config.errors import Problem
from shardtrain.optim import lr_schedules

KEY = "optimizer.schedule.decay_steps"


def problem(before: Mapping[str, Any], after: Mapping[str, Any], step: int) -> Problem:
    """Report that the decay of a run was planned to end at another step than in a config.

    Args:
      before: the section `optimizer` of the run.
      after: that of the config, which differs in `decay_steps`.
      step: the step that the run has reached.
    """
    planned, wanted = (section["schedule"]["decay_steps"] for section in (before, after))
    old, new, end = _rate(before, step), _rate(after, step), _rate(before, planned)
    jump = f"at step {step} it is the same in both" if old == new else f"it jumps from {old} to {new} at step {step}"
    return Problem(
        KEY,
        wanted,
        f"the learning rate was planned to decay until step {planned} (unless given, decay_steps is run.steps)",
        f"set {KEY}={planned} to keep that plan (it stays at {end} from there on), or --allow-changes to plan it anew "
        f"({jump})",
    )


def applies(before: Mapping[str, Any], after: Mapping[str, Any]) -> bool:
    """Whether the learning rates of two sections `optimizer` differ only in the step at which their decay ends."""
    old, new = before["schedule"], after["schedule"]
    alike = before["lr"] == after["lr"] and {**old, "decay_steps": None} == {**new, "decay_steps": None}
    return alike and old["decay_steps"] != new["decay_steps"]


def _rate(section: Mapping[str, Any], step: int) -> str:
    """The learning rate at a step, to three digits."""
    return f"{float(lr_schedules.schedule(lr=section['lr'], **section['schedule'])(step)):.3g}"
