"""`data.type: tokens`: a file of token ids."""

from shardtrain.data.listing import each
from shardtrain.data.request import Opened, Request
from shardtrain.data.tokens import TokenWindows, open_tokens


def open_rows(request: Request) -> Opened:
    """Open the windows of the file at `request.path`."""
    (path,) = each(request.path or ())
    return TokenWindows(open_tokens(path, request.watch), request.seq_len), None
