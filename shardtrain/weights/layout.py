"""Trees that follow the weights (params, optimizer state): the weight of each leaf, and the layout of each leaf."""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jax.tree_util import DictKey, GetAttrKey, tree_flatten_with_path, tree_map_with_path

from shardtrain.errors import UserError
from shardtrain.sharding import count_shards
from shardtrain.weights.paths import Path, dotted
from shardtrain.weights.weight import Weight

# The logical axes of the dims that replace `layers`. Only the middle one, the pipeline rank, may be sharded.
_LEAD_AXES: dict[int, tuple[str | None, ...]] = {1: ("layers",), 3: (None, "stages", None)}
_SMALL = 1024  # a leaf of no weight (a count, coefficients, a key) is kept on every device up to this many elements


def match_weights(tree: Any, weights: Any) -> Any:
    """Return, for each leaf of a tree, the weight to which it belongs, or `None`.

    Args:
      tree: any tree (params, gradients, the state of any optax transform).
      weights: nested dicts with `Weight` leaves. (Other leaves work too: given shardings, it finds shardings.)

    Returns:
      A tree like `tree`. A leaf belongs to the weight whose dict keys are the end of the leaf's own path or, if there
      are several, to the one with the most keys. So `state[0].mu["blocks"]["w"]` belongs to `blocks.w`, and a `count`
      to none.
    """
    by_keys = {tuple(entry.key for entry in path): leaf for path, leaf in tree_flatten_with_path(weights)[0]}

    def find(path: Path, _: Any) -> Any:
        keys: list[str] = []
        for entry in reversed(path):
            if not isinstance(entry, DictKey):
                break
            keys.insert(0, entry.key)
        return next((by_keys[tail] for i in range(len(keys)) if (tail := tuple(keys[i:])) in by_keys), None)

    return tree_map_with_path(find, tree)


def shardings_like(tree: Any, params: Any, weights: Any) -> Any:
    """Return the shardings of a tree that follows the weights, such as optimizer state.

    Args:
      tree: arrays or `jax.ShapeDtypeStruct`s.
      params: arrays or `jax.ShapeDtypeStruct`s, with `NamedSharding`s.
      weights: tree of `Weight`, congruent with `params`.

    Returns:
      Tree of `NamedSharding`, congruent with `tree`. A leaf with the shape of its weight takes the sharding of the
      weight. For a leaf of another shape (Adafactor's rows and columns, one value per block) it is derived dim by dim.
      Small leaves of no weight are replicated.

    Raises:
      UserError: the dims of a leaf cannot be traced to those of its weight. Nothing large is ever replicated.
    """
    shardings = jax.tree.map(lambda p: p.sharding, params)
    mesh = jax.tree.leaves(shardings)[0].mesh

    def derive(path: Path, leaf: Any, weight: Weight | None, sharding: NamedSharding | None) -> NamedSharding:
        if weight is None or sharding is None:
            if leaf.size > _SMALL:
                raise UserError(
                    f"state {dotted(path)} of shape {leaf.shape} belongs to no weight and is too large to "
                    "keep on every device; use an optimizer whose state mirrors the params"
                )
            return NamedSharding(mesh, PartitionSpec())
        if leaf.shape == weight.shape:
            return sharding
        spec = (*sharding.spec, *(None,) * (len(weight.shape) - len(sharding.spec)))
        if len(leaf.shape) == len(spec) and all(n % k == 0 for n, k in zip(weight.shape, leaf.shape, strict=True)):
            # One element represents several of a dim. They are split alike, unless there are fewer than devices.
            dims = [s if k % count_shards(mesh, s) == 0 else None for k, s in zip(leaf.shape, spec, strict=True)]
            kept = PartitionSpec(*dims[: len(sharding.spec)])
        else:
            kept = PartitionSpec(*_kept_dims(path, leaf.shape, weight, spec))
        return NamedSharding(mesh, kept, memory_kind=sharding.memory_kind)

    return tree_map_with_path(derive, tree, match_weights(tree, weights), match_weights(tree, shardings))


