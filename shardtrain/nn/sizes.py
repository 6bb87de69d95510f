"""What a model may state in addition to its three parts: which of its options are sizes, and the FLOPs of a token."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from flax import nnx

from shardtrain.errors import UserError, described, did_you_mean
from shardtrain.nn.param import describe

#: Logical axis -> the usual name of the option that is its size.
SIZE_OPTIONS: Mapping[str, str] = MappingProxyType(
    {
        "layers": "n_layers",
        "embed": "d_model",
        "heads": "n_heads",
        "kv_heads": "n_kv_heads",
        "head_dim": "head_dim",
        "mlp": "d_ff",
        "vocab": "vocab_size",
    }
)


def size_options(cls: type) -> dict[str, str]:
    """Find the options of a model's class that are sizes, by logical axis: the usual names and those it states.

    Args:
      cls: a class with keyword options. Where they have other names than `SIZE_OPTIONS`, its attribute `size_options`
        gives these.

    Raises:
      UserError: the attribute is not such a mapping, or names an option that the class does not have.
    """
    stated = getattr(cls, "size_options", {})
    if not isinstance(stated, Mapping):
        rule = f"{cls.__name__}.size_options is {described(stated)}, but must map logical axes to options of the class"
        raise UserError("model.type", cls.__name__, rule, 'write size_options = {"embed": "hidden_size"}')
    known = inspect.signature(cls.__init__).parameters  # type: ignore[misc]
    for axis, option in stated.items():
        if option not in known:
            rule = (
                f"{cls.__name__}.size_options names {option!r} as the size of {axis!r}, which is no option of the class"
            )
            raise UserError("model.type", cls.__name__, rule, did_you_mean(str(option), known))
    return {**SIZE_OPTIONS, **stated}


def flops_per_token(model: Any, seq_len: int) -> float:
    """Count the FLOPs of a training step per token, forward and backward, for MFU.

    Args:
      model: a module. Where more counts than the matmuls with its weights, or not all of them (experts), its method
        `flops_per_token(seq_len)` says so.
      seq_len: tokens of a sequence.
    """
    stated = getattr(model, "flops_per_token", None)
    return matmul_flops(model) if stated is None else float(stated(seq_len))


def matmul_flops(model: nnx.Module) -> float:
    """Count the FLOPs per token of the matmuls with a model's weights: 6 per element, 2 of them forward.

    The output head counts, also where it is the embedding table (tied); lookups, norms and biases do not.

    Args:
      model: a module, which may hold shapes instead of arrays.

    Example:
      >>> nn.matmul_flops(nn.Linear("BSD,DF->BSF", (4, 8), ("embed", "mlp"), rngs=nnx.Rngs(0)))
      192.0
    """
    weights = [describe(variable) for _, variable in nnx.to_flat_state(nnx.state(model, nnx.Param))]
    tied = not any(weight.role == "head" for weight in weights)
    used = [w for w in weights if w.role in ("matrix", "head", "router")]
    used += [w for w in weights if tied and w.role == "embedding" and "vocab" in w.axes]
    return 6.0 * sum(weight.size for weight in used)
