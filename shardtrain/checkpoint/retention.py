"""Which old steps are deleted."""

from collections.abc import Iterable


def expired(steps: Iterable[int], keep: int, keep_every: int | None) -> list[int]:
    """Return the steps to delete, oldest first: neither among the last `keep` nor a multiple of `keep_every`."""
    ordered = sorted(steps)
    return [step for step in ordered[:-keep] if keep_every is None or step % keep_every != 0]