def _kept_dims(path: Path, shape: tuple[int, ...], weight: Weight, spec: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return the partition of a leaf that lacks some dims of its weight."""
    k = weight.stack if shape[: weight.stack] == weight.shape[: weight.stack] else 0
    rest, size = shape[k:], weight.shape[k:]
    if math.prod(rest) == 1:  # a scalar per weight, or a placeholder
        return (*spec[:k], *(None,) * len(rest))
    choices = [c for c in itertools.combinations(range(len(size)), len(rest)) if tuple(size[d] for d in c) == rest]
    field = next((entry.name for entry in reversed(path) if isinstance(entry, GetAttrKey)), None)
    if len(choices) > 1 and field in ("v_row", "v_col"):
        # Adafactor averages v_row over the largest dim and v_col over the second largest. For equal sizes, the sort
        # that optax uses decides.
        averaged = np.argsort(size)[-1 if field == "v_row" else -2]
        choices = [c for c in choices if averaged not in c]
    found = {tuple(spec[k + dim] for dim in c) for c in choices}
    if len(found) != 1:
        raise UserError(
            f"state {dotted(path)} of shape {shape} cannot be laid out like its weight of shape "
            f"{weight.shape}: {'more than one' if found else 'no'} choice of its dims fits; use an optimizer "
            "whose state has the shapes of the params"
        )
    return (*spec[:k], *found.pop())


@dataclasses.dataclass(frozen=True)
class Layout:
    """The place of each layer: from canonical `[layers, ...]` to live `[chunks, pipe, k, ...]` and back.

    Attributes:
      n_layers: number of layers in the canonical `[layers, ...]`.
      lead: the dims that replace `layers` in the live tree: `(n_layers,)`, or `(chunks, pipe, k)` in a pipeline.
      slots: for each layer, its flat index within `lead`. Slots without a layer contain zeros.

    Raises:
      UserError: there are more layers than slots in `lead`.
    """

    n_layers: int
    lead: tuple[int, ...]
    slots: tuple[int, ...]

    def __post_init__(self) -> None:
        room = math.prod(self.lead)
        if self.n_layers > room:
            sizes = " x ".join(map(str, self.lead))
            raise UserError(
                f"{self.n_layers} layers do not fit in {sizes} = {room} slots; use at most {room} layers, "
                "or more chunks or layers per stage"
            )
        assert len(self.lead) in _LEAD_AXES, self.lead
        assert len(self.slots) == self.n_layers == len(set(self.slots)), "one slot per layer, none shared"
        assert all(0 <= slot < room for slot in self.slots), "slots are within lead"

    def live_weight(self, weight: Weight) -> Weight:
        """Return a weight as it is in the live tree. Weights without a `layers` dim stay as they are."""
        if not _has_layers(weight):
            return weight
        return dataclasses.replace(
            weight,
            shape=(*self.lead, *weight.shape[1:]),
            axes=(*_LEAD_AXES[len(self.lead)], *weight.axes[1:]),
            stack=weight.stack - 1 + len(self.lead),
        )

    def live_weights(self, weights: Any) -> Any:
        """Return `live_weight` of each weight of a tree."""
        return jax.tree.map(self.live_weight, weights)

    def pack(self, tree: Any, weights: Any) -> Any:
        """Convert from canonical to live, inside or outside of jit.

        Args:
          tree: params, gradients or optimizer state with `[layers, ...]` leaves.
          weights: the canonical weights; they say which leaves have a `layers` dim.

        Raises:
          UserError: a leaf of a stacked weight has no `layers` dim of the size of this layout.
        """
        source = [self.n_layers] * math.prod(self.lead)  # beyond the end: filled with zero
        for layer, slot in enumerate(self.slots):
            source[slot] = layer

        def pack(x: Any) -> Any:
            live = jnp.asarray(x).at[jnp.array(source)].get(mode="fill", fill_value=0)
            return live.reshape(*self.lead, *x.shape[1:])

        return self._map(pack, (self.n_layers,), tree, weights)

    def unpack(self, tree: Any, weights: Any) -> Any:
        """Convert from live to canonical, without padding: the inverse of `pack`, with its arguments and errors."""

        def unpack(x: Any) -> Any:
            rest = x.shape[len(self.lead) :]
            return jnp.asarray(x).reshape(-1, *rest)[jnp.array(self.slots)]

        return self._map(unpack, self.lead, tree, weights)

    def _map(self, fn: Any, lead: tuple[int, ...], tree: Any, weights: Any) -> Any:
        def one(path: Path, x: Any, weight: Weight | None) -> Any:
            if weight is None or not _has_layers(weight):
                return x
            if tuple(x.shape[: len(lead)]) != lead:
                raise UserError(
                    f"{dotted(path)} has shape {tuple(x.shape)}, but the layout needs leading dims {lead}; "
                    "only one stack of layers can be laid out, and optimizer state must keep its layers "
                    "apart (per_layer)"
                )
            return fn(x)

        return tree_map_with_path(one, tree, match_weights(tree, weights))


def _has_layers(weight: Weight) -> bool:
    return weight.stack > 0 and weight.axes[0] == "layers"
