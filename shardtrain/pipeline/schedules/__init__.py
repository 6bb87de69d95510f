"""Pipeline schedules: tables of the action of each rank in each tick, and their checks, buffers, costs and pictures.

A schedule is a function `(ranks, microbatches, chunks) -> Schedule` in a file of its own; `register` gives it a name.
"""

from shardtrain.pipeline.schedules import gpipe, interleaved, one_f_one_b, zb_h1, zb_v  # noqa: F401  (they register)
from shardtrain.pipeline.schedules.buffers import Program, Segment, allocate
from shardtrain.pipeline.schedules.build import ring, tabulate, vee, weights_last
from shardtrain.pipeline.schedules.check import check, check_trains
from shardtrain.pipeline.schedules.check_program import check_program
from shardtrain.pipeline.schedules.csv_file import from_csv, to_csv
from shardtrain.pipeline.schedules.forward import forward
from shardtrain.pipeline.schedules.registry import Entry, get, make, published_order, register, registered
from shardtrain.pipeline.schedules.schedule import Action, PublishedOrder, Schedule
from shardtrain.pipeline.schedules.simulate import Costs, Simulation, bubble_warning, simulate

__all__ = [
    "Action",
    "Costs",
    "Entry",
    "Program",
    "PublishedOrder",
    "Schedule",
    "Segment",
    "Simulation",
    "allocate",
    "bubble_warning",
    "check",
    "check_program",
    "check_trains",
    "forward",
    "from_csv",
    "get",
    "make",
    "published_order",
    "register",
    "registered",
    "ring",
    "simulate",
    "tabulate",
    "to_csv",
    "vee",
    "weights_last",
]
