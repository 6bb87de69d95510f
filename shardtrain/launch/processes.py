"""Several processes of one run: how they meet, and how each of them ends. Only the command line uses this."""

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

_HEARTBEAT_S = 30  # a process that was silent for this long is dead, and all others end
_HOUR = 3600  # at the end, the other processes wait while process 0 hashes the last checkpoint
_REFUSED, _PATIENCE_S = 2, 10


def join(coordinator: str | None, processes: int, process: int, patience: float) -> RollCall:
    """Meet the other processes and start JAX's distributed runtime. This must come before any other use of JAX.

    Args:
      coordinator: HOST:PORT of process 0.
      processes: number of processes.
      process: number of this one.
      patience: seconds to wait for processes that are late.

    Returns:
      The connections to the others, for comparisons before JAX computes anything.

    Raises:
      UserError: the numbers do not fit, or there is no coordinator; a process does not join, or has other software.
    """
    if coordinator is None or process >= processes or processes == 1:
        raise UserError(
            f"--processes {processes}, --process {process}, --coordinator {coordinator}: several processes need "
            "--processes 2 or more, --process from 0 to one less, and --coordinator HOST:PORT, the same for all"
        )
    roll_call = gather(coordinator, processes, process, patience)
    together(software, lambda found: found, roll_call.exchange)
    # By default the coordinator would listen on every interface; its traffic is neither authenticated nor encrypted.
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
def exit_after(report: Callable[[BaseException], int]) -> Iterator[None]:
    """End this process after the block, with code 0 or the code that `report` returns for an error.

    A normal exit of Python would first wait for the other processes (`jax.distributed` does so at exit), which may wait
    for this one in a collective. It would then wait for every device thread, one of which may hang in a collective with
    a process that has left, because reading a result waits only for a single device.

    Args:
      report: prints an error and returns the exit code.
    """
    code = 0
    try:
        yield
    except BaseException as error:
        code = report(error)
    sys.stdout.flush()
    sys.stderr.flush()
    if code in (0, _REFUSED):  # all processes end in this way together; without it the others would report a crash
        parting = threading.Thread(target=jax.distributed.shutdown, daemon=True)
        parting.start()
        parting.join(_PATIENCE_S if code else None)
    os._exit(code)
