"""One writer per run directory."""

import fcntl
import json
import os
import socket
from pathlib import Path

from shardtrain.errors import UserError
from shardtrain.host.files import naming


class RunLock:
    """Lock a run directory for this process, from construction until `release` (or the end of a `with`).

    It is an advisory `flock` on `<directory>/lock`. The kernel releases it when the process ends in any way, including
    `kill -9`, so there is never a stale lock to remove. The file stays, and names the process until that releases the
    lock: a name without a process is one that died. Of several processes of one run, process 0 takes the lock.

    Args:
      directory: the run directory; created if it is missing.

    Raises:
      UserError: another process has the lock (names its pid and host), or the directory cannot be written.
    """

    def __init__(self, directory: Path | str):
        self.path = Path(directory).absolute() / "lock"
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise UserError(
                f"cannot write in the run directory {self.path.parent}: {error.strerror}; "
                "choose another one with run.dir, or correct its permissions"
            ) from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(descriptor)
            if not isinstance(error, BlockingIOError):
                raise UserError(f"cannot lock {self.path}: {error.strerror}; use a disk that supports flock") from error
            raise UserError(
                f"the run directory {self.path.parent} is being written by {_holder(self.path)}; "
                "stop that process, or choose another run.name or run.dir"
            ) from error
        self._descriptor: int | None = descriptor
        with naming(self.path):
            os.ftruncate(descriptor, 0)
            os.write(descriptor, json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode())

    def release(self) -> None:
        """Release the run directory to other processes. Calling it again does nothing."""
        if self._descriptor is not None:
            os.ftruncate(self._descriptor, 0)
            os.close(self._descriptor)  # closing the only descriptor releases the lock
            self._descriptor = None

    def __enter__(self) -> "RunLock":
        return self

    def __exit__(self, *exception: object) -> None:
        self.release()


def _holder(path: Path) -> str:
    try:
        content = json.loads(path.read_text())
        return f"process {content['pid']} on {content['host']}"
    except (OSError, ValueError, KeyError):
        return "another process"  # it has taken the lock, but not written its name yet
