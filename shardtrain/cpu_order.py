"""Fewer orders of collectives on CPU devices: emulated ones, and those of several processes.

XLA's CPU backend starts whatever is ready. Of two collectives that no data connects, one of them inside of a loop or a
branch, each device may start another one first, and then each waits in its own for the others. XLA ends such a process
after 40 s; several processes wait for ever. A barrier between the two (`optimization_barrier`) does not order them.

The scheduler that saves memory, in place of the one that favours concurrency, leaves each device less of a choice: no
start without a pipeline has been seen to hang with it; some pipelines (zb_v) still do (`docs/benchmarks/soak.md`). So
every program on several CPU devices is compiled with it: the user's own through the variable `XLA_FLAGS`, which XLA
reads when JAX starts; and where that is too late at least the library's, through options of the compiler.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from shardtrain.xla import has_started

FLAG, _VALUE = "xla_cpu_scheduler_type", "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"
#: Either of them in `XLA_FLAGS` is a choice of the user's, which stays.
_SPELLINGS = (FLAG, "xla_cpu_enable_concurrency_optimized_scheduler")

_log = logging.getLogger(__name__)
_warned = False


def order_collectives() -> None:
    """Choose the scheduler for all programs of this process, unless `XLA_FLAGS` names one, or JAX has started."""
    if not _chosen() and not has_started():
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --{FLAG}={_VALUE}".lstrip()


def ordered(devices: Sequence[jax.Device], options: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Options to compile a program of the library's with: `options`, and the scheduler where it is needed."""
    return {**({FLAG: _VALUE} if _at_risk(devices) else {}), **(options or {})}


def warn_if_late(devices: Sequence[jax.Device]) -> None:
    """Say, once, that programs of the user's own on these devices may hang, since JAX started without the flag."""
    global _warned
    if _at_risk(devices) and not _warned:
        _warned = True
        _log.warning(
            "JAX started before shardtrain chose the order of collectives on its %d CPU devices: the library's own "
            "programs have it, but others may hang. Call shardtrain.select_devices before any jax call, or start with "
            "XLA_FLAGS=--%s=%s",
            len(devices),
            FLAG,
            _VALUE,
        )


def _at_risk(devices: Sequence[jax.Device]) -> bool:
    return len(devices) > 1 and devices[0].platform == "cpu" and not _chosen()


def _chosen() -> bool:
    return any(f"--{name}=" in os.environ.get("XLA_FLAGS", "") for name in _SPELLINGS)
