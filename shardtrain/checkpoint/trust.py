"""Which step is trusted. All processes decide together, and each hashes its share of the files, once."""

import functools
import logging
from collections.abc import Iterator
from pathlib import Path

import jax

from shardtrain.checkpoint import lifecycle, manifest
from shardtrain.errors import UserError
from shardtrain.host import agree

_log = logging.getLogger(__name__)


def newest(directory: Path) -> int | None:
    """Clean up, and return the newest step that verifies; None if the run never had a trusted one.

    Raises:
      UserError: checkpoints exist or existed, and none of them can be trusted.
    """
    agree.decide_on_process_zero(lambda: lifecycle.prepare(directory))
    problems: list[str] = []
    for step in _newest_first(directory):
        problem = _problem(directory, step)
        if problem is None:
            return step
        problems.append(problem)
        agree.decide_on_process_zero(functools.partial(lifecycle.set_corrupt_aside, directory, step, problem))
    agree.decide_on_process_zero(lambda: lifecycle.require_none_corrupt(directory, problems))
    return None


def newest_intact(directory: Path, hash_up_to: int | None = None) -> int:
    """Return the newest step that verifies in a directory that is not ours to change; warn of each newer one.

    Args:
      directory: the folder of the steps.
      hash_up_to: see `manifest.problem`.

    Raises:
      UserError: no step verifies.
    """
    for step in _newest_first(directory):
        problem = _problem(directory, step, hash_up_to)
        if problem is None:
            return step
        _log.warning("checkpoint %d in %s is corrupt: %s; trying an older one", step, directory, problem)
    raise UserError(f"no intact checkpoint in {directory}")


def require_intact(directory: Path, step: int, hash_up_to: int | None = None) -> None:
    """Check one step that was given by number. Rename nothing.

    Args:
      directory: the folder of the steps.
      step: the step to check.
      hash_up_to: see `manifest.problem`.

    Raises:
      UserError: it does not exist, has no manifest, or differs from it.
    """
    agree.decide_on_process_zero(lambda: lifecycle.require_manifest(directory, step))
    lifecycle.require_no_problem(directory, step, _problem(directory, step, hash_up_to))


def _problem(directory: Path, step: int, hash_up_to: int | None = None) -> str | None:
    share = (jax.process_index(), jax.process_count())
    return agree.first_found(lambda: manifest.problem(directory, step, hash_up_to, share))


def _newest_first(directory: Path) -> Iterator[int]:
    """Yield the steps with a manifest, newest first, as process 0 sees them."""
    step = agree.decide_on_process_zero(functools.partial(_newest_below, directory, None))
    while step is not None:
        yield step
        step = agree.decide_on_process_zero(functools.partial(_newest_below, directory, step))


def _newest_below(directory: Path, limit: int | None) -> int | None:
    return max((step for step in lifecycle.with_manifest(directory) if limit is None or step < limit), default=None)
