"""The contestants of a benchmark as separate processes, which work only when told to, so that their turns alternate."""

from __future__ import annotations

import contextlib
import json
import os
import select
import subprocess
import sys
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


class WorkerError(Exception):
    """A worker that failed, died, or did not answer in time."""


class Worker:
    """A process that runs `serve`; its chatter goes to `log`."""

    def __init__(self, command: Sequence[str], env: Mapping[str, str], log: Path):
        self._log = log
        with log.open("ab") as file:
            self._process = subprocess.Popen(
                command,
                env={**os.environ, **env},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=file,
                text=True,
            )

    def ask(self, do: str, timeout: float, **request: Any) -> dict[str, Any]:
        """Let the worker `do` something and wait for its answer.

        Raises:
          WorkerError: it says that it failed, it died, or `timeout` seconds have passed (it is ended then).
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            print(json.dumps({"do": do, **request}), file=self._process.stdin, flush=True)
        except (BrokenPipeError, ValueError):  # it is dead; it was ended before
            raise WorkerError(self._last_words()) from None
        if not select.select([self._process.stdout], [], [], max(timeout, 0.1))[0]:
            self.close()
            raise WorkerError(f"no answer to {do!r} within {timeout:.0f} s")
        line = self._process.stdout.readline()
        if not line:
            raise WorkerError(self._last_words())
        reply = json.loads(line)
        if "error" in reply:
            raise WorkerError(reply["error"])
        return reply

    def close(self) -> None:
        """End the process, and with it all that it holds."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            with contextlib.suppress(BrokenPipeError):
                pipe.close()

    def _last_words(self) -> str:
        code = self._process.wait()
        return f"ended with code {code}; last in {self._log.name}: ...{self._log.read_text(errors='replace')[-400:]}"


def serve(worker: Any) -> None:
    """Answer requests, one JSON line each, by the methods of `worker`; until stdin ends."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # whatever else is printed must not be taken for an answer
    for line in sys.stdin:
        request = json.loads(line)
        try:
            reply = getattr(worker, request.pop("do"))(**request)
        except Exception as error:
            traceback.print_exc()
            reply = {"error": f"{type(error).__name__}: {str(error)[:600]}"}
        print(json.dumps(reply), file=answers)


def largest_batch(fixed: float, per_row: float, limit: float, rows: int) -> int:
    """The largest power of two of rows, at most `rows`, whose memory `fixed + per_row * batch` stays under `limit`."""
    batch = 1
    while batch * 2 <= rows and fixed + per_row * batch * 2 <= limit:
        batch *= 2
    return batch
