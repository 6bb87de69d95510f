"""Sources of rows, and the loader that turns rows into global, sharded batches.

    source, tokenizer = open_source("corpus", seq_len=128, vocab_size=2048, directory="runs/a/data")
    train, held_out = split(source, 0.05)
    with Loader(train, global_batch=16, seed=0, sharding=sharding) as loader:
        batch = next(loader)

A new dataset is one file in `shardtrain/data/formats`, which is found by its name; or a class that follows `Source`
anywhere, named by its import path.
"""

from shardtrain.data.adapted import as_source
from shardtrain.data.catalog import open_source
from shardtrain.data.corpus import corpus_documents
from shardtrain.data.document import Document, Text
from shardtrain.data.growth import BatchGrowth
from shardtrain.data.listing import text_files
from shardtrain.data.loader import Batch, Loader, State
from shardtrain.data.prepare import Kept, load_tokenizer, prepare
from shardtrain.data.request import Request
from shardtrain.data.source import Row, Rows, Source, split, window
from shardtrain.data.synthetic import SyntheticTokens
from shardtrain.data.text import text_documents
from shardtrain.data.text_file import TextFile
from shardtrain.data.tokenizer import BPETokenizer, ByteTokenizer, Tokenizer, encode_documents
from shardtrain.data.tokens import TokenFile, TokenWindows, open_tokens, write_tokens

__all__ = [
    "BPETokenizer",
    "Batch",
    "BatchGrowth",
    "ByteTokenizer",
    "Document",
    "Kept",
    "Loader",
    "Request",
    "Row",
    "Rows",
    "Source",
    "State",
    "SyntheticTokens",
    "Text",
    "TextFile",
    "TokenFile",
    "TokenWindows",
    "Tokenizer",
    "as_source",
    "corpus_documents",
    "encode_documents",
    "load_tokenizer",
    "open_source",
    "open_tokens",
    "prepare",
    "split",
    "text_documents",
    "text_files",
    "window",
    "write_tokens",
]
