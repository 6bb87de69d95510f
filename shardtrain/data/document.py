"""One text of many."""

import dataclasses
import hashlib


@dataclasses.dataclass(frozen=True)
class Document:
    """A text, with a name for messages (a path, or a title)."""

    name: str
    text: str

    @property
    def digest(self) -> str:
        """The sha256 of the text as UTF-8: for a text file, what `sha256sum` prints."""
        return hashlib.sha256(self.text.encode()).hexdigest()
