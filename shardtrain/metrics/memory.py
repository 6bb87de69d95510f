"""The memory that training takes."""

import functools
from typing import TYPE_CHECKING

import jax

if TYPE_CHECKING:
    import psutil


def memory_bytes() -> int | None:
    """Return the peak bytes in use of the fullest local device; on CPU, the bytes that the process has now (RSS).

    None on a device without statistics.
    """
    devices = jax.local_devices()
    peaks = [s["peak_bytes_in_use"] for d in devices if "peak_bytes_in_use" in (s := d.memory_stats() or {})]
    if peaks:
        return max(peaks)
    return _this_process().memory_info().rss if devices[0].platform == "cpu" else None


@functools.cache
def _this_process() -> "psutil.Process":
    import psutil

    return psutil.Process()  # finding the process takes longer than asking it
