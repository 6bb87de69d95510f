"""Mesh axes, their sizes, and the device mesh that they name."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh

from shardtrain.errors import UserError, did_you_mean, refuse
from shardtrain.host.typed import require_fields
from shardtrain.launch.cpu_collectives import warn_if_late

#: Every mesh axis, from the slowest network to the fastest.
AXES = ("island", "pipe", "data", "fsdp", "expert", "context", "tensor")


@dataclasses.dataclass(frozen=True)
class MeshSpec:
    """Sizes of the mesh axes. At most one may be -1, which takes the devices that the others leave.

    Attributes:
      island, pipe, data, fsdp, expert, context, tensor: sizes of the axes, 1 by default.
      slow: for hybrid meshes, the part of an axis that spans the slow network (between hosts or pods). The rest,
        `size / slow`, stays within the fast network, as do axes that are not named.

    Raises:
      UserError: a size is 0 or below -1, several are -1, or a slow part does not divide its axis.
    """

    island: int = 1
    pipe: int = 1
    data: int = 1
    fsdp: int = 1
    expert: int = 1
    context: int = 1
    tensor: int = 1
    slow: Mapping[str, int] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        require_fields(self)
        refuse(mesh_problems(self.sizes, self.slow))

    @property
    def sizes(self) -> dict[str, int]:
        """Axis name to size, in mesh order."""
        return {axis: getattr(self, axis) for axis in AXES}

    def arithmetic(self) -> str:
        """The sizes that matter, written as a product: `fsdp 4 x tensor 2 = 8`."""
        return times({axis: size for axis, size in self.sizes.items() if size not in (1, -1)} or {"data": 1})

    def resolve(self, devices: int, origin: str = "found") -> MeshSpec:
        """Fill in the axis of -1.

        Args:
          devices: how many there are.
          origin: where that number comes from, for messages.

        Returns:
          A spec whose sizes multiply to `devices`.

        Raises:
          UserError: there is none; shows the arithmetic and the nearest mesh that fits.
        """
        product = math.prod(size for size in self.sizes.values() if size != -1)
        free = [axis for axis, size in self.sizes.items() if size == -1]
        if free and devices % product == 0:
            filled: dict[str, Any] = {free[0]: devices // product}
            return dataclasses.replace(self, **filled)
        if not free and product == devices:
            return self
        if free:
            rule = f"{self.arithmetic()} must divide the devices, {devices} ({origin}); {free[0]} takes the rest"
        else:
            rule = f"the product, {self.arithmetic()}, must be the number of devices, {devices} ({origin})"
        fix = f"the nearest mesh that fits is {self.nearest(devices)}"
        if origin == "devices.emulate":
            fix += f"; or devices.emulate={product}"
        shown = {axis: size for axis, size in self.sizes.items() if size != 1}
        raise UserError("mesh", shown or {"data": 1}, rule, fix)

    def nearest(self, devices: int) -> str:
        """Return the mesh for `devices` devices that differs least from this one, as `{axis: size}` text."""
        fit: dict[str, int] = {}
        left = devices
        # The fastest axes keep their size first, because they were chosen to match the shapes of the model.
        for axis, size in reversed(self.sizes.items()):
            fit[axis] = max(d for d in divisors(left) if d <= max(size, 1))
            left //= fit[axis]
        grows = next((axis for axis, size in self.sizes.items() if size == -1), None) or max(
            ("data", "fsdp"), key=lambda axis: self.sizes[axis]
        )
        fit[grows] *= left
        chosen = [f"{axis}: {fit[axis]}" for axis in AXES if fit[axis] > 1] or [f"{grows}: 1"]
        return "{" + ", ".join(chosen) + "}"

    def build(self, devices: Sequence[jax.Device] | None = None) -> Mesh:
        """Build the `jax.sharding.Mesh`, with all axes of type Auto.

        Args:
          devices: by default those of all processes.

        Raises:
          UserError: the product of the sizes is not the number of devices.
        """
        devices = list(jax.devices() if devices is None else devices)
        spec = self.resolve(len(devices))
        warn_if_late(devices)
        return Mesh(spec._arrange(devices), AXES, axis_types=(AxisType.Auto,) * len(AXES))

    def _arrange(self, devices: list[jax.Device]) -> np.ndarray:
        shape = tuple(self.sizes.values())
        slow = tuple(self.slow.get(axis, 1) for axis in AXES)
        fast = tuple(size // factor for size, factor in zip(shape, slow, strict=True))
        if devices[0].platform == "cpu":
            # Emulated devices have no network; consecutive devices count as one fast group.
            return interleave(np.array(devices).reshape(slow + fast))
        if math.prod(slow) == 1:
            return mesh_utils.create_device_mesh(shape, devices)
        by_slice = len({getattr(d, "slice_index", 0) for d in devices}) > 1
        return mesh_utils.create_hybrid_device_mesh(fast, slow, devices, process_is_granule=not by_slice)


def mesh_problems(sizes: Mapping[str, int], slow: Mapping[str, int]) -> Iterator[UserError]:
    """Find the mistakes in the sizes of the mesh axes and in their parts across the slow network."""
    for axis, size in sizes.items():
        if size == 0 or size < -1:
            rule = "an axis size must be 1 or more, or -1 for the devices that are left"
            yield UserError(f"mesh.{axis}", size, rule, "use 1")
    free = [axis for axis, size in sizes.items() if size == -1]
    if len(free) > 1:
        rule = f"{' and '.join(f'mesh.{axis}' for axis in free)} are all -1; at most one may take what is left"
        yield UserError("mesh", dict.fromkeys(free, -1), rule, f"give mesh.{free[0]} a size")
    for axis, factor in slow.items():
        key = f"mesh.slow.{axis}"
        if axis not in AXES:
            yield UserError(key, factor, "there is no such mesh axis", did_you_mean(axis, AXES))
        elif factor < 1 or (sizes[axis] > 0 and sizes[axis] % factor):
            rule = f"the part of an axis across the slow network must divide it, and mesh.{axis} is {sizes[axis]}"
            yield UserError(key, factor, rule, f"use one of {divisors(max(sizes[axis], 1))}")


def times(sizes: Mapping[str, int]) -> str:
    """Write sizes as a product, with its value: `data 2 x fsdp 4 = 8`."""
    return f"{' x '.join(f'{axis} {size}' for axis, size in sizes.items())} = {math.prod(sizes.values())}"


def interleave(devices: np.ndarray) -> np.ndarray:
    """Merge `[*slow, *fast]` dims into `[slow_0 * fast_0, slow_1 * fast_1, ...]`."""
    n = devices.ndim // 2
    pairs = devices.transpose([dim for i in range(n) for dim in (i, n + i)])
    return pairs.reshape([devices.shape[i] * devices.shape[n + i] for i in range(n)])


def divisors(n: int) -> list[int]:
    """Return all positive divisors of `n`, ascending; above 10**12 only those up to a million, and their quotients."""
    low = [d for d in range(1, min(math.isqrt(n), 10**6) + 1) if n % d == 0]
    return sorted({*low, *(n // d for d in low)})
