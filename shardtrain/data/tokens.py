"""Token files: a flat array of ids on disk, read through a memory map.

`<name>.bin` contains only the ids: uint16 or uint32, little-endian, without a header, so that any tool can write it
(`numpy.ndarray.tofile`). The file `<name>.bin.json` next to it says how to read it:

    {"format": "shardtrain-tokens", "format_version": 1,
     "dtype": "uint16", "count": 1207006, "vocab_size": 2048}
"""

import concurrent.futures
import dataclasses
import hashlib
import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from shardtrain.data.source import Row, check_row, window
from shardtrain.data.watch import Watch
from shardtrain.errors import UserError
from shardtrain.host.files import atomic, read_json, write_json

FORMAT = "shardtrain-tokens"
FORMAT_VERSION = 1
_DTYPES: dict[str, np.dtype] = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}
_SCAN_BYTES = 64 << 20  # part of the digest's definition: do not change


@dataclasses.dataclass(frozen=True, eq=False)
class TokenFile:
    """An open token file, checked from end to end.

    Attributes:
      path: of the `.bin` file.
      ids: a read-only view of a memory map, [count].
      vocab_size: every id is below it.
      digest: the sha256 of the sha256 of each 64 MiB of the file, which are hashed in parallel. For a longer file it
        therefore differs from the output of `sha256sum`.
    """

    path: Path
    ids: np.ndarray
    vocab_size: int
    digest: str


@dataclasses.dataclass(frozen=True)
class TokenWindows:
    """A source of windows of `seq_len + 1` ids, which start every `seq_len` ids of a token file.

    Each id except the first is the target of exactly one row. A last part that does not fill a window is not used.

    Attributes:
      file: the tokens.
      seq_len: length of a row.

    Raises:
      UserError: the file is too short for one window.
    """

    file: TokenFile
    seq_len: int

    def __post_init__(self) -> None:
        if self.seq_len < 1:
            raise UserError(f"data.seq_len {self.seq_len}: it must be at least 1")
        if len(self) < 1:
            raise UserError(
                f"{self.file.path}: {len(self.file.ids)} tokens, but a window of data.seq_len {self.seq_len} "
                f"needs {self.seq_len + 1}: use more data or a shorter seq_len"
            )

    @property
    def fingerprint(self) -> str:
        """The content of the file, and the window."""
        return f"tokens sha256={self.file.digest} vocab_size={self.vocab_size} seq_len={self.seq_len}"

    @property
    def vocab_size(self) -> int:
        """That of the file."""
        return self.file.vocab_size

    def __len__(self) -> int:
        return (len(self.file.ids) - 1) // self.seq_len

    def __getitem__(self, row: int) -> Row:
        check_row(row, len(self))
        start = row * self.seq_len
        return window(self.file.ids[start : start + self.seq_len + 1])


def sidecar(path: Path) -> Path:
    """Return the path of the JSON file that belongs to a token file."""
    return path.with_name(path.name + ".json")


def write_tokens(path: str | os.PathLike[str], chunks: Iterable[np.ndarray], vocab_size: int) -> int:
    """Write integer arrays one after the other as a token file, and return the number of ids.

    The sidecar is written last, so that an interrupted write leaves no readable pair behind.

    Args:
      path: of the `.bin` file.
      chunks: arrays of ids.
      vocab_size: every id must be below it.

    Raises:
      UserError: an id is outside of `0 .. vocab_size - 1`; names the file and the offset.
    """
    path = Path(path)
    dtype = "uint16" if vocab_size <= 1 << 16 else "uint32"
    count = 0
    sidecar(path).unlink(missing_ok=True)
    with atomic(path) as file:
        for chunk in chunks:
            ids = np.asarray(chunk)
            _check_range(ids, vocab_size, path, count, _DTYPES[dtype].itemsize)
            file.write(ids.astype(_DTYPES[dtype]).tobytes())
            count += len(ids)
    description = {"format": FORMAT, "format_version": FORMAT_VERSION}
    write_json(sidecar(path), description | {"dtype": dtype, "count": count, "vocab_size": vocab_size})
    return count


