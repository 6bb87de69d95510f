"""Mesh axes, and the rules that map logical axes to them.

Layers and models name logical axes only; the partitioner of the run, which is ambient while a step is traced, knows the
rest.
"""

from shardtrain.sharding.mesh import AXES, MeshSpec
from shardtrain.sharding.partitioner import (
    DEFAULT_RULES,
    LogicalAxes,
    Partitioner,
    Rules,
    constrain,
    current,
    gather_residual,
    make_rules,
    pieces,
    use,
)

__all__ = [
    "AXES",
    "DEFAULT_RULES",
    "LogicalAxes",
    "MeshSpec",
    "Partitioner",
    "Rules",
    "constrain",
    "current",
    "gather_residual",
    "make_rules",
    "pieces",
    "use",
]
