"""Mesh axes, and the rules that map logical axes to them.

Layers and models name only logical axes. The partitioner of the run, which is current while a step is traced, maps them
to the mesh.
"""

from shardtrain.sharding.ambient import constrain, current, gather_residual, shards, use
from shardtrain.sharding.mesh import AXES, MeshSpec
from shardtrain.sharding.partitioner import Partitioner, count_shards
from shardtrain.sharding.rules import DEFAULT_RULES, LogicalAxes, Rules, make_rules, mesh_axes

__all__ = [
    "AXES",
    "DEFAULT_RULES",
    "LogicalAxes",
    "MeshSpec",
    "Partitioner",
    "Rules",
    "constrain",
    "count_shards",
    "current",
    "gather_residual",
    "make_rules",
    "mesh_axes",
    "shards",
    "use",
]
