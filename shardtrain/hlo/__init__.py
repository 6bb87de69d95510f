"""What the compiler did: a compiled program's collectives, over which mesh axes and inside which loops."""

from shardtrain.hlo.collectives import Collective, Loop, collectives
from shardtrain.hlo.order import in_flight
from shardtrain.hlo.text import Array, UnknownHLOError

__all__ = ["Array", "Collective", "Loop", "UnknownHLOError", "collectives", "in_flight"]
