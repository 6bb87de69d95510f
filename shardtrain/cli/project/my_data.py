"""The data: sums such as `7+12=19`, of which the model learns the answers. Replace it by your own rows."""

from __future__ import annotations

import numpy as np

from shardtrain.data import ByteTokenizer, Row, window

_ROWS = 20_000


class Sums:
    """A source: rows by number, each a text of sums. Row i depends on i and the seed alone, so a run can be resumed.

    Args:
      seq_len: tokens in a row, from the config.
      seed: from the config.
    """

    tokenizer = ByteTokenizer()  # with which a run writes samples
    vocab_size = tokenizer.vocab_size

    def __init__(self, seq_len: int, seed: int):
        self.seq_len, self.seed = seq_len, seed
        self.fingerprint = f"sums seq_len={seq_len} seed={seed}"  # of everything that the rows depend on

    def __len__(self) -> int:
        return _ROWS

    def __getitem__(self, row: int) -> Row:
        random = np.random.default_rng([self.seed, row])
        pairs = random.integers(0, 20, (self.seq_len // 6 + 1, 2))
        ids = self.tokenizer.encode("".join(f"{a}+{b}={a + b}\n" for a, b in pairs))[: self.seq_len + 1]
        leaves = window(ids)  # tokens, and as targets the token after each
        leaves["loss_mask"] = _answers(leaves["tokens"])
        return leaves


def _answers(tokens: np.ndarray) -> np.ndarray:
    """1 where the next token is part of an answer, from `=` to the end of the line; 0 elsewhere."""
    inside, mask = False, np.zeros(len(tokens), np.float32)
    for place, token in enumerate(tokens):
        inside = (inside or token == ord("=")) and token != ord("\n")
        mask[place] = inside
    return mask
