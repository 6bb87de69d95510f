"""The moments of any optax optimizer, stored in fewer bits: bfloat16, or 8-bit codes with a scale per block.

    Dettmers et al. 2022, "8-bit Optimizers via Block-wise Quantization", arXiv:2110.02861: blocks, section 2.1.
    Li et al. 2023, "Memory Efficient Optimizers with 4-bit States", arXiv:2309.01507: no zero for second moments.

A block is part of one dim of its weight, so codes and scales are sharded, packed and stored like the weight.
"""

from __future__ import annotations

import functools
import math
import zlib
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

import jax
import jax.numpy as jnp
import optax
from jax.tree_util import GetAttrKey, keystr, tree_leaves_with_path, tree_map_with_path

from shardtrain.errors import UserError, did_you_mean
from shardtrain.weights.layout import match_weights
from shardtrain.weights.paths import Path, dotted
from shardtrain.weights.weight import Weight

Moments: TypeAlias = Literal["float32", "bfloat16", "int8"]

#: Fields of optax's states that contain moments, and whether these are second moments: never negative, slow to change.
_FIELDS = {"mu": False, "trace": False, "nu": True, "v": True}
#: Moments of weights with fewer elements per layer stay float32, as in bitsandbytes: norms and biases.
_SMALL = 4096
#: Sizes of a block, and the number of parts into which its dim is divided if possible, for the devices that split it.
_LEAST, _MOST, _PARTS = 32, 256, 64


class Quantized(NamedTuple):
    """Moments of all weights in 8 bits.

    Attributes:
      code: int8, or uint8 for second moments, in the weight's shape; float32 where the weight is small.
      scale: float32, the largest absolute value of each block; nothing where the weight is small.
    """

    code: Any
    scale: Any


