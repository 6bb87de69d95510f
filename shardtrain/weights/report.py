"""A report of how much of a model is actually sharded, weight by weight."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from jax.sharding import PartitionSpec

from shardtrain.errors import UserError
from shardtrain.sharding import Partitioner, count_shards
from shardtrain.weights.paths import flatten
from shardtrain.weights.weight import Weight

#: Mesh axes that split weights; the others split only the batch or the sequence.
_WEIGHT_AXES = ("pipe", "fsdp", "expert", "tensor")


@dataclasses.dataclass(frozen=True)
class Row:
    """One weight.

    Attributes:
      path: its dotted path.
      weight: its declaration.
      spec: its partition.
      pieces: into how many pieces it is split.
    """

    path: str
    weight: Weight
    spec: PartitionSpec
    pieces: int


@dataclasses.dataclass(frozen=True)
class ShardingReport:
    """The partition of every weight.

    Attributes:
      rows: one per weight, the largest first.
      total_bytes: bytes of all parameters.
      device_bytes: bytes of the parameters on one device.
      replicated_bytes: bytes of the parameters that every device keeps whole.
      splits_weights: whether the mesh has an axis, larger than 1, that could split weights.
    """

    rows: tuple[Row, ...]
    total_bytes: int
    device_bytes: int
    replicated_bytes: int
    splits_weights: bool

    @property
    def replicated_share(self) -> float:
        """Replicated bytes over total bytes, in [0, 1]."""
        return self.replicated_bytes / max(self.total_bytes, 1)

    @property
    def unannotated(self) -> list[str]:
        """Paths of weights without logical axes. They are whole on every device because the model opted in."""
        return [row.path for row in self.rows if not row.weight.annotated]

    def check(self, max_replicated: float) -> None:
        """Refuse a layout that leaves too much of the model whole on a mesh that could split it.

        Args:
          max_replicated: largest share of replicated bytes, in [0, 1].

        Raises:
          UserError: more than `max_replicated` of the bytes are replicated; names the largest such weights.
        """
        if not self.splits_weights or self.replicated_share <= max_replicated:
            return
        worst = ", ".join(f"{row.path} ({row.weight.nbytes:,} bytes)" for row in self.rows if row.pieces == 1)
        raise UserError(
            f"{self.replicated_share:.0%} of the parameter bytes are replicated on every device, above the limit of "
            f"{max_replicated:.0%} (mesh.max_replicated): {worst[:300]}; give these weights logical axes with a "
            "rule, or raise the limit"
        )


def sharding_report(weights: Any, partitioner: Partitioner) -> ShardingReport:
    """Make the report for a tree of `Weight` under a partitioner, without any array."""
    rows = []
    for path, weight in flatten(weights).items():
        spec = partitioner.sharding(weight.axes, weight.shape, f"weight {path}").spec
        rows.append(Row(path, weight, spec, math.prod(count_shards(partitioner.mesh, part) for part in spec)))
    rows.sort(key=lambda row: -row.weight.nbytes)
    return ShardingReport(
        rows=tuple(rows),
        total_bytes=sum(row.weight.nbytes for row in rows),
        device_bytes=sum(row.weight.nbytes // row.pieces for row in rows),
        replicated_bytes=sum(row.weight.nbytes for row in rows if row.pieces == 1),
        splits_weights=any(partitioner.mesh.shape[axis] > 1 for axis in _WEIGHT_AXES),
    )
