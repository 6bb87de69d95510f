"""What may be on the disk after a crash, and what is done about it.

======================================  =============================================================
uncommitted (Orbax's temporary name)    removed
`N.deleting` (deletion interrupted)     removed
`N` without manifest                    died before the hashes were written: renamed `N.unverified`;
                                        the newest of these is kept, the others are removed
`N` that differs from its manifest      corrupt: renamed `N.corrupt`
======================================  =============================================================

Then the newest step that agrees with its manifest is trusted. If none is left but some are corrupt, that is an error:
a run never silently starts again from step 0.
"""

import logging
import re
import shutil
from pathlib import Path

from shardtrain.checkpoint import manifest
from shardtrain.checkpoint.store import TEMPORARY
from shardtrain.errors import UserError

UNVERIFIED = "unverified"
CORRUPT = "corrupt"
_DELETING = "deleting"

_log = logging.getLogger(__name__)


def committed(directory: Path) -> list[int]:
    """Return the steps that have a directory named after them, oldest first, with or without a manifest."""
    return sorted(int(path.name) for path in directory.iterdir() if path.is_dir() and _is_step(path.name))


def with_manifest(directory: Path) -> list[int]:
    """Steps that have a manifest, oldest first; their files may have been lost or damaged since."""
    names = [path.name.removesuffix(manifest.SUFFIX) for path in directory.glob(f"*{manifest.SUFFIX}")]
    return sorted(int(name) for name in names if _is_step(name))


def uncommitted(directory: Path) -> list[Path]:
    """Return the directories of saves that never finished."""
    return sorted(path for path in directory.glob(f"*{TEMPORARY}*") if _is_step(path.name.split(".")[0]))


def set_aside(directory: Path) -> list[Path]:
    """Return what was renamed `N.corrupt` or `N.unverified`. Of a corrupt step, only the manifest may exist."""
    pattern = re.compile(rf"\d+\.({CORRUPT}|{UNVERIFIED})(-\d+)?({re.escape(manifest.SUFFIX)})?")
    found = {path.name.removesuffix(manifest.SUFFIX) for path in directory.iterdir() if pattern.fullmatch(path.name)}
    return [directory / name for name in sorted(found)]


def clean(directory: Path) -> None:
    """Remove saves that were never committed, and finish deletions that were interrupted."""
    for path in uncommitted(directory):
        _log.warning("removing %s: its save was interrupted", path)
        # Renamed first: writer threads of a save that failed in this process may still add files under the old name.
        shutil.rmtree(path.rename(directory / f"{path.name}.{_DELETING}"))
    for path in directory.glob(f"*.{_DELETING}"):
        _delete(directory, path)
    for path in directory.glob(f"*{manifest.TEMPORARY}"):
        path.unlink()


def prepare(directory: Path) -> None:
    """Clean up, and set aside each step without a manifest. Only the newest of these stays on the disk.

    Raises:
      UserError: there are several of them, and no step has a manifest.
    """
    clean(directory)
    complete = with_manifest(directory)
    without = [step for step in committed(directory) if step not in complete]
    if len(without) > 1 and not complete:
        # An interrupted run leaves one at most, so these manifests were lost in another way, such as a copy.
        raise UserError(
            f"the steps {without} in {directory} have no manifest, so nothing says whether they are intact. "
            f"Restore their <step>{manifest.SUFFIX} files, or choose another run.name to start from step 0"
        )
    for step in without:
        target = rename(directory, step, UNVERIFIED)
        _log.warning("step %d in %s has no manifest (interrupted): set aside as %s", step, directory, target.name)
    for path in sorted(_unverified(directory), key=_age)[:-1]:
        _log.warning("removing %s: an interrupted save leaves such a copy, and only the newest is kept", path)
        shutil.rmtree(path)


def set_corrupt_aside(directory: Path, step: int, problem: str) -> None:
    """Rename a step that differs from its manifest, so that an older one is used instead."""
    target = rename(directory, step, CORRUPT)
    _log.warning("checkpoint %d in %s is corrupt: %s; set aside as %s", step, directory, problem, target.name)


def require_none_corrupt(directory: Path, problems: list[str]) -> None:
    """Check, if no step can be trusted, that there never was one.

    Args:
      directory: the folder of the steps.
      problems: what was found just now.

    Raises:
      UserError: there are corrupt steps.
    """
    corrupt = [path.name for path in set_aside(directory) if f".{CORRUPT}" in path.name]
    if corrupt:
        raise UserError(
            f"no intact checkpoint is left in {directory}: {', '.join(corrupt)} "
            f"({'; '.join(problems[:3]) or 'set aside earlier'}). A run never starts again from step 0 by itself: "
            "restore an intact step with its manifest from a backup, or choose another run.name"
        )


def require_manifest(directory: Path, step: int) -> None:
    """Check that a step that was asked for by number has a manifest.

    Raises:
      UserError: it does not exist, or has no manifest.
    """
    if step not in with_manifest(directory):
        reason = "has no manifest" if step in committed(directory) else "does not exist"
        raise UserError(f"step {step} in {directory} {reason}; the verifiable steps are {with_manifest(directory)}")


def require_no_problem(directory: Path, step: int, problem: str | None) -> None:
    """Check that a step that was given by number agrees with its manifest. Rename nothing.

    Raises:
      UserError: there is a problem.
    """
    if problem is not None:
        others = [other for other in with_manifest(directory) if other != step]
        raise UserError(f"checkpoint {step} in {directory} is corrupt: {problem}; the others are {others}")


def rename(directory: Path, step: int, label: str) -> Path:
    """Rename a step and its manifest to `N.<label>`, or to `N.<label>-2` and so on if that is taken."""
    taken = {path.name for path in set_aside(directory)}
    target, count = directory / f"{step}.{label}", 1
    while target.name in taken:
        count += 1
        target = directory / f"{step}.{label}-{count}"
    if (directory / str(step)).is_dir():
        (directory / str(step)).rename(target)
    if manifest.path_of(directory, step).exists():
        manifest.path_of(directory, step).rename(directory / f"{target.name}{manifest.SUFFIX}")
    return target


def delete(directory: Path, step: int) -> None:
    """Delete a step and its manifest. If interrupted at any moment, it never looks like a corrupt step."""
    doomed = directory / f"{step}.{_DELETING}"
    if (directory / str(step)).exists():
        (directory / str(step)).rename(doomed)
    _delete(directory, doomed)


def _delete(directory: Path, doomed: Path) -> None:
    step = int(doomed.name.split(".")[0])
    if not (directory / str(step)).exists():
        manifest.path_of(directory, step).unlink(missing_ok=True)
    if doomed.exists():
        shutil.rmtree(doomed)


def _unverified(directory: Path) -> list[Path]:
    return [path for path in set_aside(directory) if f".{UNVERIFIED}" in path.name and path.is_dir()]


def _age(path: Path) -> tuple[int, int]:
    """Return, for `N.unverified-k`, the step and how often it was set aside before."""
    step, label = path.name.split(".")
    return int(step), int(label.partition("-")[2] or 1)


def _is_step(name: str) -> bool:
    return name.isdecimal() and str(int(name)) == name
