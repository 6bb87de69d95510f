"""`data.type: synthetic`: rows of a random Markov chain."""

from shardtrain.data.request import Opened, Request
from shardtrain.data.synthetic import SyntheticTokens


def open_rows(request: Request) -> Opened:
    """Open the rows of `request.seed`."""
    return SyntheticTokens(seq_len=request.seq_len, vocab_size=request.vocab_size, seed=request.seed), None
