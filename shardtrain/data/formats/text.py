"""`data.type: text`: text files."""

from shardtrain.data.request import Opened, Request
from shardtrain.data.text import check_unchanged, text_documents
from shardtrain.data.tokenized import tokenized, windows


def open_rows(request: Request) -> Opened:
    """Open the text of `request.path`, tokenized into `request.directory`; afterwards the files may be missing."""
    kept = tokenized(request, lambda: text_documents(request.path or ()))
    if request.path is not None:
        check_unchanged(request.path, kept.documents, request.watch)
    return windows(request, kept)
