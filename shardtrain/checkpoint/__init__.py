"""Checkpoints: written asynchronously, trusted only if their hashes verify, restored onto any mesh.

Each run has one directory on disk::

    checkpoints/100/                a committed step (Orbax), leaves named by dotted paths
    checkpoints/100.manifest.json   size and sha256 of each of its files; without it the step is not trusted
    checkpoints/200.corrupt/        differs from its manifest; kept as evidence, never loaded
    checkpoints/300.unverified/     committed, but the process died before the manifest was written
"""

from shardtrain.checkpoint.checkpointer import Checkpointer, Restored
from shardtrain.checkpoint.inspect import Parameter, StepRecord, list_steps, parameter_table, verify
from shardtrain.checkpoint.reading import check_weights, load_weights, read_extra
from shardtrain.checkpoint.store import FORMAT_VERSION
from shardtrain.host.lock import RunLock

__all__ = [
    "FORMAT_VERSION",
    "Checkpointer",
    "Parameter",
    "Restored",
    "RunLock",
    "StepRecord",
    "check_weights",
    "list_steps",
    "load_weights",
    "parameter_table",
    "read_extra",
    "verify",
]
