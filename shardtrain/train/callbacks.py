"""A user's own metrics of a run while it trains."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import jax

from shardtrain.errors import UserError, require_kind
from shardtrain.train.state import TrainState

Values = dict[str, float]


class Callback:
    """A user's own metrics. Override the methods that you need; the returned metrics join the step's line in the log.

    No name may have two values, whether from the step or from two callbacks.
    """

    def on_state(self, step: int, state: TrainState) -> Mapping[str, float | jax.Array]:
        """Called after `step` is sent to the devices, with the resulting state, which the next step donates.

        Reading an array here waits for the step, and leaves the devices idle until the next one is sent. It costs
        nothing to compute with JAX and return the scalars unread: they are fetched with the step's own metrics, one
        step late, and passed to `on_step`.

        Called once per step that is trained: not again for a step whose interrupted evaluation a resumed run makes.
        """
        return {}

    def on_step(self, step: int, metrics: Mapping[str, float]) -> Mapping[str, float]:
        """Called when the metrics of `step` have arrived, one step late: its state is gone by then (see `on_state`).

        If an evaluation was interrupted, its step is passed once more, with the evaluation, when the run is resumed.
        """
        return {}

    def on_eval(self, step: int, state: TrainState) -> Mapping[str, float]:
        """Called after an evaluation, with the state after `step`, which the next step donates: copy what you keep."""
        return {}


def check_callbacks(callbacks: Iterable[Any]) -> None:
    """Refuse what is no callback.

    Raises:
      UserError: one of them is something else, such as a class or a function.
    """
    for callback in callbacks:
        require_kind("a callback", callback, Callback, "make a subclass of shardtrain.Callback, and pass an instance")


def join(values: dict, more: Mapping, callback: Callback, hook: str) -> None:
    """Add the metrics that a callback returned.

    Raises:
      UserError: they are not a mapping, or a name is taken.
    """
    name = f"{type(callback).__name__}.{hook}"
    if not isinstance(more, Mapping):
        raise UserError(f"{name} returned {type(more).__name__}; return a dict of metrics, or {{}} for none")
    if taken := [key for key in more if key in values and more[key] is not values[key]]:
        raise UserError(f"{name} returned {', '.join(taken)}, which the step has already; choose another name")
    values.update(more)
