"""Text is tokenised once, when a run begins, and kept in the run's directory:

    tokens.bin, tokens.bin.json   the token file (`tokens.py`); the separator stands after each document
    tokenizer.json                the tokenizer, where it was learnt from the text
    source.json                   what was asked for, and digests of the texts and of the files above

`source.json` is written last, so without it nothing counts as kept. From then on the kept files are the data:
a resumed run reads them, verified against their digests, and not the text. So another Python, with another
standard library, cannot change a run on the built-in corpus.
"""

import dataclasses
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from shardtrain.data.document import Document
from shardtrain.data.tokenizer import BPETokenizer, ByteTokenizer, Tokenizer, encode_documents
from shardtrain.data.tokens import TokenFile, open_tokens, write_tokens
from shardtrain.errors import UserError
from shardtrain.files import read_json, require_writable, sha256, write_json, write_text

FORMAT_VERSION = 1


@dataclasses.dataclass(frozen=True)
class Kept:
    """What a run keeps of its text. `documents` maps the name of each text to its digest."""

    tokens: TokenFile
    tokenizer: Tokenizer
    documents: dict[str, str]


def prepare(
    directory: Path,
    documents: Callable[[], Iterable[Document]],
    *,
    kind: str,
    tokenizer: str,
    tokenizer_vocab: int,
    write: bool = True,
    wait_s: float = 600,
) -> Kept:
    """Tokenises the documents into `directory`, or opens what a run has kept there.

    Of several processes that share the directory, one is called with `write`; the others wait up to `wait_s`
    seconds until it has finished, and read.

    Raises UserError where other settings were kept, where a kept file is damaged, where `directory` cannot be
    made, and after a wait in vain.
    """
    request = {"type": kind, "tokenizer": tokenizer, "vocab_size": tokenizer_vocab}
    record = directory / "source.json"
    if not write:
        _wait(record, wait_s)
    elif not record.exists():
        require_writable(directory, "its data")
        _tokenise(directory, documents, request)
    return _open(directory, request)


def load_tokenizer(directory: Path) -> Tokenizer:
    """Opens the tokenizer that `prepare` kept in `directory`. Raises UserError where it is damaged."""
    record = read_json(directory / "source.json")
    if record.get("tokenizer") == "byte":
        return ByteTokenizer()
    path = directory / "tokenizer.json"
    if not path.is_file() or sha256(path) != record.get("tokenizer_sha256"):
        raise _damaged(path)
    return BPETokenizer.load(path)


def _tokenise(directory: Path, documents: Callable[[], Iterable[Document]], request: dict[str, Any]) -> None:
    digests: dict[str, str] = {}
    record = {"format_version": FORMAT_VERSION, **request}
    tokenizer: Tokenizer
    if request["tokenizer"] == "byte":
        tokenizer = ByteTokenizer()
    else:
        tokenizer = BPETokenizer.train((d.text for d in documents()), request["vocab_size"])
        write_text(directory / "tokenizer.json", tokenizer.to_json())
        record["tokenizer_sha256"] = sha256(directory / "tokenizer.json")

    def texts() -> Iterator[str]:
        for document in documents():
            digests[document.name] = document.digest
            yield document.text

    path = directory / "tokens.bin"
    write_tokens(path, encode_documents(tokenizer, texts()), tokenizer.vocab_size)
    write_json(directory / "source.json", {**record, "tokens_digest": open_tokens(path).digest, "documents": digests})


def _open(directory: Path, request: dict[str, Any]) -> Kept:
    record = read_json(directory / "source.json")
    asked = {"format_version": FORMAT_VERSION, **request}
    differing = [f"data.{k}: kept {record.get(k)!r}, now {v!r}" for k, v in asked.items() if record.get(k) != v]
    if differing:
        raise UserError(
            f"{directory} keeps the data of a run that was started otherwise ({'; '.join(differing)}): "
            f"set these as they were, or start a new run (another run.name)"
        )
    tokens = open_tokens(directory / "tokens.bin")
    if tokens.digest != record.get("tokens_digest"):
        raise _damaged(tokens.path)
    return Kept(tokens, load_tokenizer(directory), record.get("documents", {}))


def _wait(record: Path, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not record.exists():
        if time.monotonic() > deadline:
            raise UserError(
                f"{record} did not appear in {seconds:g} s: process 0 writes it, and the run directory must "
                f"be on a file system that all share; see the log of process 0, or choose another run.dir"
            )
        time.sleep(0.1)


def _damaged(path: Path) -> UserError:
    return UserError(
        f"{path}: damaged: its digest is not the one in source.json; copy the file back from a backup, "
        f"or start a new run (another run.name)"
    )
