"""Text as rows: tokenized once into a directory, and cut into windows."""

from collections.abc import Callable, Iterable

from shardtrain.data.document import Text
from shardtrain.data.prepare import Kept, prepare
from shardtrain.data.request import Opened, Request
from shardtrain.data.tokenizer import ByteTokenizer, check_bpe_vocab
from shardtrain.data.tokens import TokenWindows
from shardtrain.errors import UserError


def tokenized(request: Request, documents: Callable[[], Iterable[Text]]) -> Kept:
    """Tokenizes documents into the directory of a request, unless that was done before.

    Args:
      request: names directory and tokenizer.
      documents: called if there is anything to tokenize.

    Raises:
      UserError: no directory, or a tokenizer that does not exist or does not fit the model.
    """
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
    request.check_vocab(vocab)
    return prepare(
        request.directory,
        documents,
        kind=request.type,
        tokenizer=tokenizer,
        tokenizer_vocab=vocab,
        write=request.write,
        watch=request.watch,
    )


def windows(request: Request, kept: Kept) -> Opened:
    """Returns rows of `request.seq_len` tokens, and the tokenizer."""
    return TokenWindows(kept.tokens, request.seq_len), kept.tokenizer
