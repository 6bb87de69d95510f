"""The sections of a config, typed, frozen and with their defaults."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_serializer

from shardtrain.collectives.fsdp import Gather
from shardtrain.config.frozen import FrozenDict, thaw
from shardtrain.config.model_type import ModelType
from shardtrain.config.strict_yaml import dump
from shardtrain.config.types import Count, Dtype, Flags, Fraction, Natural, Options, Rules, SlowSizes
from shardtrain.data.tokenizer import TokenizerName
from shardtrain.launch.devices import Platform
from shardtrain.launch.xla_flags import Preset
from shardtrain.nn.sizes import size_options
from shardtrain.optim.lr_schedules import ScheduleName
from shardtrain.optim.moments import Moments
from shardtrain.pipeline.idle import Idle
from shardtrain.pipeline.phases import BackwardName
from shardtrain.sharding import AXES, MeshSpec
from shardtrain.weights.precision import Matmul
from shardtrain.weights.weight import Role


class Section(BaseModel):
    """One section: frozen, no unknown keys, no conversions (text never becomes a number)."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class Run(Section):
    """One training job with one directory."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]*$", examples=["quickstart"])] = "run"
    dir: str | None = None  # default: runs/<name>
    steps: Annotated[Count, Field(examples=[200])]
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    compile_cache: str | None = "auto"  # a directory, null for none, or auto: .jax_cache next to the run directory
    max_skipped_steps: Count = 10  # this many non-finite steps in a row stop the run
    debug: bool = False  # check each batch for ids that are out of range, before its step

    @property
    def directory(self) -> Path:
        """The directory of the run."""
        return Path(self.dir or f"runs/{self.name}")


class Devices(Section):
    """The devices that the run computes on."""

    platform: Platform = "auto"
    emulate: Annotated[Count | None, Field(examples=[8])] = None  # pretend to have this many CPU devices


class MeshSizes(Section):
    """Size of every mesh axis, slowest network first; one may be -1 and takes the devices that are left."""

    island: int = 1
    pipe: int = 1
    data: int = 1
    fsdp: int = 1
    expert: int = 1
    context: int = 1
    tensor: int = 1
    #: Hybrid meshes: the part of an axis that is across the slow network.
    slow: SlowSizes = FrozenDict()
    #: Largest fraction of the parameter bytes that every device may hold, on a mesh that splits weights.
    max_replicated: Fraction = 0.1

    @property
    def sizes(self) -> dict[str, int]:
        """Mesh axis to size as configured, -1 included."""
        return {axis: getattr(self, axis) for axis in AXES}

    def spec(self) -> MeshSpec:
        """The sizes as the library takes them; raises what `MeshSpec` raises."""
        return MeshSpec(**self.sizes, slow=dict(self.slow))


class Model(Section):
    """The model's type and the options of its class; in YAML the options are keys next to `type`."""

    type: Annotated[str, Field(examples=["llama"])]
    options: Options = FrozenDict()

    @model_serializer
    def _flat(self) -> dict[str, Any]:
        return {"type": self.type, **thaw(self.options)}

    def load(self) -> Callable[..., Any]:
        """The model's class."""
        return ModelType.find(self.type).cls

    def size_options(self) -> dict[str, str]:
        """The options that are sizes, by logical axis."""
        return size_options(ModelType.find(self.type).cls)

    def size(self, axis: str) -> int | None:
        """The option that is the size of a logical axis; `None` where it is absent, or not a number of 1 or more."""
        value = self.options.get(self.size_options().get(axis, ""))
        return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments for the class, of the types in its signature, without `rngs` and `precision`."""
        return ModelType.find(self.type).arguments(thaw(self.options))


class Data(Section):
    """The data to learn from. Batches are global, in sequences."""

    type: Annotated[str, Field(examples=["corpus"])]  # a module of shardtrain.data.formats, or package.module:Class
    path: Annotated[str | tuple[str, ...] | None, Field(examples=["data/*.txt"])] = None  # text and tokens
    seq_len: Annotated[Count, Field(examples=[128])]
    global_batch: Annotated[Count, Field(examples=[16])]
    first_batch: Count | None = None  # of a batch that grows to global_batch by doubling; null: constant
    growth_rows: Count | None = None  # how many rows that takes
    tokenizer: TokenizerName | None = None  # corpus and text; default bpe
    vocab_size: Count | None = None  # of a bpe tokenizer; default: the model's
    held_out: Annotated[float, Field(ge=0, le=0.5)] = 0.02  # fraction kept for evaluation
    shuffle: bool = True


class Schedule(Section):
    """Learning rate over the steps, as a factor of `optimizer.lr`."""

    type: ScheduleName = "cosine"
    warmup_steps: Natural = 0
    decay_steps: Count | None = None  # the step at which the decay ends; default run.steps (constant has none)
    final_ratio: Fraction = 0.1  # of lr, from decay_steps on
    stable_ratio: Annotated[float, Field(ge=0, lt=1)] | None = None  # wsd: share of steps before the decay; default 0.8
    decay_start: Natural | None = None  # wsd, instead of stable_ratio: the step at which the decay starts


class Optimizer(Section):
    """How gradients become updates; `shardtrain.optim` explains each option."""

    type: str = "adamw"  # or an import path, package.module:factory
    lr: Annotated[float, Field(gt=0, le=10, examples=[1e-3])]
    schedule: Schedule = Schedule()
    clip_norm: Annotated[float, Field(gt=0)] | None = 1.0
    weight_decay: Fraction = 0.1
    decay_roles: tuple[Role, ...] = ("matrix", "embedding", "head", "router")
    trains: tuple[str, ...] = ("*",)  # the weights that may train: paths, with * for any text, or role:NAME
    freeze: tuple[str, ...] = ()  # the weights that do not
    accumulate: Count = 1  # microbatches per step
    per_layer: bool | None = None  # update each stacked layer separately; default: where the optimizer needs it
    moments: Moments | None = None  # how its state is stored; default: like the weights
    options: Options = FrozenDict()


class Precision(Section):
    """Dtypes of stored parameters, computation (auto: bfloat16 on a GPU) and gradient reductions."""

    params: Dtype = "float32"
    compute: Literal["auto", Dtype] = "auto"
    reduce: Dtype = "float32"
    matmul: Matmul = "compute"  # float8: the blocks' matmuls, scaled per tensor


class Checkpoint(Section):
    """When to save, and which checkpoints to keep."""

    every: Count = 50
    keep: Count = 3  # this many of the last ones
    keep_every: Count | None = None  # in addition, each multiple of this step
    compress: bool = False
    asynchronous: bool = True
    cast: bool = False  # convert weights and moments that have another dtype in the checkpoint


class Eval(Section):
    """Loss on held-out data."""

    every: Count | None = 50  # null: at the end only
    batches: Count = 8


class Ema(Section):
    """A moving average of the weights, kept beside them."""

    decay: float | None = None  # from 0 to below 1, such as 0.999; null: none is kept
    evaluate: bool = True  # evaluations and samples use it


class Log(Section):
    """Metrics on disk."""

    every: Count = 1
    tensorboard: bool = True
    also: tuple[str, ...] = ()  # wandb, mlflow, or package.module:function
    norms: Count | None = None  # steps from one log of the norms of gradients and weights, by layer, to the next


class Profile(Section):
    """A trace of some steps for TensorBoard and Perfetto, and a table of where their time went."""

    steps: tuple[Count, Count] | None = None  # the first and the last; SIGUSR1 traces the next three at any time


class Sample(Section):
    """Text that the trained model writes at the end of the run, where the data has a tokenizer."""

    prompt: str | None = None  # null: from the start of a document
    tokens: Natural = 128  # 0: none
    temperature: Annotated[float, Field(ge=0, le=10)] = 0.8


class Pipeline(Section):
    """How a batch flows through the stages, once mesh.pipe > 1."""

    schedule: str = "1f1b"  # of `shardtrain schedule --compare`, a .csv file, or package.module:function
    microbatches: Count = 8
    chunks: Count = 1  # stages on each rank
    backward: BackwardName = "remat"  # recompute each stage in its backward pass, or keep its residuals
    idle: Idle = "compute"  # ranks without work in a tick: compute anyway, or skip it
    gather: Gather = "tick"  # the weights that fsdp splits: in each tick, or once per step, with more memory


class Xla(Section):
    """Flags of XLA. `launch/xla_flags.py` gives the preset and its reasons; see also docs/xla.md."""

    preset: Preset = "none"  # auto: gpu-default on NVIDIA GPUs, none elsewhere
    options: Flags = FrozenDict()  # for the compiler, with the train and eval step
    environment: Flags = FrozenDict()  # added to XLA_FLAGS before JAX starts, for flags that XLA reads only there


class RunConfig(Section):
    """A resolved config. Made by `load_config` and `parse_config`, which also check it as a whole."""

    run: Run
    init_from: str | None = None  # a run directory or a checkpoint step: start from its weights alone
    devices: Devices = Devices()
    mesh: MeshSizes = MeshSizes()
    rules: Rules = FrozenDict()
    model: Model
    data: Data
    optimizer: Optimizer
    precision: Precision = Precision()
    checkpoint: Checkpoint = Checkpoint()
    eval: Eval = Eval()
    ema: Ema = Ema()
    log: Log = Log()
    profile: Profile = Profile()
    sample: Sample = Sample()
    pipeline: Pipeline = Pipeline()
    xla: Xla = Xla()

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, lists, text, numbers and null, for JSON or YAML."""
        return self.model_dump(mode="json")

    def to_yaml(self) -> str:
        """The resolved config as YAML, which `load_config` reads back to an equal config."""
        return dump(self.to_dict())
