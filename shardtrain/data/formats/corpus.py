"""`data.type: corpus`: the text that is part of the library."""

from shardtrain.data.corpus import corpus_documents
from shardtrain.data.request import Opened, Request
from shardtrain.data.tokenized import tokenized, windows


def open_rows(request: Request) -> Opened:
    """Open the text, tokenized into `request.directory`."""
    return windows(request, tokenized(request, corpus_documents))
