"""The partitioner in use while a step is traced, by which layers constrain their activations."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar

import jax

from shardtrain.sharding.partitioner import Partitioner

_current: ContextVar[Partitioner | None] = ContextVar("partitioner", default=None)


@contextlib.contextmanager
def use(partitioner: Partitioner | None) -> Iterator[Partitioner | None]:
    """Within a `with` block, make a partitioner the current one, by which layers constrain their activations."""
    token = _current.set(partitioner)
    try:
        yield partitioner
    finally:
        _current.reset(token)


def current() -> Partitioner | None:
    """Return the partitioner in use, or `None` on a single device."""
    return _current.get()


def constrain(x: jax.Array, *axes: str | None, name: str = "activation") -> jax.Array:
    """Constrain the sharding of `x` by the partitioner in use; without one (a single device), return `x`.

    Args:
      x: an intermediate value.
      *axes: the logical axis of each dim; `None` does not split it.
      name: of the tensor, for errors.

    Raises:
      UserError: as `Partitioner.sharding`.
    """
    partitioner = current()
    return x if partitioner is None else partitioner.constrain(x, *axes, name=name)


def gather_residual(x_BSD: jax.Array) -> jax.Array:
    """Gather the residual stream over `tensor`, which splits its sequence between blocks, for a block's matmuls.

    The split sharding is named first. Otherwise the gathered one spreads to before a norm's cast, and XLA gathers
    float32.
    """
    return constrain(constrain(x_BSD, "batch", "seq_residual", None), "batch", "seq", None)


def shards(logical: str) -> int:
    """Return `Partitioner.shards(logical)` of the partitioner in use; 1 without one."""
    partitioner = current()
    return 1 if partitioner is None else partitioner.shards(logical)
