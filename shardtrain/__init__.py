"""shardtrain: train neural networks that are too large, or too slow, for one accelerator.

The names below are the public surface, loaded when first used. Rooms: `shardtrain.nn` (layers), `shardtrain.models`,
`shardtrain.data`, `shardtrain.checkpoint`, `shardtrain.metrics`, `shardtrain.hlo`.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from shardtrain.checkpoint import Checkpointer as Checkpointer
    from shardtrain.config import ConfigError as ConfigError
    from shardtrain.config import RunConfig as RunConfig
    from shardtrain.config import load_config as load_config
    from shardtrain.config import parse_config as parse_config
    from shardtrain.data import Loader as Loader
    from shardtrain.data import open_source as open_source
    from shardtrain.errors import UserError as UserError
    from shardtrain.launch.devices import select_devices as select_devices
    from shardtrain.optim import optimizer as optimizer
    from shardtrain.run import Trainer as Trainer
    from shardtrain.run.fit import fit as fit
    from shardtrain.run.job import Job as Job
    from shardtrain.run.job import build as build
    from shardtrain.run.writer import Writer as Writer
    from shardtrain.run.writer import sample as sample
    from shardtrain.sharding import MeshSpec as MeshSpec
    from shardtrain.sharding import Partitioner as Partitioner
    from shardtrain.sharding import constrain as constrain
    from shardtrain.sharding import make_rules as make_rules
    from shardtrain.train.averages import averaged as averaged
    from shardtrain.train.averages import start_ema as start_ema
    from shardtrain.train.callbacks import Callback as Callback
    from shardtrain.train.evaluation import evaluate as evaluate
    from shardtrain.train.generate import generate as generate
    from shardtrain.train.loop import Loop as Loop
    from shardtrain.train.model_def import ModelDef as ModelDef
    from shardtrain.train.sampler import Sampler as Sampler
    from shardtrain.train.sampling import Sampling as Sampling
    from shardtrain.train.state import TrainState as TrainState
    from shardtrain.train.state import abstract_state as abstract_state
    from shardtrain.train.state import init_state as init_state
    from shardtrain.train.step import make_eval_step as make_eval_step
    from shardtrain.train.step import make_train_step as make_train_step
    from shardtrain.weights.precision import Precision as Precision
    from shardtrain.weights.report import sharding_report as sharding_report

__version__ = "0.1.0"

_HOME = {
    "Callback": "train.callbacks",
    "Checkpointer": "checkpoint",
    "ConfigError": "config",
    "Job": "run",
    "Loader": "data",
    "Loop": "train.loop",
    "MeshSpec": "sharding",
    "ModelDef": "train.model_def",
    "Partitioner": "sharding",
    "Precision": "weights.precision",
    "RunConfig": "config",
    "Sampler": "train.sampler",
    "Sampling": "train.sampling",
    "TrainState": "train.state",
    "Trainer": "run",
    "UserError": "errors",
    "Writer": "run.writer",
    "abstract_state": "train.state",
    "averaged": "train.averages",
    "build": "run",
    "constrain": "sharding",
    "evaluate": "train.evaluation",
    "fit": "run",
    "generate": "train.generate",
    "init_state": "train.state",
    "load_config": "config",
    "make_eval_step": "train.step",
    "make_rules": "sharding",
    "make_train_step": "train.step",
    "open_source": "data",
    "optimizer": "optim",
    "parse_config": "config",
    "sample": "run.writer",
    "select_devices": "launch.devices",
    "sharding_report": "weights.report",
    "start_ema": "train.averages",
}

__all__ = ["__version__", *_HOME]


def __getattr__(name: str) -> Any:
    """Load a public name from its room when it is first used, so that the import itself stays light."""
    if name not in _HOME:
        raise AttributeError(f"module 'shardtrain' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"shardtrain.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
