"""The parts of a job that follow from a config alone: mesh, model, optimizer and step. No data, directory or arrays."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import NamedSharding

from shardtrain.collectives.fsdp import GatheredBytes, gathered_bytes
from shardtrain.config import RunConfig, check_devices
from shardtrain.launch.cpu_collectives import ordered
from shardtrain.launch.devices import select_devices
from shardtrain.launch.xla_flags import compiler_options, set_environment
from shardtrain.metrics import peak_flops
from shardtrain.nn.returned import Sums
from shardtrain.nn.sizes import flops_per_token
from shardtrain.pipeline import schedules
from shardtrain.run.named import named_model, named_optimizer, named_precision
from shardtrain.sharding import Partitioner, make_rules
from shardtrain.train.averages import averaged, start_ema
from shardtrain.train.jitted_step import JittedStep, Metrics
from shardtrain.train.loss_sums import LossFunction
from shardtrain.train.model_def import ModelDef
from shardtrain.train.state import TrainState, abstract_canonical, abstract_state, init_state
from shardtrain.train.step import make_eval_step, make_train_step
from shardtrain.train.step_timer import Speed
from shardtrain.weights.precision import Precision
from shardtrain.weights.report import ShardingReport, sharding_report


@dataclasses.dataclass(frozen=True)
class Job:
    """The parts of a training job, made by `build`."""

    config: RunConfig
    partitioner: Partitioner
    model: ModelDef
    precision: Precision
    tx: optax.GradientTransformation
    lr: optax.Schedule
    report: ShardingReport
    compiler_options: Mapping[str, Any]
    #: Memory that devices need in a step because a pipeline gathers weights once per step.
    whole: GatheredBytes | None = None
    #: Of a module that does not follow `nn.Model`.
    loss: LossFunction | None = None

    @property
    def batch_sharding(self) -> NamedSharding:
        """The sharding of a batch `[B, S]`."""
        return self.partitioner.sharding(("batch", "seq"))

    @property
    def keeps_ema(self) -> bool:
        """Whether a moving average of the weights is kept."""
        return self.config.ema.decay is not None

    def abstract_state(self, ema: bool | None = None) -> TrainState:
        """The state as shapes and shardings; with an average or not, by config or as told."""
        ema = self.keeps_ema if ema is None else ema
        return abstract_state(self.model, self.tx, self.partitioner, ema=ema)

    def abstract_canonical(self, ema: bool | None = None) -> TrainState:
        """The state as checkpoints store it, as shapes and shardings; with an average or not, by config or as told."""
        ema = self.keeps_ema if ema is None else ema
        return abstract_canonical(self.model, self.tx, self.partitioner, ema=ema)

    @functools.cached_property
    def canonical(self) -> Callable[[TrainState], TrainState]:
        """Turns a state into the one that checkpoints store; without a pipeline that is the same."""
        return self._converter(self.model.canonical, self.abstract_canonical)

    @functools.cached_property
    def live(self) -> Callable[[TrainState], TrainState]:
        """The inverse of `canonical`."""
        return self._converter(self.model.live, self.abstract_state)

    def live_parts(self, state: TrainState) -> TrainState:
        """As `live`, of a state whose optimizer or average may be left out, whatever the config keeps."""
        whole = self.abstract_state(ema=bool(state.ema))
        parts = whole if state.opt_state else dataclasses.replace(whole, opt_state=())
        return self._converter(self.model.live, lambda: parts)(state)

    def _converter(
        self, convert: Callable[[Any], Any], wanted: Callable[[], TrainState]
    ) -> Callable[[TrainState], TrainState]:
        if self.model.is_canonical:
            return lambda state: state
        shardings = jax.tree.map(lambda leaf: leaf.sharding, wanted())
        return jax.jit(convert, out_shardings=shardings, compiler_options=ordered(self.partitioner.devices))

    def init_state(self) -> TrainState:
        """A fresh sharded state from the config's seed."""
        state = init_state(self.model, self.tx, self.partitioner, seed=self.config.run.seed)
        return start_ema(self.model, state) if self.keeps_ema else state

    def evaluated(self, state: TrainState) -> TrainState:
        """The state that evaluations and samples use: with averaged weights, as far as the config wants them."""
        kept = state if self.config.ema.evaluate else dataclasses.replace(state, ema={})
        return averaged(self.model, kept)

    def train_step(self) -> JittedStep[tuple[TrainState, Metrics]]:
        """See `make_train_step`."""
        return make_train_step(
            self.model,
            self.tx,
            self.partitioner,
            seed=self.config.run.seed,
            loss=self.loss,
            accumulate=self.config.optimizer.accumulate,
            reduce_dtype=self.precision.reduce,
            lr=self.lr,
            compiler_options=self.compiler_options,
            gather="tick" if self.whole is None else "step",
            ema=self.config.ema.decay,
            norms_every=self.config.log.norms,
            debug=self.config.run.debug,
        )

    def eval_step(self) -> JittedStep[Sums]:
        """See `make_eval_step`."""
        return make_eval_step(
            self.model,
            self.partitioner,
            loss=self.loss,
            compiler_options=self.compiler_options,
            debug=self.config.run.debug,
        )

    def speed(self) -> Speed:
        """The sizes that turn step times into tokens/s and, on a GPU with a known peak, MFU."""
        data = self.config.data
        flops = flops_per_token(self.model.outline({}), data.seq_len)
        devices = self.partitioner.mesh.devices
        peak = peak_flops(devices.flat[0].device_kind, jnp.dtype(self.precision.compute).name)
        peak_of_all = None if peak is None else peak * devices.size
        return Speed(data.global_batch * data.seq_len, flops, peak_of_all, rows_per_step=data.global_batch)


