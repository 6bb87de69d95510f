"""The rules table: from logical axes, which tensors carry, to mesh axes, which hardware has."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from types import MappingProxyType
from typing import NoReturn

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from shardtrain.errors import UserError, did_you_mean, refuse, require_kind
from shardtrain.sharding.divide import check_dim
from shardtrain.sharding.mesh import AXES

LogicalAxes = Sequence[str | None]
Rules = Mapping[str, tuple[str, ...]]

#: Logical axis -> the mesh axes that split it. Data, FSDP and tensor parallelism are rows of this table.
DEFAULT_RULES: Rules = MappingProxyType(
    {
        "batch": ("island", "data", "fsdp", "expert"),
        "seq": ("context",),
        "embed": ("fsdp",),
        "mlp": ("tensor",),
        "heads": ("tensor",),
        "kv_heads": ("tensor",),
        "head_dim": (),
        "vocab": ("tensor",),
        "experts": ("expert",),
        "layers": (),
        "stages": ("pipe",),
        "norm": (),
        "positions": (),
        # The sequence between blocks: norms and residuals are held in parts, and a sum over `tensor` becomes a
        # reduce-scatter and a gather (Korthikanti et al. 2022). Follows overrides of `seq` and `batch`.
        "seq_residual": ("context", "tensor"),
    }
)


def make_rules(overrides: Mapping[str, str | Sequence[str] | None] = MappingProxyType({})) -> Rules:
    """The default table with some rows replaced: a mesh axis, several, or `None` for none. New names are new rows.

    Raises:
      UserError: a mesh axis that does not exist, with the nearest that does.
    """
    table = dict(DEFAULT_RULES)
    for name, value in overrides.items():
        table[name] = () if value is None else (value,) if isinstance(value, str) else tuple(value)
        refuse(row_problems(name, table[name]))
    if "seq_residual" not in overrides:
        axes = dict.fromkeys([*table["seq"], *DEFAULT_RULES["seq_residual"][1:]])
        table["seq_residual"] = tuple(axis for axis in axes if axis not in table["batch"])
    return MappingProxyType(table)


def row_problems(name: str, axes: Sequence[str]) -> Iterator[UserError]:
    """Find the names in a row of the rules that are not mesh axes."""
    for axis in axes:
        if axis not in AXES:
            yield UserError(f"rules.{name}", axis, "there is no such mesh axis", did_you_mean(axis, AXES))


@dataclasses.dataclass(frozen=True)
class Partitioner:
    """A mesh and the rules that lay tensors out on it.

    Raises:
      UserError: a mesh that `MeshSpec.build` could not have made, or rules that `make_rules` could not.
    """

    mesh: Mesh
    rules: Rules = dataclasses.field(default_factory=make_rules)

    def __post_init__(self) -> None:
        fix = "make the mesh with MeshSpec(...).build()"
        require_kind("the mesh of a Partitioner", self.mesh, (Mesh, AbstractMesh), fix)
        if lacking := [axis for axis in AXES if axis not in self.mesh.axis_names]:
            raise UserError(f"the mesh of a Partitioner has no axis {', '.join(lacking)}; {fix}, which has all axes")
        if any(kind is not AxisType.Auto for kind in self.mesh.axis_types):
            raise UserError(f"the mesh of a Partitioner has axes of types {self.mesh.axis_types}, not all Auto; {fix}")
        require_kind("the rules of a Partitioner", self.rules, Mapping, fix := "make them with make_rules()")
        for name, axes in self.rules.items():
            require_kind(f"row {name!r} of the rules of a Partitioner", axes, tuple, fix)

    @property
    def devices(self) -> list[jax.Device]:
        """Those of the mesh, all processes' together; none of an abstract one."""
        return list(self.mesh.devices.flat) if isinstance(self.mesh, Mesh) else []

    def size(self, logical: str) -> int:
        """Into how many pieces the mesh splits a dim with this logical axis."""
        return math.prod(self.mesh.shape[axis] for axis in self._row(logical))

    def pieces(self, logical: str) -> int:
        """The same, for a tensor as it is seen here: the axes that are manual at this point have split it already."""
        manual = jax.sharding.get_abstract_mesh().manual_axes
        return math.prod(self.mesh.shape[axis] for axis in self._row(logical) if axis not in manual)

    def spec(self, *axes: str | None, drop: Sequence[str] = ()) -> PartitionSpec:
        """The partition of a tensor whose dims carry these logical axes; `None` keeps a dim whole.

        Mesh axes of size 1, those in `drop`, and those that are manual at this point of the program are left out.

        Raises:
          UserError: a name without a rule, or two dims of the tensor on one mesh axis.
        """
        taken: dict[str, str] = {}
        manual = jax.sharding.get_abstract_mesh().manual_axes
        parts: list[str | tuple[str, ...] | None] = []
        for logical in axes:
            part = [] if logical is None else [a for a in self._row(logical) if self.mesh.shape[a] > 1]
            for axis in part:
                if axis in taken:
                    raise UserError(
                        f"dims ({', '.join(map(str, axes))}) of one tensor put both {taken[axis]!r} and {logical!r} on "
                        f"mesh axis {axis!r}; a mesh axis splits one dim: set rules.{logical} or rules.{taken[axis]} "
                        "to another axis or to null"
                    )
                taken[axis] = str(logical)
            part = [a for a in part if a not in drop and a not in manual]
            parts.append(None if not part else part[0] if len(part) == 1 else tuple(part))
        while parts and parts[-1] is None:
            parts.pop()
        return PartitionSpec(*parts)

    def sharding(
        self,
        axes: LogicalAxes,
        shape: Sequence[int] | None = None,
        name: str = "tensor",
        drop: Sequence[str] = (),
    ) -> NamedSharding:
        """The `NamedSharding` of a tensor, checked against its shape when that is given.

        Raises:
          UserError: as `spec` does, or for a dim that does not divide over its mesh axes; names tensor, dim and sizes.
        """
        for logical in axes:
            if logical is not None and logical not in self.rules:
                self._refuse(logical, f"{name}: ")
        spec = self.spec(*axes, drop=drop)
        if shape is not None:
            self._check(spec, axes, tuple(shape), name)
        inside = jax.sharding.get_abstract_mesh()
        return NamedSharding(inside if inside.manual_axes else self.mesh, spec)  # type: ignore[arg-type]

    def constrain(
        self, x: jax.Array, *axes: str | None, drop: Sequence[str] = (), name: str = "activation"
    ) -> jax.Array:
        """Pin the layout of an intermediate `x`, one logical axis per dim."""
        return jax.lax.with_sharding_constraint(x, self.sharding(axes, x.shape, name, drop))

    def per_device(
        self, function: Callable[..., jax.Array], *arguments: tuple[jax.Array, LogicalAxes], out: LogicalAxes
    ) -> jax.Array:
        """What `function` makes of each device's own parts of some arrays, given with a logical axis per dim.

        For kernels that the compiler cannot split by itself. A dim without a mesh axis is whole on every device;
        backward, gradients are added up over the axes that split none of an array's dims.

        Raises:
          UserError: as `sharding` does.
        """
        shardings = [self.sharding(axes, x.shape, f"an array of {function.__name__}") for x, axes in arguments]
        ones = tuple(axis for axis, size in self.mesh.shape.items() if size == 1)

        def named(spec: PartitionSpec) -> PartitionSpec:
            """With the axes of size 1, over which there is nothing to add up."""
            first, *rest = spec or (None,)
            return PartitionSpec(((first,) if isinstance(first, str) else first or ()) + ones, *rest)

        run = jax.shard_map(
            function,
            mesh=shardings[0].mesh,
            in_specs=tuple(named(sharding.spec) for sharding in shardings),
            out_specs=named(self.spec(*out)),
            axis_names=set(self.mesh.axis_names).difference(jax.sharding.get_abstract_mesh().manual_axes),
            check_vma=False,
        )
        return run(*(x for x, _ in arguments))

    def _row(self, logical: str) -> tuple[str, ...]:
        if logical not in self.rules:
            self._refuse(logical)
        return self.rules[logical]

    def _refuse(self, logical: str, where: str = "") -> NoReturn:
        if logical in AXES:
            raise UserError(
                f"{where}{logical!r} is a mesh axis; a tensor names logical axes, such as embed, mlp, heads or vocab, "
                "and rules map them to mesh axes"
            )
        raise UserError(
            f"{where}logical axis {logical!r} has no rule; {did_you_mean(logical, self.rules)} "
            f"(or add rules.{logical}, null to keep such dims whole)"
        )

    def _check(self, spec: PartitionSpec, axes: LogicalAxes, shape: tuple[int, ...], name: str) -> None:
        if len(axes) != len(shape):
            raise UserError(f"{name} has shape {shape}, but {len(axes)} logical axes {tuple(axes)}: give one per dim")
        for dim, part in enumerate(spec):
            split = (part,) if isinstance(part, str) else tuple(part or ())
            check_dim(f"{name}: dim {dim}", shape[dim], str(axes[dim]), {axis: self.mesh.shape[axis] for axis in split})


