"""Text files, folders and globs as documents."""

import hashlib
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path

from shardtrain.data.listing import Paths, each, expand, once, text_files
from shardtrain.data.text_file import TextFile, UnreadableError
from shardtrain.data.watch import Watch
from shardtrain.errors import UserError, shortened

_log = logging.getLogger(__name__)


def text_documents(paths: Paths) -> Iterator[TextFile]:
    """Yield one document for each UTF-8 file with text in it. A file is read when its document is.

    Empty files in folders and globs are left out.

    Raises:
      UserError: a path matches no file; a file cannot be read or is not UTF-8 (names it, and the byte offset); a file
        that is named itself is empty; or there is no text at all.
    """
    files, named, empty = text_files(paths), set(map(Path, each(paths))), True
    for document in map(TextFile, files):
        if not document.empty:
            empty = False
            yield document
        elif document.path in named:
            raise UserError(f"data.path {document.path}: the file is empty; write text to it, or leave it out")
    if empty:
        named_paths = shortened(", ".join(each(paths)))
        raise UserError(f"data.path {named_paths}: all {len(files)} files are empty; write text to them")


def check_unchanged(paths: Paths, recorded: Mapping[str, str], watch: Watch | None = None) -> None:
    """Check that a run's text has not changed since it was tokenised.

    Only content counts: files may have been moved, or be gone, since the run keeps its tokens (a warning names the
    path). A file with other content, changed or new, is an error, because its text would silently be left out. A file
    that cannot be read as text could not have been trained on either, and causes a warning.

    Args:
      paths: as in the config.
      recorded: name to digest of each text that was tokenised.
      watch: polled meanwhile.

    Raises:
      UserError: the content of a file is not among the recorded ones; names the file.
    """
    watch, digests = watch or Watch(), set(recorded.values())
    for file in _present(paths):
        try:
            digest = _digest(TextFile(file), watch)
        except UnreadableError as error:
            _log.warning(f"{error} (the run continues with the tokens that it keeps)")
            continue
        if digest is not None and digest not in digests:
            what = "has changed" if str(file) in recorded else "is new"
            raise UserError(
                f"data.path {file}: this file {what} since the run tokenised its text, and a run trains "
                f"on one text from start to end; restore the file as it was, or start a new run "
                f"(another run.name)"
            )


def _present(paths: Paths) -> list[Path]:
    """Return the files that exist now; a warning names a path without any."""
    found = []
    for path in each(paths):
        files = expand(path, may_be_none=True)
        found += files
        if not files:
            _log.warning(f"data.path {shortened(path)}: no file is left there; the run continues with its kept tokens")
    return once(found)


def _digest(file: TextFile, watch: Watch) -> str | None:
    """Return the digest of a file; None if it is empty."""
    digest, read = hashlib.sha256(), 0
    for part in file.parts(digest):
        read += len(part)
        watch(f"{file.path}: comparing with what was tokenised, {read / 1e6:.0f} MB so far")
    return digest.hexdigest() if read else None
