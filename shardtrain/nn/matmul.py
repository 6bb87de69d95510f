"""Matmuls with sharded weights: gather the weight where it is used, scatter its gradient to where it is stored."""

from __future__ import annotations

import functools
import string
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from shardtrain.nn import float8
from shardtrain.sharding import current
from shardtrain.weights.precision import Precision

Axes = tuple[str | None, ...]
Arrays = tuple[jax.Array, ...]


def gathered(w: jax.Array, axes: Axes, dtype: Any) -> jax.Array:
    """Lay out a weight as a matmul uses it: in the compute dtype, and whole along the mesh axes that split the batch.

    This makes FSDP move weights (in the narrow dtype), never activations.
    """
    w, partitioner = narrowed(w, axes, dtype).astype(dtype), current()
    return w if partitioner is None else partitioner.constrain(w, *axes, drop=_batch_axes(axes))


def narrowed(w: jax.Array, axes: Axes, dtype: Any) -> jax.Array:
    """Cast a weight that will be gathered to the compute dtype, in the layout that it is stored in.

    Without this constraint XLA moves the gather before the cast, and gathers the wide weight. A weight that is not
    gathered is returned as it is.
    """
    partitioner = current()
    if partitioner is None or w.dtype == dtype:
        return w
    split = partitioner.spec(*axes) != partitioner.spec(*axes, drop=_batch_axes(axes))
    return partitioner.constrain(w.astype(dtype), *axes) if split else w


def scattered(w: jax.Array, axes: Axes, dtype: Any) -> jax.Array:
    """Lay out the gradient of a weight as it is stored: in the parameter's dtype, split like the parameter."""
    partitioner = current()
    return (w if partitioner is None else partitioner.constrain(w, *axes)).astype(dtype)


def added(parts: jax.Array) -> jax.Array:
    """Sum over the leading dim, which devices hold in parts, and send its own dtype (`jnp.sum` widens bfloat16).

    This is not `lax.reduce`: within a pipeline, its bfloat16 makes XLA's CPU compiler end the process (JAX 0.10.2 and
    0.12).
    """
    return jax.lax.reduce_sum(parts, (0,))


def _batch_axes(axes: Axes) -> tuple[str, ...]:
    partitioner = current()
    assert partitioner is not None
    own = partitioner.rules["experts"] if "experts" in axes else ()  # experts stay apart; their tokens travel
    return tuple(axis for axis in partitioner.rules["batch"] if axis not in own)


def einsum(equation: str, x: jax.Array, w: jax.Array, axes: Axes, precision: Precision) -> jax.Array:
    """Compute `jnp.einsum(equation, x, w)` for an activation `x` and a sharded weight `w` with logical `axes`.

    `w` has its stored dtype and layout. It is gathered in `precision.compute`, and again in the backward pass, so that
    no gathered copy stays alive. Its gradient is computed and reduced over devices in `precision.gradient`. Every label
    of the equation appears in at least two of its three terms.
    """
    return einsums((equation,), x, (w,), (axes,), precision)[0]


class _Products(NamedTuple):
    """Products of one activation with several weights: the equation, logical axes and stored dtype of each."""

    equations: tuple[str, ...]
    axes: tuple[Axes, ...]
    stored: tuple[Any, ...]
    precision: Precision


def einsums(
    equations: tuple[str, ...], x: jax.Array, ws: Arrays, axes: tuple[Axes, ...], precision: Precision
) -> Arrays:
    """Multiply one `x` with several weights; their shares of the gradient of `x` are added before devices reduce it."""
    return _einsums(_Products(equations, axes, tuple(w.dtype for w in ws), precision), x, ws)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _einsums(products: _Products, x: jax.Array, ws: Arrays) -> Arrays:
    return _einsums_fwd(products, x, ws)[0]