_current: ContextVar[Partitioner | None] = ContextVar("partitioner", default=None)


@contextlib.contextmanager
def use(partitioner: Partitioner | None) -> Iterator[Partitioner | None]:
    """Make a partitioner the one that layers constrain by, within a `with` block."""
    token = _current.set(partitioner)
    try:
        yield partitioner
    finally:
        _current.reset(token)


def current() -> Partitioner | None:
    """The partitioner in use here, or `None` where everything runs on one device."""
    return _current.get()


def constrain(x: jax.Array, *axes: str | None, name: str = "activation") -> jax.Array:
    """Pin the layout of `x` under the partitioner in use; without one (a single device) `x` is returned as it is."""
    partitioner = current()
    return x if partitioner is None else partitioner.constrain(x, *axes, name=name)


def gather_residual(x_BSD: jax.Array) -> jax.Array:
    """The residual stream, held in parts of the sequence, as a block's matmuls take it: whole over `tensor`.

    The parts are named first. Otherwise the layout asked for spreads to before a norm's cast, and XLA gathers float32.
    """
    return constrain(constrain(x_BSD, "batch", "seq_residual", None), "batch", "seq", None)


def pieces(logical: str) -> int:
    """`Partitioner.pieces` of the partitioner in use; 1 without one."""
    partitioner = current()
    return 1 if partitioner is None else partitioner.pieces(logical)
