"""A jitted step as its users call it: what JAX would say in words of its own, or crash on, is said in ours."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any

import jax
from jax.sharding import Mesh

from shardtrain.errors import UserError, described, require_kind
from shardtrain.pipeline.idle import Lowered
from shardtrain.sharding import Partitioner
from shardtrain.train.state import TrainState
from shardtrain.weights.paths import dotted

#: Looks at a batch before the step does.
Check = Callable[[Any], None]


class Step:
    """A jitted `(state, batch) -> ...` that explains the mistakes of its callers.

    Only what JAX would crash on is looked at before; other errors are looked into when they come. What else it has are
    the attributes of the function within.

    Args:
      function: from `jax.jit`, compiled or not, or a `CheckedStep`.
      mesh: that it is for.
      check: what each batch has to pass first.
      leaves: of a compiled step, the names of the batch's.
    """

    def __init__(self, function: Any, mesh: Mesh, check: Check | None = None, leaves: frozenset[str] | None = None):
        self._function, self._mesh, self._check, self._leaves = function, mesh, check, leaves

    def __call__(self, state: TrainState, batch: Any) -> Any:
        """Run it.

        Raises:
          UserError: a state that an earlier step was given, arguments on other devices than the mesh's, a batch that
            lacks what the model reads, or one that the check refuses.
        """
        refuse_donated(state)
        if self._check is not None:
            self._check(batch)
        try:
            return self._function(state, batch)
        except (KeyError, TypeError, ValueError) as error:
            self._explain(error, state, batch)
            raise

    def lower(self, state: TrainState, batch: Any) -> Lowered:
        """As `jax.jit` has it.

        Raises:
          UserError: a batch that lacks what the model reads.
        """
        try:
            lowered = self._function.lower(state, batch)
        except (KeyError, TypeError, ValueError) as error:
            self._explain(error, state, batch)
            raise
        return Lowered(lowered, lambda compiled: Step(compiled, self._mesh, self._check, frozenset(batch)))

    def __getattr__(self, name: str) -> Any:
        if name == "_function":  # not there yet while a copy is made
            raise AttributeError(name)
        return getattr(self._function, name)

    def _explain(self, error: Exception, state: Any, batch: Any) -> None:
        """Raise what the error comes from as a UserError, if we know it."""
        if isinstance(error, UserError):
            return
        _explain_devices(error, {"state": state, "batch": batch}, {*self._mesh.devices.flat})
        if not isinstance(batch, Mapping):
            return
        if isinstance(error, KeyError) and error.args[0] not in batch and _reads(error.__traceback__, {*batch}):
            raise UserError(
                f"the model reads {error.args[0]!r} of the batch, which has only {', '.join(sorted(batch))}; add it to "
                "the batch, or correct the name"
            ) from error
        if self._leaves is not None and self._leaves != {*batch}:
            raise UserError(
                f"the step was compiled for a batch of {', '.join(sorted(self._leaves))}, and was given one of "
                f"{', '.join(sorted(batch))}; give it the same leaves"
            ) from error


def refuse_donated(state: Any) -> None:
    """Refuse what is no state, or none any more: JAX may crash on one of several devices.

    Raises:
      UserError: the memory of the state has become that of a later one.
    """
    require_kind("the state", state, TrainState, "make one with init_state")
    step = state.step
    if isinstance(step, jax.Array) and not isinstance(step, jax.core.Tracer) and step.is_deleted():
        raise UserError(
            "this state was given to a train step before, which donated its memory to the next state; go on with the "
            "state that the step returned, or copy what you keep: jax.tree.map(jnp.copy, state)"
        )


def check_batch(batch: Any, partitioner: Partitioner) -> None:
    """Refuse what is no batch, while a step is traced.

    Raises:
      UserError: no dict of arrays with the same number of rows; or a sequence that the mesh does not divide.
    """
    rule = "but a batch is a dict of [rows, ...] arrays"
    if not isinstance(batch, Mapping) or not batch:
        raise UserError(f"the batch is {described(batch)}, {rule}")
    for name, leaf in batch.items():
        if not isinstance(leaf, jax.Array) or not leaf.ndim:
            raise UserError(f"batch[{name!r}] is {described(leaf)}, {rule}")
    rows = {name: leaf.shape[0] for name, leaf in batch.items()}
    if len({*rows.values()}) > 1:
        raise UserError(f"the leaves of a batch all have one row per example, but here they have {rows} rows")
    if "tokens" not in batch:
        return
    for name, leaf in batch.items():
        if leaf.ndim > 1 and leaf.shape[:2] == batch["tokens"].shape[:2]:
            partitioner.sharding((None, "seq", *[None] * (leaf.ndim - 2)), leaf.shape, f"batch[{name!r}]")


def _explain_devices(error: Exception, arguments: Any, devices: set[jax.Device]) -> None:
    for path, leaf in jax.tree_util.tree_leaves_with_path(arguments):
        if isinstance(leaf, jax.Array) and getattr(leaf, "committed", False) and leaf.sharding.device_set != devices:
            name = dotted(path)
            raise UserError(
                f"{name} lies on {_named(leaf.sharding.device_set)}, but the step runs on a mesh of "
                f"{_named(devices)}; make the state with init_state, and put batches on the mesh too: "
                "jax.device_put(array, partitioner.sharding(('batch', 'seq')[:array.ndim]))"
            ) from error


def _named(devices: set[jax.Device]) -> str:
    names = [f"{d.platform}:{d.id}" for d in sorted(devices, key=lambda d: d.id)]
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def _reads(traceback: TracebackType | None, leaves: set[str]) -> bool:
    """Whether the frame that raised has a batch with these leaves in its hands, or a context of one."""
    if traceback is None:
        return False
    while traceback.tb_next is not None:
        traceback = traceback.tb_next
    held = [getattr(value, "inputs", value) for value in traceback.tb_frame.f_locals.values()]
    return any(isinstance(value, Mapping) and {*value} == leaves for value in held)
