"""Learning-rate schedules: a linear warm-up, then constant, linear, cosine or WSD."""

from __future__ import annotations

import math

import optax

from shardtrain.errors import UserError, did_you_mean

SCHEDULES = ("constant", "linear", "cosine", "wsd")


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
    """Return the learning rate as a function of the number of updates made so far.

    The warm-up is linear and never zero: update s gets `lr * (s + 1) / (warmup_steps + 1)`, so that the peak is reached
    at s = `warmup_steps`. From `decay_steps` on, the rate stays at `lr * final_ratio`.

    Args:
      type: `constant` (no decay; ignores `decay_steps` and `final_ratio`), `linear` or `cosine` (from the end of the
        warm-up on; SGDR, arXiv:1608.03983), `wsd` (warm-up, stable, linear decay; arXiv:2405.18392).
      lr: the peak rate.
      decay_steps: the update at which the decay ends, counted from the start of the run, warm-up included.
      warmup_steps: number of updates of the warm-up.
      final_ratio: final rate / peak.
      stable_ratio: for wsd only: the share of `decay_steps`, warm-up included, before the decay starts. Default: 0.8.
      decay_start: for wsd only, instead of `stable_ratio`: the update at which the decay starts.

    Raises:
      UserError: the type is unknown, or a number is out of range.
    """
    if type not in SCHEDULES:
        raise UserError(f"schedule type {type!r} does not exist; {did_you_mean(type, SCHEDULES)}")
    if not (lr > 0 and math.isfinite(lr)):
        raise UserError(f"lr {lr} must be a positive number, such as 1.0e-3")
    if warmup_steps < 0:
        raise UserError(f"schedule warmup_steps {warmup_steps} must be 0 or more; 0 means no warm-up")
    if not 0 <= final_ratio <= 1:
        raise UserError(f"schedule final_ratio {final_ratio} is the final rate / peak and must be from 0 to 1")
    if type != "wsd" and (stable_ratio is not None or decay_start is not None):
        raise UserError(f"schedule {type} has no stable_ratio or decay_start; drop them, or use type wsd")

    if type == "constant":
        after = optax.constant_schedule(lr)
    else:
        if decay_steps <= warmup_steps:
            raise UserError(
                f"schedule {type} with decay_steps {decay_steps} ends before its warm-up of {warmup_steps} "
                "steps does; use a shorter warm-up, or more steps"
            )
        start = _decay_start(decay_steps, warmup_steps, stable_ratio, decay_start) if type == "wsd" else warmup_steps
        stable, decay = start - warmup_steps, decay_steps - start
        if type == "cosine":
            after = optax.cosine_decay_schedule(lr, decay, alpha=final_ratio)
        else:
            after = optax.linear_schedule(lr, lr * final_ratio, decay, transition_begin=stable)
    if warmup_steps == 0:
        return after
    warmup = optax.linear_schedule(lr / (warmup_steps + 1), lr, warmup_steps)
    return optax.join_schedules([warmup, after], [warmup_steps])


def _decay_start(decay_steps: int, warmup_steps: int, stable_ratio: float | None, decay_start: int | None) -> int:
    """Return the update at which the decay of wsd starts."""
    if stable_ratio is not None and decay_start is not None:
        raise UserError(f"schedule wsd has both stable_ratio {stable_ratio} and decay_start {decay_start}; drop one")
    stable_ratio = 0.8 if stable_ratio is None else stable_ratio
    start = round(decay_steps * stable_ratio) if decay_start is None else decay_start
    if not warmup_steps <= start < decay_steps:
        raise UserError(
            f"schedule wsd would start its decay at step {start}, but that must be at least the end of "
            f"the warm-up ({warmup_steps}) and below decay_steps ({decay_steps}); change decay_start or stable_ratio"
        )
    return start
