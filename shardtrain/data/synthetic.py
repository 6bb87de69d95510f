"""Synthetic tokens: endless, not stored anywhere, and with a structure that a model can learn."""

import functools

import numpy as np

from shardtrain.data.source import Row, check_row, window
from shardtrain.errors import UserError


class SyntheticTokens:
    """Rows of a random Markov chain; row i is a pure function of (seed, i).

    The chain walks around a ring of `vocab_size` places. Each stride is one of four, drawn with fixed probabilities,
    and the places are renamed by a random permutation. So all tokens are equally frequent (a model that knows only
    frequencies has a loss of ln vocab_size), and each has four possible successors (a model that has learnt them has a
    loss of `entropy` nats). The seed determines the strides, the names and the rows.

    Args:
      seq_len: tokens in a row.
      vocab_size: number of tokens, at least 4.
      seed: determines everything.
      rows: length of the source.

    Raises:
      UserError: a number is too small.
    """

    PROBABILITIES = (0.7, 0.15, 0.1, 0.05)

    def __init__(self, *, seq_len: int, vocab_size: int, seed: int, rows: int = 1 << 20):
        for name, value, least in (
            ("data.seq_len", seq_len, 1),
            ("model.vocab_size", vocab_size, len(self.PROBABILITIES)),
            ("seed", seed, 0),
            ("rows", rows, 1),
        ):
            if value < least:
                raise UserError(f"{name} {value}: synthetic tokens need at least {least}")
        self.seq_len, self.vocab_size, self.seed, self.rows = seq_len, vocab_size, seed, rows
        rng = np.random.default_rng([seed])
        self._strides = rng.choice(vocab_size, len(self.PROBABILITIES), replace=False)
        self._names = rng.permutation(vocab_size)
        self._cumulative = np.cumsum(self.PROBABILITIES[:-1])

    @property
    def fingerprint(self) -> str:
        """Everything on which the rows depend."""
        sizes = f"vocab_size={self.vocab_size} seq_len={self.seq_len} rows={self.rows}"
        return f"synthetic v1 seed={self.seed} {sizes}"

    @functools.cached_property
    def entropy(self) -> float:
        """The lowest possible mean loss, in nats per token."""
        return float(-sum(p * np.log(p) for p in self.PROBABILITIES))

    def __len__(self) -> int:
        return self.rows

    def __getitem__(self, row: int) -> Row:
        check_row(row, len(self))
        # The seed of a row has three words, that of the chain only one, so the two random streams never coincide.
        rng = np.random.default_rng([self.seed, row, 1])
        start = rng.integers(self.vocab_size)
        steps = self._strides[np.searchsorted(self._cumulative, rng.random(self.seq_len), side="right")]
        places = (start + np.concatenate([[0], np.cumsum(steps)])) % self.vocab_size
        return window(self._names[places])