def build(
    config: RunConfig,
    *,
    processes: int = 1,
    devices: Sequence[jax.Device] | None = None,
    loss: LossFunction | None = None,
    model: Callable[[nnx.Rngs], nnx.Module] | None = None,
) -> Job:
    """Assemble the parts that a config names. Starts JAX's backend; makes no array and touches no file.

    Args:
      config: names the parts.
      processes: how many processes share emulated devices.
      devices: used instead of the config's `devices`; then its `xla.environment` is not read either. They may be
        compile-only ones (`jax.experimental.topologies`), whose steps can be compiled and read, but not run.
      loss: of a module that does not follow `nn.Model`; see `make_train_step`.
      model: builds the module, instead of the class that the config names.

    Raises:
      UserError: the devices are missing or do not fit the mesh, the rules cannot shard the model on it, the class does
        not follow `nn.Model` and has no `loss`, a pipeline cannot gather its weights once per step, or XLA does not
        know a flag.
    """
    if devices is None:
        set_environment(config.xla.environment)
        devices = select_devices(config.devices.platform, config.devices.emulate, processes)
    check_devices(config, len(devices))
    here = [device for device in devices if device.process_index == jax.process_index()]
    options = compiler_options(config.xla.preset, config.xla.options, (here or devices)[0])
    mesh = config.mesh.spec().build(devices)
    partitioner = Partitioner(mesh, make_rules(config.rules))
    precision = named_precision(config, devices[0])
    pipeline, ranks = config.pipeline, mesh.shape["pipe"]
    definition = ModelDef(
        model or named_model(config, precision, loss),
        schedule=None
        if ranks == 1
        else schedules.make(pipeline.schedule, ranks, pipeline.microbatches, pipeline.chunks),
        backward=pipeline.backward,
        idle=pipeline.idle,
        trains=config.optimizer.trains,
        freeze=config.optimizer.freeze,
    )
    report = sharding_report(definition.weights, partitioner)
    report.check(config.mesh.max_replicated)
    tx, lr = named_optimizer(config, definition)
    whole = gathered_bytes(definition.weights, partitioner) if ranks > 1 and pipeline.gather == "step" else None
    return Job(config, partitioner, definition, precision, tx, lr, report, options, whole, loss)
