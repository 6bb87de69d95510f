"""Optimizers by name. Roles say what decays and what muon takes; stacked layers are updated as if separate."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeAlias, get_args

import jax
import numpy as np
import optax
from jax.tree_util import tree_map_with_path

from shardtrain.errors import UserError, described, did_you_mean, refuse, require_kind
from shardtrain.host.import_path import accepts, find
from shardtrain.host.typed import is_number, typed
from shardtrain.optim.clipping import clipped
from shardtrain.optim.moments import Moments, with_moments
from shardtrain.optim.per_layer import abstract, over_layers, probe, slices
from shardtrain.optim.schedule_free import check_average, schedule_free_adamw, schedule_free_sgd
from shardtrain.weights.layout import shardings_like
from shardtrain.weights.paths import Path, dotted
from shardtrain.weights.trained import trained
from shardtrain.weights.weight import Role, Weight

Transform: TypeAlias = optax.GradientTransformation
Rate: TypeAlias = optax.Schedule | float

OPTIMIZERS: dict[str, Callable[..., Transform]] = {
    "adamw": optax.adamw,
    "lion": optax.lion,
    "sgd": optax.sgd,
    "adafactor": optax.adafactor,
    "muon": optax.contrib.muon,
    "schedule_free_adamw": schedule_free_adamw,
    "schedule_free_sgd": schedule_free_sgd,
}
_SCHEDULE_FREE = (schedule_free_adamw, schedule_free_sgd)
# None of their statistics spans a tensor, so stacking cannot change them.
_ELEMENTWISE = (optax.adamw, optax.lion, optax.sgd, *_SCHEDULE_FREE)
_MASKS = ("mask", "weight_decay_mask")
# Those for which the learning rate of a wide matrix is known to scale with 1 / width (Adam's class of muP).
_SCALABLE = (optax.adamw, optax.lion)
# Options of optax that follow from our own arguments, and from which ones.
_DERIVED = {
    "learning_rate": "lr",
    "muon_weight_dimension_numbers": "the roles and dims of the weights",
} | dict.fromkeys(("weight_decay", "weight_decay_rate", "adam_weight_decay", *_MASKS), "weight_decay and decay_roles")


@typed
def optimizer(
    type: str,
    weights: Any,
    *,
    lr: Rate,
    clip_norm: float | None = None,
    weight_decay: float = 0.0,
    decay_roles: Sequence[Role] = ("matrix", "embedding", "head", "router"),
    per_layer: bool | None = None,
    moments: Moments | None = None,
    **options: Any,
) -> Transform:
    """Return an optimizer over a tree of weights. Its state mirrors the params; each leaf is laid out like its weight.

    The order is: clipping by the global norm, the optimizer, decay. Weight decay is decoupled, and the same for all
    optimizers: an update also subtracts `lr * weight_decay * w`. (A factory that takes both `weight_decay` and a mask
    gives it its own meaning: lamb decays within the trust ratio.)

    Args:
      type: `adamw`, `lion`, `sgd`, `adafactor`, `muon` (arXiv:2502.16982; matrices by role, AdamW for the
        rest), `schedule_free_adamw`, `schedule_free_sgd`, or the import path of a factory, such as `optax.lamb`.
      weights: nested dicts of `Weight`, congruent with the params. Frozen ones are left out.
      lr: learning rate, or a schedule over the number of updates made so far.
      clip_norm: largest norm of the whole gradient, over all weights together.
      weight_decay: 0 means none.
      decay_roles: roles of the weights that decay.
      per_layer: treat each slice of a stacked weight as a separate weight. This is the default wherever it matters;
        False is for a factory that couples weights on purpose.
      moments: how they are stored, see `with_moments`; by default as in optax, in the dtype of the weights.
      options: passed on to the optax factory.

    Raises:
      UserError: a type, role or option is unknown (names the nearest known one); a number is out of range; or the
        factory cannot work on these weights, or not on one layer at a time.
    """
    for weight in jax.tree.leaves(weights) or [None]:
        require_kind("what optimizer is given as weights", weight, Weight, "pass model.weights of your ModelDef")
    weights = trained(weights, weights)
    factory = _factory(type)
    refuse(option_problems(type, options))
    for role in decay_roles:
        if role not in get_args(Role):
            raise UserError("optimizer.decay_roles", role, "there is no such role", did_you_mean(role, get_args(Role)))
    _check_numbers(lr, clip_norm, weight_decay)
    if factory in _SCHEDULE_FREE:
        check_average(type, weights)
    if per_layer is False and factory in OPTIMIZERS.values() and factory not in _ELEMENTWISE:
        rule = f"{type} would then mix the layers of a stack"
        raise UserError("optimizer.per_layer", per_layer, rule, "drop it, or set it to true")

    apart = factory not in _ELEMENTWISE if per_layer is None else per_layer
    decays = jax.tree.map(lambda w: w.role in decay_roles, weights)
    tx = _build(type, slices(weights) if apart else weights, lr, weight_decay, decays, options)
    if factory not in OPTIMIZERS.values():
        probe(f"optimizer {type}", tx, weights, apart)
    if apart:
        tx = over_layers(tx, weights)
    if moments is not None:
        tx = with_moments(tx, weights, moments)
    return tx if clip_norm is None else clipped(tx, clip_norm)


def _check_numbers(lr: float | optax.Schedule, clip_norm: float | None, weight_decay: float) -> None:
    if not callable(lr):
        require_kind("optimizer lr", lr, (float, int), "give a positive number, or a schedule of the step")
    for name, value, example in (("lr", lr, 1.0e-3), ("clip_norm", clip_norm, 1.0)):
        if isinstance(value, float | int) and not (value > 0 and math.isfinite(value)):
            raise UserError(f"optimizer.{name}", value, "must be a positive number", f"for example {example}")
    if not (weight_decay >= 0 and math.isfinite(weight_decay)):
        raise UserError("optimizer.weight_decay", weight_decay, "must be a number of 0 or more", "use 0 for no decay")


def state_shardings(tx: Transform, params: Any, weights: Any) -> Any:
    """Return the layout of the state of an optimizer: that of the weights to which it belongs (see `shardings_like`).

    Args:
      tx: from `optimizer`, or any optax transform.
      params: arrays or `jax.ShapeDtypeStruct`s, with `NamedSharding`s.
      weights: tree of `Weight`, congruent with `params`.

    Returns:
      Tree of `NamedSharding`, congruent with `tx.init(params)`.

    Raises:
      UserError: the dims of a leaf cannot be traced to those of its weight. Nothing large is ever replicated.
    """
    return shardings_like(jax.eval_shape(tx.init, abstract(weights)), params, weights)


def _factory(type: str) -> Callable[..., Transform]:
    known = type.removeprefix("optax.").removeprefix("contrib.")  # Optax's own, as far as they are in the table
    if known in OPTIMIZERS:
        return OPTIMIZERS[known]
    module, _, name = type.partition(":") if ":" in type else type.rpartition(".")
    if not module or not name:
        fix = f"{did_you_mean(type, OPTIMIZERS)} (or an import path such as optax.lamb or package.module:factory)"
        raise UserError("optimizer.type", type, "there is no such optimizer", fix)
    factory: Callable[..., Transform] = find(f"{module}:{name}", "factory", "optimizer.type")
    return factory


def option_problems(type: str, options: Mapping[str, Any]) -> Iterator[UserError]:
    """Find the mistakes in the type of an optimizer and the options for its factory.

    Raises:
      UserError: there is no such optimizer.
    """
    accepted = inspect.signature(factory := _factory(type)).parameters
    if not accepts(accepted, "learning_rate"):
        fix = "name a factory that takes one, such as optax.lamb"
        yield UserError("optimizer.type", type, "this factory takes no learning_rate", fix)
    for name, value in options.items():
        key = f"optimizer.options.{name}"
        if name in _DERIVED:
            yield UserError(key, value, f"{name} follows from {_DERIVED[name]}", "set those instead")
        elif not accepts(accepted, name):
            fix = did_you_mean(name, sorted({*accepted} - {*_DERIVED}))
            yield UserError(key, value, f"{type} has no such option", fix)
        elif name in accepted and is_number(default := accepted[name].default):
            may_be_none = value is None and "None" in str(accepted[name].annotation)
            if not (is_number(value) or isinstance(value, jax.Array | np.ndarray) or may_be_none):
                rule = f"must be a number, not {described(value)}"
                yield UserError(key, value, rule, f"its default is {default}")
            elif name == "b1" and factory in _SCHEDULE_FREE and isinstance(value, float | int) and not 0 < value < 1:
                yield UserError(key, value, "must be above 0 and below 1", f"its default is {default}")


def _build(type: str, weights: Any, lr: Rate, weight_decay: float, decays: Any, options: dict[str, Any]) -> Transform:
    factory = _factory(type)
    accepted = inspect.signature(factory).parameters
    mask = next((name for name in _MASKS if name in accepted), None)
    given = {"learning_rate": lr} | options
    groups = [(lr, decays)]
    if scaled := any(w.lr_scale != 1 for w in jax.tree.leaves(weights)):
        _check_scalable(type, factory)
    if factory is optax.contrib.muon:
        # Decayed here, because optax decays its AdamW half without a mask, and that half may have its own rate.
        given["muon_weight_dimension_numbers"] = tree_map_with_path(_muon_dims, weights)
        is_matrix = jax.tree.map(lambda w: w.role == "matrix", weights)
        if (other := options.get("adam_learning_rate")) is not None:
            groups = [
                (lr, jax.tree.map(lambda d, m: d and m, decays, is_matrix)),
                (other, jax.tree.map(lambda d, m: d and not m, decays, is_matrix)),
            ]
    elif "weight_decay" in accepted and mask and not scaled:
        given |= {"weight_decay": weight_decay, mask: decays}
        groups = []
    elif "weight_decay" in accepted:
        given["weight_decay"] = 0.0
    try:
        tx = factory(**given)
    except (TypeError, ValueError) as error:
        raise UserError(f"optimizer {type} with options {options}: {error}") from error
    if scaled:  # before the decay, which muP does not scale
        tx = optax.chain(tx, _scale_by(jax.tree.map(lambda w: w.lr_scale, weights)))
    if not weight_decay or not groups:
        return tx
    return optax.chain(tx, *(optax.add_decayed_weights(_decay(r, weight_decay), m) for r, m in groups))


def _check_scalable(type: str, factory: Callable[..., Transform]) -> None:
    if factory not in _SCALABLE:
        rule = "the model asks for learning rates that depend on width (mup_base), which are known for adamw and lion"
        raise UserError("optimizer.type", type, rule, "use one of these, or a model without mup_base")


def _scale_by(scales: Any) -> Transform:
    return optax.stateless(lambda updates, _: jax.tree.map(lambda u, s: u if s == 1 else u * s, updates, scales))


def _decay(lr: Rate, weight_decay: float) -> optax.Schedule:
    return lambda count: -weight_decay * (lr(count) if callable(lr) else lr)


def _muon_dims(path: Path, weight: Weight) -> optax.contrib.MuonDimensionNumbers | None:
    if weight.role != "matrix":
        return None
    if not weight.input_dims or not weight.output_dims:
        raise UserError(
            f"muon needs input and output dims, but matrix {dotted(path)} of shape {weight.shape} has "
            f"{weight.inputs} input dims after {weight.stack} stack dims; declare `inputs`, or another role"
        )
    return optax.contrib.MuonDimensionNumbers(weight.input_dims, weight.output_dims)


def updates_made(opt_state: Any, otherwise: jax.Array) -> jax.Array:
    """Return how many updates an optimizer has made, by its own count, which its schedule uses.

    Args:
      opt_state: its state.
      otherwise: the result for a state without a count.
    """
    leaves = jax.tree_util.tree_leaves_with_path(opt_state)
    return next((leaf for path, leaf in leaves if dotted(path[-1:]) == "count" and leaf.shape == ()), otherwise)
