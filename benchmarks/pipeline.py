"""The cost of a pipeline, compared with its own simulation, with a vmap and roll pipeline, and with no pipeline.

    python benchmarks/pipeline.py                    # all of it
    python benchmarks/pipeline.py --tiny             # under a minute, to see that it runs
    python benchmarks/pipeline.py --only schedules --microbatches 8 --microbatches 32

Emulated CPU devices share the cores, so a rank that computes for nothing (`idle: compute`) takes CPU time from the
others, which it would not on accelerators; with `idle: skip` it does not here either. Hence three questions, each
answered by ratios from one run:

- schedules: the critical path of stages that sleep instead of computing, relative to that of `simulate`;
- yardstick: matmul FLOPs (of `idle: skip` the program does not tell them) and temporary memory (the compiler's,
  exact), and CPU seconds (all threads) of a step and of tracing and compiling it, over those of a vmap and roll
  pipeline (`roll.py`) of the same model, weights and data;
- floor: matmul FLOPs, step time and CPU seconds on pipe 4 x fsdp 2, over those of the hand-written step (`floor.py`) on
  fsdp 8; and that one against itself (A/A).

And one that needs no clock:

- gather: bytes over fsdp and temporary memory of the compiled step, weights gathered in each tick and once per step.
"""

from __future__ import annotations

import argparse
import itertools
import math
import os
import re
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax

from shardtrain import select_devices

select_devices("cpu", emulate=8)

import numpy as np
import optax
from jax.sharding import NamedSharding

import floor
import roll
import sleeping
from programs import random_batch
from shardtrain import MeshSpec, ModelDef, Partitioner, init_state, make_train_step, optimizer
from shardtrain.collectives.fsdp import gathered_bytes
from shardtrain.hlo import collectives
from shardtrain.hlo.text import leaves, parse
from shardtrain.models.llama import Llama
from shardtrain.pipeline import schedules
from shardtrain.pipeline.idle import Idle
from shardtrain.pipeline.schedules import simulate
from shardtrain.train.state import abstract_state

PARTS = ("schedules", "yardstick", "floor", "gather")
RANKS = 4
#: (schedule, chunks, backward mode)
CASES = (
    ("gpipe", 1, "remat"),
    ("1f1b", 1, "remat"),
    ("1f1b", 1, "save"),
    ("interleaved", 2, "remat"),
    ("zb_h1", 1, "remat"),
    ("zb_v", 2, "remat"),
)


FLOOR_MESHES: tuple[dict[str, int], ...] = ({"fsdp": 8}, {"pipe": RANKS, "fsdp": 2})
#: (schedule, microbatches, backward mode) of 16 rows
FLOOR_CASES = (("1f1b", 8, "remat"), ("1f1b", 8, "save"), ("zb_h1", 8, "remat"))
GATHER_CASES = [case for case in CASES if case[0] in ("1f1b", "zb_h1")]
IDLE: tuple[Idle, ...] = ("compute", "skip")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", choices=PARTS, help="default: all")
    parser.add_argument("--microbatches", action="append", type=int, help="of the schedules; default: 8, 16, 32")
    parser.add_argument("--seconds", type=float, default=0.02, help="that a stage sleeps in F, and in I, and in W")
    parser.add_argument("--idle", choices=IDLE, help="what idle ranks do in yardstick and floor; default: both in turn")
    parser.add_argument("--pairs", type=int, default=5, help="interleaved steps of each program")
    parser.add_argument("--tiny", action="store_true", help="tiny models, to see that the benchmark runs")
    args = parser.parse_args()
    idles = (args.idle,) if args.idle else IDLE
    parts = args.only or PARTS
    print(f"jax {jax.__version__}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, pipe {RANKS}")
    if "schedules" in parts:
        critical_paths(args.microbatches or ([8] if args.tiny else [8, 16, 32]), args.seconds)
    if "yardstick" in parts:
        if args.tiny:
            against_roll(floor.Shape(4, 32, 4, 4, 64, 64), 8, 16, CASES[1:2], idles, compilations=1, pairs=1)
        else:
            against_roll(floor.Shape(8, 128, 4, 4, 512, 512), 32, 64, CASES, idles, compilations=3, pairs=args.pairs)
    if "floor" in parts:
        if args.tiny:
            against_floor(floor.Shape(4, 32, 8, 8, 64, 64), 32, FLOOR_CASES[:1], idles, pairs=1)
        else:
            against_floor(floor.Shape(), 256, FLOOR_CASES, idles, pairs=args.pairs)
    if "gather" in parts:
        if args.tiny:
            tick_and_step(floor.Shape(4, 32, 8, 8, 64, 64), 32, CASES[1:2], [8])
        else:
            tick_and_step(floor.Shape(8, 256, 8, 8, 1024, 2048), 256, GATHER_CASES, [8, 32])


