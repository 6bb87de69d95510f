"""A real corpus that needs no download: the documentation and sources of the running Python."""

import sysconfig
import tokenize
from collections.abc import Iterator
from pathlib import Path

from shardtrain.data.document import Document
from shardtrain.errors import UserError

# Tests, vendored code, generated tables, and the topics in their source form.
_SKIPPED = frozenset(
    {
        "__pycache__",
        "dist-packages",
        "encodings",
        "ensurepip",
        "idlelib",
        "lib2to3",
        "pydoc_data",
        "site-packages",
        "test",
        "tests",
        "turtledemo",
    }
)


def corpus_documents(max_bytes: int = 4_000_000) -> Iterator[Document]:
    """Yield Python's documentation topics, then the sources of its standard library, each sorted by name.

    The text is the same for every run of one Python version. Another version has another text, so a run keeps the
    tokens with which it began (see `prepare.py`).

    Args:
      max_bytes: stop before the document that would exceed this many bytes of UTF-8.

    Raises:
      UserError: this Python has no sources.
    """
    size = 0
    for document in _all_documents():
        size += len(document.text.encode())
        if size > max_bytes:
            return
        yield document


def _all_documents() -> Iterator[Document]:
    root = Path(sysconfig.get_path("stdlib"))
    names = sorted(
        path.relative_to(root).as_posix()
        for path in root.rglob("*.py")
        if not _SKIPPED.intersection(path.relative_to(root).parts) and not path.name.startswith("_sysconfigdata")
    )
    if not names:
        raise UserError(
            f"data.type corpus: this Python has no standard-library sources under {root}; use another "
            f"Python, or data.type text with a path"
        )
    from pydoc_data.topics import topics  # only now: half a megabyte of text

    for name in sorted(topics):
        yield Document(f"topics/{name}", topics[name])
    for name in names:
        with tokenize.open(root / name) as file:  # honours the file's own encoding line
            text = file.read()
        if text:
            yield Document(name, text)
