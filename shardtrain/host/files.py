"""Files that are either complete or absent."""

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from shardtrain.errors import UserError

TEMPORARY = ".tmp"
"""Suffix of a file that is being written. After a crash such a file may remain until it is written again."""


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Make an error of the system name the file. One at a write or a flush, as on a full disk, names none by itself."""
    try:
        yield
    except OSError as error:
        if error.filename is None and error.errno is not None:
            error.filename = str(path)
        raise


@contextlib.contextmanager
def atomic(path: Path) -> Iterator[BinaryIO]:
    """Open `path` for writing under a temporary name. It appears, synced, only if the block succeeds."""
    temporary = path.with_name(path.name + TEMPORARY)
    try:
        with naming(path), open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_text(path: Path, text: str) -> None:
    """Write a text as UTF-8, atomically."""
    with atomic(path) as file:
        file.write(text.encode())


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write one JSON object, atomically."""
    write_text(path, json.dumps(value, indent=1) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """Read one JSON object.

    Raises:
      UserError: there is no such file, or it is not a JSON object; names the file and the offset of the error.
    """
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such file; correct the path, or restore the file") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: not JSON at byte offset {error.pos}: {error.msg}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not JSON: byte offset {error.start} is not UTF-8") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: a JSON object was expected, not {type(value).__name__}")
    return value


def sha256(path: Path) -> str:
    """Return the digest of the content of a file, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def require_writable(directory: Path, what: str) -> None:
    """Create a directory if it is missing, and try to write there.

    Args:
      directory: to be tried.
      what: its future content (checkpoints, ...), for the message.

    Raises:
      UserError: it cannot be written.
    """
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            pass
    except OSError as error:
        raise UserError(
            f"cannot write {what} in {directory}: {error.strerror}; "
            "choose another one with run.dir, or correct its permissions"
        ) from error