def critical_paths(microbatches: list[int], seconds: float) -> None:
    """Measured over simulated time of every schedule, the fastest of two runs."""
    print(f"\nschedules: F, I and W {seconds * 1e3:.0f} ms each; B, and I, with F again unless its residuals are saved")
    print("schedule              M   simulated s  measured s  measured / simulated")
    for name, chunks, backward in CASES:
        for count in microbatches:
            schedule = schedules.make(name, RANKS, count, chunks)
            step = sleeping.step(schedule, backward, seconds, jax.devices()[:RANKS])
            times = []
            for _ in range(2):
                start = time.perf_counter()
                step()
                times.append(time.perf_counter() - start)
            wanted, got = simulate(schedule, sleeping.costs(backward, seconds)).makespan, min(times)
            print(
                f"{label(name, chunks, backward):20} {count:3} {wanted:11.3f} {got:11.3f} {got / wanted:15.3f}",
                flush=True,
            )


def against_roll(
    shape: floor.Shape, microbatches: int, length: int, cases: Any, idles: Any, *, compilations: int, pairs: int
) -> None:
    """One line of ratios for each schedule: the same model and data, two rows in a microbatch."""
    print(f"\nyardstick: {shape}, {microbatches} microbatches of 2 x {length} tokens; library / vmap and roll")
    print("schedule                  flops    temp B   CPU s  compile   |dloss|")
    place = Partitioner(MeshSpec(pipe=RANKS).build(jax.devices()[:RANKS]))
    batch = random_batch(place, 2 * microbatches, length, shape.vocab_size)
    steps: dict[str, Callable[[], float]] = {}
    counts: dict[str, tuple[float, float, float]] = {}
    runs = [(*case, idle) for idle in idles for case in cases]
    for name, chunks, backward, idle in (("roll", 1, "remat", "compute"), *runs):
        table = schedules.make("1f1b" if name == "roll" else name, RANKS, microbatches, chunks)
        model = llama(shape, table, backward, idle)
        tx = optimizer("sgd", model.weights, lr=1e-3)
        make = roll.make_step if name == "roll" else make_train_step
        state = init_state(model, tx, place)
        seconds = []
        for _ in range(compilations):
            start = time.process_time()
            program = make(model, tx, place).lower(state, batch).compile()
            seconds.append(time.process_time() - start)
        memory = program.memory_analysis().temp_size_in_bytes
        key = label(name, chunks, backward, idle)
        counts[key], steps[key] = (flops(program.as_text()), memory, min(seconds)), stepper(program, state, batch)
    _, cpu, losses = interleaved(steps, pairs)
    for name in list(steps)[1:]:
        work, memory, compiling = (a / b for a, b in zip(counts[name], counts["roll"], strict=True))
        line = f"{work:7.3f} {memory:9.3f} {cpu[name] / cpu['roll']:7.3f} {compiling:8.2f}"
        print(f"{name:23} {line} {abs(losses[name] - losses['roll']):9.1e}")
    _, memory, compiling = counts["roll"]
    print(f"vmap and roll: {memory / 1e6:.1f} MB, {cpu['roll']:.2f} CPU s, {compiling:.1f} CPU s to compile")


def against_floor(shape: floor.Shape, length: int, cases: Any, idles: Any, *, pairs: int) -> None:
    """Step time on pipe 4 x fsdp 2, over that of the hand-written step on fsdp 8; 16 rows."""
    print(f"\nfloor: {shape}, 16 x {length} tokens; library on pipe 4 x fsdp 2 / hand-written on fsdp 8")
    print("                            flops    step   CPU s   |dloss|")
    flat, piped = (Partitioner(MeshSpec(**sizes).build(jax.devices())) for sizes in FLOOR_MESHES)
    plain = ModelDef(lambda rngs: Llama(**shape.__dict__, attention="einsum", rngs=rngs))
    decays = jax.tree.map(lambda w: w.role not in ("norm", "bias"), floor.from_library(plain.weights))
    tx = optax.adamw(1e-3, weight_decay=0.1, mask=decays)
    initial = init_state(plain, optimizer("sgd", plain.weights, lr=1e-3), flat).params
    params = jax.tree.map(
        lambda a, spec: jax.device_put(np.asarray(a), NamedSharding(flat.mesh, spec)),
        floor.from_library(initial),
        floor.SPECS,
    )
    batch = random_batch(flat, 16, length, shape.vocab_size)
    state = (params, jax.jit(tx.init)(params))
    theirs = floor.make_step(tx, shape, flat.mesh).lower(*state, batch).compile()

    def by_hand(state: Any) -> Callable[[], float]:
        def step() -> float:
            nonlocal state
            *state, loss, _ = theirs(*state, batch)
            return float(loss)

        return step

    steps = {"hand-written": by_hand(state), "hand-written again": by_hand(jax.tree.map(lambda a: a.copy(), state))}
    work = dict.fromkeys(steps, flops(theirs.as_text()))
    for name, microbatches, backward, idle in ((*case, idle) for idle in idles for case in cases):
        model = llama(shape, schedules.make(name, RANKS, microbatches), backward, idle)
        ours = optimizer("adamw", model.weights, lr=1e-3, weight_decay=0.1)
        start, rows = init_state(model, ours, piped), random_batch(piped, 16, length, shape.vocab_size)
        program = make_train_step(model, ours, piped).lower(start, rows).compile()
        key = f"{label(name, 1, backward, idle)}, M {microbatches}"
        work[key], steps[key] = flops(program.as_text()), stepper(program, start, rows)
    measured = (work, *interleaved(steps, pairs))
    for name in list(steps)[1:]:
        *ratios, loss = ((of[name], of["hand-written"]) for of in measured)
        line = " ".join(f"{ours / theirs:7.3f}" for ours, theirs in ratios)
        print(f"{name:25} {line} {abs(loss[0] - loss[1]):9.1e}")
    _, wall, cpu, _ = (of["hand-written"] for of in measured)
    print(f"hand-written: {wall * 1e3:.0f} ms, {cpu:.2f} CPU s; load now {os.getloadavg()[0]:.1f}")


