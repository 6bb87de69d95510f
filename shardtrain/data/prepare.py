"""Text is tokenised once, when a run begins, and kept in the directory of the run.

    tokens.bin, tokens.bin.json   the token file (`tokens.py`); a separator follows each document
    tokenizer.json                the tokenizer, if it was learnt from the text
    source.json                   the request, and digests of the texts and of the files above

`source.json` is written last, and nothing counts as kept without it. From then on the kept files are the data: a
resumed run reads them, verified against their digests, instead of the text. So another Python, with another standard
library, cannot change a run on the built-in corpus.
"""

import dataclasses
import functools
import hashlib
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from shardtrain.data.document import Text
from shardtrain.data.sample import sample
from shardtrain.data.tokenizer import BPETokenizer, ByteTokenizer, Tokenizer, encode_documents
from shardtrain.data.tokens import TokenFile, open_tokens, write_tokens
from shardtrain.data.watch import Watch
from shardtrain.data.words import PIECE, pieces
from shardtrain.errors import UserError
from shardtrain.host.files import read_json, require_writable, sha256, write_json, write_text

FORMAT_VERSION = 1
_RECORD = "source.json"
Documents = Callable[[], Iterable[Text]]


@dataclasses.dataclass(frozen=True)
class Kept:
    """The part of its text that a run keeps.

    Attributes:
      tokens: the token file.
      tokenizer: from text to ids and back.
      documents: name of each text to its digest.
    """

    tokens: TokenFile
    tokenizer: Tokenizer
    documents: dict[str, str]


def prepare(
    directory: Path,
    documents: Documents,
    *,
    kind: str,
    tokenizer: str,
    tokenizer_vocab: int,
    write: bool = True,
    wait_s: float = 600,
    watch: Watch | None = None,
) -> Kept:
    """Tokenise the documents into `directory`, or open what a run has kept there.

    Only a few pieces of a text are in memory at a time.

    Args:
      directory: where the tokens are kept.
      documents: gives the texts, from the first one, each time it is called.
      kind: the type of data in the config, for the record.
      tokenizer: `bpe` or `byte`.
      tokenizer_vocab: number of ids.
      write: whether this process writes. Of several processes that share the directory, exactly one does; the others
        wait until it has finished.
      wait_s: how many seconds they wait.
      watch: polled at each piece.

    Raises:
      UserError: other settings were kept, a kept file is damaged, `directory` cannot be made, the wait was in vain, or
        `watch` was asked to stop.
    """
    watch = watch or Watch()
    request = {"type": kind, "tokenizer": tokenizer, "vocab_size": tokenizer_vocab}
    record = directory / _RECORD
    if not write:
        _wait(record, wait_s, watch)
    elif not record.exists():
        require_writable(directory, "its data")
        _tokenise(directory, documents, request, watch)
    return _open(directory, request, watch)


def is_kept(directory: Path) -> bool:
    """Whether `prepare` has finished in `directory`; from then on the text itself is not needed."""
    return (directory / _RECORD).exists()


def load_tokenizer(directory: Path) -> Tokenizer:
    """Open the tokenizer that `prepare` kept in `directory`.

    Raises:
      UserError: it is damaged.
    """
    record = read_json(directory / _RECORD)
    if record.get("tokenizer") == "byte":
        return ByteTokenizer()
    path = directory / "tokenizer.json"
    if not path.is_file() or sha256(path) != record.get("tokenizer_sha256"):
        raise _damaged(path)
    return BPETokenizer.load(path)


def _tokenise(directory: Path, documents: Documents, request: dict[str, Any], watch: Watch) -> None:
    record = {"format_version": FORMAT_VERSION, **request}
    tokenizer: Tokenizer
    if request["tokenizer"] == "byte":
        tokenizer = ByteTokenizer()
    else:
        learnt = sample(lambda: (piece for document in documents() for piece in pieces(document.parts())), watch)
        tokenizer = BPETokenizer.train(learnt, request["vocab_size"], watch)
        write_text(directory / "tokenizer.json", tokenizer.to_json())
        record["tokenizer_sha256"] = sha256(directory / "tokenizer.json")
    path, digests = directory / "tokens.bin", dict[str, str]()
    write_tokens(path, encode_documents(tokenizer, _texts(documents, digests, watch)), tokenizer.vocab_size)
    digest = open_tokens(path, watch).digest
    write_json(directory / _RECORD, {**record, "tokens_digest": digest, "documents": digests})


def _texts(documents: Documents, digests: dict[str, str], watch: Watch) -> Iterator[Iterator[str]]:
    """Yield the parts of each text, and note its digest once they were read."""
    total = functools.cache(lambda: sum(document.size for document in documents()))
    done = 0

    def progress() -> str:
        return f"tokenised {done / 1e6:.0f} of {total() / 1e6:.0f} MB"

    def parts(document: Text) -> Iterator[str]:
        nonlocal done
        read = hashlib.sha256()
        for part in document.parts(read):
            for start in range(0, len(part), PIECE):
                piece = part[start : start + PIECE]
                yield piece
                done += len(piece.encode())
                watch(progress)
        digests[document.name] = read.hexdigest()

    yield from map(parts, documents())


def _open(directory: Path, request: dict[str, Any], watch: Watch) -> Kept:
    record = read_json(directory / _RECORD)
    asked = {"format_version": FORMAT_VERSION, **request}
    differing = [f"data.{k}: kept {record.get(k)!r}, now {v!r}" for k, v in asked.items() if record.get(k) != v]
    if differing:
        raise UserError(
            f"{directory} keeps the data of a run that was started with other settings ({'; '.join(differing)}): "
            f"set these as they were, or start a new run (another run.name)"
        )
    tokens = open_tokens(directory / "tokens.bin", watch)
    if tokens.digest != record.get("tokens_digest"):
        raise _damaged(tokens.path)
    return Kept(tokens, load_tokenizer(directory), record.get("documents", {}))


def _wait(record: Path, seconds: float, watch: Watch) -> None:
    deadline = time.monotonic() + seconds
    while not record.exists():
        watch("waiting for process 0 to prepare the data ...")
        if time.monotonic() > deadline:
            raise UserError(
                f"{record} did not appear in {seconds:g} s: process 0 writes it, and the run directory must "
                f"be on a file system that all processes share; see the log of process 0, or choose another run.dir"
            )
        time.sleep(0.1)


def _damaged(path: Path) -> UserError:
    return UserError(
        f"{path} is damaged: its digest differs from the one in source.json; restore the file from a backup, "
        f"or start a new run (another run.name)"
    )
