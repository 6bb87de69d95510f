"""The files that a path, a folder or a glob stands for. Each counts once, however it is reached."""

import fnmatch
import glob
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from shardtrain.errors import UserError

StrPath = str | os.PathLike[str]
Paths = StrPath | Sequence[StrPath]
Identity = tuple[int, int] | str

_SHOWN = 200  # characters of a value in a message


def text_files(paths: Paths) -> list[Path]:
    """Return the files that `paths` stand for: those of each path in turn, sorted, every file once.

    A path is a file, a folder (all files below it, except hidden ones and those in folders that are links) or a glob
    (`corpus/**/*.txt`, which follows links). Several links to one file, including hard links, count as one file.

    Raises:
      UserError: a path stands for no file, or a folder cannot be read.
    """
    return once(file for path in each(paths) for file in expand(path))


def each(paths: Paths) -> list[str]:
    """Return the paths one by one.

    Raises:
      UserError: there is none, or one of them is not a path.
    """
    several = [paths] if isinstance(paths, str | os.PathLike) else paths
    if not isinstance(several, Sequence):
        raise UserError(
            f"data.path {shown(paths)}: it is of type {type(paths).__name__}; give a path, or a list of paths"
        )
    for path in several:
        if not isinstance(path, str | os.PathLike):
            raise UserError(f"data.path {shown(path)}: it is of type {type(path).__name__}; give a path")
        if not str(path).strip():
            raise UserError(f"data.path {str(path)!r}: it is empty; name a file, folder or glob, or leave it out")
    if not several:
        raise UserError("data.path []: it is empty; name at least one file, folder or glob")
    return [str(path) for path in several]


def expand(path: str, *, may_be_none: bool = False) -> list[Path]:
    """Return the files of one path, sorted.

    Raises:
      UserError: there is none, unless there may be none; or they cannot be read.
    """
    try:
        files, problem = _expand(path)
    except OSError as error:
        raise UserError(
            f"data.path {shown(error.filename or path)}: it cannot be read: {error.strerror}; correct its permissions, "
            f"or leave it out"
        ) from error
    if not files and not may_be_none:
        raise UserError(f"data.path {shown(path)}: {problem}")
    return sorted(files)


def _expand(path: str) -> tuple[list[Path], str]:
    """Return the files of a path, and what is wrong if there are none."""
    if os.path.isfile(path):
        return [Path(path)], ""
    if os.path.isdir(path):
        files = [file for file in _below(Path(path), links=False) if file.is_file()]
        problem = "the folder is empty; put text files into it, or name another"
    elif glob.has_magic(path):
        files = [file for file in _matches(Path(path)) if file.is_file()]
        problem = "the glob matches no file; '**' stands for any depth of folders"
    else:
        files, problem = [], f"there is no such file or folder (looked from {os.getcwd()}); correct the path"
    return files, problem


def once(files: Iterable[Path]) -> list[Path]:
    """Return the files, without those that are an earlier one under another name."""
    first: dict[Identity, Path] = {}
    for file in files:
        first.setdefault(_identity(file), file)
    return list(first.values())


def shown(value: object) -> str:
    """Return a path, or a list of paths, for a message; cut if it is long."""
    text = str(value) if isinstance(value, str | os.PathLike) else repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}... ({len(text):,} characters)"


def _identity(path: Path) -> Identity:
    status = path.stat()
    return (status.st_dev, status.st_ino) if status.st_ino else os.path.realpath(path)


def _matches(pattern: Path) -> list[Path]:
    """Like `glob.glob` with `recursive`, but `**` enters each folder only once, even if links form loops."""
    parts = pattern.parts
    start = 1 if pattern.is_absolute() else 0
    found = [Path(*parts[:start])]
    for part in parts[start:]:
        found = [path for folder in found for path in _step(folder, part)]
    return found


def _step(folder: Path, part: str) -> Iterator[Path]:
    if part == "**":
        yield folder
        yield from _below(folder, links=True)
    elif glob.has_magic(part):
        names = (name for name in _names(folder) if part.startswith(".") or not name.startswith("."))
        yield from (folder / name for name in fnmatch.filter(names, part))
    elif os.path.lexists(folder / part):
        yield folder / part


def _below(top: Path, *, links: bool) -> Iterator[Path]:
    """Yield files and folders at any depth, except hidden ones, and each folder once."""
    entered, waiting = {_identity(top)} if top.is_dir() else set(), [top]
    while waiting:
        folder = waiting.pop(0)
        for name in sorted(_names(folder)):
            path = folder / name
            if name.startswith("."):
                continue
            if path.is_dir():
                if (path.is_symlink() and not links) or _identity(path) in entered:
                    continue
                entered.add(_identity(path))
                waiting.append(path)
            yield path


def _names(folder: Path) -> list[str]:
    return os.listdir(folder) if folder.is_dir() else []
