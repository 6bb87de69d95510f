"""The type of a jitted step, which explains errors that JAX would report in its own terms, or would crash on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Any, Generic, Protocol, TypeVar

import jax
from jax.sharding import Mesh

from shardtrain.errors import UserError, described, require_kind
from shardtrain.nn.model import Batch
from shardtrain.pipeline.idle import Lowered
from shardtrain.sharding import Partitioner
from shardtrain.train.state import TrainState
from shardtrain.weights.paths import dotted

Metrics = dict[str, Any]  # scalars; `norms`, if there are any, in a dict of their own
Check = Callable[[Any], None]
R = TypeVar("R")
R_co = TypeVar("R_co", covariant=True)


class Compilable(Protocol[R_co]):
    """A step that can be compiled ahead of its first call, as the loop does with the one that it is given."""

    def lower(self, state: TrainState, batch: Batch) -> Any:
        """An object whose `compile()` returns the compiled `(state, batch) -> result`."""

    def __call__(self, state: TrainState, batch: Batch) -> R_co:
        """Run the step."""


class JittedStep(Generic[R]):
    """A jitted `(state, batch) -> result` that explains the mistakes of its callers.

    Checks beforehand only those mistakes on which JAX would crash; other errors are explained when they occur. All
    further attributes are those of the wrapped function.

    Args:
      function: from `jax.jit`, compiled or not, or a `CheckedStep`.
      mesh: for which it was made.
      check: called with each batch before the step.
      leaves: for a compiled step, the names of the batch's leaves.
    """

    def __init__(
        self,
        function: Any,
        mesh: Mesh,
        check: Check | None = None,
        leaves: frozenset[str] | None = None,
    ):
        self._function, self._mesh, self._check, self._leaves = function, mesh, check, leaves

    @property
    def mesh(self) -> Mesh:
        """The mesh for which it was made."""
        return self._mesh

    def __call__(self, state: TrainState, batch: Any) -> R:
        """Run the step.

        Raises:
          UserError: a state that was passed to an earlier step, arguments on other devices than the mesh's, a batch
            without a leaf that the model reads, or one that the check refuses.
        """
        refuse_donated(state)
        if self._check is not None:
            self._check(batch)
        try:
            result: R = self._function(state, batch)
            return result
        except (KeyError, TypeError, ValueError) as error:
            self._explain(error, state, batch)
            raise

    def lower(self, state: TrainState, batch: Any) -> Lowered:
        """Lower it, as a `jax.jit` function is lowered.

        Raises:
          UserError: a batch without a leaf that the model reads.
        """
        try:
            lowered = self._function.lower(state, batch)
        except (KeyError, TypeError, ValueError) as error:
            self._explain(error, state, batch)
            raise
        return Lowered(lowered, lambda compiled: JittedStep(compiled, self._mesh, self._check, frozenset(batch)))

    def __getattr__(self, name: str) -> Any:
        if name == "_function":  # not set yet while a copy is made
            raise AttributeError(name)
        return getattr(self._function, name)

    def _explain(self, error: Exception, state: Any, batch: Any) -> None:
        """Raise a UserError that names the cause of the error, if it is a known one."""
        if isinstance(error, UserError):
            return
        _explain_devices(error, {"state": state, "batch": batch}, {*self._mesh.devices.flat})
        if not isinstance(batch, Mapping):
            return
        if isinstance(error, KeyError) and error.args[0] not in batch and _reads(error.__traceback__, {*batch}):
            raise UserError(
                f"the model reads {error.args[0]!r} from the batch, which has only {', '.join(sorted(batch))}; add it "
                "to the batch, or correct the name"
            ) from error
        if self._leaves is not None and self._leaves != {*batch}:
            raise UserError(
                f"the step was compiled for a batch of {', '.join(sorted(self._leaves))}, and was given one of "
                f"{', '.join(sorted(batch))}; give it the same leaves"
            ) from error


def refuse_donated(state: Any) -> None:
    """Refuse a state that was donated, on which JAX may crash if there are several devices; and any other kind.

    Raises:
      UserError: another kind of argument; or the memory of the state now belongs to a later one.
    """
    require_kind("the state", state, TrainState, "make one with init_state")
    step = state.step
    if isinstance(step, jax.Array) and not isinstance(step, jax.core.Tracer) and step.is_deleted():
        raise UserError(
            "this state was passed to a train step before, which donated its memory to the next state; go on with the "
            "state that the step returned, or copy what you keep: jax.tree.map(jnp.copy, state)"
        )


def check_batch(batch: Any, partitioner: Partitioner) -> None:
    """Refuse a wrong batch, while a step is traced.

    Raises:
      UserError: not a dict of arrays with the same number of rows; or a sequence length that the mesh does not divide.
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
        if not isinstance(leaf, jax.Array) or isinstance(leaf, jax.core.Tracer):  # which is on no device
            continue
        if getattr(leaf, "committed", False) and leaf.sharding.device_set != devices:
            name = dotted(path)
            raise UserError(
                f"{name} is on {_named(leaf.sharding.device_set)}, but the step runs on a mesh of "
                f"{_named(devices)}; make the state with init_state, and put batches on the mesh too: "
                "jax.device_put(array, partitioner.sharding(('batch', 'seq')[:array.ndim]))"
            ) from error


def _named(devices: set[jax.Device]) -> str:
    names = [f"{d.platform}:{d.id}" for d in sorted(devices, key=lambda d: d.id)]
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def _reads(traceback: TracebackType | None, leaves: set[str]) -> bool:
    """Whether the frame that raised has a local variable that is a batch with these leaves, or a context with one."""
    if traceback is None:
        return False
    while traceback.tb_next is not None:
        traceback = traceback.tb_next
    held = [getattr(value, "inputs", value) for value in traceback.tb_frame.f_locals.values()]
    return any(isinstance(value, Mapping) and {*value} == leaves for value in held)
