"""Rules for the settings of the built-in types of data, which hold before anything is opened."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, get_args

import numpy as np

from shardtrain.data.listing import Paths, each
from shardtrain.data.source import Source
from shardtrain.data.tokenizer import ByteTokenizer, TokenizerName, check_bpe_vocab
from shardtrain.errors import UserError, described, did_you_mean

#: Types that read files, and that read none.
READ_FILES, READ_NONE = ("text", "tokens"), ("corpus", "synthetic")
#: Types that are text, and that are not.
TEXT, NOT_TEXT = ("corpus", "text"), ("tokens", "synthetic")


def default_tokenizer(type: str) -> TokenizerName | None:
    """The tokenizer of a type of data, unless another is named; `None` where it has none."""
    return "bpe" if type in TEXT else None


def setting_problems(
    type: str, path: Paths | None, tokenizer: str | None, *, is_kept: bool = False
) -> Iterator[UserError]:
    """Find settings that a type of data needs, or does not use.

    Args:
      type: as for `open_source`.
      path: as for `open_source`.
      tokenizer: as for `open_source`.
      is_kept: whether the run has kept the tokens of its text, and needs no files.

    Raises:
      UserError: `path` is not a path or a list of paths.
    """
    if type in READ_FILES and path is None and not is_kept:
        rule = f"data.type {type} reads files and needs their path"
        yield UserError("data.path", None, rule, "set data.path to where they are")
    elif type in READ_NONE and path is not None:
        fix = f"set data.path=null, or data.type to {' or '.join(READ_FILES)}"
        yield UserError("data.path", path, f"data.type {type} reads no files", fix)
    if type in NOT_TEXT and tokenizer is not None:
        rule = f"data.type {type} is not text, so there is nothing to tokenize"
        yield UserError("data.tokenizer", tokenizer, rule, "set data.tokenizer=null")
    if type in READ_FILES and path is not None:
        each(path)
        if type == "tokens" and not isinstance(path, str | Path):
            yield UserError("data.path", path, "data.type tokens reads one file", "join the files into one")


def vocabulary_problems(
    vocab_size: int, tokenizer: str | None, tokenizer_vocab: int | None = None, key: str = "model.vocab_size"
) -> Iterator[UserError]:
    """Find the mistakes in sizes of vocabularies: a tokenizer has a least number of ids, and each needs a row.

    Args:
      vocab_size: of the model: the rows of its embedding.
      tokenizer: its name; `None` where there is none.
      tokenizer_vocab: the ids that a bpe tokenizer shall have; the model's when not given.
      key: the setting of `vocab_size`.

    Raises:
      UserError: too few ids for a bpe tokenizer.
    """
    known, byte_ids = get_args(TokenizerName), ByteTokenizer.vocab_size
    if tokenizer not in (None, *known):
        yield UserError("data.tokenizer", tokenizer, "must be bpe or byte", did_you_mean(str(tokenizer), known))
    elif tokenizer == "bpe":
        ids = vocab_size if tokenizer_vocab is None else tokenizer_vocab
        if ids > vocab_size:
            rule = f"each of the data's {ids} token ids needs a row in the model, and {key} is {vocab_size}"
            fix = f"set {key}={ids}, or a smaller data.vocab_size"
            yield UserError("data.vocab_size", ids, rule, fix)
        check_bpe_vocab(ids, key if ids == vocab_size else "data.vocab_size")
    else:
        if tokenizer == "byte" and vocab_size < byte_ids:
            rule = f"the byte tokenizer has {byte_ids} ids: 256 bytes and a separator"
            yield UserError(key, vocab_size, rule, f"use {key}={byte_ids} or more")
        if tokenizer_vocab not in (None, byte_ids if tokenizer else None):
            rule = "only a bpe tokenizer has a vocabulary to choose"
            yield UserError("data.vocab_size", tokenizer_vocab, rule, "set data.vocab_size=null")


def check_source_vocabulary(source: Source, vocab_size: int, what: str) -> None:
    """Refuse a source with ids beyond the model's vocabulary, which would train on wrong rows of the embedding.

    Args:
      source: rows; one that states no `vocab_size` is not checked.
      vocab_size: the model's.
      what: names the source, for the message.
    """
    ids = getattr(source, "vocab_size", 0)
    if ids > vocab_size:
        rule = f"{what} has a vocabulary of {ids}, and each id needs a row"
        fix = f"set model.vocab_size={ids} or more, or choose a smaller tokenizer"
        raise UserError("model.vocab_size", vocab_size, rule, fix)


def check_row_length(source: Source, seq_len: int, what: str) -> None:
    """Refuse a source of language-model rows of another length than the config's, judged by its first row."""
    row = source[0] if len(source) else {}
    length = len(row["tokens"]) if isinstance(row, Mapping) and np.ndim(row.get("tokens", 0)) else seq_len
    if length != seq_len:
        rule = f"{what} has rows of {length} tokens"
        raise UserError("data.seq_len", seq_len, rule, f"set data.seq_len={length}, or cut the rows to {seq_len}")


def check_tokenizer(tokenizer: Any) -> None:
    """Refuse the attribute `tokenizer` of a source where it lacks what a sample needs; `None` stands for none."""
    parts = ("encode", "decode", "separator", "fingerprint")
    if tokenizer is not None and (lacking := [part for part in parts if not hasattr(tokenizer, part)]):
        raise UserError(
            f"the source's tokenizer is {described(tokenizer)}, which has no {', no '.join(lacking)}; it must follow "
            "shardtrain.data.Tokenizer, or be None"
        )


def check_prompt(prompt: str | None, data: str, *, has_tokenizer: bool) -> None:
    """Refuse a prompt for a sample where the data, described in a word or two, has no tokenizer."""
    if prompt is not None and not has_tokenizer:
        rule = f"text needs a tokenizer, and {data} has none"
        raise UserError("sample.prompt", prompt, rule, "set sample.prompt=null")
