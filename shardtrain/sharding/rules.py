"""The rules table: from the logical axes of tensors to the mesh axes of the hardware."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType

from shardtrain.errors import UserError, did_you_mean
from shardtrain.sharding.mesh import AXES

LogicalAxes = Sequence[str | None]
Rules = Mapping[str, tuple[str, ...]]

#: From a logical axis to the mesh axes that split it. Data, FSDP and tensor parallelism are rows of this table.
DEFAULT_RULES: Rules = MappingProxyType(
    {
        "batch": ("island", "data", "fsdp", "expert"),
        "seq": ("context",),
        "embed": ("fsdp",),
        "mlp": ("tensor",),
        "heads": ("tensor",),
        "kv_heads": ("tensor",),
        "head_dim": (),
        "vocab": ("tensor",),
        "experts": ("expert",),
        "layers": (),
        "stages": ("pipe",),
        "norm": (),
        "positions": (),
        # The sequence between blocks: norms and the residual stream are split over `tensor`, whose all-reduce becomes a
        # reduce-scatter and an all-gather (Korthikanti et al. 2022). It follows overrides of `seq` and `batch`.
        "seq_residual": ("context", "tensor"),
    }
)


def make_rules(overrides: Mapping[str, str | Sequence[str] | None] = MappingProxyType({})) -> Rules:
    """Make the default table with some rows replaced.

    Args:
      overrides: for each logical axis, a mesh axis, several, or `None` for none. New names become new rows.

    Raises:
      UserError: a mesh axis does not exist; suggests the nearest.
    """
    table = dict(DEFAULT_RULES)
    for name, value in overrides.items():
        table[name] = () if value is None else (value,) if isinstance(value, str) else tuple(value)
        for axis in table[name]:
            if axis not in AXES:
                raise UserError(
                    f"rules.{name} names mesh axis {axis!r}, which does not exist; {did_you_mean(axis, AXES)}"
                )
    if "seq_residual" not in overrides:
        axes = dict.fromkeys([*table["seq"], *DEFAULT_RULES["seq_residual"][1:]])
        table["seq_residual"] = tuple(axis for axis in axes if axis not in table["batch"])
    return MappingProxyType(table)
