"""Who hears of a run while it trains: callbacks and a display."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import jax

from shardtrain.errors import UserError
from shardtrain.train.state import TrainState

Values = dict[str, float]


class Callback:
    """A user's own metrics. Override what you need; what is returned joins the step's line in `metrics.jsonl`.

    No name may get two values, be it from the step or from two callbacks.
    """

    def on_state(self, step: int, state: TrainState) -> Mapping[str, float | jax.Array]:
        """After `step` is sent to the devices, with the state that it makes; the next step donates that.

        To read an array here waits for the step, and the devices then wait for the next one. It costs nothing to
        compute with JAX and return the scalars unread: they are fetched with the step's own metrics, one step late, and
        `on_step` sees them.
        """
        return {}

    def on_step(self, step: int, metrics: Mapping[str, float]) -> Mapping[str, float]:
        """After the metrics of `step` have arrived, one step late: its state is gone by then (see `on_state`).

        A step whose evaluation was interrupted comes once more, with it, when the run is resumed.
        """
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


def join(values: dict, more: Mapping, callback: Callback, hook: str) -> None:
    """Add what a callback returned.

    Raises:
      UserError: it is no mapping, or has a name that is taken.
    """
    name = f"{type(callback).__name__}.{hook}"
    if not isinstance(more, Mapping):
        raise UserError(f"{name} returned {type(more).__name__}; return a dict of metrics, or {{}} for none")
    if taken := [key for key in more if key in values and more[key] is not values[key]]:
        raise UserError(f"{name} returned {', '.join(taken)}, which the step has already; choose another name")
    values.update(more)
