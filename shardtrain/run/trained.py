"""The weights of a run, on the devices that are here, without the state of its optimizer."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp

from shardtrain.checkpoint.reading import intact_step, load_parts, parts_of
from shardtrain.config import RunConfig, parse_config, thaw
from shardtrain.config.files import read_file
from shardtrain.config.overrides import apply_overrides
from shardtrain.errors import UserError
from shardtrain.launch.compile_cache import cache_folder, use_cache
from shardtrain.launch.devices import select_devices
from shardtrain.run.job import Job, build
from shardtrain.sharding.mesh import AXES
from shardtrain.train.averages import keeps_average
from shardtrain.train.state import TrainState


@dataclasses.dataclass(frozen=True)
class Trained:
    """A checkpoint, ready to be evaluated.

    Attributes:
      directory: of the run.
      step: of the checkpoint.
      config: of the run.
      job: mesh and model on the devices here. Its config is that of the run with another mesh, if the run's does not
        fit these devices.
      state: with the weights that the run evaluates (of an average, if it keeps one), and nothing else.
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
        if not (file := directory / "config.yaml").is_file():
            raise UserError(f"{directory} has no config.yaml, which `shardtrain train` writes at the start of a run")
        stored = read_file(file)  # that of a checkpoint would start JAX, whose devices are not chosen yet
        stored["run"]["dir"] = str(directory)
        config = parse_config(stored, source=str(file), check_files=False)
        use_cache(cache_folder(config.run.compile_cache, directory))
        job = build_here(stored, overrides)
        path = intact_step(directory, step)
        return cls(directory, int(path.name), config, job, _weights(path, job))


def build_here(stored: dict[str, Any], overrides: Sequence[str]) -> Job:
    """The job of a stored config on the devices here.

    These are the config's emulated devices, or else whatever JAX finds. If the mesh does not fit their number, all of
    them are on `fsdp`, and the batch is rounded up to a multiple of it.

    Raises:
      UserError: the config, with its overrides, does not fit these devices.
    """
    wanted = thaw(stored)
    wanted["data"] |= {"first_batch": None, "growth_rows": None}  # which are for training alone, as the next one is
    wanted["optimizer"]["accumulate"] = 1
    if wanted["devices"]["emulate"] is None:
        wanted["devices"]["platform"] = "auto"
    asked = thaw(wanted)
    apply_overrides(asked, overrides)  # whose problems `parse_config` reports
    devices = select_devices(asked["devices"]["platform"], asked["devices"]["emulate"])
    sizes = [wanted["mesh"][axis] for axis in AXES]
    fits = -1 in sizes or math.prod(sizes) == len(devices)
    if not fits and not any(override.startswith("mesh") for override in overrides):
        wanted["mesh"] |= {**dict.fromkeys(AXES, 1), "slow": {}, "fsdp": len(devices)}
        wanted["data"]["global_batch"] = math.ceil(wanted["data"]["global_batch"] / len(devices)) * len(devices)
    return build(parse_config(wanted, overrides, check_files=False), devices=devices)


def _weights(path: Path, job: Job) -> TrainState:
    """The weights that the run would evaluate: their average, if it keeps one."""
    ema = job.config.ema.evaluate and "ema" in parts_of(path)
    canonical = job.abstract_canonical(ema=ema)
    wanted = {"params": canonical.params, "model_state": canonical.model_state}
    if ema:
        wanted["ema"] = canonical.ema
    elif keeps_average(canonical.opt_state):
        wanted["opt_state"] = canonical.opt_state
    parts = load_parts(path, wanted, cast=job.config.checkpoint.cast)
    zero = jnp.zeros((), jnp.int32)
    state = TrainState(**{"opt_state": (), **parts}, step=jnp.int32(int(path.name)), skipped=zero, skipped_in_row=zero)
    return dataclasses.replace(job.evaluated(job.live_parts(state)), opt_state=(), ema={})