def open_tokens(path: str | os.PathLike[str], watch: Watch | None = None) -> TokenFile:
    """Open a token file, and read it once from end to end to check every id and to compute its digest.

    Args:
      path: of the `.bin` file.
      watch: polled meanwhile.

    Raises:
      UserError: the file or its sidecar is missing, the sidecar does not follow the format, the file is empty or of
        another size than the sidecar states, or an id is not in the vocabulary; names the file and the offset.
    """
    path = Path(path)
    dtype, count, vocab_size = _read_sidecar(path)
    size = path.stat().st_size
    if size == 0:
        raise UserError(f"{path}: empty (0 bytes): write at least one window of tokens to it")
    promised = count * dtype.itemsize
    if size != promised:
        raise UserError(
            f"{path}: ends at byte offset {size}, but its sidecar says {count} tokens of {dtype.itemsize} "
            f"bytes, {promised}: the file is {'truncated' if size < promised else 'too long'}, or "
            f"{sidecar(path).name} belongs to another; copy or write both again"
        )
    ids = np.memmap(path, dtype, mode="r").view(np.ndarray)  # which is faster to slice
    return TokenFile(path, ids, vocab_size, _scan(path, ids, vocab_size, watch or Watch()))


def _read_sidecar(path: Path) -> tuple[np.dtype, int, int]:
    if not path.is_file():
        raise UserError(f"data.path {path}: there is no such token file")
    beside = sidecar(path)
    if not beside.is_file():
        raise UserError(
            f"{path}: its sidecar {beside.name} is missing; next to each token file there must be one like "
            f'{{"format": "{FORMAT}", "format_version": {FORMAT_VERSION}, "dtype": "uint16", '
            f'"count": <tokens>, "vocab_size": <largest id + 1>}}'
        )
    fields = read_json(beside)
    rules = {
        "format": (lambda v: v == FORMAT, repr(FORMAT)),
        "format_version": (
            lambda v: v == FORMAT_VERSION,
            f"{FORMAT_VERSION}, which this version reads",
        ),
        "dtype": (lambda v: isinstance(v, str) and v in _DTYPES, " or ".join(map(repr, _DTYPES))),
        "count": (lambda v: type(v) is int and v >= 0, "the number of tokens"),
        "vocab_size": (lambda v: type(v) is int and v >= 1, "at least 1"),
    }
    for name, (valid, rule) in rules.items():
        if name not in fields:
            raise UserError(f"{beside}: {name!r} is missing; it must be {rule}")
        if not valid(fields[name]):
            raise UserError(f"{beside}: {name} is {fields[name]!r}; it must be {rule}")
    return _DTYPES[fields["dtype"]], fields["count"], fields["vocab_size"]


def _scan(path: Path, ids: np.ndarray, vocab_size: int, watch: Watch) -> str:
    """Check every id and return the digest, in one parallel pass at about the speed of the disk."""
    step = _SCAN_BYTES // ids.itemsize

    def scan(start: int) -> bytes:
        chunk = ids[start : start + step]
        _check_range(chunk, vocab_size, path, start, ids.itemsize)
        return hashlib.sha256(chunk.data).digest()

    with concurrent.futures.ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        whole = hashlib.sha256()
        try:
            for number, digest in enumerate(pool.map(scan, range(0, len(ids), step)), 1):
                whole.update(digest)
                watch(f"checked {number * _SCAN_BYTES / 1e6:.0f} of {ids.nbytes / 1e6:.0f} MB of tokens")
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
        return whole.hexdigest()


def _check_range(ids: np.ndarray, vocab_size: int, path: Path, start: int, itemsize: int) -> None:
    if len(ids) and (int(ids.max()) >= vocab_size or int(ids.min()) < 0):
        at = int(np.argmax((ids >= vocab_size) | (ids < 0)))
        raise UserError(
            f"{path}: token id {ids[at]} at token {start + at} (byte offset {(start + at) * itemsize}): ids "
            f"must be in 0 .. {vocab_size - 1} for vocab_size {vocab_size}; tokenise again, or give the real "
            f"vocab_size"
        )
