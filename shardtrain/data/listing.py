"""The files that a path, a folder or a glob stands for. Each counts once, however it is reached."""

import contextlib
import fnmatch
import glob
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from shardtrain.errors import UserError

StrPath = str | os.PathLike[str]
Paths = StrPath | Sequence[StrPath]
Identity = tuple[int, int] | str


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
        raise UserError("data.path", paths, f"it is of type {type(paths).__name__}", "give a path, or a list of paths")
    for path in several:
        if not isinstance(path, str | os.PathLike):
            raise UserError("data.path", path, f"it is of type {type(path).__name__}", "give a path")
        if not str(path).strip():
            raise UserError("data.path", str(path), "it is empty", "name a file, folder or glob, or leave it out")
    if not several:
        raise UserError("data.path", [], "it is empty", "name at least one file, folder or glob")
    return [str(path) for path in several]


def expand(path: str, *, may_be_none: bool = False) -> list[Path]:
    """The files of one path, sorted.

    Raises:
      UserError: there is none, unless there may be none; or the path cannot be read.
    """
    with _readable(path):
        files = sorted(_found(path))
    if not files and not may_be_none:
        raise _none(path)
    return files


def check_path(path: str) -> None:
    """Refuse a path that `expand` would refuse, without listing all of its files."""
    with _readable(path):
        if next(_found(path), None) is None:
            raise _none(path)


def _found(path: str) -> Iterator[Path]:
    """The files of a path."""
    if os.path.isfile(path):
        yield Path(path)
    elif os.path.isdir(path):
        yield from (file for file in _below(Path(path), links=False) if file.is_file())
    elif glob.has_magic(path):
        yield from (file for file in _matches(Path(path)) if file.is_file())


def _none(path: str) -> UserError:
    """The error for a path without files."""
    if os.path.isdir(path):
        return UserError("data.path", path, "the folder is empty", "put files there, or name another folder")
    if os.path.exists(path):
        return UserError("data.path", path, "it is neither a file nor a folder", "name a file, folder or glob")
    here = "" if os.path.isabs(path) else f"; it is relative to the current directory, {os.getcwd()}"
    if glob.has_magic(path):
        fix = f"check the glob ('**' stands for any depth of folders){here}"
        return UserError("data.path", path, "the glob matches no file", fix)
    return UserError("data.path", path, "there is no such file or folder", f"check the path{here}")


@contextlib.contextmanager
def _readable(path: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        where, fix = str(error.filename or path), "correct its permissions, or leave it out"
        raise UserError("data.path", where, f"it cannot be read: {error.strerror}", fix) from error


def once(files: Iterable[Path]) -> list[Path]:
    """Return the files, without those that are an earlier one under another name."""
    first: dict[Identity, Path] = {}
    for file in files:
        first.setdefault(_identity(file), file)
    return list(first.values())


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
