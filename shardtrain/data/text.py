"""Text files, folders and globs as documents."""

import glob
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from shardtrain.data.document import Document
from shardtrain.errors import UserError

StrPath = str | os.PathLike[str]
Paths = StrPath | Sequence[StrPath]


def text_files(paths: Paths) -> list[Path]:
    """Returns the files that `paths` stand for: of each path in turn, sorted, every file once.

    A path is a file, a folder (all files below it, but no hidden ones) or a glob (`corpus/**/*.txt`).
    Raises UserError where one of them stands for no file.
    """
    files = dict.fromkeys(file for path in _each(paths) for file in _expand(path))
    if not files:
        raise UserError("data.path []: name at least one file, folder or glob")
    return list(files)


def text_documents(paths: Paths) -> Iterator[Document]:
    """Yields one document for each file with text in it, read as UTF-8, one in memory at a time.

    Raises UserError, with the file, for one that is not UTF-8 (and the byte offset), for a file that is named
    itself and empty, and where there is no text at all. Empty files inside of folders and globs hold no
    document.
    """
    files, named, empty = text_files(paths), set(map(Path, _each(paths))), True
    for file in files:
        text = _read(file)
        if text:
            empty = False
            yield Document(str(file), text)
        elif file in named:
            raise UserError(f"data.path {file}: the file is empty; write text to it, or leave it out")
    if empty:
        raise UserError(f"data.path {', '.join(_each(paths))}: all {len(files)} files are empty; write text to them")


def check_unchanged(paths: Paths, recorded: Mapping[str, str]) -> None:
    """Raises UserError naming a file under `paths` whose content is not among the `recorded` ones (name:
    digest).

    What counts is the content: files may have been moved, or be gone (the run keeps its tokens). A file with
    other content, changed or new, is an error, because its text would otherwise be left out without a word.
    """
    digests = set(recorded.values())
    present = [path for path in _each(paths) if glob.has_magic(path) or os.path.exists(path)]
    for path in present:
        for file in _expand(path, may_be_none=True):
            text = _read(file)
            if text and Document(str(file), text).digest not in digests:
                what = "has changed" if str(file) in recorded else "is new"
                raise UserError(
                    f"data.path {file}: this file {what} since the run tokenised its text, and a run trains "
                    f"on one text from start to end; put the file back as it was, or start a new run "
                    f"(another run.name)"
                )


def _each(paths: Paths) -> list[str]:
    return [str(paths)] if isinstance(paths, str | os.PathLike) else [str(path) for path in paths]


def _expand(path: str, *, may_be_none: bool = False) -> list[Path]:
    if os.path.isfile(path):
        return [Path(path)]
    if os.path.isdir(path):
        files = sorted(file for file in Path(path).rglob("*") if file.is_file() and not _hidden(file, path))
        problem = "the folder is empty; put text files into it, or name another"
    elif glob.has_magic(path):
        files = sorted(Path(file) for file in glob.glob(path, recursive=True) if os.path.isfile(file))
        problem = "the glob matches no file; '**' stands for any depth of folders"
    else:
        files, problem = [], f"there is no such file or folder (looked from {os.getcwd()}); correct the path"
    if not files and not may_be_none:
        raise UserError(f"data.path {path}: {problem}")
    return files


def _hidden(file: Path, root: str) -> bool:
    return any(part.startswith(".") for part in file.relative_to(root).parts)


def _read(file: Path) -> str:
    data = file.read_bytes()
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{file}: not UTF-8: byte 0x{data[error.start]:02x} at byte offset {error.start}; convert it "
            f"(iconv -t utf-8), or leave it out with a glob such as 'folder/**/*.txt'"
        ) from None
