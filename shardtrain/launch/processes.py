"""Several processes of one run: how they meet, and how each of them ends. The command line's business."""

from __future__ import annotations

import contextlib
import os
import sys
import threading
from collections.abc import Callable, Iterator

import jax

from shardtrain.errors import UserError
from shardtrain.host.alike import software, together
from shardtrain.launch.roll_call import RollCall, gather

_HEARTBEAT_S = 30  # a process of which nothing was heard for so long is dead, and all others end
_HOUR = 3600  # at the end, the others wait while process 0 hashes the last checkpoint
_REFUSED, _PATIENCE_S = 2, 10


def join(coordinator: str | None, processes: int, process: int, patience: float) -> RollCall:
    """Meet the other processes and start JAX's distributed runtime; it must come before anything else of JAX.

    Args:
      patience: seconds to wait for processes that are late.

    Returns:
      The connections to the others, for what has to be compared before JAX computes anything.

    Raises:
      UserError: numbers that do not fit, or no coordinator; a process that does not come, or has other software.
    """
    if coordinator is None or process >= processes or processes == 1:
        raise UserError(
            f"--processes {processes}, --process {process}, --coordinator {coordinator}: several processes need "
            "--processes 2 or more, --process from 0 to one less, and --coordinator HOST:PORT, the same for all"
        )
    roll_call = gather(coordinator, processes, process, patience)
    together(software, lambda found: found, roll_call.exchange)
    # Unless told, the coordinator would listen on every interface; its traffic is neither authenticated nor encrypted.
    jax.distributed.initialize(
        coordinator,
        processes,
        process,
        cluster_detection_method="deactivate",
        coordinator_bind_address=coordinator if process == 0 else None,
        heartbeat_timeout_seconds=_HEARTBEAT_S,
        shutdown_timeout_seconds=_HOUR,
    )
    return roll_call


@contextlib.contextmanager
def last_act(report: Callable[[BaseException], int]) -> Iterator[None]:
    """End this process after the block, with code 0 or what `report` makes of an error.

    Python's own way out would first wait for the others (`jax.distributed` does so at exit), which wait for this one
    in a collective; and then for every device thread, of which one may hang in a collective with a process that has
    left: reading a result waits for a single device.
    """
    code = 0
    try:
        yield
    except BaseException as error:
        code = report(error)
    sys.stdout.flush()
    sys.stderr.flush()
    if code in (0, _REFUSED):  # what all do together; otherwise others would call it a crash
        parting = threading.Thread(target=jax.distributed.shutdown, daemon=True)
        parting.start()
        parting.join(_PATIENCE_S if code else None)
    os._exit(code)
