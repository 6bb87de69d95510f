"""One text out of many."""

import dataclasses
import hashlib
from collections.abc import Iterable
from typing import Any, Protocol


class Text(Protocol):
    """The unit that `prepare` tokenises: a text that need not be in memory as a whole."""

    @property
    def name(self) -> str:
        """A path or a title, for messages."""
        ...

    @property
    def size(self) -> int:
        """Bytes of UTF-8."""
        ...

    def parts(self, digest: Any = None) -> Iterable[str]:
        """The text from start to end, cut anywhere. `digest`, from hashlib, is updated with the bytes read."""
        ...


@dataclasses.dataclass(frozen=True)
class Document:
    """A text in memory.

    Attributes:
      name: a path or a title, for messages.
      text: the text.
    """

    name: str
    text: str

    @property
    def digest(self) -> str:
        """The sha256 of the text as UTF-8."""
        return hashlib.sha256(self.text.encode()).hexdigest()

    @property
    def size(self) -> int:
        """Bytes of UTF-8."""
        return len(self.text.encode())

    def parts(self, digest: Any = None) -> Iterable[str]:
        """The text, in one part."""
        if digest is not None:
            digest.update(self.text.encode())
        return (self.text,)
