"""Saving and restoring the state of a run."""

import json
import logging
import shutil
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import jax

from shardtrain.checkpoint import lifecycle, manifest, names, reading, store, trust, unwaited
from shardtrain.checkpoint.retention import expired
from shardtrain.errors import UserError
from shardtrain.host.closing import close_all
from shardtrain.host.files import require_writable

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Restored:
    """A step as it was saved.

    Attributes:
      step: its number.
      state: on the mesh that was asked for.
      extra: the record saved with it, as JSON returns it.
    """

    step: int
    state: Any
    extra: dict[str, Any]


class Checkpointer:
    """The checkpoints of one run. All processes of the run make one, and make the same calls, on one shared disk.

    `save` returns after the copy to the host. The commit, the hashes and the deletion of old steps happen in the
    background. At most one save is under way: another `save` waits until it has ended, and so does the end of the
    program, which fails with code 1 if that save fails.

    Process 0 alone hashes the saved files (after the commit, which Orbax synchronises over the processes), renames,
    deletes, and chooses the step to restore. Each process then verifies its share of the files of that step. When
    process 0 fails it ends, and whatever supervises the run starts all processes again.

    Args:
      directory: where the steps are stored; created if it is missing.
      keep: how many of the newest steps to keep, at least 1.
      keep_every: keep, in addition, every step that is a multiple of this.
      asynchronous: False makes `save` wait until it is done.
      compress: by zstd. Off by default: saves of float32 weights would be about 3 times slower for 8% of the size.

    Raises:
      UserError: the directory cannot be written, or `keep` or `keep_every` is below 1.
    """

    def __init__(
        self,
        directory: Path | str,
        *,
        keep: int = 3,
        keep_every: int | None = None,
        asynchronous: bool = True,
        compress: bool = False,
    ):
        for name, value in (("keep", keep), ("keep_every", keep_every)):
            if value is not None and value < 1:
                raise UserError(f"checkpoint.{name} = {value} must be at least 1")
        self.directory = Path(directory).absolute()
        self._keep, self._keep_every = keep, keep_every
        self._asynchronous, self._compress = asynchronous, compress
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None
        self._verified: int | None = None  # by `latest`, and not restored since
        require_writable(self.directory, "checkpoints")

    def save(self, step: int, state: Any, extra: Mapping[str, Any]) -> None:
        """Save a step. Its buffers may be donated as soon as this returns.

        Args:
          step: newer than every step in the directory.
          state: a pytree of arrays and numbers.
          extra: JSON saved with it (config, data position, mesh).

        Raises:
          UserError: the save before this one, or this one, failed (on a full disk, say); the step is not new;
            two leaves share a path; `extra` is not JSON.
        """
        self.wait()
        self._require_new(step)
        record = {"format_version": store.FORMAT_VERSION, "extra": _json(extra)}
        arrays = {name: names.storable(name, leaf) for name, leaf in names.flatten(state).items()}
        try:
            commit = store.save(self.directory / str(step), arrays, record, compress=self._compress)
        except OSError as error:  # before a byte is written, anything else is a bug
            raise self._failure(step, error) from error
        self._pending = self._worker.submit(self._finish, step, commit)
        unwaited.remember(self)
        if not self._asynchronous:
            self.wait()

    def wait(self) -> None:
        """Wait until the save under way is committed, hashed and verified.

        Raises:
          UserError: it failed; the message names the last good step, which is intact.
        """
        if self._pending is not None:
            self._pending.exception()  # if this is interrupted, it stays pending
            pending, self._pending = self._pending, None
            unwaited.forget(self)
            pending.result()

    @property
    def kept(self) -> int | None:
        """The newest step that is committed and verified by now."""
        return max(lifecycle.with_manifest(self.directory), default=None)

    def latest(self) -> int | None:
        """Clean up after a crash, and return the newest step that verifies; None in a fresh run.

        Raises:
          UserError: checkpoints exist, but none can be trusted.
        """
        self.wait()
        self._verified = trust.newest(self.directory)
        return self._verified

    def restore(self, abstract: Any, step: int | None = None, *, cast: bool = False) -> Restored | None:
        """Verify a step and load it; None in a fresh run. A step that `latest` has just found is not hashed again.

        Args:
          abstract: the tree of the state with leaves of `jax.ShapeDtypeStruct` that carry shardings, on any mesh.
          step: which step; None means `latest`. A step given by number is never replaced by another.
          cast: allow a dtype that differs from the saved one.

        Raises:
          UserError: no step can be trusted; or paths, shapes or dtypes differ (each is named).
        """
        if step is None:
            step = self.latest()
        if step is None:
            return None
        self._require_intact(step)
        self._verified = None  # a file that has been on the disk for long is checked again
        state, extra = reading.read_state(self.directory / str(step), abstract, cast=cast)
        return Restored(step, state, extra)

    def extra(self, step: int) -> dict[str, Any]:
        """The record saved with a step. The step is verified as in `restore`.

        Raises:
          UserError: the step cannot be trusted.
        """
        self._require_intact(step)
        return reading.intact_extra(self.directory / str(step))

    def parts(self, step: int) -> set[str]:
        """The names of the parts of the state in a step that have arrays. The step is verified as in `restore`.

        Raises:
          UserError: the step cannot be trusted.
        """
        self._require_intact(step)
        return reading.parts_of(self.directory / str(step))

    def close(self) -> None:
        """Wait for the save under way, and end the background thread.

        Raises:
          UserError: that save failed.
        """
        close_all(self.wait, self._worker.shutdown)

    def __enter__(self) -> "Checkpointer":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        close_all(self.close, after=error)

    def _finish(self, step: int, commit: store.Commit) -> None:
        """The half in the background: commit, hash, read back, and only then delete old steps."""
        try:
            commit.result()
            if jax.process_index() != 0:
                return
            manifest.write(self.directory, step)
            problem = manifest.problem(self.directory, step)
            if problem is not None:
                lifecycle.rename(self.directory, step, lifecycle.CORRUPT)
                raise OSError(f"what was written does not read back: {problem}")
            for old in expired(lifecycle.with_manifest(self.directory), self._keep, self._keep_every):
                lifecycle.delete(self.directory, old)
        except Exception as error:
            raise self._failure(step, error) from error
        _log.info("checkpoint %d in %s is committed and verified", step, self.directory)

    def _failure(self, step: int, error: Exception) -> UserError:
        older = [kept for kept in lifecycle.with_manifest(self.directory) if kept != step]
        kept = f"the last good checkpoint, step {older[-1]}, is intact" if older else "there is no earlier checkpoint"
        reason = next(iter(str(error).splitlines()), type(error).__name__)  # the other lines are Orbax's own traceback
        return UserError(
            f"saving step {step} in {self.directory} failed: {reason} "
            f"({_free_space(self.directory)}); {kept}. "
            "Correct the cause (a full disk, a quota, permissions), and run the same command again"
        )

    def _require_new(self, step: int) -> None:
        existing = {*lifecycle.committed(self.directory), *lifecycle.with_manifest(self.directory)}
        if existing and step <= max(existing):
            raise UserError(
                f"cannot save step {step} in {self.directory}: step {max(existing)} already exists there; "
                "restore it first, or move the newer steps away"
            )

    def _require_intact(self, step: int) -> None:
        if step != self._verified:
            self.wait()
            trust.require_intact(self.directory, step)


def _free_space(directory: Path) -> str:
    try:
        return f"{shutil.disk_usage(directory).free / 2**20:,.0f} MiB are free there"
    except OSError as error:
        return f"that directory: {error.strerror}"


def _json(extra: Mapping[str, Any]) -> dict[str, Any]:
    try:
        return json.loads(json.dumps(dict(extra)))
    except (TypeError, ValueError) as error:
        raise UserError(f"the extra record of a checkpoint must be JSON: {error}") from error
