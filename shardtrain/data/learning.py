"""Learning byte pairs in a separate process, which can be ended: the `tokenizers` package ignores signals."""

import json
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import IO

import tokenizers

from shardtrain.data.watch import Watch

_PROGRAM = Path(__file__).with_name("learner.py")


def learn(
    tokenizer: tokenizers.Tokenizer, texts: Iterable[str], vocab_size: int, special_tokens: list[str], watch: Watch
) -> tokenizers.Tokenizer:
    """Return `tokenizer` with the merges that it learns from `texts`.

    Whatever `watch` raises is raised at once, and so is an error in reading the texts.

    Args:
      tokenizer: without merges.
      texts: read by another thread.
      vocab_size: at most this many ids.
      special_tokens: ids that no text has.
      watch: polled meanwhile.
    """
    request = {"tokenizer": tokenizer.to_str(), "vocab_size": vocab_size, "special_tokens": special_tokens}
    errors: list[BaseException] = []
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        process = subprocess.Popen(
            [sys.executable, "-P", _PROGRAM],
            stdin=subprocess.PIPE,
            stdout=out,
            stderr=err,
            start_new_session=True,  # Ctrl-C is for this process
        )
        assert process.stdin is not None
        sender = threading.Thread(target=_send, args=(process.stdin, request, texts, errors), name="tokenizer")
        sender.start()
        try:
            while _runs(process):
                watch("learning the tokenizer ...")
        finally:
            process.kill()
            process.wait()
            sender.join()
        if errors:
            raise errors[0]
        out.seek(0), err.seek(0)
        if process.returncode:
            raise RuntimeError(f"{_PROGRAM.name} ended with {process.returncode}: {err.read().decode()}")
        return tokenizers.Tokenizer.from_str(out.read().decode())


def _runs(process: subprocess.Popen[bytes]) -> bool:
    try:
        process.wait(0.1)
    except subprocess.TimeoutExpired:
        return True
    return False


def _send(stream: IO[bytes], request: object, texts: Iterable[str], errors: list[BaseException]) -> None:
    try:
        with stream:
            stream.write(json.dumps(request).encode() + b"\n")
            for text in texts:
                stream.write(json.dumps(text).encode() + b"\n")
            stream.write(b"null\n")
    except BrokenPipeError:
        pass  # it has ended; the other thread says why
    except BaseException as error:
        errors.append(error)
