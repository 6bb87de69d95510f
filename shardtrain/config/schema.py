"""The sections of a config, typed, frozen and with their defaults."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_serializer

from shardtrain.collectives.fsdp import Gather
from shardtrain.config.frozen import FrozenDict, thaw
from shardtrain.config.model_type import ModelType
from shardtrain.config.strict_yaml import dump
from shardtrain.config.types import AxisSize, Count, Dtype, Flags, Fraction, Natural, Options, Rules, SlowSizes
from shardtrain.data.tokenizer import TokenizerName
from shardtrain.launch.devices import Platform
from shardtrain.launch.xla_flags import Preset
from shardtrain.nn.sizes import size_options
from shardtrain.optim.lr_schedules import ScheduleName
from shardtrain.optim.moments import Moments
from shardtrain.pipeline.idle import Idle
from shardtrain.pipeline.phases import BackwardName
from shardtrain.weights.precision import Matmul
from shardtrain.weights.weight import Role


class Section(BaseModel):
    """One section: frozen, no unknown keys, no conversions (text never becomes a number)."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class Run(Section):
    """One training job with one directory."""

    name: str = Field(
        default="run", pattern=r"^[A-Za-z0-9_][A-Za-z0-9_.-]*$", examples=["quickstart"], description="its name"
    )
    dir: str | None = Field(default=None, description="its directory; null: runs/<name>")
    steps: Count = Field(examples=[200], description="updates over the whole run; more of them extend a finished run")
    seed: int = Field(default=0, ge=0, lt=2**32, description="of the initial weights, the order of rows and dropout")
    compile_cache: str | None = Field(default="auto", description="for compiled programs; auto: next to the run")
    max_skipped_steps: Count = Field(default=10, description="non-finite steps in a row that stop the run")
    debug: bool = Field(default=False, description="check each batch for ids that are out of range, before its step")


class Devices(Section):
    """The devices that the run computes on."""

    platform: Platform = Field(default="auto", description="their kind; auto: the fastest that JAX finds")
    emulate: Count | None = Field(default=None, examples=[8], description="pretend to have this many CPU devices")


class MeshSizes(Section):
    """Size of every mesh axis, slowest network first; one may be -1 and takes the devices that are left."""

    island: AxisSize = Field(default=1, description="groups of devices for rare synchronisation; today like data")
    pipe: AxisSize = Field(default=1, description="splits the layers into stages (see pipeline)")
    data: AxisSize = Field(default=1, description="splits the batch; each group holds all weights")
    fsdp: AxisSize = Field(default=1, description="splits the batch, and the weights along their embed dim")
    expert: AxisSize = Field(default=1, description="splits the batch, and the weights of experts")
    context: AxisSize = Field(default=1, description="splits the sequence")
    tensor: AxisSize = Field(default=1, description="splits heads, MLPs and vocabulary")
    slow: SlowSizes = Field(default=FrozenDict(), description="of an axis, the part across the slow network")
    max_replicated: Fraction = Field(default=0.1, description="largest share of the weights that all devices hold")


class Model(Section):
    """The model's type and the options of its class; in YAML the options are keys next to `type`."""

    type: str = Field(examples=["llama"], description="a file of models/, or package.module:Class")
    options: Options = Field(default=FrozenDict(), description="the keys next to type: keyword arguments of the class")

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

    type: str = Field(examples=["corpus"], description="corpus, text, tokens, synthetic, or package.module:Class")
    path: str | tuple[str, ...] | None = Field(
        default=None, examples=["data/*.txt"], description="files of text or tokens"
    )
    seq_len: Count = Field(examples=[128], description="tokens in a row")
    global_batch: Count = Field(examples=[16], description="rows in a step, over all devices")
    tokenizer: TokenizerName | None = Field(default=None, description="of corpus and text; null: bpe")
    vocab_size: Count | None = Field(default=None, description="of a bpe tokenizer; null: the model's")
    held_out: float = Field(default=0.02, ge=0, le=0.5, description="share of the rows that is kept for evaluation")
    shuffle: bool = Field(default=True, description="each epoch in another order; false: the order of the source")


class Schedule(Section):
    """Learning rate over the steps, as a factor of `optimizer.lr`."""

    type: ScheduleName = Field(default="cosine", description="its shape after the warm-up")
    warmup_steps: Natural = Field(default=0, description="updates during which the rate rises, in a line")
    decay_steps: Count | None = Field(default=None, description="the step at which the decay ends; null: run.steps")
    final_ratio: Fraction = Field(default=0.1, description="the rate from decay_steps on, as a share of lr")
    stable_ratio: float | None = Field(
        default=None, ge=0, lt=1, description="of wsd: share of the steps before the decay; null: 0.8"
    )
    decay_start: Natural | None = Field(default=None, description="of wsd, instead of stable_ratio: its step")


