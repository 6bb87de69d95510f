"""One text of many."""

import dataclasses
import hashlib
from collections.abc import Iterable
from typing import Any, Protocol


class Text(Protocol):
    """What `prepare` tokenises: a text that need not lie in memory as a whole."""

    @property
    def name(self) -> str:
        """For messages: a path, or a title."""
        ...

    @property
    def size(self) -> int:
        """Bytes of UTF-8."""
        ...

    def parts(self, digest: Any = None) -> Iterable[str]:
        """The text from start to end, cut anywhere; `digest`, of hashlib, is updated with the bytes read."""
        ...


@dataclasses.dataclass(frozen=True)
class Document:
    """A text in memory, with a name for messages (a path, or a title)."""

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
