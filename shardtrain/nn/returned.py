"""Checks of a user's functions and of the values that they return, made while the step is traced.

The compiled step contains none of them.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from shardtrain.errors import UserError, described, one, require_kind
from shardtrain.weights.precision import at_least_float32

#: `{name: (sum, weight)}`, float32 scalars at least.
Sums = dict[str, tuple[jax.Array, jax.Array]]

#: Names of the values that the library itself reports of a step.
RESERVED = (
    "loss",
    "weight",
    "grad_norm",
    "lr",
    "skipped",
    "skipped_in_row",
    "step",
    "step_time_s",
    "tokens_per_s",
    "mfu",
    "memory_bytes",
)
_HELD_OUT = "eval_"


def built(make: Any) -> nnx.Module:
    """Build the module of `make`, as shapes.

    Raises:
      UserError: `make` is not a function from `nnx.Rngs` to a module, or the module keeps bare arrays.
    """
    fix = "write ModelDef(lambda rngs: MyModel(..., rngs=rngs))"
    if isinstance(make, nnx.Module) or not callable(make):
        raise UserError(f"ModelDef was given {described(make)}, but takes a function from nnx.Rngs to a module; {fix}")
    name = getattr(make, "__name__", type(make).__name__)
    try:
        if isinstance(make, type):  # the signature of an nnx class itself says nothing
            inspect.signature(make.__init__).bind(None, None)  # type: ignore[misc]
        else:
            inspect.signature(make).bind(None)
    except TypeError as error:
        raise UserError(
            f"ModelDef calls {name} with nnx.Rngs alone, which it does not accept ({error}); {fix}"
        ) from None
    except ValueError:  # it has no signature to read
        pass

    def build() -> nnx.Module:
        module = make(nnx.Rngs(0))
        require_kind(f"what {name} returned to ModelDef", module, nnx.Module, f"return a module of flax.nnx; {fix}")
        return module

    with nnx.use_eager_sharding(False):
        module = nnx.eval_shape(build)
    refuse_bare_arrays(module)
    return module


def checked_loss(function: str, returned: Any) -> Sums:
    """Check the `(loss_sum, weight_sum, metrics)` of a head or a loss function.

    Returns:
      The metrics, preceded by the pair `loss`, in at least float32.

    Raises:
      UserError: it is something else, or the name of a metric is taken; names the function and the value.
    """
    if not isinstance(returned, tuple | list) or len(returned) != 3:
        raise UserError(
            f"{function} returned {described(returned)}, but must return (loss_sum, weight_sum, metrics): two scalars, "
            "and a dict of (sum, weight) pairs, {} for none"
        )
    loss, weight, metrics = returned
    loss, weight = _scalar(f"loss_sum of {function}", loss), _scalar(f"weight_sum of {function}", weight)
    return {"loss": (loss, weight), **checked_sums(function, "metric", metrics)}


def checked_block(function: str, x: Any, returned: Any) -> tuple[Any, Sums]:
    """Check the `(x, aux)` that a block returned for `x`.

    Raises:
      UserError: it is something else, the returned `x` differs in structure, shape or dtype, or the name of an
        auxiliary term is taken.
    """
    if not isinstance(returned, tuple | list) or len(returned) != 2:
        raise UserError(
            f"{function} returned {described(returned)}, but a block must return (x, aux): x with the shape and dtype "
            "of its input, and a dict of (sum, weight) pairs, {} for none"
        )
    y, aux = returned
    came, went = (jax.tree.map(described, tree) for tree in (x, y))
    if came != went:
        raise UserError(
            f"{function} was given x of {came} and returned one of {went}; a block must keep structure, shape and dtype"
        )
    return y, checked_sums(function, "auxiliary term", aux)


def checked_rows(function: str, x: Any, rows: int) -> Any:
    """Check that an embedder returned arrays `[rows, ...]`.

    Raises:
      UserError: it returned something else.
    """
    leaves = jax.tree.leaves(x)
    wrong = [leaf for leaf in leaves if not isinstance(leaf, jax.Array) or leaf.shape[:1] != (rows,)]
    if wrong or not leaves:
        raise UserError(
            f"{function} returned {described(wrong[0] if wrong else x)}, but must return arrays with a first dim of "
            f"the batch's {rows} rows, [{rows}, ...]"
        )
    return x


def checked_sums(function: str, kind: str, sums: Any) -> Sums:
    """Check a dict of `{name: (sum, weight)}`; returns it in at least float32.

    Raises:
      UserError: it is something else, or a name is taken.
    """
    if not isinstance(sums, Mapping):
        raise UserError(
            f"{function} returned {described(sums)} for its {kind}s, but must return a dict of (sum, weight) pairs by "
            "name, {} for none"
        )
    for name, pair in sums.items():
        if not isinstance(name, str):
            raise UserError(f"{function} returned for a name of its {kind}s {described(name)}; a name is text")
        if name in RESERVED or name.startswith(_HELD_OUT):
            raise UserError(
                f"{function} returned, among its {kind}s, {name!r}, which is how the step names a value of its own; "
                f"rename it (taken are {', '.join(RESERVED)}, and names that begin with {_HELD_OUT})"
            )
        if not isinstance(pair, tuple | list) or len(pair) != 2:
            raise UserError(
                f"{function} returned {described(pair)} for the {kind} {name!r}, but must return a (sum, weight) pair; "
                "the step divides, once, over the global batch"
            )
    return {
        name: (
            _scalar(f"sum of the {kind} {name!r} of {function}", pair[0]),
            _scalar(f"weight of the {kind} {name!r} of {function}", pair[1]),
        )
        for name, pair in sums.items()
    }


def joined(sums: Sums, aux: Sums) -> Sums:
    """Join the sums of loss and metrics with those of the auxiliary terms.

    Raises:
      UserError: a metric and an auxiliary term have the same name.
    """
    if both := sums.keys() & aux.keys():
        raise UserError(
            f"{min(both)!r} names a metric of the head and an auxiliary term of a block, so that one would replace the "
            "other; rename one of them"
        )
    return sums | aux


def refuse_sown(module: nnx.Module) -> None:
    """Refuse variables that `self.sow` or `self.perturb` left in a module in its forward pass.

    Raises:
      UserError: there is one; names it.
    """
    for path, variable in nnx.to_flat_state(nnx.state(module)):
        if isinstance(variable, nnx.Intermediate | nnx.Perturbation):
            raise UserError(
                f"the forward pass of {type(module).__name__} keeps {'.'.join(map(str, path))}, "
                f"{one(type(variable))} (of self.sow or self.perturb), which a step would lose; return it as a "
                "metric, a (sum, weight) pair, or drop it"
            )


def refuse_bare_arrays(module: Any) -> None:
    """Refuse JAX arrays that are attributes of a module themselves: they are not part of its state.

    Raises:
      UserError: there is one; names the attribute.
    """
    for path, value in nnx.iter_graph(module):
        if isinstance(value, jax.Array):
            raise UserError(
                f"{type(module).__name__} keeps a bare array, {described(value)}, as its attribute "
                f"{'.'.join(map(str, path))}; declare a weight by nn.param or nnx.Param, and a value that does "
                "not train by nnx.Variable, and create a constant where it is used"
            )


def _scalar(what: str, value: Any) -> jax.Array:
    if not isinstance(value, jax.Array):
        try:
            value = jnp.asarray(value)
        except (TypeError, ValueError):
            raise UserError(f"the {what} is {described(value)}, but must be a scalar") from None
    if value.shape or jnp.issubdtype(value.dtype, jnp.complexfloating):
        raise UserError(f"the {what} is {described(value)}, but must be a real scalar: a sum over rows and positions")
    wide = at_least_float32(value.dtype) if jnp.issubdtype(value.dtype, jnp.floating) else jnp.float32
    return value if value.dtype == wide else value.astype(wide)
