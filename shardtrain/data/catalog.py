"""The sources by name, as a config asks for them."""

import dataclasses
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from shardtrain.data.checks import default_tokenizer, setting_problems, vocabulary_problems
from shardtrain.data.corpus import corpus_documents
from shardtrain.data.document import Text
from shardtrain.data.imported import check_imported, open_imported
from shardtrain.data.listing import Paths, each
from shardtrain.data.prepare import Kept, is_kept, prepare
from shardtrain.data.source import Source
from shardtrain.data.synthetic import SyntheticTokens
from shardtrain.data.text import check_unchanged, text_documents
from shardtrain.data.tokenizer import ByteTokenizer, Tokenizer
from shardtrain.data.tokens import TokenWindows, open_tokens
from shardtrain.data.watch import ShouldStop, Watch
from shardtrain.errors import UserError, did_you_mean, refuse


@dataclasses.dataclass(frozen=True)
class Request:
    """What a config says of its data; the arguments of `open_source`."""

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
        """What a source of the user's own may take, by name."""
        return {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if field.name not in ("type", "watch")
        }


Opened = tuple[Source, Tokenizer | None]


def _corpus(request: Request) -> Opened:
    return _windows(request, _prepare(request, corpus_documents))


def _text(request: Request) -> Opened:
    kept = _prepare(request, lambda: text_documents(request.path or ()))
    if request.path is not None:
        check_unchanged(request.path, kept.documents, request.watch)
    return _windows(request, kept)


def _tokens(request: Request) -> Opened:
    (path,) = each(request.path or ())
    return TokenWindows(open_tokens(path, request.watch), request.seq_len), None


def _synthetic(request: Request) -> Opened:
    return SyntheticTokens(seq_len=request.seq_len, vocab_size=request.vocab_size, seed=request.seed), None


FACTORIES: dict[str, Callable[[Request], Opened]] = {
    "corpus": _corpus,
    "text": _text,
    "tokens": _tokens,
    "synthetic": _synthetic,
}


def check_type(
    type: str, path: Paths | None = None, tokenizer: str | None = None, tokenizer_vocab: int | None = None
) -> None:
    """Whether there is such a type, before anything is opened; of an import path, also whether it takes the settings.

    Raises UserError where not.
    """
    if ":" in type:
        check_imported(type, Request(type, 1, 1, 0, path, tokenizer, tokenizer_vocab, None, False).fields)
    elif type not in FACTORIES:
        fix = f"{did_you_mean(type, FACTORIES)} (package.module:Class for a source of your own)"
        raise UserError("data.type", type, "there is no such type", fix)


def open_source(
    type: str,
    *,
    seq_len: int,
    vocab_size: int,
    seed: int = 0,
    path: Paths | None = None,
    tokenizer: str | None = None,
    tokenizer_vocab: int | None = None,
    directory: str | Path | None = None,
    write: bool = True,
    should_stop: ShouldStop | None = None,
) -> Opened:
    """Opens the rows that a config asks for, and the tokenizer where there is one.

    Args:
        type: a name in `FACTORIES`: `corpus`, `text`, `tokens` or `synthetic`; or `package.module:Class`
            (`imported.py` says what that is called with).
        seq_len: tokens in a row.
        vocab_size: the model's; the data's must not be larger.
        seed: of synthetic tokens. (The order of rows has its own, in `Loader`.)
        path: files for `text` (a file, folder or glob, or several), the file for `tokens`.
        tokenizer: `bpe` (the default) or `byte`, for `corpus` and `text`.
        tokenizer_vocab: for `bpe` (`data.vocab_size` in a config); the model's when not given.
        directory: where `corpus` and `text` keep their tokens (`prepare.py`).
        write: whether this process may write there; with several, true in just one.
        should_stop: polled several times a second while text is tokenised or tokens are checked; True ends it.

    Raises UserError for anything wrong with these, or with the data, and where `should_stop` said so.
    """
    check_type(type, path, tokenizer, tokenizer_vocab)
    tokenizer = tokenizer or default_tokenizer(type)
    kept, watch = Path(directory) if directory is not None else None, Watch(should_stop)
    request = Request(type, seq_len, vocab_size, seed, path, tokenizer, tokenizer_vocab, kept, write, watch)
    if ":" not in type:
        refuse(setting_problems(type, path, tokenizer, is_kept=kept is not None and is_kept(kept)))
        refuse(vocabulary_problems(vocab_size, tokenizer, tokenizer_vocab))
    source, text_tokenizer = open_imported(type, request.fields) if ":" in type else FACTORIES[type](request)
    if source.vocab_size > vocab_size:
        rule = f"the data (data.type {type}) has a vocabulary of {source.vocab_size}, and each id needs a row"
        fix = f"set model.vocab_size={source.vocab_size} or more, or choose a smaller tokenizer"
        raise UserError("model.vocab_size", vocab_size, rule, fix)
    return source, text_tokenizer


def _prepare(request: Request, documents: Callable[[], Iterable[Text]]) -> Kept:
    if request.directory is None:
        raise UserError(f"directory is missing: data.type {request.type} keeps its tokens in one")
    assert request.tokenizer is not None, "text has a tokenizer"
    ids = ByteTokenizer.vocab_size if request.tokenizer == "byte" else request.tokenizer_vocab
    return prepare(
        request.directory,
        documents,
        kind=request.type,
        tokenizer=request.tokenizer,
        tokenizer_vocab=request.vocab_size if ids is None else ids,
        write=request.write,
        watch=request.watch,
    )


def _windows(request: Request, kept: Kept) -> Opened:
    return TokenWindows(kept.tokens, request.seq_len), kept.tokenizer
