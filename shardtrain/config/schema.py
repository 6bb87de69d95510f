"""A config: its sections on what a run trains, typed, frozen and with their defaults, and all of them together."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from pydantic import Field, model_serializer

from shardtrain.config.frozen import FrozenDict, thaw
from shardtrain.config.machine import Devices, MeshSizes, Pipeline, Precision, Section, Xla
from shardtrain.config.model_type import ModelType
from shardtrain.config.strict_yaml import dump
from shardtrain.config.types import Count, Fraction, Natural, Options, Rules
from shardtrain.data.tokenizer import TokenizerName
from shardtrain.nn.sizes import size_options
from shardtrain.optim.lr_schedules import ScheduleName
from shardtrain.optim.moments import Moments
from shardtrain.weights.weight import Role


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

    @property
    def directory(self) -> Path:
        """The directory of the run."""
        return Path(self.dir or f"runs/{self.name}")


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
    first_batch: Count | None = Field(default=None, description="a batch that grows to global_batch; null: constant")
    growth_rows: Count | None = Field(default=None, description="rows of training until the batch has grown")
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
        default="adamw",
        description="adamw, lion, sgd, adafactor, muon, schedule_free_adamw, schedule_free_sgd, or an import path such "
        "as optax.lamb",
    )
    lr: float = Field(gt=0, le=10, examples=[1e-3], description="the highest learning rate")
    schedule: Schedule = Field(default=Schedule(), description="the learning rate over the steps")
    clip_norm: float | None = Field(default=1.0, gt=0, description="largest norm of the whole gradient; null: any")
    weight_decay: Fraction = Field(default=0.1, description="each update also subtracts lr * weight_decay * weight")
    decay_roles: tuple[Role, ...] = Field(
        default=("matrix", "embedding", "head", "router"), description="roles of the weights that decay"
    )
    trains: tuple[str, ...] = Field(
        default=("*",), description="weights that may train: paths, with * for any text, or role:NAME"
    )
    freeze: tuple[str, ...] = Field(default=(), description="weights that do not train, as in trains")
    accumulate: Count = Field(default=1, description="microbatches in a step: less memory, the same result")
    per_layer: bool | None = Field(default=None, description="each layer of a stack by itself; null: if it matters")
    moments: Moments | None = Field(default=None, description="dtype of the state; null: that of the weights")
    options: Options = Field(default=FrozenDict(), description="arguments of the optimizer, such as b2")


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


class Ema(Section):
    """A moving average of the weights, kept beside them."""

    decay: float | None = Field(default=None, description="from 0 to below 1, such as 0.999; null: none is kept")
    evaluate: bool = Field(default=True, description="evaluations and samples use it")


class Log(Section):
    """Metrics on disk."""

    every: Count = Field(default=1, description="steps from one line of metrics.jsonl to the next")
    tensorboard: bool = Field(default=True, description="write events for TensorBoard too")
    also: tuple[str, ...] = Field(default=(), description="wandb, mlflow, or package.module:function")
    norms: Count | None = Field(default=None, description="steps between norms of gradients and weights, by layer")


class Profile(Section):
    """A trace of some steps for TensorBoard and Perfetto, and a table of where their time went."""

    steps: tuple[Count, Count] | None = Field(
        default=None, description="the first and the last; SIGUSR1 traces the next three at any time"
    )


class Sample(Section):
    """Text that the trained model writes at the end of the run, where the data has a tokenizer."""

    prompt: str | None = Field(default=None, description="the text to continue; null: the start of a held-out row")
    tokens: Natural = Field(default=128, description="how many to write; 0: none")
    temperature: float = Field(default=0.8, ge=0, le=10, description="0 takes the likeliest token")


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
