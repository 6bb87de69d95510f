"""Closing several things completely, such that the first error is the one that is seen."""

import logging
from collections.abc import Callable

from shardtrain.errors import UserError

_log = logging.getLogger(__name__)


def close_all(*closers: Callable[[], object], after: BaseException | None = None) -> None:
    """Make every call, even if some fail. The first error is raised, later ones are logged.

    Args:
      closers: the calls.
      after: the error that is already being raised, if any. Then all errors are logged.
    """
    errors = [] if after is None else [after]
    for close in closers:
        try:
            close()
        except BaseException as error:
            errors.append(error)
    for later in errors[1:]:
        expected = isinstance(later, UserError | OSError)
        _log.error("%s", later if expected else type(later).__name__, exc_info=None if expected else later)
    if after is None and errors:
        raise errors[0]
