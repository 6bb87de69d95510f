"""The collectives of a compiled program: how large, over which mesh axes, in which loops and branches.

    found = collectives(step.lower(state, batch).compile().as_text(), mesh)
    assert all("data" not in c.axes for c in found if c.loops)

Unknown syntax raises an error: if a collective were silently missed, every assertion about the others would be
worthless.
"""

import math
import re
from dataclasses import dataclass, field

from jax.sharding import AbstractMesh, Mesh

from shardtrain.errors import UserError
from shardtrain.hlo.groups import Groups, replica_groups, source_target_pairs, spanned
from shardtrain.hlo.text import Array, Instruction, Module, UnknownHLOError, leaves, parse

_REDUCING = frozenset({"all-reduce", "all-gather", "reduce-scatter"})  # they have use_global_device_ids
_KINDS = _REDUCING | {"all-to-all", "collective-permute", "collective-broadcast", "ragged-all-to-all"}


@dataclass(frozen=True)
class Loop:
    """A while loop.

    Attributes:
      name: of its instruction.
      trips: the number of iterations; `None` if XLA does not know it.
    """

    name: str
    trips: int | None


@dataclass(frozen=True)
class Collective:
    """One collective at one place of the program; if two places call its computation, it counts twice.

    Attributes:
      kind: HLO's name, without `-start`.
      operands: per-device arrays that it reads.
      results: per-device arrays that it writes.
      axes: the mesh axes along which the members of some group (or a source and its target) differ; empty if nothing
        is sent.
      loops: the loops around it, outermost first.
      conditional: whether it is inside a branch.
      op_name: the JAX operation that it stems from.
      computation: name of the HLO computation.
      name: of the instruction.
      groups: positions in `mesh.devices.flat`; for a collective-permute, its (source, target) pairs.
    """

    kind: str
    operands: tuple[Array, ...]
    results: tuple[Array, ...]
    axes: frozenset[str]
    loops: tuple[Loop, ...]
    conditional: bool
    op_name: str
    computation: str
    name: str
    groups: Groups = field(repr=False)

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """Per-device shapes of the results."""
        return tuple(r.shape for r in self.results)

    @property
    def dtype(self) -> str:
        """HLO's name of the results' dtype; joined, as in `bf16+f32`, if XLA merged several."""
        return "+".join(sorted({r.dtype for r in self.results}))

    @property
    def bytes(self) -> int:
        """Per-device bytes of the larger side (the gathered or unscattered one), for one execution."""
        return max(sum(a.bytes for a in side) for side in (self.operands, self.results))

    @property
    def times(self) -> int | None:
        """Executions in one run of the program, with every branch taken; `None` if a loop's trips are unknown."""
        trips = [loop.trips for loop in self.loops if loop.trips is not None]
        return math.prod(trips) if len(trips) == len(self.loops) else None


def collectives(text: str, mesh: Mesh | AbstractMesh) -> list[Collective]:
    """List all collectives that a program reaches from its entry. An asynchronous one counts once, at its start.

    Args:
      text: the compiled program's `as_text()`.
      mesh: the mesh that it was compiled for.

    Raises:
      UserError: the program and the mesh have different numbers of devices.
      UnknownHLOError: the parser does not know a line, an instruction or the syntax of a group.
    """
    return collectives_of(parse(text), mesh)


def collectives_of(module: Module, mesh: Mesh | AbstractMesh) -> list[Collective]:
    """List the collectives of a program that is parsed already, as `collectives` does."""
    if module.partitions != mesh.size:
        raise UserError(
            f"the program is compiled for {module.partitions} devices, but the mesh {dict(mesh.shape)} has "
            f"{mesh.size}: pass the mesh that it was compiled for"
        )
    found: list[Collective] = []
    reached: set[str] = set()

    def walk(name: str, loops: tuple[Loop, ...], conditional: bool) -> None:
        reached.add(name)
        for op in module.computations[name].values():
            if op.opcode.endswith(("-done", "-update")):
                continue  # counted at its start
            if _kind(op):
                found.append(_collective(op, name, module.computations[name], mesh, loops, conditional))
                continue  # it calls only the scalar reduction
            inside = (*loops, Loop(op.name, _trips(op))) if op.opcode == "while" else loops
            for callee in op.called():
                if callee not in module.computations:
                    raise UnknownHLOError(f"no computation {callee!r}: {op.line}")
                walk(callee, inside, conditional or op.opcode == "conditional")

    walk(module.entry, (), False)
    for name, body in module.computations.items():
        for op in body.values():
            if name not in reached and _kind(op):
                raise UnknownHLOError(f"a collective in computation {name!r}, which no instruction calls: {op.line}")
    return found


def is_collective(op: Instruction) -> bool:
    """Return whether an instruction is a collective, or the start of an asynchronous one.

    Raises:
      UnknownHLOError: it looks like a collective, but is not a known one.
    """
    return not op.opcode.endswith(("-done", "-update")) and _kind(op) is not None


def _kind(op: Instruction) -> str | None:
    """Return the kind of collective that `op` is (or ends), or `None`."""
    kind = re.sub(r"-(start|done)$", "", op.opcode)
    if kind in _KINDS:
        return kind
    named = re.match(r"all-|reduce-scatter|collective|ragged-all", op.opcode)
    talks = re.search(r"(?:^|, )(replica_groups|source_target_pairs|channel_id)=", op.attributes())
    if named or (talks and "is_host_transfer=true" not in op.rest):
        raise UnknownHLOError(f"opcode {op.opcode!r}: {op.line}")
    return None


def _trips(loop: Instruction) -> int | None:
    m = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.line)
    if m is None and "known_trip_count" in loop.line:
        raise UnknownHLOError(f"trip count: {loop.line}")
    return int(m[1]) if m else None


def _collective(
    op: Instruction,
    computation: str,
    siblings: dict[str, Instruction],
    mesh: Mesh | AbstractMesh,
    loops: tuple[Loop, ...],
    conditional: bool,
) -> Collective:
    kind, attributes = _kind(op), op.attributes()
    assert kind is not None
    if missing := set(op.operands()) - siblings.keys():
        raise UnknownHLOError(f"operands {sorted(missing)}: {op.line}")
    operands = tuple(a for name in op.operands() for a in leaves(siblings[name].type))
    # A start returns (operands, results, contexts...); all-reduce-start alone returns the bare results.
    started = op.opcode.endswith("-start") and kind != "all-reduce"
    if started and (not isinstance(op.type, tuple) or len(op.type) < 2 or leaves(op.type[0]) != operands):
        raise UnknownHLOError(f"type of {op.opcode}: {op.line}")
    results = leaves(op.type[1] if started and isinstance(op.type, tuple) else op.type)
    if kind == "all-reduce" and results != operands:
        raise UnknownHLOError(f"an all-reduce whose results differ in type from its operands: {op.line}")
    # Without these, ids in groups count replicas, not partitions (XLA collective_op_group_mode.cc).
    if ", channel_id=" not in attributes or (kind in _REDUCING and ", use_global_device_ids=true" not in attributes):
        raise UnknownHLOError(f"a collective whose groups do not count partitions: {op.line}")
    read_groups = source_target_pairs if kind == "collective-permute" else replica_groups
    groups = read_groups(attributes, mesh.size)
    op_name = re.search(r'\bop_name="((?:[^"\\]|\\.)*)"', op.line)
    return Collective(
        kind=kind,
        operands=operands,
        results=results,
        axes=spanned(groups, mesh),
        loops=loops,
        conditional=conditional,
        op_name=op_name[1] if op_name else "",
        computation=computation,
        name=op.name,
        groups=groups,
    )
