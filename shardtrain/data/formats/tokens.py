"""`data.type: tokens`: a file of token ids."""

from pathlib import Path

from shardtrain.data.request import Opened, Request
from shardtrain.data.tokens import TokenWindows, open_tokens
from shardtrain.errors import UserError


def open_rows(request: Request) -> Opened:
    """Opens the windows of the file at `request.path`."""
    request.refuse("tokenizer", "tokenizer_vocab")
    path = request.need_path()
    if not isinstance(path, str | Path):
        raise UserError(f"data.path {path!r}: data.type tokens reads one file; concatenate them into one")
    return TokenWindows(open_tokens(path, request.watch), request.seq_len), None
