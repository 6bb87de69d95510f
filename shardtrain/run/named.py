"""The parts of a job that a config names: the model, the optimizer and the dtypes."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from shardtrain.config import RunConfig, thaw
from shardtrain.config.given import refuse_alone
from shardtrain.errors import UserError
from shardtrain.host.import_path import accepts
from shardtrain.optim import lr_schedules, optimizer
from shardtrain.train.loss_sums import LossFunction
from shardtrain.train.model_def import ModelDef
from shardtrain.weights.precision import Precision


def named_model(config: RunConfig, precision: Precision, loss: LossFunction | None) -> Callable[[nnx.Rngs], nnx.Module]:
    """Return what builds the module of a config.

    Raises:
      UserError: the class does not follow `nn.Model` and there is no `loss`, or only a program can build it.
    """
    refuse_alone(config.model.type)
    make, arguments = config.model.load(), config.model.arguments()
    if loss is None:
        _require_contract(config.model.type, make)
    if loss is None or _takes(make, "precision"):
        arguments["precision"] = precision
    return lambda rngs: make(**arguments, rngs=rngs)


def named_optimizer(config: RunConfig, model: ModelDef) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """Return the optimizer of a config for a model, and its learning rate."""
    section = config.optimizer
    schedule = section.schedule.model_dump()
    schedule["decay_steps"] = schedule["decay_steps"] or config.run.steps  # `None` for a constant schedule
    lr = lr_schedules.schedule(lr=section.lr, **schedule)
    tx = optimizer(
        section.type,
        model.weights,
        lr=lr,
        clip_norm=section.clip_norm,
        weight_decay=section.weight_decay,
        decay_roles=section.decay_roles,
        per_layer=section.per_layer,
        moments=section.moments,
        **thaw(section.options),
    )
    return tx, lr


def named_precision(config: RunConfig, device: jax.Device) -> Precision:
    """Return the dtypes of a config on a device; turns 64-bit computation on where they need it."""
    compute = config.precision.compute
    if compute == "auto":
        compute = "float32" if device.platform == "cpu" else "bfloat16"
    dtypes = (config.precision.params, compute, config.precision.reduce)
    if "float64" in dtypes:
        jax.config.update("jax_enable_x64", True)  # otherwise JAX would silently use float32
    params, used, reduce = map(jnp.dtype, dtypes)
    return Precision(params, used, reduce, config.precision.matmul)


def _require_contract(name: str, model: Any) -> None:
    """Check that a class follows `nn.Model`, as far as its signature and methods show, before anything runs."""
    lacking = [f"parameter {p}" for p in ("precision", "rngs") if not _takes(model, p)]
    lacking += [f"method {m}" for m in ("embedder", "head") if not hasattr(model, m)]
    if lacking:
        raise UserError(
            f"model.type {name} has no {', no '.join(lacking)}: a class named by a config takes precision and rngs and "
            "follows shardtrain.nn.Model (embedder, blocks, head); to train another module, pass a loss function to "
            "Trainer.from_config or make_train_step"
        )


def _takes(model: Any, name: str) -> bool:
    """Whether a class can be called with a keyword argument of that name."""
    return accepts(inspect.signature(model.__init__).parameters, name)