def with_moments(tx: optax.GradientTransformation, weights: Any, moments: Moments) -> optax.GradientTransformation:
    """Return the same optimizer, computing in float32, with its moments stored as `moments`.

    - `float32`: whatever the dtype of the weights (optax takes theirs).
    - `bfloat16`: 2 bytes each. Second moments are rounded at random, in proportion to the distance: a step changes them
      by less than half of the last place, which rounding to nearest would undo each time.
    - `int8`: 1 byte each, and 4 for each block of 32 to 256. A code is the square root of a first moment's share of the
      largest one in its block, or the fourth root for a second moment (rounded at random, never down to 0).

    The state is that of `tx`, except for dtypes, and for a `Quantized` in place of each int8 field.

    Args:
      tx: the optimizer.
      weights: nested dicts of `Weight`, congruent with the params.
      moments: one of the three.

    Raises:
      UserError: `moments` is something else, or the state of the optimizer has no moments in a known form.
    """
    if moments not in (known := get_args(Moments)):
        rule = f"must be one of {', '.join(known)}"
        raise UserError("optimizer.moments", moments, rule, did_you_mean(str(moments), known))

    def init(params: Any) -> Any:
        # Behind a barrier. Otherwise XLA computes the codes of all the zeros while it compiles.
        state, count = jax.lax.optimization_barrier((tx.init(jax.tree.map(_wide, params)), jnp.zeros((), jnp.int32)))
        return _fields(functools.partial(_store, moments, count), state, weights)

    def update(grads: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        state = _fields(_load, state, weights)
        updates, state = tx.update(jax.tree.map(_wide, grads), state, jax.tree.map(_wide, params))
        return updates, _fields(functools.partial(_store, moments, _count(state)), state, weights)

    state = jax.eval_shape(tx.init, jax.tree.map(lambda w: jax.ShapeDtypeStruct(w.shape, w.dtype), weights))
    found = {name for path, _ in tree_leaves_with_path(state) for name in map(_field, path) if name}
    if moments != "float32" and (not found or (any(map(_FIELDS.get, found)) and _count(state) is None)):
        raise UserError(
            f"this optimizer keeps no {' or '.join(_FIELDS)} with a count of its updates, so its moments cannot be "
            f"{moments}; drop moments, or take another optimizer"
        )
    return optax.GradientTransformation(init, update)


def blocks(weight: Weight) -> tuple[int, int] | None:
    """Return which dim of a weight is divided into blocks, and their size; `None` if the weight has no blocks.

    A small weight has none, and neither has a dim without a suitable divisor. The result follows from the shape of one
    layer only, so checkpoints fit any mesh and any pipeline. Tokens differ in scale by their frequency, so no block
    spans several: the dim is the longest one that is not the vocabulary.
    """
    dims = [dim for dim in range(weight.stack, len(weight.shape)) if weight.axes[dim] != "vocab"]
    if not dims or math.prod(weight.shape[weight.stack :]) < _SMALL:
        return None
    dim = max(dims, key=lambda d: weight.shape[d])
    size = weight.shape[dim]
    parts = next((math.gcd(size, p) for p in (_PARTS, 32, 16, 8, 4, 2) if size // math.gcd(size, p) >= _LEAST), 1)
    block = next(n for n in range(min(_MOST, size // parts), 0, -1) if (size // parts) % n == 0)
    return None if block < _LEAST // 2 else (dim, block)  # nearly a prime number: scales would outweigh codes


def encode(x: jax.Array, dim: int, block: int, noise: jax.Array | None) -> tuple[jax.Array, jax.Array]:
    """Return codes in the shape of `x`, and the scale of each block: `x.shape` with dim `dim` divided by `block`.

    Args:
      x: moments.
      dim: the dim that is divided into blocks.
      block: size of a block.
      noise: for second moments, uniform in [0, 1) and of a shape that broadcasts to that of `x`; `None` for first
        moments, which are rounded to nearest.
    """
    x_blocks = _in_blocks(x, dim, block)
    scale = jnp.abs(x_blocks).max(dim + 1, keepdims=True)
    share = _merged(x_blocks / jnp.where(scale > 0, scale, 1), dim)
    if noise is None:
        code = (jnp.sign(share) * jnp.round(127 * jnp.sqrt(jnp.abs(share)))).astype(jnp.int8)
    else:
        low = jnp.floor(255 * jnp.sqrt(jnp.sqrt(share)))
        below, above = (low / 255) ** 4, ((low + 1) / 255) ** 4
        up = noise * (above - below) < share - below
        code = jnp.clip(low + up, jnp.where(share > 0, 1, 0), 255).astype(jnp.uint8)
    return code, jnp.squeeze(scale, dim + 1)


def decode(code: jax.Array, scale: jax.Array, dim: int) -> jax.Array:
    """Return the float32 values of codes."""
    root = code.astype(jnp.float32) / (255 if code.dtype == jnp.uint8 else 127)
    share = jnp.square(jnp.square(root)) if code.dtype == jnp.uint8 else root * jnp.abs(root)
    return _merged(_in_blocks(share, dim, code.shape[dim] // scale.shape[dim]) * jnp.expand_dims(scale, dim + 1), dim)


def round_at_random(x: jax.Array, noise: jax.Array) -> jax.Array:
    """Round float32 to bfloat16, up or down, so that the mean is exact. `noise` is uniform in [0, 1)."""
    bits = jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.uint32)
    bits = bits + (noise * 2**16).astype(jnp.uint32)
    return jax.lax.bitcast_convert_type(bits & jnp.uint32(0xFFFF0000), jnp.float32).astype(jnp.bfloat16)


def _store(moments: Moments, count: jax.Array, path: Path, tree: Any, of: Any) -> Any:
    """Return one field of the state as it is stored."""
    second = _FIELDS[_field(path[-1]) or ""]

    def one(leaf_path: Path, x: jax.Array, weight: Weight | None) -> Any:
        if weight is None or x.shape != weight.shape or moments == "float32":
            return x, optax.MaskedNode()
        block, noise = blocks(weight), None
        if second and (block or moments == "bfloat16"):
            # The same for all layers of a stack, and so independent of the layout of a pipeline.
            key = jax.random.fold_in(jax.random.key(zlib.crc32(dotted((*path, *leaf_path)).encode())), count)
            noise = jax.random.uniform(key, x.shape[weight.stack :])
        if moments == "bfloat16":
            return x.astype(jnp.bfloat16) if noise is None else round_at_random(x, noise), optax.MaskedNode()
        return encode(x, *block, noise) if block else (x, optax.MaskedNode())

    pairs = tree_map_with_path(one, tree, of)
    code, scale = (jax.tree.map(lambda _, pair, i=i: pair[i], tree, pairs) for i in (0, 1))
    return Quantized(code, scale) if moments == "int8" else code


def _load(path: Path, tree: Any, of: Any) -> Any:
    """Return one field of the state as the optimizer needs it."""
    if not isinstance(tree, Quantized):
        return jax.tree.map(_wide, tree)

    def one(code: jax.Array, scale: Any, weight: Weight | None) -> jax.Array:
        block = None if weight is None or isinstance(scale, optax.MaskedNode) else blocks(weight)
        return decode(code, scale, block[0]) if block else code

    return jax.tree.map(one, tree.code, tree.scale, of.code)


def _fields(fn: Callable[[Path, Any, Any], Any], state: Any, weights: Any) -> Any:
    """Return `state` with `fn(path, field, weights of its leaves)` in place of each field of moments."""

    def is_field(path: Path, _: Any) -> bool:
        return bool(path) and _field(path[-1]) is not None

    def one(path: Path, node: Any, of: Any) -> Any:
        return fn(path, node, of) if is_field(path, node) else node

    return tree_map_with_path(one, state, match_weights(state, weights), is_leaf=is_field, is_leaf_takes_path=True)


def _field(entry: Any) -> str | None:
    return entry.name if isinstance(entry, GetAttrKey) and entry.name in _FIELDS else None


def _count(state: Any) -> Any:
    """Return the number of updates made so far, as optax itself counts them."""
    return next((leaf for path, leaf in tree_leaves_with_path(state) if keystr(path[-1:]) == ".count"), None)


def _wide(x: Any) -> Any:
    narrow = jnp.issubdtype(x.dtype, jnp.floating) and jnp.finfo(x.dtype).bits < 32
    return x.astype(jnp.float32) if narrow else x


def _in_blocks(x: jax.Array, dim: int, block: int) -> jax.Array:
    return x.reshape(*x.shape[:dim], x.shape[dim] // block, block, *x.shape[dim + 1 :])


def _merged(x: jax.Array, dim: int) -> jax.Array:
    return x.reshape(*x.shape[:dim], -1, *x.shape[dim + 2 :])
