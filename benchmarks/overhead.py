"""What the library costs: its training step beside the same model hand-written in plain JAX (`floor.py`).

    python benchmarks/overhead.py                    # all meshes of 8 emulated devices, 10 interleaved pairs each
    python benchmarks/overhead.py --mesh fsdp=8 --pairs 30

Same weights, same data, losses compared. FLOPs, collective bytes and temporary memory are the compiler's own counts and
repeat exactly; times are medians of interleaved steps, with the floor measured against itself (A/A) for the noise.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import jax

jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", 8)

import numpy as np
import optax
from jax.sharding import NamedSharding

import floor
from shardtrain import MeshSpec, ModelDef, Partitioner, init_state, make_train_step, optimizer
from shardtrain.hlo import collectives
from shardtrain.models.llama import Llama

MESHES = ("data=1", "data=8", "fsdp=8", "fsdp=4,tensor=2", "data=2,fsdp=2,tensor=2", "tensor=8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mesh", action="append", help="mesh sizes such as fsdp=4,tensor=2; default: all")
    parser.add_argument("--pairs", type=int, default=10, help="interleaved pairs of steps")
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--tiny", action="store_true", help="a tiny model, to see that the benchmark runs")
    args = parser.parse_args()
    shape = floor.Shape(2, 32, 8, 8, 64, 64) if args.tiny else floor.Shape()
    print(f"jax {jax.__version__}, {shape}, {args.rows} x {args.length} tokens; library / floor")
    print("mesh                       flops  collective B  temp B   step    A/A  floor ms  |dloss|")
    for name in args.mesh or MESHES:
        sizes = {axis: int(size) for axis, size in (part.split("=") for part in name.split(","))}
        print(f"{name:24} " + compare(shape, sizes, args.rows, args.length, args.pairs), flush=True)


def compare(shape: floor.Shape, sizes: dict[str, int], rows: int, length: int, pairs: int) -> str:
    """One line of ratios for one mesh."""
    devices = jax.devices()[: int(np.prod(list(sizes.values())))]
    place = Partitioner(MeshSpec(**sizes).build(devices))
    options = {**shape.__dict__, "attention": "einsum"}
    model = ModelDef(lambda rngs: Llama(**options, rngs=rngs))
    batch = random_batch(place, rows, length, shape.vocab_size)

    tx = optimizer("adamw", model.weights, lr=1e-3, weight_decay=0.1)
    state = init_state(model, tx, place)
    ours = make_train_step(model, tx, place).lower(state, batch).compile()

    decays = jax.tree.map(lambda w: w.role not in ("norm", "bias"), floor.from_library(model.weights))
    floor_tx = optax.adamw(1e-3, weight_decay=0.1, mask=decays)
    params = jax.tree.map(
        lambda a, spec: jax.device_put(np.asarray(a), NamedSharding(place.mesh, spec)),
        floor.from_library(state.params),
        floor.SPECS,
    )
    theirs_state = (params, jax.jit(floor_tx.init)(params))
    mesh = place.mesh if len(devices) > 1 else None
    theirs = floor.make_step(floor_tx, shape, mesh).lower(*theirs_state, batch).compile()

    def step_ours(state: Any) -> tuple[Any, float]:
        state, metrics = ours(state, batch)
        return state, float(metrics["loss"])

    def step_theirs(state: Any) -> tuple[Any, float]:
        params, opt_state, loss, _ = theirs(*state, batch)
        return (params, opt_state), float(loss)

    runs = {"ours": [step_ours, state], "a": [step_theirs, theirs_state], "b": [step_theirs, copied(theirs_state)]}
    times: dict[str, list[float]] = {name: [] for name in runs}
    losses: dict[str, float] = {}
    for turn in range(pairs + 2):
        for name in runs if turn % 2 else reversed(runs):
            start = time.perf_counter()
            runs[name][1], losses[name] = runs[name][0](runs[name][1])
            if turn >= 2:  # the first steps warm up
                times[name].append(time.perf_counter() - start)
    median = {name: statistics.median(values) for name, values in times.items()}
    moved = [sum((c.times or 1) * c.bytes for c in collectives(p.as_text(), place.mesh)) for p in (ours, theirs)]
    temp = [p.memory_analysis().temp_size_in_bytes for p in (ours, theirs)]
    flops = [p.cost_analysis()["flops"] for p in (ours, theirs)]
    ratios = [ours_count / theirs_count if theirs_count else 1.0 for ours_count, theirs_count in (flops, moved, temp)]
    return (
        f"{ratios[0]:7.3f} {ratios[1]:13.3f} {ratios[2]:7.3f} {median['ours'] / median['a']:6.3f} "
        f"{median['b'] / median['a']:6.3f} {median['a'] * 1e3:9.1f} {abs(losses['ours'] - losses['a']):8.1e}"
    )


def random_batch(place: Partitioner, rows: int, length: int, vocab: int) -> dict[str, jax.Array]:
    rng = np.random.default_rng(0)
    host = {
        "tokens": rng.integers(0, vocab, (rows, length), dtype=np.int32),
        "targets": rng.integers(0, vocab, (rows, length), dtype=np.int32),
        "loss_mask": np.ones((rows, length), np.float32),
        "positions": np.tile(np.arange(length, dtype=np.int32), (rows, 1)),
        "row": np.arange(rows, dtype=np.int32),
    }
    return {name: jax.device_put(a, place.sharding(("batch", "seq")[: a.ndim])) for name, a in host.items()}


def copied(tree: Any) -> Any:
    return jax.tree.map(lambda a: a.copy(), tree)


if __name__ == "__main__":
    main()
