"""Errors as the command line prints them."""

from __future__ import annotations

import sys
import traceback

from shardtrain.errors import UserError


def report(error: BaseException) -> int:
    """Print an error, with its traceback unless it is a mistake of the user; returns the exit code."""
    if "--debug" in sys.argv or not isinstance(error, UserError | OSError):
        traceback.print_exception(error)
        return 1
    if isinstance(error, UserError):
        print(f"error: {error}", file=sys.stderr)
    else:  # a full disk, missing permissions
        where = f": {error.filename}" if error.filename else ""
        print(f"error: {error.strerror or error}{where}; correct that and run the same command again", file=sys.stderr)
    return 2
