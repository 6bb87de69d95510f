"""Files that are either whole or absent."""

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

from shardtrain.errors import UserError


@contextlib.contextmanager
def atomic(path: Path) -> Iterator[BinaryIO]:
    """Opens `path` for writing under a temporary name; it appears, synced, only if the block succeeds."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Writes one JSON object, atomically."""
    with atomic(path) as file:
        file.write((json.dumps(value, indent=1) + "\n").encode())


def read_json(path: Path) -> dict[str, Any]:
    """Reads one JSON object; raises UserError naming the file and the offset of what is wrong in it."""
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such file; correct the path, or put it back") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: not JSON at byte offset {error.pos}: {error.msg}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not JSON: byte offset {error.start} is not UTF-8") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: a JSON object was expected, not {type(value).__name__}")
    return value
