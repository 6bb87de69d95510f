"""The rules table: from the logical axes of tensors to the mesh axes of the hardware."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import MappingProxyType

from shardtrain.errors import UserError, did_you_mean, refuse
from shardtrain.host.typed import typed
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


def mesh_axes(part: str | Iterable[str] | None) -> tuple[str, ...]:
    """Return the mesh axes of a row of the rules, or of an entry of a `PartitionSpec`.

    Args:
      part: one axis, several, or `None` for none.
    """
    return (part,) if isinstance(part, str) else tuple(part or ())


@typed
def make_rules(overrides: Mapping[str, str | Sequence[str] | None] = MappingProxyType({})) -> Rules:
    """Make the default table with some rows replaced.

    Args:
      overrides: for each logical axis, a mesh axis, several, or `None` for none. New names become new rows.

    Raises:
      UserError: a mesh axis does not exist (suggests the nearest), or a row names it twice.
    """
    table = dict(DEFAULT_RULES)
    for name, value in overrides.items():
        table[name] = mesh_axes(value)
        refuse(row_problems(name, table[name]))
    if "seq_residual" not in overrides:
        axes = dict.fromkeys([*table["seq"], *DEFAULT_RULES["seq_residual"][1:]])
        table["seq_residual"] = tuple(axis for axis in axes if axis not in table["batch"])
    return MappingProxyType(table)


def row_problems(name: str, axes: Sequence[str]) -> Iterator[UserError]:
    """Find the names in a row of the rules that are not mesh axes, or stand there twice."""
    for axis, times in Counter(axes).items():
        if axis not in AXES:
            yield UserError(f"rules.{name}", axis, "there is no such mesh axis", did_you_mean(str(axis), AXES))
        elif times > 1:
            rule = f"a mesh axis can split a dim once, and {axis} is named {times} times"
            yield UserError(f"rules.{name}", list(axes), rule, f"name {axis} once")