def _einsums_fwd(products: _Products, x: jax.Array, ws: Arrays) -> tuple[Arrays, tuple[jax.Array, Arrays]]:
    # Written out, because a remat policy does not see matmuls inside the custom_vjp itself. The backward pass starts
    # from the same narrow shards: only then does XLA share one gather between it and a rematerialised forward pass.
    equations, axes, _, precision = products
    ws = tuple(narrowed(w, names, precision.compute) for w, names in zip(ws, axes, strict=True))

    def forward(equation: str, w: jax.Array, names: Axes) -> jax.Array:
        whole = gathered(w, names, precision.compute)
        return _product(equation, x, whole, names, precision, precision.compute, float8.E4M3, float8.E4M3)

    return tuple(map(forward, equations, ws, axes)), (x, ws)


def _einsums_bwd(products: _Products, saved: tuple[jax.Array, Arrays], dys: Arrays) -> tuple[jax.Array, Arrays]:
    (x, ws), (equations, axes, stored, precision) = saved, products
    dws: list[jax.Array] = []
    dxs: dict[Any, jax.Array] = {}
    for equation, w, names, dy, dtype in zip(equations, ws, axes, dys, stored, strict=True):
        inputs, out = equation.split("->")
        x_labels, w_labels = inputs.split(",")
        whole = gathered(w, names, precision.compute)
        over, dx = _input_gradient(x_labels, w_labels, out, whole, names, dy, precision, parts=len(ws) > 1)
        dxs[over] = dxs[over] + dx if over in dxs else dx
        into_w = f"{x_labels},{out}->{w_labels}"
        dw = _product(into_w, x, dy, names, precision, precision.gradient, float8.E4M3, float8.E5M2)
        dws.append(scattered(dw, names, dtype))
    dx, *others = (dx if over is None else added(dx) for over, dx in dxs.items())
    return functools.reduce(jnp.add, others, dx), tuple(dws)


def _product(
    equation: str, a: jax.Array, b: jax.Array, axes: Axes, precision: Precision, dtype: Any, *formats: Any
) -> jax.Array:
    """Multiply in float8 where the policy says so, with the vocabulary always in the compute dtype."""
    if precision.matmul == "float8" and "vocab" not in axes:
        return float8.einsum(equation, a, b, (formats[0], formats[1]), dtype)
    return jnp.einsum(equation, a, b, preferred_element_type=dtype)


_einsums.defvjp(_einsums_fwd, _einsums_bwd)


def _input_gradient(
    x_labels: str, w_labels: str, out: str, w: jax.Array, axes: Axes, dy: jax.Array, precision: Precision, parts: bool
) -> tuple[Any, jax.Array]:
    """Compute the gradient of `x`, or with `parts` each device's share of it along a leading dim.

    XLA reduces the result of each matmul over devices immediately, even where only the sum of several is needed.

    Returns:
      The mesh axes of the leading dim, `None` where there is none, and the gradient.
    """

    def multiply(equation: str, dy: jax.Array, w: jax.Array) -> jax.Array:
        return _product(equation, dy, w, axes, precision, w.dtype, float8.E5M2, float8.E4M3)

    partitioner = current()
    if parts and partitioner is not None:
        spec = partitioner.spec(*axes, drop=_batch_axes(axes))
        split = [i for i, over in enumerate(spec) if over and w_labels[i] not in x_labels]
        if len(split) == 1:
            label, name, over = w_labels[split[0]], axes[split[0]], spec[split[0]]
            part = next(letter for letter in string.ascii_letters if letter not in w_labels + out)
            count, inside = partitioner.shards(str(name)), partitioner.sharding((name,)).mesh

            def cut(a: jax.Array, labels: str) -> tuple[jax.Array, str]:
                at = labels.index(label)
                shape = (*a.shape[:at], count, a.shape[at] // count, *a.shape[at + 1 :])
                return a.reshape(shape), labels.replace(label, part + label)

            (dy, out), (w, w_labels) = cut(dy, out), cut(w, w_labels)
            dx = multiply(f"{out},{w_labels}->{part}{x_labels}", dy, w)
            free = [PartitionSpec.UNCONSTRAINED] * len(x_labels)
            return over, jax.lax.with_sharding_constraint(dx, NamedSharding(inside, PartitionSpec(over, *free)))
    return None, multiply(f"{out},{w_labels}->{x_labels}", dy, w)
