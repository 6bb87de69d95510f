"""The request for a source: the settings of a config's section `data`."""

import dataclasses
from pathlib import Path
from typing import Any

from shardtrain.data.listing import Paths
from shardtrain.data.source import Source
from shardtrain.data.tokenizer import Tokenizer
from shardtrain.data.watch import Watch

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
