"""One decision for all processes: two that looked at the disk themselves might restore different steps."""

from collections.abc import Callable
from typing import TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from shardtrain.errors import UserError

T = TypeVar("T")

_NOTHING, _REFUSED = -1, -2
_CALM, _FOUND, _RAISED = range(3)
_WORDS = 1024  # bytes of a message that goes to all processes


def by_process_zero(decide: Callable[[], int | None]) -> int | None:
    """Runs `decide` on process 0 and returns its answer (a step, or None) on every process.

    Raises:
        UserError: `decide` raised it; the other processes refer to process 0's message.
    """
    if jax.process_count() == 1:
        return decide()
    answer, refusal = _NOTHING, None
    if jax.process_index() == 0:
        try:
            step = decide()
            answer = _NOTHING if step is None else step
        except UserError as error:
            answer, refusal = _REFUSED, error
    answer = int(multihost_utils.broadcast_one_to_all(np.int32(answer)))
    if refusal is not None:
        raise refusal
    if answer == _REFUSED:
        raise UserError("process 0 refused to go on; see its message")
    return None if answer == _NOTHING else answer


def on_process_zero(make: Callable[[], T]) -> T | None:
    """What `make` makes, on process 0, and None on the others, which wait until it is made.

    Raises:
        UserError: `make` raised it; then no process waits in vain for another.
    """
    made = None

    def decide() -> None:
        nonlocal made
        made = make()

    by_process_zero(decide)
    return made


def first_found(look: Callable[[], str | None]) -> str | None:
    """Runs `look` on every process, and returns on each what the first of them found that found anything, or None.

    Raises:
        UserError: `look` raised it, on any process.
    """
    if jax.process_count() == 1:
        return look()
    try:
        words = look()
        kind = _CALM if words is None else _FOUND
    except UserError as error:
        kind, words = _RAISED, str(error)
    mine = np.zeros(1 + _WORDS, np.uint8)
    text = (words or "").encode()[:_WORDS]
    mine[0], mine[1 : 1 + len(text)] = kind, np.frombuffer(text, np.uint8)
    all_of_them = multihost_utils.process_allgather(mine)
    loud = max(all_of_them, key=lambda theirs: theirs[0])  # of several, the first
    answer = loud[1:].tobytes().rstrip(b"\0").decode(errors="ignore")
    if loud[0] == _RAISED:
        raise UserError(answer)
    return answer if loud[0] == _FOUND else None
