"""The partitioner: a mesh, and the rules that shard tensors over it."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NoReturn

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from shardtrain.errors import UserError, did_you_mean, require_kind
from shardtrain.sharding.divide import check_dim
from shardtrain.sharding.mesh import AXES
from shardtrain.sharding.rules import LogicalAxes, Rules, make_rules, mesh_axes


def count_shards(mesh: Mesh | AbstractMesh, part: str | Iterable[str] | None) -> int:
    """Return the number of shards into which one entry of a `PartitionSpec` splits a dim.

    Args:
      mesh: the mesh.
      part: one axis, several, or `None` for none.
    """
    return math.prod(mesh.shape[axis] for axis in mesh_axes(part))


@dataclasses.dataclass(frozen=True)
class Partitioner:
    """A mesh and the rules that shard tensors over it.

    Attributes:
      mesh: a mesh from `MeshSpec.build`.
      rules: a table from `make_rules`.

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
        """The devices of the mesh, of all processes; none for an abstract mesh."""
        return list(self.mesh.devices.flat) if isinstance(self.mesh, Mesh) else []

    def shards(self, logical: str) -> int:
        """Return the number of shards into which the mesh splits a dim.

        Mesh axes that are manual at this point of the program do not count: they have split the tensor already.

        Args:
          logical: the logical axis of the dim.

        Raises:
          UserError: the name has no rule.
        """
        manual = jax.sharding.get_abstract_mesh().manual_axes
        return count_shards(self.mesh, (axis for axis in self._row(logical) if axis not in manual))

    def spec(self, *axes: str | None, drop: Sequence[str] = ()) -> PartitionSpec:
        """Return the partition of a tensor. Mesh axes of size 1, and those that are manual here, are left out.

        Args:
          *axes: the logical axis of each dim; `None` does not split it.
          drop: mesh axes to leave out.

        Raises:
          UserError: a name has no rule, or two dims of the tensor are on one mesh axis.
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
        """Return the `NamedSharding` of a tensor.

        Args:
          axes: the logical axis of each dim; `None` does not split it.
          shape: the shape to check, if it is known.
          name: of the tensor, for errors.
          drop: mesh axes to leave out.

        Raises:
          UserError: as `spec`, or a dim is not a multiple of its number of shards; names tensor, dim and sizes.
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
        """Constrain the sharding of an intermediate value.

        Args:
          x: the value.
          *axes: the logical axis of each dim; `None` does not split it.
          drop: mesh axes to leave out.
          name: of the tensor, for errors.

        Raises:
          UserError: as `sharding`.
        """
        return jax.lax.with_sharding_constraint(x, self.sharding(axes, x.shape, name, drop))

    def per_device(
        self, function: Callable[..., jax.Array], *arguments: tuple[jax.Array, LogicalAxes], out: LogicalAxes
    ) -> jax.Array:
        """Call `function` with each device's own shards, for kernels that the compiler cannot split by itself.

        In the backward pass, gradients are summed over the mesh axes that split none of an array's dims.

        Args:
          function: maps the shards of the arguments to the shard of the result.
          *arguments: arrays, each with a logical axis per dim; `None` does not split the dim.
          out: the logical axis of each dim of the result.

        Raises:
          UserError: as `sharding`.
        """
        shardings = [self.sharding(axes, x.shape, f"an array of {function.__name__}") for x, axes in arguments]
        ones = tuple(axis for axis, size in self.mesh.shape.items() if size == 1)

        def named(spec: PartitionSpec) -> PartitionSpec:
            """Add the axes of size 1, over which there is nothing to sum."""
            first, *rest = spec or (None,)
            return PartitionSpec(mesh_axes(first) + ones, *rest)

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
            check_dim(
                f"{name}: dim {dim}",
                shape[dim],
                str(axes[dim]),
                {axis: self.mesh.shape[axis] for axis in mesh_axes(part)},
            )
