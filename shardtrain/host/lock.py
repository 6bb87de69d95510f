"""One writer per run directory."""

import fcntl
import json
import os
import socket
from pathlib import Path

from shardtrain.errors import UserError
from shardtrain.host.files import naming


class RunLock:
    """Holds a run directory for this process, from construction until `release` (or the end of a `with`).

    An advisory `flock` on `<directory>/lock`: the kernel drops it when the process ends in any way, `kill
    -9` included, so there is never a stale lock to remove. The file stays; its content only serves the
    message. Of several processes of one run, process 0 takes it.

    Raises:
      UserError: another process holds it (its pid and host are named), or the directory cannot be written.
    """

    def __init__(self, directory: Path | str):
        self.path = Path(directory).absolute() / "lock"
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._descriptor: int | None = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
        except OSError as error:
            raise UserError(
                f"cannot write in the run directory {self.path.parent}: {error.strerror}; "
                "choose another with run.dir, or correct its permissions"
            ) from error
        try:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self.release()
            if not isinstance(error, BlockingIOError):
                raise UserError(f"cannot lock {self.path}: {error.strerror}; use a disk with flock") from error
            raise UserError(
                f"the run directory {self.path.parent} is being written by {_holder(self.path)}; "
                "stop that process, or choose another run.name or run.dir"
            ) from error
        with naming(self.path):
            os.ftruncate(self._descriptor, 0)
            os.write(self._descriptor, json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode())

    def release(self) -> None:
        """Let another process in. Calling it again does nothing."""
        if self._descriptor is not None:
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
        return "another process"  # caught between taking the lock and writing its name
