"""Text to token ids and back: single bytes, or byte pairs merged by frequency.

Byte-level BPE: Sennrich et al. 2016 (arXiv:1508.07909) over bytes as in GPT-2, by the `tokenizers` package.
"""

import hashlib
import itertools
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Literal, Protocol, TypeAlias

import numpy as np
import tokenizers
from tokenizers import decoders, models

from shardtrain.data.learning import learn
from shardtrain.data.watch import Watch
from shardtrain.data.words import have_our_words, pieces, words
from shardtrain.errors import UserError

TokenizerName: TypeAlias = Literal["bpe", "byte"]
SEPARATOR = "<|endoftext|>"
BYTES = 256
_TOGETHER = 4  # pieces encoded at once, each by its own thread: enough to keep some cores busy for 0.1 s


class Tokenizer(Protocol):
    """Any text to ids and back, without loss. `separator` is an id that ends each document and occurs in no text."""

    @property
    def vocab_size(self) -> int:
        """Every id is below it."""
        ...

    @property
    def separator(self) -> int:
        """The id between documents."""
        ...

    @property
    def fingerprint(self) -> str:
        """Equal for tokenizers that encode all texts alike."""
        ...

    def encode(self, text: str) -> np.ndarray:
        """Text to int32 ids, without separators."""
        ...

    def encode_parts(self, parts: Iterable[str]) -> Iterator[np.ndarray]:
        """Yield the ids of a text that comes in parts, cut anywhere. They are the ids of the whole, in pieces."""
        ...

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Ids to text. Separators and ids beyond the vocabulary give no text."""
        ...


class ByteTokenizer:
    """The 256 bytes of UTF-8, and 256 as separator."""

    vocab_size = BYTES + 1
    separator = BYTES
    fingerprint = "byte"

    def encode(self, text: str) -> np.ndarray:
        """Text to int32 ids, one for each byte."""
        return np.frombuffer(text.encode(), np.uint8).astype(np.int32)

    def encode_parts(self, parts: Iterable[str]) -> Iterator[np.ndarray]:
        """Yield the ids of a text that comes in parts."""
        return map(self.encode, parts)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Ids to text; bytes that are not UTF-8 become U+FFFD."""
        return bytes(int(i) for i in ids if i < BYTES).decode(errors="replace")


class BPETokenizer:
    """Byte-level BPE. Make one with `BPETokenizer.train` or `BPETokenizer.load`."""

    def __init__(self, tokenizer: tokenizers.Tokenizer):
        # A text that contains the spelling of the separator is text like any other. (The file does not say so.)
        tokenizer.encode_special_tokens = True
        self._tokenizer = tokenizer
        separator = tokenizer.token_to_id(SEPARATOR)
        if separator is None:
            raise UserError(f"this tokenizer has no {SEPARATOR!r}, which must end each document; add it")
        self.separator = separator

    @classmethod
    def train(cls, texts: Iterable[str], vocab_size: int, watch: Watch | None = None) -> "BPETokenizer":
        """Learn merges until the vocabulary is full, or until a short text has no more pairs.

        Args:
          texts: read once, by another thread.
          vocab_size: number of bytes, merges and the separator together.
          watch: polled meanwhile. An error that it raises ends the wait at once.
        """
        check_bpe_vocab(vocab_size)
        tokenizer = tokenizers.Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = words()
        tokenizer.decoder = decoders.ByteLevel()
        whole = (piece for text in texts for piece in pieces([text]))
        return cls(learn(tokenizer, whole, vocab_size, [SEPARATOR], watch or Watch()))

    @classmethod
    def load(cls, path: Path) -> "BPETokenizer":
        """Read a file with the result of `to_json`."""
        return cls(tokenizers.Tokenizer.from_str(path.read_text(encoding="utf-8")))

    def to_json(self) -> str:
        """The `tokenizer.json` of the Hugging Face libraries."""
        return self._tokenizer.to_str()

    @property
    def vocab_size(self) -> int:
        """Bytes, merges and the separator."""
        return self._tokenizer.get_vocab_size()

    @property
    def fingerprint(self) -> str:
        """The hash of the JSON form."""
        return f"bpe sha256={hashlib.sha256(self.to_json().encode()).hexdigest()}"

    def encode(self, text: str) -> np.ndarray:
        """Text to int32 ids."""
        # Only the batch form skips computing character offsets, which makes it twice as fast.
        return np.array(self._tokenizer.encode_batch_fast([text])[0].ids, np.int32)

    def encode_parts(self, parts: Iterable[str]) -> Iterator[np.ndarray]:
        """Yield the ids of a text that comes in parts. A tokenizer with other words than ours gets the whole text."""
        ours = have_our_words(self._tokenizer)
        texts = pieces(parts) if ours else iter(["".join(parts)])
        while several := list(itertools.islice(texts, _TOGETHER)):
            for encoding in self._tokenizer.encode_batch_fast(several):
                yield np.array(encoding.ids, np.int32)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Ids to text; bytes that are not UTF-8 become U+FFFD."""
        return self._tokenizer.decode([int(i) for i in ids])


def encode_documents(tokenizer: Tokenizer, texts: Iterable[str | Iterable[str]]) -> Iterator[np.ndarray]:
    """Yield the ids of each text in turn, in pieces. The last piece of a text is the separator.

    Args:
      tokenizer: for all texts.
      texts: each is a string, or its parts, cut anywhere.
    """
    for text in texts:
        yield from tokenizer.encode_parts([text] if isinstance(text, str) else text)
        yield np.array([tokenizer.separator], np.int32)


def check_bpe_vocab(vocab_size: int, key: str = "data.vocab_size") -> None:
    """Refuse a vocabulary that cannot hold the bytes and the separator.

    Raises:
      UserError: with `key`, the setting that the size comes from.
    """
    if vocab_size <= BYTES:
        rule = f"a byte-level BPE needs at least {BYTES + 1} ids: {BYTES} bytes and a separator"
        raise UserError(key, vocab_size, rule, f"use {key}={BYTES + 1} or more, for example 2048")
