"""The sections on how a run computes: devices, mesh, pipeline, dtypes and XLA; typed, frozen, with their defaults."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from shardtrain.collectives.fsdp import Gather
from shardtrain.config.frozen import FrozenDict
from shardtrain.config.types import Count, Dtype, Flags, Fraction, SlowSizes
from shardtrain.launch.devices import Platform
from shardtrain.launch.xla_flags import Preset
from shardtrain.pipeline.idle import Idle
from shardtrain.pipeline.phases import BackwardName
from shardtrain.sharding import AXES, MeshSpec
from shardtrain.weights.precision import Matmul


class Section(BaseModel):
    """One section: frozen, no unknown keys, no conversions (text never becomes a number)."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class Devices(Section):
    """The devices that the run computes on."""

    platform: Platform = Field(default="auto", description="their kind; auto: the fastest that JAX finds")
    emulate: Count | None = Field(default=None, examples=[8], description="pretend to have this many CPU devices")


class MeshSizes(Section):
    """Size of every mesh axis, slowest network first; one may be -1 and takes the devices that are left."""

    island: int = Field(default=1, description="groups of devices for rare synchronisation; today like data")
    pipe: int = Field(default=1, description="splits the layers into stages (see pipeline)")
    data: int = Field(default=1, description="splits the batch; each group holds all weights")
    fsdp: int = Field(default=1, description="splits the batch, and the weights along their embed dim")
    expert: int = Field(default=1, description="splits the batch, and the weights of experts")
    context: int = Field(default=1, description="splits the sequence")
    tensor: int = Field(default=1, description="splits heads, MLPs and vocabulary")
    slow: SlowSizes = Field(default=FrozenDict(), description="of an axis, the part across the slow network")
    max_replicated: Fraction = Field(default=0.1, description="largest share of the weights that all devices hold")

    @property
    def sizes(self) -> dict[str, int]:
        """Mesh axis to size as configured, -1 included."""
        return {axis: getattr(self, axis) for axis in AXES}

    def spec(self) -> MeshSpec:
        """The sizes as the library takes them; raises what `MeshSpec` raises."""
        return MeshSpec(**self.sizes, slow=dict(self.slow))


class Precision(Section):
    """Dtypes of stored parameters, computation (auto: bfloat16 on a GPU) and gradient reductions."""

    params: Dtype = Field(default="float32", description="of the stored weights")
    compute: Literal["auto", Dtype] = Field(default="auto", description="of matmuls; auto: bfloat16 on a GPU")
    reduce: Dtype = Field(default="float32", description="of gradients as they are summed over devices")
    matmul: Matmul = Field(default="compute", description="float8: those of the blocks in 8 bits")


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
