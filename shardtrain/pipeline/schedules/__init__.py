"""Pipeline schedules: tables that say which rank does what in which tick, and what follows from them.

A schedule is a function `(ranks, microbatches, chunks) -> Schedule`, decorated by `register`, in a file of its own: in
this folder, where it is found by itself, or anywhere, named by its import path.
"""

import sys

from shardtrain.host.import_path import modules_of
from shardtrain.pipeline.schedules.buffers import Program, Segment, allocate
from shardtrain.pipeline.schedules.build import ring, tabulate, vee, weights_last
from shardtrain.pipeline.schedules.check import check, check_trains
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

modules_of(sys.modules[__name__])  # imports every file of this folder, so that its schedules are registered
