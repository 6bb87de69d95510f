"""The weights of a run, on the devices that are here, without the state of its optimizer."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from shardtrain.checkpoint.reading import intact_extra, intact_step, load_parts
from shardtrain.config import RunConfig, parse_config
from shardtrain.errors import UserError
from shardtrain.launch.cpu_collectives import ordered
from shardtrain.launch.devices import select_devices
from shardtrain.run.job import Job, build
from shardtrain.sharding.mesh import AXES
from shardtrain.train.state import TrainState


@dataclasses.dataclass(frozen=True)
class Trained:
    """A checkpoint, ready to be evaluated.

    Attributes:
      directory: of the run.
      step: of the checkpoint.
      config: of the run, as the checkpoint has it.
      job: mesh and model on the devices here. Its config is that of the run with another mesh, if the run's does not
        fit these devices.
      state: with the weights, and without a state of the optimizer.
    """

    directory: Path
    step: int
    config: RunConfig
    job: Job
    state: TrainState

    @classmethod
    def open(cls, directory: Path, step: int | None = None, overrides: Sequence[str] = ()) -> Trained:
        """Load the weights of a checkpoint. Nothing in the directory is changed.

        Args:
          directory: of the run.
          step: which one; `None` for the newest that verifies.
          overrides: of the config, such as `devices.emulate=8`.

        Raises:
          UserError: no such checkpoint, one that does not verify, or a config that does not fit the devices here.
        """
        path = intact_step(directory, step)
        extra = intact_extra(path)
        if "config" not in extra:
            raise UserError(
                f"{path} has no config, since `shardtrain train` did not save it; load it with load_weights"
            )
        stored = {**extra["config"], "run": {**extra["config"]["run"], "dir": str(directory)}}
        config = parse_config(stored, source=str(path), check_files=False)
        job = build_here(stored, overrides)
        return cls(directory, int(path.name), config, job, _weights(path, job))


def build_here(stored: dict[str, Any], overrides: Sequence[str]) -> Job:
    """The job of a stored config on the devices here.

    These are the config's emulated devices, or else whatever JAX finds. If the mesh does not fit their number, all of
    them are on `fsdp`, and the batch is rounded up to a multiple of it.

    Raises:
      UserError: the config, with its overrides, does not fit these devices.
    """
    if stored["devices"]["emulate"] is None:
        stored = {**stored, "devices": {**stored["devices"], "platform": "auto"}}
    config = parse_config(stored, overrides, check_files=False)
    devices = select_devices(config.devices.platform, config.devices.emulate)
    sizes = [getattr(config.mesh, axis) for axis in AXES]
    fits = -1 in sizes or math.prod(sizes) == len(devices)
    if not fits and not any(override.startswith("mesh") for override in overrides):
        rows = math.ceil(config.data.global_batch / len(devices)) * len(devices)
        ones = dict.fromkeys(AXES, 1)
        mesh = {**config.mesh.model_dump(mode="json"), **ones, "slow": {}, "fsdp": len(devices)}
        data = {**config.data.model_dump(mode="json"), "global_batch": rows}
        config = parse_config({**config.to_dict(), "mesh": mesh, "data": data}, check_files=False)
    return build(config, devices=devices)


def _weights(path: Path, job: Job) -> TrainState:
    canonical = job.abstract_canonical()
    parts = load_parts(
        path,
        {"params": canonical.params, "model_state": canonical.model_state},
        cast=job.config.checkpoint.cast,
    )
    zero = jnp.zeros((), jnp.int32)
    state = TrainState(jnp.int32(int(path.name)), parts["params"], parts["model_state"], (), zero, zero)
    if job.model.is_canonical:
        return state
    live = dataclasses.replace(job.abstract_state(), opt_state=())
    shardings = jax.tree.map(lambda leaf: leaf.sharding, live)
    return jax.jit(job.model.live, out_shardings=shardings, compiler_options=ordered(job.partitioner.devices))(state)
