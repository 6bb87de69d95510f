"""Learning-rate schedules: a linear warm-up, then constant, linear, cosine or WSD."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Literal, TypeAlias, get_args

import optax

from shardtrain.errors import UserError, did_you_mean, refuse

ScheduleName: TypeAlias = Literal["constant", "linear", "cosine", "wsd"]
SCHEDULES: tuple[ScheduleName, ...] = get_args(ScheduleName)
#: Of wsd: the share of the steps before the decay, unless the start of the decay is given.
STABLE_RATIO = 0.8
_KEY = "optimizer.schedule"


def schedule(
    type: str,
    *,
    lr: float,
    decay_steps: int,
    warmup_steps: int = 0,
    final_ratio: float = 0.1,
    stable_ratio: float | None = None,
    decay_start: int | None = None,
) -> optax.Schedule:
    """Make the learning rate, a function of the number of updates made so far.

    The warm-up is linear and never zero: update s gets `lr * (s + 1) / (warmup_steps + 1)`, so that the peak is reached
    at s = `warmup_steps`. From `decay_steps` on, the rate stays at `lr * final_ratio`.

    Args:
      type: `constant` (no decay: `decay_steps` and `final_ratio` are ignored), `linear` or `cosine` (from the
        end of the warm-up on; SGDR, arXiv:1608.03983), `wsd` (warm-up, stable, linear decay;
        arXiv:2405.18392).
      lr: the peak.
      decay_steps: the update at which the decay ends, counted from the start of the run, warm-up included.
      warmup_steps: number of updates of the warm-up.
      final_ratio: final rate / peak.
      stable_ratio: wsd only: the share of `decay_steps`, warm-up included, before the decay starts; default
        `STABLE_RATIO`.
      decay_start: wsd only, instead of `stable_ratio`: the update at which the decay starts.

    Raises:
      UserError: the type is unknown, or a number is out of range.
    """
    if not (lr > 0 and math.isfinite(lr)):
        raise UserError("optimizer.lr", lr, "must be a positive number", "for example 1.0e-3")
    refuse(schedule_problems(type, decay_steps, warmup_steps, final_ratio, stable_ratio, decay_start))
    if type == "constant":
        after = optax.constant_schedule(lr)
    else:
        start = _decay_start(decay_steps, stable_ratio, decay_start) if type == "wsd" else warmup_steps
        stable, decay = start - warmup_steps, decay_steps - start
        if type == "cosine":
            after = optax.cosine_decay_schedule(lr, decay, alpha=final_ratio)
        else:
            after = optax.linear_schedule(lr, lr * final_ratio, decay, transition_begin=stable)
    if warmup_steps == 0:
        return after
    warmup = optax.linear_schedule(lr / (warmup_steps + 1), lr, warmup_steps)
    return optax.join_schedules([warmup, after], [warmup_steps])


def schedule_problems(
    type: str,
    decay_steps: int | None,
    warmup_steps: int,
    final_ratio: float,
    stable_ratio: float | None,
    decay_start: int | None,
) -> Iterator[UserError]:
    """Find the mistakes in the arguments of `schedule`; `decay_steps` is `None` where it is not known yet."""
    if type not in SCHEDULES:
        yield UserError(f"{_KEY}.type", type, "there is no such schedule", did_you_mean(type, SCHEDULES))
    if warmup_steps < 0:
        yield UserError(f"{_KEY}.warmup_steps", warmup_steps, "must be 0 or more", "use 0 for no warm-up")
    if not 0 <= final_ratio <= 1:
        rule = "the final rate, as a fraction of the peak, must be from 0 to 1"
        yield UserError(f"{_KEY}.final_ratio", final_ratio, rule, "for example 0.1")
    if type != "wsd":
        for name, value in {"stable_ratio": stable_ratio, "decay_start": decay_start}.items():
            if value is not None:
                fix = f"set {_KEY}.{name}=null or {_KEY}.type=wsd"
                yield UserError(f"{_KEY}.{name}", value, f"only wsd has it, and {_KEY}.type is {type}", fix)
    elif stable_ratio is not None and decay_start is not None:
        rule = f"stable_ratio = {stable_ratio} says the same; only one of the two may be set"
        yield UserError(f"{_KEY}.decay_start", decay_start, rule, f"set {_KEY}.stable_ratio=null")
        return
    if type == "constant" or decay_steps is None:
        return
    if warmup_steps >= decay_steps:
        rule = f"the warm-up must end before decay_steps = {decay_steps} (default: run.steps)"
        fix = f"use {_KEY}.warmup_steps={decay_steps // 10}, or more steps"
        yield UserError(f"{_KEY}.warmup_steps", warmup_steps, rule, fix)
    elif type == "wsd":
        start = _decay_start(decay_steps, stable_ratio, decay_start)
        by_ratio = ("stable_ratio", STABLE_RATIO if stable_ratio is None else stable_ratio)
        name, value = by_ratio if decay_start is None else ("decay_start", decay_start)
        if not warmup_steps <= start < decay_steps:
            rule = (
                f"the decay would start at step {start}, but must start at warmup_steps = {warmup_steps} or later, and "
                f"below decay_steps = {decay_steps}"
            )
            also = f" and {_KEY}.stable_ratio=null" if decay_start is None else ""
            fix = f"use {_KEY}.decay_start={max(warmup_steps, decay_steps * 4 // 5)}{also}"
            yield UserError(f"{_KEY}.{name}", value, rule, fix)


def _decay_start(decay_steps: int, stable_ratio: float | None, decay_start: int | None) -> int:
    """The update at which the decay of wsd starts."""
    ratio = STABLE_RATIO if stable_ratio is None else stable_ratio
    return round(decay_steps * ratio) if decay_start is None else decay_start
