"""The program that `learning.py` starts, which learns byte pairs. It imports little, so it starts in 0.1 s.

Standard input has lines of JSON: the request, then pieces of text, then `null`. The tokenizer goes to standard output.
"""

import json
import sys
from collections.abc import Iterator

from tokenizers import Tokenizer, pre_tokenizers, trainers


def learn() -> str:
    """Return the trained tokenizer as JSON."""
    request = json.loads(sys.stdin.buffer.readline())
    tokenizer = Tokenizer.from_str(request["tokenizer"])
    trainer = trainers.BpeTrainer(
        vocab_size=request["vocab_size"],
        special_tokens=request["special_tokens"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),  # all bytes: no text is ever unknown
        show_progress=False,
    )
    tokenizer.train_from_iterator(_texts(), trainer)
    return tokenizer.to_str()


def _texts() -> Iterator[str]:
    for line in sys.stdin.buffer:
        if (text := json.loads(line)) is None:
            return
        yield text
    raise SystemExit("the text ended too early")  # because its sender has ended


if __name__ == "__main__":
    sys.stdout.buffer.write(learn().encode())
