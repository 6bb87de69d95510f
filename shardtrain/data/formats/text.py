"""`data.type: text`: text files."""

from shardtrain.data.listing import each
from shardtrain.data.prepare import is_kept
from shardtrain.data.request import Opened, Request
from shardtrain.data.text import check_unchanged, text_documents
from shardtrain.data.tokenized import tokenized, windows


def open_rows(request: Request) -> Opened:
    """Opens the text of `request.path`, tokenized into `request.directory`; afterwards the files may be missing."""
    if request.directory is None or not is_kept(request.directory):
        request.need_path()
    elif request.path is not None:
        each(request.path)
    kept = tokenized(request, lambda: text_documents(request.need_path()))
    if request.path is not None:
        check_unchanged(request.path, kept.documents, request.watch)
    return windows(request, kept)
