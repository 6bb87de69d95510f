"""Steps in progress: their metrics arrive from the devices and are timed."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from shardtrain.metrics import memory_bytes, mfu
from shardtrain.train.callbacks import Values
from shardtrain.train.norms import by_layer

_MEMORY_S = 0.1  # how old the reported memory may be


@dataclasses.dataclass(frozen=True)
class Speed:
    """Sizes that turn seconds into tokens/s and MFU.

    Attributes:
      tokens_per_step: number of tokens in the global batch.
      flops_per_token: model FLOPs, forward and backward; `None` if unknown.
      peak_flops: FLOP/s of all devices together; `None` if unknown (CPU): then no MFU is reported.
      rows_per_step: number of rows in the global batch, for steps with fewer; `None` if there are none.
    """

    tokens_per_step: int
    flops_per_token: float | None = None
    peak_flops: float | None = None
    rows_per_step: int | None = None

    def values(self, seconds: float, rows: int) -> Values:
        """`step_time_s`, `tokens_per_s` and, where known, `mfu`, of a step over this number of rows."""
        rate = self.tokens_per_step / seconds * (1 if self.rows_per_step is None else rows / self.rows_per_step)
        values = {"step_time_s": seconds, "tokens_per_s": rate}
        if self.flops_per_token and self.peak_flops:
            values["mfu"] = mfu(rate, self.flops_per_token, self.peak_flops)
        return values


@dataclasses.dataclass
class PendingStep:
    """A dispatched step.

    Attributes:
      number: of the step, from 1 on.
      metrics: scalars on the devices, and `norms`, if they are due.
      rows: number of rows in its batch.
      values: the numbers that are reported, once the metrics have arrived.
    """

    number: int
    metrics: Mapping[str, Any]
    rows: int
    values: Values = dataclasses.field(default_factory=dict)


class StepTimer:
    """Waits for the metrics of steps; the time of a step is the time since the metrics of the previous one arrived."""

    def __init__(self, speed: Speed):
        self.speed = speed
        self._clock = self._memory_due = 0.0
        self._memory: int | None = None

    def restart(self) -> None:
        """Start timing the next step now."""
        self._clock = time.perf_counter()

    def wait_for(self, step: PendingStep) -> None:
        """Wait for a step's metrics and time it, once."""
        if "loss" in step.values:
            return
        # Reading waits for one device only; the others of this process may be far behind it.
        metrics = dict(jax.block_until_ready(step.metrics))
        norms = metrics.pop("norms", {})
        # For an array that has arrived, `np.asarray` takes 2 us on CPU; `jax.device_get` takes 15, `float` 6.
        step.values |= {name: float(np.asarray(value)) for name, value in metrics.items()} | by_layer(norms)
        now = time.perf_counter()
        step.values |= self.speed.values(now - self._clock, step.rows)
        self._clock = now
        if now >= self._memory_due:  # a query takes 50 us on CPU, 5% of a short step
            self._memory, self._memory_due = memory_bytes(), now + _MEMORY_S
        if self._memory is not None:
            step.values["memory_bytes"] = float(self._memory)
