"""Text as rows: tokenized once into a directory, and cut into windows."""

from collections.abc import Callable, Iterable

from shardtrain.data.document import Text
from shardtrain.data.prepare import Kept, prepare
from shardtrain.data.request import Opened, Request
from shardtrain.data.tokenizer import ByteTokenizer
from shardtrain.data.tokens import TokenWindows
from shardtrain.errors import UserError


def tokenized(request: Request, documents: Callable[[], Iterable[Text]]) -> Kept:
    """Tokenize documents into the directory of a request, unless that was done before.

    Args:
      request: names directory and tokenizer.
      documents: called if there is anything to tokenize.

    Raises:
      UserError: no directory.
    """
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


def windows(request: Request, kept: Kept) -> Opened:
    """Return rows of `request.seq_len` tokens, and the tokenizer."""
    return TokenWindows(kept.tokens, request.seq_len), kept.tokenizer
