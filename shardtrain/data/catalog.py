"""Sources by name, as a config asks for them."""

from pathlib import Path
from types import ModuleType

from shardtrain.data import formats
from shardtrain.data.checks import default_tokenizer, setting_problems, vocabulary_problems
from shardtrain.data.imported import check_imported, open_imported
from shardtrain.data.listing import Paths
from shardtrain.data.prepare import is_kept
from shardtrain.data.request import Opened, Request
from shardtrain.data.watch import ShouldStop, Watch
from shardtrain.errors import UserError, did_you_mean, refuse
from shardtrain.host.import_path import modules_of


def types() -> dict[str, ModuleType]:
    """Returns the modules of `shardtrain.data.formats`, by the value of `data.type` that names them."""
    return modules_of(formats)


def check_type(
    type: str, path: Paths | None = None, tokenizer: str | None = None, tokenizer_vocab: int | None = None
) -> None:
    """Checks that there is such a type, before anything is opened; of an import path, also that it takes the settings.

    Args:
      type: see `open_source`, also for the others.
      path: files.
      tokenizer: kind of tokenizer.
      tokenizer_vocab: size of its vocabulary.

    Raises:
      UserError: there is no such type, or a class of the user's own cannot be called with the settings.
    """
    if ":" in type:
        check_imported(type, Request(type, 1, 1, 0, path, tokenizer, tokenizer_vocab, None, False).fields)
    elif type not in types():
        fix = f"{did_you_mean(type, types())} (package.module:Class for a source of your own)"
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
    """Opens the rows that a config asks for, and the tokenizer if there is one.

    Args:
      type: a module of `shardtrain.data.formats`: `corpus`, `text`, `tokens` or `synthetic`; or
        `package.module:Class` (`shardtrain.data.imported` says with which arguments that is called).
      seq_len: tokens in a row.
      vocab_size: the model's; the data's must not be larger.
      seed: of synthetic tokens. (The order of rows has its own, in `Loader`.)
      path: files for `text` (a file, folder or glob, or several), the file for `tokens`.
      tokenizer: `bpe` (the default) or `byte`, for `corpus` and `text`.
      tokenizer_vocab: for `bpe` (`data.vocab_size` in a config); default: the model's.
      directory: where `corpus` and `text` store their tokens.
      write: whether this process may write there; if there are several, true in exactly one.
      should_stop: polled several times a second while text is tokenised or tokens are checked; True ends it.

    Raises:
      UserError: anything wrong with these, or with the data; or `should_stop` returned True.
    """
    check_type(type, path, tokenizer, tokenizer_vocab)
    tokenizer = tokenizer or default_tokenizer(type)
    stored, watch = Path(directory) if directory is not None else None, Watch(should_stop)
    request = Request(type, seq_len, vocab_size, seed, path, tokenizer, tokenizer_vocab, stored, write, watch)
    if ":" not in type:
        refuse(setting_problems(type, path, tokenizer, is_kept=stored is not None and is_kept(stored)))
        refuse(vocabulary_problems(vocab_size, tokenizer, tokenizer_vocab))
    source, text_tokenizer = open_imported(type, request.fields) if ":" in type else types()[type].open_rows(request)
    if source.vocab_size > vocab_size:
        rule = f"the data (data.type {type}) has a vocabulary of {source.vocab_size}, and each id needs a row"
        fix = f"set model.vocab_size={source.vocab_size} or more, or choose a smaller tokenizer"
        raise UserError("model.vocab_size", vocab_size, rule, fix)
    return source, text_tokenizer
