"""Learns byte pairs: the program that `learning.py` starts. It stands alone, so that it starts in a tenth of a second.

Standard input holds lines of JSON: what is asked for, then pieces of text, then `null`. The tokenizer goes to standard
output.
"""

import json
import sys
from collections.abc import Iterator

from tokenizers import Tokenizer, pre_tokenizers, trainers


def learn() -> str:
    """Returns the trained tokenizer's JSON form."""
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
    raise SystemExit("the text ended too early")  # who sends it has ended


if __name__ == "__main__":
    sys.stdout.buffer.write(learn().encode())