def tick_and_step(shape: floor.Shape, length: int, cases: Any, microbatches: list[int]) -> None:
    """What a device moves over fsdp in a step, and holds, on pipe 4 x fsdp 2; from the compiled program."""
    print(f"\ngather: {shape}, microbatches of 2 x {length} tokens, pipe 4 x fsdp 2; MB on each device")
    print("schedule              M     tick: over fsdp, temporaries     step: over fsdp, temporaries")
    place = Partitioner(MeshSpec(**FLOOR_MESHES[1]).build(jax.devices()))
    for (name, chunks, backward), count in itertools.product(cases, microbatches):
        model = llama(shape, schedules.make(name, RANKS, count, chunks), backward, "compute")
        tx = optimizer("sgd", model.weights, lr=1e-3)
        state, batch = abstract_state(model, tx, place), random_batch(place, 2 * count, length, shape.vocab_size)
        line = f"{label(name, chunks, backward):18} {count:4}"
        for gather in ("tick", "step"):
            program = make_train_step(model, tx, place, gather=gather).lower(state, batch).compile()
            moved = sum(c.bytes * c.times for c in collectives(program.as_text(), place.mesh) if "fsdp" in c.axes)
            line += f" {moved / 1e6:20.1f} {program.memory_analysis().temp_size_in_bytes / 1e6:11.1f}"
        print(line, flush=True)
    held = gathered_bytes(model.weights, place)
    print(f"step holds {held.weights / 1e6:.1f} MB of gathered weights and {held.gradients / 1e6:.1f} MB of gradients")


def llama(shape: floor.Shape, schedule: Any, backward: Any, idle: Idle) -> ModelDef:
    """Rematerialised by the pipeline, if at all, and not within stages as well."""
    options = {**shape.__dict__, "attention": "einsum", "remat": "none"}
    return ModelDef(lambda rngs: Llama(**options, rngs=rngs), schedule=schedule, backward=backward, idle=idle)


def stepper(program: Any, state: Any, batch: Any) -> Callable[[], float]:
    """One more step each time it is called; returns the loss."""

    def step() -> float:
        nonlocal state
        state, out = program(state, batch)
        return float(out["loss"] if isinstance(out, dict) else out)

    return step


def interleaved(steps: dict[str, Callable[[], float]], pairs: int) -> tuple[dict, dict, dict]:
    """Median seconds, and median CPU seconds of all threads, of each step; and its last loss. The first warms up."""
    wall: dict[str, list[float]] = {name: [] for name in steps}
    cpu: dict[str, list[float]] = {name: [] for name in steps}
    losses = {}
    for turn in range(pairs + 1):
        for name in steps if turn % 2 else reversed(steps):
            start, start_cpu = time.perf_counter(), time.process_time()
            losses[name] = steps[name]()
            if turn:
                wall[name].append(time.perf_counter() - start)
                cpu[name].append(time.process_time() - start_cpu)
    median = lambda all_: {name: statistics.median(values) for name, values in all_.items()}  # noqa: E731
    return median(wall), median(cpu), losses


def flops(text: str) -> float:
    """Of all matmuls that one device does in one run of a compiled program, loops as often as they run.

    Not a number where a branch holds some.
    """
    module = parse(text)

    def walk(name: str) -> float:
        total = 0.0
        for op in module.computations[name].values():
            inside = sum(walk(callee) for callee in op.called())
            if op.opcode == "while":
                trips = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', op.line)
                assert trips, f"a loop that runs nobody knows how often: {op.line}"
                inside *= int(trips[1])
            if op.opcode == "conditional" and inside:
                inside = math.nan
            if op.opcode == "dot":
                (left,) = leaves(module.computations[name][op.operands()[0]].type)
                dims = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", op.rest)
                assert dims, op.line
                contracted = math.prod(left.shape[int(d)] for d in dims[1].split(",") if d)
                inside += 2 * contracted * sum(math.prod(a.shape) for a in leaves(op.type))
            total += inside
        return total

    return walk(module.entry)


def label(name: str, chunks: int, backward: str, idle: str = "compute") -> str:
    words = (name, f"x{chunks}" if chunks > 1 else "", backward if backward == "save" else "", idle)
    return " ".join(word for word in words if word not in ("", "compute"))


if __name__ == "__main__":
    main()
