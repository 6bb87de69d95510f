"""The collectives of a compiled program: over which mesh axes, and inside which loops, the compiler put them."""

from shardtrain.hlo.collectives import Collective, Loop, collectives
from shardtrain.hlo.order import in_flight
from shardtrain.hlo.text import Array, UnknownHLOError

__all__ = ["Array", "Collective", "Loop", "UnknownHLOError", "collectives", "in_flight"]
