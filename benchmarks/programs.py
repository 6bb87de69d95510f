"""The library's training step and the hand-written one (`floor.py`), compiled for one mesh, and what the compiler made.

Its counts repeat exactly, so they are gates; `overhead.py` prints them and the tests hold a tiny shape to them.
"""

from __future__ import annotations

import dataclasses
import math
import re
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding

import floor
from cases import host_batch
from shardtrain import MeshSpec, ModelDef, Partitioner, init_state, make_train_step, optimizer
from shardtrain.hlo import collectives
from shardtrain.hlo.text import Array, leaves, parse
from shardtrain.launch.cpu_collectives import FLAG
from shardtrain.models.llama import Llama

MESHES = ("data=1", "data=8", "fsdp=8", "fsdp=4,tensor=2", "data=2,fsdp=2,tensor=2", "tensor=8")
TINY = floor.Shape(2, 32, 8, 8, 64, 64)


@dataclasses.dataclass(frozen=True)
class Step:
    """A compiled step, its first state, and the mesh.

    `counted` is the step as XLA schedules it by itself. On CPU the library runs with the scheduler that saves memory
    (`shardtrain/launch/cpu_collectives.py`), which is no measure of what an accelerator would hold.
    """

    program: Any
    counted: Any
    state: Any
    mesh: Mesh


@dataclasses.dataclass(frozen=True)
class Counts:
    """Of one step on one device: matmul FLOPs, arrays and bytes that collectives carry, bytes of temporaries.

    Arrays, not instructions: how many arrays XLA packs into one instruction changes with unrelated lines. Scalars (the
    loss, the norms) are left out: a few more or fewer depend on where XLA takes the norm of a gradient.
    """

    flops: int
    arrays: int
    sent: int
    temporary: int


def pair(shape: floor.Shape, mesh: str, rows: int, length: int) -> tuple[Step, Step, dict[str, jax.Array]]:
    """The library's step, the floor's with the same weights, and a batch, on a mesh such as `fsdp=4,tensor=2`."""
    sizes = {axis: int(size) for axis, size in (part.split("=") for part in mesh.split(","))}
    devices = jax.devices()[: math.prod(sizes.values())]
    place = Partitioner(MeshSpec(**sizes).build(devices))
    options = {**shape.__dict__, "attention": "einsum"}
    model = ModelDef(lambda rngs: Llama(**options, rngs=rngs))
    batch = random_batch(place, rows, length, shape.vocab_size)

    tx = optimizer("adamw", model.weights, lr=1e-3, weight_decay=0.1, clip_norm=1.0)
    state = init_state(model, tx, place)
    ours = make_train_step(model, tx, place).lower(state, batch)

    decays = jax.tree.map(lambda w: w.role not in ("norm", "bias"), floor.from_library(model.weights))
    floor_tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3, weight_decay=0.1, mask=decays))
    params = jax.tree.map(
        lambda a, spec: jax.device_put(np.asarray(a), NamedSharding(place.mesh, spec)),
        floor.from_library(state.params),
        floor.SPECS,
    )
    theirs_state = (params, jax.jit(floor_tx.init)(params))
    step = floor.make_step(floor_tx, shape, place.mesh if len(devices) > 1 else None)
    theirs = step.lower(*theirs_state, batch)
    return _compiled(ours, state, place.mesh), _compiled(theirs, theirs_state, place.mesh), batch


def _compiled(lowered: Any, state: Any, mesh: Mesh) -> Step:
    counted = lowered.compile(compiler_options={FLAG: "CPU_SCHEDULER_TYPE_DEFAULT"})
    return Step(lowered.compile(), counted, state, mesh)


def counts(step: Step) -> Counts:
    """What the compiler counts in a step."""
    text = step.counted.as_text()
    arrays = [(c.times, a.bytes) for c in collectives(text, step.mesh) for a in _larger(c) if a.shape]
    return Counts(
        flops=matmul_flops(text),
        arrays=sum(times for times, _ in arrays),
        sent=sum(times * size for times, size in arrays),
        temporary=step.counted.memory_analysis().temp_size_in_bytes,
    )


def failures(ours: Counts, theirs: Counts) -> list[str]:
    """Which gates the library misses: FLOPs within 0.5%, no more sent, temporaries at most 1.02 times."""
    checks = {
        "matmul FLOPs": abs(ours.flops / theirs.flops - 1) <= 0.005,
        "arrays sent": ours.arrays <= theirs.arrays,
        "bytes sent": ours.sent <= theirs.sent,
        "temporary bytes": ours.temporary <= 1.02 * theirs.temporary,
    }
    return [name for name, passed in checks.items() if not passed]


def matmul_flops(text: str) -> int:
    """Two per multiply-add of every dot in a compiled program, loops counted as often as they run."""
    module = parse(text)

    def walk(name: str, times: int) -> int:
        total = 0
        for op in module.computations[name].values():
            inside = times
            if op.opcode == "while":
                trips = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', op.line)
                assert trips, op.line
                inside *= int(trips[1])
            if op.opcode == "dot":
                contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", op.line)
                assert contracted, op.line
                lhs = leaves(module.computations[name][op.operands()[0]].type)[0].shape
                depth = math.prod(lhs[int(dim)] for dim in contracted[1].split(",") if dim)
                total += 2 * times * depth * math.prod(leaves(op.type)[0].shape)
            total += sum(walk(callee, inside) for callee in op.called())
        return total

    total = walk(module.entry, 1)
    assert total, "a training step without a dot: this compiler writes its matmuls in another way"
    return total


def random_batch(place: Partitioner, rows: int, length: int, vocab: int) -> dict[str, jax.Array]:
    """`host_batch`, laid out on the mesh."""
    host = host_batch(rows, length, vocab)
    return {name: jax.device_put(a, place.sharding(("batch", "seq")[: a.ndim])) for name, a in host.items()}


def _larger(c: Any) -> tuple[Array, ...]:
    return max(c.operands, c.results, key=lambda side: sum(a.bytes for a in side))
