"""Enough threads, and fewer possible orders, for the collectives of CPU devices (emulated, or of several processes).

XLA runs all CPU devices of a process on one pool of threads, by default with one thread per device. A collective blocks
a thread until every device has entered it. The collectives of a device follow each other, but the next one may start
while a loop that contains collectives is still running, unless data connects the two. So a device can be in several
collectives at once (`shardtrain.hlo.in_flight` counts them). When the devices have taken all threads, none is left for
the collective that they wait for. XLA ends such a process after 40 s; several processes wait forever.

Two measures prevent this. The pool gets `THREADS` threads per device, a number that tests compare with `in_flight` of
every mesh and schedule; XLA reads it from `PJRT_NPROC` when JAX starts. And programs are compiled with the scheduler
that saves memory instead of the one that favours concurrency: some hosts hung without it, for a reason that the number
of threads does not explain (`docs/benchmarks/soak.md`). It is set in `XLA_FLAGS`, so that it also applies to the user's
programs. If JAX has already started, at least the programs of the library get it as an option of the compiler.
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
#: The variable that XLA reads, and one that tells our own value, which children inherit, from the user's.
_POOL, _OURS = "PJRT_NPROC", "SHARDTRAIN_PJRT_NPROC"
#: If one of these is in `XLA_FLAGS`, the user has chosen, and the choice stays.
_SPELLINGS = (FLAG, "xla_cpu_enable_concurrency_optimized_scheduler")

#: Threads of XLA's pool for each device of this process.
THREADS = 6
#: If more were needed, there are so many devices that programs are only compiled for them.
_MOST_THREADS = 512

_log = logging.getLogger(__name__)
_warned = False


def order_collectives() -> None:
    """Choose scheduler and threads for all programs of this process, unless the user has, or JAX has started."""
    if has_started():
        return
    if not _chosen():
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --{FLAG}={_VALUE}".lstrip()
    devices, free = _local_devices(), os.environ.get(_POOL) == os.environ.get(_OURS)
    if free and (devices > 1 or jax.distributed.is_initialized()):
        os.environ[_POOL] = os.environ[_OURS] = str(_threads(devices))


def ordered(devices: Sequence[jax.Device], options: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return the options for compiling a program of the library: `options`, and the scheduler if it is needed."""
    return {**({FLAG: _VALUE} if _several(devices) and not _chosen() else {}), **(options or {})}


def warn_if_late(devices: Sequence[jax.Device]) -> None:
    """Warn, once, that programs on these devices may hang, because JAX started without threads or scheduler."""
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
    """Return how many CPU devices this process will have, before JAX has started."""
    config: Any = jax.config
    forced = re.search(r"--xla_force_host_platform_device_count=(\d+)", os.environ.get("XLA_FLAGS", ""))
    return max(1, config.jax_num_cpu_devices, int(forced[1]) if forced else 1)


def _threads(devices: int) -> int:
    return max(os.cpu_count() or 1, min(THREADS * devices, _MOST_THREADS))
