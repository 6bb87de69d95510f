"""The cost of the library: its training step compared with the same model in hand-written JAX (`floor.py`).

    python benchmarks/overhead.py                    # all meshes of 8 emulated devices, 30 interleaved pairs each
    python benchmarks/overhead.py --mesh fsdp=8 --pairs 60
    python benchmarks/overhead.py --quick            # a tiny model and 3 pairs, to see that it runs

Weights and data are the same, and losses are compared. Matmul FLOPs, the arrays in collectives and temporary memory are
counted by the compiler and repeat exactly. Times are medians of interleaved steps. The floor runs twice, and the
difference of its two medians (A/A) is the noise of the machine. Limits: FLOPs within 0.5%, no more arrays or bytes
sent, temporaries at most 1.02 times, losses within 1e-5, step time at most 1.03 times plus the noise. The exit status
is 1 if any limit is missed.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from typing import Any

import jax

from shardtrain import select_devices

select_devices("cpu", emulate=8)

import floor
from programs import MESHES, TINY, Step, counts, failures, pair


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mesh", action="append", help="mesh sizes such as fsdp=4,tensor=2; default: all")
    parser.add_argument("--pairs", type=int, default=30, help="interleaved pairs of steps; 0 for the counts alone")
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--tiny", action="store_true", help="a tiny model")
    parser.add_argument("--quick", action="store_true", help="a tiny model, 32 tokens a row, 3 pairs")
    args = parser.parse_args()
    if args.quick:
        args.tiny, args.length, args.pairs = True, 32, 3
    shape = TINY if args.tiny else floor.Shape()
    print(f"jax {jax.__version__}, {shape}, {args.rows} x {args.length} tokens, {args.pairs} pairs; library / floor")
    print("mesh                       flops arrays  bytes   temp   step  noise  floor ms   dloss  gates")
    missed = [compare(shape, mesh, args.rows, args.length, args.pairs) for mesh in args.mesh or MESHES]
    sys.exit(any(missed))


def compare(shape: floor.Shape, mesh: str, rows: int, length: int, pairs: int) -> list[str]:
    """Print one line of ratios for one mesh; returns the gates missed."""
    ours, theirs, batch = pair(shape, mesh, rows, length)
    a, b = counts(ours), counts(theirs)
    missed = failures(a, b)
    ratios = [x / y if y else 1.0 for x, y in zip(vars(a).values(), vars(b).values(), strict=True)]
    line = f"{mesh:24} " + " ".join(f"{ratio:{7 if i == 0 else 6}.3f}" for i, ratio in enumerate(ratios))
    if pairs:
        times, losses = interleaved(ours, theirs, batch, pairs)
        median = {name: statistics.median(values) for name, values in times.items()}
        noise, dloss = abs(median["again"] / median["floor"] - 1), abs(losses["ours"] - losses["floor"])
        # Against both runs of the floor, since neither of them is the better judge.
        step = 2 * median["ours"] / (median["floor"] + median["again"])
        missed += ["step time"] * (step > 1.03 + noise) + ["loss"] * (dloss > 1e-5)
        line += f" {step:6.3f} {noise:6.3f} {median['floor'] * 1e3:9.1f} {dloss:7.0e}"
    print(f"{line}  {'FAIL: ' + ', '.join(missed) if missed else 'pass'}", flush=True)
    return missed


def interleaved(
    ours: Step, theirs: Step, batch: dict[str, jax.Array], pairs: int
) -> tuple[dict[str, list[float]], dict[str, float]]:
    """Seconds per step of the library, the floor and the floor again, in turns; and their last losses."""

    def step_ours(state: Any) -> tuple[Any, float]:
        state, metrics = ours.program(state, batch)
        return state, float(metrics["loss"])

    def step_theirs(state: Any) -> tuple[Any, float]:
        params, opt_state, loss, _ = theirs.program(*state, batch)
        return (params, opt_state), float(loss)

    again = jax.tree.map(lambda a: a.copy(), theirs.state)
    runs = {"ours": [step_ours, ours.state], "floor": [step_theirs, theirs.state], "again": [step_theirs, again]}
    times: dict[str, list[float]] = {name: [] for name in runs}
    losses: dict[str, float] = {}
    for turn in range(pairs + 2):
        names = list(runs)[turn % 3 :] + list(runs)[: turn % 3]  # each is first, second and last equally often
        for name in names:
            start = time.perf_counter()
            runs[name][1], losses[name] = runs[name][0](runs[name][1])
            if turn >= 2:  # the first steps warm up
                times[name].append(time.perf_counter() - start)
    return times, losses


if __name__ == "__main__":
    main()
