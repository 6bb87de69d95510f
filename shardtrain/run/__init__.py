"""A config becomes the parts of a job; a directory becomes a run."""

from shardtrain.run.fit import fit
from shardtrain.run.job import Job, build
from shardtrain.run.trainer import Trainer

__all__ = ["Job", "Trainer", "build", "fit"]
