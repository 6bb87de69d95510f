"""Hashes of the files of a step, stored next to it. Array data in Orbax has no checksum that catches a flipped bit.

`<step>.manifest.json` is `{"version": 1, "step": 100, "files": {"state/d/...": [size, sha256], ...}}`. It is
stored outside of the step's directory, and is written atomically once every file that it names is on the disk.
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path

from shardtrain.errors import UserError
from shardtrain.host.files import TEMPORARY as _TEMPORARY
from shardtrain.host.files import sha256, write_json

VERSION = 1
SUFFIX = ".manifest.json"
TEMPORARY = SUFFIX + _TEMPORARY


def path_of(directory: Path, step: int) -> Path:
    """Return the path of a step's manifest."""
    return directory / f"{step}{SUFFIX}"


def write(directory: Path, step: int) -> None:
    """Hash the files of a committed step, force them to disk, then write the manifest atomically.

    Raises:
      OSError: the disk is full or failing.
    """
    root = directory / str(step)
    files = {}
    for name in _names(root):
        files[name] = [(root / name).stat().st_size, sha256(root / name)]
        _force_to_disk(root / name)
    for folder in (root, *(path for path in root.rglob("*") if path.is_dir())):
        _sync_directory(folder)
    write_json(path_of(directory, step), {"version": VERSION, "step": step, "files": files})
    _sync_directory(directory)


def problem(directory: Path, step: int, hash_up_to: int | None = None, share: tuple[int, int] = (0, 1)) -> str | None:
    """Return the first difference between a step and its manifest, naming the file; None if they agree.

    Args:
      directory: the folder of the step and its manifest.
      step: the step to check.
      hash_up_to: hash only files of at most this many bytes, and compare the others by size. None hashes all.
      share: (i, n) hashes the i-th of n shares of the files, about equal in bytes. The others are compared by size.

    Raises:
      UserError: permissions forbid reading a file, which is not corruption.
    """
    root = directory / str(step)
    try:
        files = _read(path_of(directory, step), step)
        if files is None:
            return f"{path_of(directory, step).name} is not a readable manifest"
        if not root.is_dir():
            return f"{root.name}/ is missing"
        found = set(_names(root))
        hashed = _share(files, *share)
        for name, (size, digest) in files.items():
            if name not in found:
                return f"{root.name}/{name} is missing"
            actual = (root / name).stat().st_size
            if actual != size:
                return f"{root.name}/{name} has {actual} bytes instead of {size}"
            if name in hashed and (hash_up_to is None or size <= hash_up_to) and sha256(root / name) != digest:
                return f"{root.name}/{name} does not have the content that was written"
        extra = sorted(found - set(files))
        return f"{root.name}/{extra[0]} was not there when the step was written" if extra else None
    except PermissionError as error:
        raise UserError(f"cannot read {error.filename}: {error.strerror}; make it readable") from error
    except OSError as error:  # a disk that can no longer deliver the bytes
        return f"{error.filename}: {error.strerror}"


def _share(files: dict[str, tuple[int, str]], index: int, count: int) -> set[str]:
    """Return one share: the largest file goes to the first, the next one to the second, and so on in turn."""
    return set(sorted(files, key=lambda name: (-files[name][0], name))[index::count])


def _read(path: Path, step: int) -> dict[str, tuple[int, str]] | None:
    """Return the files that a manifest names, or None if it is not the manifest that we wrote for this step."""
    try:
        content = json.loads(path.read_text())
        files = {name: (size, digest) for name, (size, digest) in content["files"].items()}
        intact = content["version"] == VERSION and content["step"] == step and len(content) == 3
    except (ValueError, KeyError, TypeError, AttributeError, FileNotFoundError):
        return None
    return files if intact and files else None


def _names(root: Path) -> Iterator[str]:
    return (path.relative_to(root).as_posix() for path in sorted(root.rglob("*")) if not path.is_dir())


def _force_to_disk(path: Path) -> None:
    """Make a file durable and drop it from the page cache, so that the next hash reads the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
        if hasattr(os, "posix_fadvise"):  # absent on macOS
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(descriptor)


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
