"""A text file, read piece by piece, so that a file of any size takes the memory of one piece."""

import codecs
import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from shardtrain.errors import UserError

_PIECE = 1 << 18
#: Byte-order marks of other encodings. The longer ones come first: that of UTF-32 begins with that of UTF-16.
_OTHER = (
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


class UnreadableError(UserError):
    """A file that cannot be read, or is not text."""


@dataclasses.dataclass(frozen=True)
class TextFile:
    """A UTF-8 file as a document. A byte-order mark at its start is not part of the text.

    Attributes:
      path: of the file.
    """

    path: Path

    @property
    def name(self) -> str:
        """The path."""
        return str(self.path)

    @property
    def size(self) -> int:
        """Bytes, including a byte-order mark."""
        return self.path.stat().st_size

    @property
    def text(self) -> str:
        """All of it. Raises what `parts` raises."""
        return "".join(self.parts())

    @property
    def empty(self) -> bool:
        """Whether it has no text. Raises what `parts` raises."""
        return next(self.parts(), None) is None

    def parts(self, digest: Any = None) -> Iterator[str]:
        """Yield the text from start to end in pieces, none of them empty.

        Args:
          digest: from hashlib, updated with the bytes of the file. A sha256 then equals the output of `sha256sum`.

        Raises:
          UnreadableError: the file cannot be read, or is not UTF-8; names it, and the byte offset.
        """
        decoder = codecs.getincrementaldecoder("utf-8")()
        end = 0
        for data in self._read():
            if digest is not None:
                digest.update(data)
            if end == 0:
                _refuse_other_encodings(self.path, data)
            start, end = end - len(decoder.getstate()[0]), end + len(data)
            try:
                text = decoder.decode(data, final=not data)
            except UnicodeDecodeError as error:
                raise UnreadableError(
                    f"{self.path}: not UTF-8: byte 0x{error.object[error.start]:02x} at byte offset "
                    f"{start + error.start}; convert it (iconv -t utf-8), or leave it out with a glob such as "
                    f"'folder/**/*.txt'"
                ) from None
            if start == 0:
                text = text.removeprefix("\ufeff")
            if text:
                yield text

    def _read(self) -> Iterator[bytes]:
        """Yield the bytes of the file, and an empty string at the end."""
        try:
            with open(self.path, "rb") as file:
                while data := file.read(_PIECE):
                    yield data
        except OSError as error:
            raise _unreadable(self.path, error) from error
        yield b""


def _refuse_other_encodings(path: Path, data: bytes) -> None:
    for mark, encoding in _OTHER:
        if data.startswith(mark):
            raise UnreadableError(
                f"{path}: not UTF-8: it begins with the byte-order mark of {encoding.upper()}; "
                f"convert it (iconv -f {encoding} -t utf-8)"
            )


def _unreadable(path: Path, error: OSError) -> UnreadableError:
    return UnreadableError(
        f"data.path {path}: the file cannot be read: {error.strerror}; correct its permissions, or leave it out"
    )
