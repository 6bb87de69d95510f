"""Enough threads, and fewer orders, for the collectives of CPU devices: emulated ones, and those of several processes.

XLA runs all CPU devices of a process on one pool of threads, by default one thread for each device. A collective blocks
a thread until every device is in it. Collectives of one device follow each other, but the next one may start while a
loop that holds some is not over, unless data connects the two. So a device can be in several collectives at once
(`shardtrain.hlo.in_flight` counts them), and where the devices have taken all threads, none is left for the collective
that they wait for. XLA ends such a process after 40 s; several processes wait for ever.

Two things keep that from happening. The pool gets `THREADS` threads for each device, which tests compare with
`in_flight` of every mesh and schedule; XLA reads their number from `PJRT_NPROC` when JAX starts. And programs are
compiled with the scheduler that saves memory in place of the one that favours concurrency: some hosts were seen to hang
without it for a reason that the threads do not explain (`docs/benchmarks/soak.md`). It is named in `XLA_FLAGS`, for the
user's programs too; where JAX has started already, at least the library's get it as an option of the compiler.
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from shardtrain.launch.xla_flags import has_started

FLAG, _VALUE = "xla_cpu_scheduler_type", "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"
_POOL = "PJRT_NPROC"
#: Either of them in `XLA_FLAGS` is a choice of the user's, which stays.
_SPELLINGS = (FLAG, "xla_cpu_enable_concurrency_optimized_scheduler")

#: Of XLA's pool, for each device of this process.
THREADS = 6
#: More devices than need these are there to compile for, and not to run.
_MOST_THREADS = 512

_log = logging.getLogger(__name__)
_warned = False


def order_collectives() -> None:
    """Choose scheduler and threads for all programs of this process; not where the user has, or JAX has started."""
    if has_started():
        return
    if not _chosen():
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --{FLAG}={_VALUE}".lstrip()
    if (devices := _local_devices()) > 1 or jax.distributed.is_initialized():
        os.environ.setdefault(_POOL, str(_threads(devices)))


def ordered(devices: Sequence[jax.Device], options: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Options to compile a program of the library's with: `options`, and the scheduler where it is needed."""
    return {**({FLAG: _VALUE} if _several(devices) and not _chosen() else {}), **(options or {})}


def warn_if_late(devices: Sequence[jax.Device]) -> None:
    """Say, once, that programs on these devices may hang, since JAX started without threads or scheduler."""
    global _warned
    if _several(devices) and not (_chosen() and _POOL in os.environ) and not _warned:
        _warned = True
        here = sum(device.process_index == jax.process_index() for device in devices)
        _log.warning(
            "JAX started before shardtrain could prepare it for the collectives of %d CPU devices: programs on them "
            "may hang. Call shardtrain.select_devices before any jax call, or start with %s=%d XLA_FLAGS=--%s=%s",
            len(devices),
            _POOL,
            _threads(here),
            FLAG,
            _VALUE,
        )


def _several(devices: Sequence[jax.Device]) -> bool:
    return len(devices) > 1 and devices[0].platform == "cpu"


def _chosen() -> bool:
    return any(f"--{name}=" in os.environ.get("XLA_FLAGS", "") for name in _SPELLINGS)


def _local_devices() -> int:
    """How many CPU devices this process will have, before JAX has started."""
    config: Any = jax.config
    forced = re.search(r"--xla_force_host_platform_device_count=(\d+)", os.environ.get("XLA_FLAGS", ""))
    return max(1, config.jax_num_cpu_devices, int(forced[1]) if forced else 1)


def _threads(devices: int) -> int:
    return max(os.cpu_count() or 1, min(THREADS * devices, _MOST_THREADS))
