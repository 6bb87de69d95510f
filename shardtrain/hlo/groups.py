"""The groups of devices of a collective, in every syntax that XLA prints, and the mesh axes that they span.

    {{0,1},{2,3}}                                      lists; {} is all devices
    [4,2]<=[2,4]T(1,0)                                 iota: arange, reshaped, transposed, cut into groups
    mesh['data'=2,'tensor'=4] {'tensor'}               the groups along some axes of a mesh
    mesh['a'=8], device_ids=([2,4]T(1,0)) {'a':(2)4}   a permuted mesh; a's part of size 4 after one of size 2

Sources: XLA `xla/hlo/ir/replica_group.cc`, `tile_assignment.cc`, `mesh_and_axis.cc`. The mesh that XLA prints
may have other axes than the user's (`axis_0`, ...): only the resulting ids are used. Ids are partition ids:
positions in `mesh.devices.flat`, independent of the devices' own ids.
"""

import math
import re

import numpy as np
from jax.sharding import AbstractMesh, Mesh

from shardtrain.hlo.text import UnknownHLOError

Groups = tuple[tuple[int, ...], ...]

_INTS = r"\d+(?:,\d+)*"
_LISTS = re.compile(rf"\{{(?:\{{{_INTS}\}}(?:,\{{{_INTS}\}})*)?\}}")
_IOTA = re.compile(rf"\[(\d+),(\d+)\]<=\[({_INTS})\](?:T\(({_INTS})\))?")
_MESH = re.compile(r"mesh\[([^\]]*)\](?:, device_ids=\(((?:[^()]|\([^()]*\))*)\))? \{([^{}]*)\}")
_MESH_IDS = re.compile(rf"(?:\[{_INTS}\]<=)?\[({_INTS})\](?:T\(({_INTS})\))?")
_MESH_AXIS = re.compile(r"'([^']+)'=(\d+)")
_MESH_REF = re.compile(r"'([^']+)'(?::\((\d+)\)(\d+))?")


def replica_groups(attributes: str, devices: int) -> Groups:
    """Read the groups in an instruction's attributes, as partition ids.

    Args:
      attributes: text of the instruction's attributes.
      devices: number of devices of the program.

    Raises:
      UnknownHLOError: there are no groups, their syntax is not listed above, or they do not partition the devices.
    """
    if m := _find("replica_groups", _LISTS, attributes):
        lists = re.findall(rf"\{{({_INTS})\}}", m[0])
        groups = [_ints(g) for g in lists] if lists else [tuple(range(devices))]
    elif m := _find("replica_groups", _IOTA, attributes):
        groups = _rows(_iota(m[3], m[4]), int(m[1]), int(m[2]))
    elif m := _find("replica_groups", _MESH, attributes):
        groups = _mesh_groups(m[1], m[2], m[3])
    else:
        raise UnknownHLOError(f"replica groups: {attributes}")
    if sorted(i for g in groups for i in g) != list(range(devices)):
        raise UnknownHLOError(f"replica groups that do not partition {devices} devices: {attributes}")
    return tuple(groups)


def source_target_pairs(attributes: str, devices: int) -> Groups:
    """Read the (source, target) pairs of a collective-permute, as partition ids.

    Args:
      attributes: text of the instruction's attributes.
      devices: number of devices of the program.

    Raises:
      UnknownHLOError: as `replica_groups`.
    """
    m = _find("source_target_pairs", _LISTS, attributes)
    pairs = [_ints(p) for p in re.findall(rf"\{{({_INTS})\}}", m[0])] if m else []
    if m is None or any(len(p) != 2 or max(p) >= devices for p in pairs):
        raise UnknownHLOError(f"source and target pairs among {devices} devices: {attributes}")
    return tuple(pairs)


def spanned(groups: Groups, mesh: Mesh | AbstractMesh) -> frozenset[str]:
    """Return the axes of `mesh` along which the members of at least one of the `groups` differ."""
    coordinates = np.indices(tuple(mesh.shape.values())).reshape(len(mesh.axis_names), -1)
    return frozenset(
        axis
        for axis, along in zip(mesh.axis_names, coordinates, strict=True)
        if any(np.ptp(along[list(g)]) for g in groups)
    )


def _find(key: str, syntax: re.Pattern[str], attributes: str) -> re.Match[str] | None:
    """Match `key=<syntax>` as an entire attribute: any remainder before the next comma is unknown syntax."""
    start = re.search(rf"(?:^|, ){key}=", attributes)
    m = syntax.match(attributes, start.end()) if start else None
    return m if m and re.match(r", [\w-]+=|$", attributes[m.end() :]) else None


def _ints(text: str) -> tuple[int, ...]:
    return tuple(int(i) for i in text.split(","))


def _iota(reshape: str, transpose: str | None) -> np.ndarray:
    dims = _ints(reshape)
    ids = np.arange(math.prod(dims)).reshape(dims)
    return (ids.transpose(_ints(transpose)) if transpose else ids).reshape(-1)


def _rows(ids: np.ndarray, count: int, size: int) -> list[tuple[int, ...]]:
    if ids.size != count * size:
        raise UnknownHLOError(f"{ids.size} ids for {count} groups of {size}")
    return [tuple(int(i) for i in row) for row in ids.reshape(count, size)]


def _mesh_groups(axes: str, device_ids: str | None, over: str) -> list[tuple[int, ...]]:
    sizes = {name: int(size) for name, size in _MESH_AXIS.findall(axes)}
    refs = _MESH_REF.findall(over)
    if _MESH_AXIS.sub("", axes).strip(",") or _MESH_REF.sub("", over).strip(",") or {r[0] for r in refs} - {*sizes}:
        raise UnknownHLOError(f"mesh [{axes}] {{{over}}}")
    if device_ids is None:
        ids = np.arange(math.prod(sizes.values()))
    elif m := _MESH_IDS.fullmatch(device_ids):
        ids = _iota(m[1], m[2])
    elif re.fullmatch(_INTS, device_ids):
        ids = np.array(_ints(device_ids))
    else:
        raise UnknownHLOError(f"mesh device_ids ({device_ids})")
    if ids.size != math.prod(sizes.values()):
        raise UnknownHLOError(f"{ids.size} device_ids for mesh [{axes}]")
    # Ids share a group if their coordinates agree on all axes that are not grouped over. A sub-axis (p)s of an axis of
    # size n is the middle dim of that axis reshaped to [p, s, n / (p s)].
    coordinates = dict(zip(sizes, np.indices(tuple(sizes.values())).reshape(len(sizes), -1), strict=True))
    key = {name: c.copy() for name, c in coordinates.items()}
    for name, before, size in refs:
        inner = sizes[name] // (int(before) * int(size)) if before else 1
        extent = int(size) if before else sizes[name]
        key[name] -= coordinates[name] // inner % extent * inner
    groups: dict[tuple[int, ...], list[int]] = {}
    for i, group in zip(ids, zip(*key.values(), strict=True), strict=True):
        groups.setdefault(tuple(int(k) for k in group), []).append(int(i))
    return [tuple(g) for g in groups.values()]
