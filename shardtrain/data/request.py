"""The request for a source: the settings of a config's section `data`, and the checks that several types share."""

import dataclasses
from pathlib import Path
from typing import Any

from shardtrain.data.listing import Paths, each
from shardtrain.data.source import Source
from shardtrain.data.tokenizer import Tokenizer
from shardtrain.data.watch import Watch
from shardtrain.errors import UserError

#: Rows, and the tokenizer of text.
Opened = tuple[Source, Tokenizer | None]


@dataclasses.dataclass(frozen=True)
class Request:
    """The arguments of `open_source`, which describes them."""

    type: str
    seq_len: int
    vocab_size: int
    seed: int
    path: Paths | None
    tokenizer: str | None
    tokenizer_vocab: int | None
    directory: Path | None
    write: bool
    watch: Watch = dataclasses.field(default_factory=Watch)

    @property
    def fields(self) -> dict[str, Any]:
        """The arguments that a source of the user's own may take, by name."""
        return {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if field.name not in ("type", "watch")
        }

    def refuse(self, *names: str) -> None:
        """Refuses settings that this type does not use.

        Raises:
          UserError: one of them was given.
        """
        for name in names:
            if getattr(self, name) is not None:
                key = "vocab_size" if name == "tokenizer_vocab" else name
                raise UserError(
                    f"data.{key} {getattr(self, name)!r}: data.type {self.type} does not use it; remove it, "
                    f"or choose another type"
                )

    def need_path(self) -> Paths:
        """Returns the path.

        Raises:
          UserError: none was given.
        """
        if self.path is None:
            raise UserError(f"data.path is missing: data.type {self.type} reads files; set it to where they are")
        each(self.path)
        return self.path

    def check_vocab(self, vocab_size: int) -> None:
        """Checks the vocabulary of the data against the model's.

        Raises:
          UserError: it is larger.
        """
        if vocab_size > self.vocab_size:
            raise UserError(
                f"model.vocab_size {self.vocab_size}: the data (data.type {self.type}) has a vocabulary of "
                f"{vocab_size}, and each of its ids needs a row in the embedding; set model.vocab_size to "
                f"{vocab_size} or more, or choose a smaller tokenizer"
            )
