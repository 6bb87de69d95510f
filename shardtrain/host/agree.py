"""One decision for all processes. If each looked at the disk itself, two might restore different steps."""

import json
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from shardtrain.errors import UserError
from shardtrain.host.alike import together

T = TypeVar("T")

_NOTHING, _REFUSED = -1, -2
_CALM, _FOUND, _RAISED = range(3)


def decide_on_process_zero(decide: Callable[[], int | None]) -> int | None:
    """Run `decide` on process 0, and return its answer (a step, or None) on every process.

    Raises:
      UserError: `decide` raised it. The other processes refer to the message of process 0.
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
        raise UserError("process 0 refused to continue; see its message")
    return None if answer == _NOTHING else answer


def on_process_zero(make: Callable[[], T]) -> T | None:
    """Call `make` on process 0 and return its result; on the others wait until it is done, and return None.

    Raises:
      UserError: `make` raised it. No process then waits in vain for another.
    """
    made = None

    def decide() -> None:
        nonlocal made
        made = make()

    decide_on_process_zero(decide)
    return made


def first_found(look: Callable[[], str | None]) -> str | None:
    """Run `look` on every process, and return on each the finding of the first process that has one, or None.

    Raises:
      UserError: `look` raised it on some process.
    """
    if jax.process_count() == 1:
        return look()
    failure: Exception | None = None
    try:
        found = look()
        mine = [_CALM if found is None else _FOUND, found or ""]
    except Exception as error:  # whatever it is, because the others wait for an answer of this process
        failure, mine = error, [_RAISED, f"process {jax.process_index()}: {error}"]
    answers = map(json.loads, _exchange(json.dumps(mine)))
    kind, words = max(answers, key=lambda theirs: theirs[0])  # the first, if there are several
    if failure is not None:
        raise failure
    if kind == _RAISED:
        raise UserError(words)
    return words if kind == _FOUND else None


def on_all(make: Callable[[], T], said: Callable[[T], Mapping[str, Any]]) -> T:
    """Call `make` on every process, and return its result once all describe it alike (see `alike.together`).

    Args:
      make: makes the object.
      said: describes it, as key to value.

    Raises:
      UserError: `make` raised it on some process, or the processes differ.
    """
    return make() if jax.process_count() == 1 else together(make, said, _exchange)


def _exchange(text: str) -> list[str]:
    """Return the text of every process, by its number. Lengths are sent first, then bytes, padded to the longest."""
    content = np.frombuffer(text.encode(), np.uint8)
    lengths = multihost_utils.process_allgather(np.int32(content.size))
    rows = multihost_utils.process_allgather(np.pad(content, (0, int(max(lengths)) - content.size)))
    return [row[:length].tobytes().decode() for row, length in zip(rows, lengths, strict=True)]