class Optimizer(Section):
    """How gradients become updates; `shardtrain.optim` explains each option."""

    type: str = Field(
        default="adamw", description="adamw, lion, sgd, adafactor, muon, or an import path such as optax.lamb"
    )
    lr: float = Field(gt=0, le=10, examples=[1e-3], description="the highest learning rate")
    schedule: Schedule = Field(default=Schedule(), description="the learning rate over the steps")
    clip_norm: float | None = Field(default=1.0, gt=0, description="largest norm of the whole gradient; null: any")
    weight_decay: Fraction = Field(default=0.1, description="each update also subtracts lr * weight_decay * weight")
    decay_roles: tuple[Role, ...] = Field(
        default=("matrix", "embedding", "head", "router"), description="roles of the weights that decay"
    )
    accumulate: Count = Field(default=1, description="microbatches in a step: less memory, the same result")
    per_layer: bool | None = Field(default=None, description="each layer of a stack by itself; null: if it matters")
    moments: Moments | None = Field(default=None, description="dtype of the state; null: that of the weights")
    options: Options = Field(default=FrozenDict(), description="arguments of the optimizer, such as b2")


class Precision(Section):
    """Dtypes of stored parameters, computation (auto: bfloat16 on a GPU) and gradient reductions."""

    params: Dtype = Field(default="float32", description="of the stored weights")
    compute: Literal["auto", Dtype] = Field(default="auto", description="of matmuls; auto: bfloat16 on a GPU")
    reduce: Dtype = Field(default="float32", description="of gradients as they are summed over devices")
    matmul: Matmul = Field(default="compute", description="float8: those of the blocks in 8 bits")


class Checkpoint(Section):
    """When to save, and which checkpoints to keep."""

    every: Count = Field(default=50, description="steps from one to the next; the last step is always saved")
    keep: Count = Field(default=3, description="how many of the newest are kept")
    keep_every: Count | None = Field(default=None, description="in addition, keep each multiple of this step")
    compress: bool = Field(default=False, description="by zstd: about 8% smaller and three times slower")
    asynchronous: bool = Field(default=True, description="write while training goes on")
    cast: bool = Field(default=False, description="convert what has another dtype in the checkpoint")


class Eval(Section):
    """Loss on held-out data."""

    every: Count | None = Field(default=50, description="steps from one evaluation to the next; null: at the end only")
    batches: Count = Field(default=8, description="batches in an evaluation")


class Log(Section):
    """Metrics on disk."""

    every: Count = Field(default=1, description="steps from one line of metrics.jsonl to the next")
    tensorboard: bool = Field(default=True, description="write events for TensorBoard too")


class Sample(Section):
    """Text that the trained model writes at the end of the run, where the data has a tokenizer."""

    prompt: str | None = Field(default=None, description="the text to continue; null: the start of a held-out row")
    tokens: Natural = Field(default=128, description="how many to write; 0: none")
    temperature: float = Field(default=0.8, ge=0, le=10, description="0 takes the likeliest token")


class Pipeline(Section):
    """How a batch flows through the stages, once mesh.pipe > 1."""

    schedule: str = Field(
        default="1f1b", description="a name, see `shardtrain schedule`; a .csv file; package.module:function"
    )
    microbatches: Count = Field(default=8, description="parts of the batch that follow each other through the stages")
    chunks: Count = Field(default=1, description="stages on each rank")
    backward: BackwardName = Field(default="remat", description="recompute stages in their backward pass, or save")
    idle: Idle = Field(default="compute", description="ranks without work in a tick compute anyway, or skip it")
    gather: Gather = Field(default="tick", description="gather weights split by fsdp in each tick, or once per step")


class Xla(Section):
    """Flags of XLA. `launch/xla_flags.py` gives the preset and its reasons; see also docs/howto/xla.md."""

    preset: Preset = Field(default="none", description="auto: gpu-default on NVIDIA GPUs, none elsewhere")
    options: Flags = Field(default=FrozenDict(), description="for the compiler, with the train and eval step")
    environment: Flags = Field(default=FrozenDict(), description="added to XLA_FLAGS before JAX starts")


class RunConfig(Section):
    """A resolved config. Made by `load_config` and `parse_config`, which also check it as a whole."""

    run: Run
    init_from: str | None = Field(
        default=None, description="a run or one of its checkpoints: start from its weights alone"
    )
    devices: Devices = Devices()
    mesh: MeshSizes = MeshSizes()
    rules: Rules = Field(
        default=FrozenDict(), description="rows of the rules table to replace: mesh axes, by logical axis"
    )
    model: Model
    data: Data
    optimizer: Optimizer
    precision: Precision = Precision()
    checkpoint: Checkpoint = Checkpoint()
    eval: Eval = Eval()
    log: Log = Log()
    sample: Sample = Sample()
    pipeline: Pipeline = Pipeline()
    xla: Xla = Xla()

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, lists, text, numbers and null, for JSON or YAML."""
        return self.model_dump(mode="json")

    def to_yaml(self) -> str:
        """The resolved config as YAML, which `load_config` reads back to an equal config."""
        return dump(self.to_dict())
