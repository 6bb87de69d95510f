"""The sources by name, as a config asks for them."""

import dataclasses
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from shardtrain.data.corpus import corpus_documents
from shardtrain.data.document import Text
from shardtrain.data.imported import check_imported, open_imported
from shardtrain.data.listing import Paths, each
from shardtrain.data.prepare import Kept, is_kept, prepare
from shardtrain.data.source import Source
from shardtrain.data.synthetic import SyntheticTokens
from shardtrain.data.text import check_unchanged, text_documents
from shardtrain.data.tokenizer import ByteTokenizer, Tokenizer, check_bpe_vocab
from shardtrain.data.tokens import TokenWindows, open_tokens
from shardtrain.data.watch import ShouldStop, Watch
from shardtrain.errors import UserError, did_you_mean


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

    def refuse(self, *names: str) -> None:
        """Raises UserError where a setting was given that this type does not use."""
        for name in names:
            if getattr(self, name) is not None:
                key = "vocab_size" if name == "tokenizer_vocab" else name
                raise UserError(
                    f"data.{key} {getattr(self, name)!r}: data.type {self.type} does not use it; remove it, "
                    f"or choose another type"
                )

    def need_path(self) -> Paths:
        """Returns the path; raises UserError where none was given."""
        if self.path is None:
            raise UserError(f"data.path is missing: data.type {self.type} reads files; name where they are")
        each(self.path)
        return self.path


Opened = tuple[Source, Tokenizer | None]


def _corpus(request: Request) -> Opened:
    request.refuse("path")
    return _windows(request, _prepare(request, corpus_documents))


def _text(request: Request) -> Opened:
    if request.directory is None or not is_kept(request.directory):
        request.need_path()
    elif request.path is not None:
        each(request.path)
    kept = _prepare(request, lambda: text_documents(request.need_path()))
    if request.path is not None:
        check_unchanged(request.path, kept.documents, request.watch)
    return _windows(request, kept)


def _tokens(request: Request) -> Opened:
    request.refuse("tokenizer", "tokenizer_vocab")
    path = request.need_path()
    if not isinstance(path, str | Path):
        raise UserError(f"data.path {path!r}: data.type tokens reads one file; concatenate them into one")
    return TokenWindows(open_tokens(path, request.watch), request.seq_len), None


def _synthetic(request: Request) -> Opened:
    request.refuse("path", "tokenizer", "tokenizer_vocab")
    return SyntheticTokens(seq_len=request.seq_len, vocab_size=request.vocab_size, seed=request.seed), None


FACTORIES: dict[str, Callable[[Request], Opened]] = {
    "corpus": _corpus,
    "text": _text,
    "tokens": _tokens,
    "synthetic": _synthetic,
}


def check_type(
    type: str, *, path: Paths | None = None, tokenizer: str | None = None, tokenizer_vocab: int | None = None
) -> None:
    """Check that there is such a type, before anything is opened; for an import path, also that it takes the settings.

    Raises:
      UserError: there is no such type, or it does not take a setting.
    """
    if ":" in type:
        check_imported(type, Request(type, 1, 1, 0, path, tokenizer, tokenizer_vocab, None, False).fields)
    elif type not in FACTORIES:
        own = "package.module:Class for a source of your own"
        raise UserError(f"data.type {type!r} does not exist; {did_you_mean(type, FACTORIES)} ({own})")


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

    Raises:
      UserError: anything is wrong with these or with the data, or `should_stop` returned True.
    """
    check_type(type, path=path, tokenizer=tokenizer, tokenizer_vocab=tokenizer_vocab)
    kept, watch = Path(directory) if directory is not None else None, Watch(should_stop)
    request = Request(type, seq_len, vocab_size, seed, path, tokenizer, tokenizer_vocab, kept, write, watch)
    source, text_tokenizer = open_imported(type, request.fields) if ":" in type else FACTORIES[type](request)
    _check_vocab(source.vocab_size, request)
    return source, text_tokenizer


def _prepare(request: Request, documents: Callable[[], Iterable[Text]]) -> Kept:
    if request.directory is None:
        raise UserError(f"directory is missing: data.type {request.type} keeps its tokens in one")
    tokenizer = request.tokenizer or "bpe"
    if tokenizer == "bpe":
        vocab = request.vocab_size if request.tokenizer_vocab is None else request.tokenizer_vocab
        check_bpe_vocab(vocab)
    elif tokenizer == "byte":
        vocab = ByteTokenizer.vocab_size
        if request.tokenizer_vocab not in (None, vocab):
            raise UserError(
                f"data.vocab_size {request.tokenizer_vocab}: data.tokenizer byte has exactly {vocab} ids; "
                f"remove it, or choose bpe"
            )
    else:
        raise UserError(f"data.tokenizer {tokenizer!r}: it must be 'bpe' or 'byte'")
    _check_vocab(vocab, request)
    return prepare(
        request.directory,
        documents,
        kind=request.type,
        tokenizer=tokenizer,
        tokenizer_vocab=vocab,
        write=request.write,
        watch=request.watch,
    )


def _windows(request: Request, kept: Kept) -> Opened:
    return TokenWindows(kept.tokens, request.seq_len), kept.tokenizer


def _check_vocab(vocab_size: int, request: Request) -> None:
    if vocab_size > request.vocab_size:
        raise UserError(
            f"model.vocab_size {request.vocab_size}: the data (data.type {request.type}) has a vocabulary of "
            f"{vocab_size}, and each of its ids needs a row in the embedding; set model.vocab_size to "
            f"{vocab_size} or more, or choose a smaller tokenizer"
        )
