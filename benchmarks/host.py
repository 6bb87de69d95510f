"""The cost of the host per step: the loop's own work, waiting for data, metrics, checkpoints and their hashes.

    python benchmarks/host.py                  # some minutes
    python benchmarks/host.py --tiny           # only to see that it runs and counts correctly; times have no limit

There are three tables, each with its own control, measured in turns, and its limit:

1. The library's loop (loader, metrics log, TensorBoard), compared with a bare `for` loop over the same compiled step
   with one batch that stays on the device. Both fetch the metrics one step late. This is measured once with a step of
   about a millisecond that runs in parallel with the loop, as on an accelerator, except that it takes processor time
   from the threads of the loop; and once with a tiny Llama, which XLA on CPU runs within the call, in the loop's own
   thread, so that nothing can overlap. Limit: 1.10 times, plus the difference of the medians of two bare loops (A/A).
2. The time that the loop waits for data, compared with the time to make and send a batch while nothing else runs.
   Limit: 1%.
3. The loop with metrics, TensorBoard and checkpoints: the shares of its time in which its thread writes metrics and
   waits for the hashes of the save before, limit 1% each; and, without a limit, in which it copies the state for a save
   (the next step overwrites the state, so it has to wait; the share depends on how often one saves). Wall time compared
   with the same loop without these is not a limit: on a host whose processors also compute the step, threads compete
   with it for processors, although it never stops.

The exit status is 1 if a limit is missed.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import jax

from shardtrain import select_devices

select_devices("cpu", emulate=8)

from loops import Timed, bare, fit, llama, loader, one_core

from shardtrain import Checkpointer
from shardtrain.metrics import MetricsLog, plot_loss

SMALL = {"n_layers": 2, "d_model": 32, "n_heads": 4, "d_ff": 64, "vocab_size": 256}
MEDIUM = {"n_layers": 4, "d_model": 128, "n_heads": 4, "n_kv_heads": 2, "d_ff": 512, "vocab_size": 2048}


class Limits(NamedTuple):
    """Limits of wall time, relative to a bare loop, and of the share of the loop's time that one thing may take."""

    slower: float = 1.10
    share: float = 0.01


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=500, help="steps of each turn of table 1; tables 2 and 3: a tenth")
    parser.add_argument("--turns", type=int, default=5, help="turns of each kind, interleaved; medians are printed")
    parser.add_argument("--tiny", action="store_true", help="few steps, too few to judge times by")
    parser.add_argument("--share", type=float, help="limit of the shares of time; default 0.01, with --tiny none")
    args = parser.parse_args()
    limits = Limits(math.inf, math.inf) if args.tiny else Limits()
    limits = limits if args.share is None else limits._replace(share=args.share)
    steps, turns = (20, 2) if args.tiny else (args.steps, args.turns)
    print(f"jax {jax.__version__}, {time.strftime('%Y-%m-%d')}; microseconds a step; medians of {turns} turns")
    within = [
        overhead("a step in a thread of its own", one_core(), steps, turns, limits),
        overhead("a tiny Llama on 1 CPU device", llama(SMALL, rows=8, length=16), steps, turns, limits),
    ]
    work = llama(SMALL if args.tiny else MEDIUM, rows=16, length=16 if args.tiny else 128, fsdp=4, tensor=2)
    within += [prefetch(work, max(10, steps // 10), limits), stalls(work, max(10, steps // 10), turns, limits)]
    sys.exit(0 if all(within) else 1)


def overhead(name: str, work: SimpleNamespace, steps: int, turns: int, limits: Limits) -> bool:
    """Table 1; whether it is within the limit."""
    wall, cpu = defaultdict(list), defaultdict(list)
    with tempfile.TemporaryDirectory() as folder, MetricsLog(folder) as log:
        runs: dict[str, Callable[[], object]] = {
            "bare": lambda: bare(work, steps),
            "again": lambda: bare(work, steps),
            "loop": lambda: fit(work, steps, log),
        }
        for turn in range(turns + 1):
            for kind in runs if turn % 2 else reversed(runs):
                started, thread = time.perf_counter(), time.thread_time()
                runs[kind]()
                if turn:  # the first warms up
                    wall[kind].append((time.perf_counter() - started) / steps * 1e6)
                    cpu[kind].append((time.thread_time() - thread) / steps * 1e6)
    median = {kind: statistics.median(values) for kind, values in wall.items()}
    ratio = 2 * median["loop"] / (median["bare"] + median["again"])
    noise = abs(median["again"] / median["bare"] - 1)
    extra = statistics.median(cpu["loop"]) - statistics.median(cpu["bare"])
    print(
        f"1. {name}: bare {median['bare']:.0f}, again {median['again']:.0f} (A/A {noise:.3f}), loop "
        f"{median['loop']:.0f}: x {ratio:.3f}: {verdict(ratio <= limits.slower + noise)}; "
        f"processor time of the loop's thread {extra:+.0f}",
        flush=True,
    )
    return ratio <= limits.slower + noise


def prefetch(work: SimpleNamespace, steps: int, limits: Limits) -> bool:
    """Table 2; whether it is within the limit."""
    with loader(work) as alone:
        next(alone)
        started = time.perf_counter()
        for _ in range(steps):
            jax.block_until_ready(next(alone))
        cost = (time.perf_counter() - started) / steps * 1e6
    loop = fit(work, steps)
    ready, waits = sum(loop.ready) / len(loop.ready), loop.spent["data"] / loop.total
    print(
        f"2. a batch takes {cost:.0f} to make and send; the loop (step {loop.total / steps * 1e6:.0f}) waits "
        f"{loop.spent['data'] / steps * 1e6:.0f} for one, {waits:.2%} of its time: {verdict(waits <= limits.share)}; "
        f"{ready:.0%} lay on the devices when asked for",
        flush=True,
    )
    return waits <= limits.share


def stalls(work: SimpleNamespace, steps: int, turns: int, limits: Limits) -> bool:
    """Table 3; whether it is within the limits."""
    found: dict[str, list[Timed]] = {"plain": [], "again": [], "full": []}
    for turn in range(turns + 1):
        with (
            tempfile.TemporaryDirectory() as folder,
            MetricsLog(folder) as log,
            Checkpointer(f"{folder}/checkpoints") as checkpointer,
        ):
            for kind in found if turn % 2 else reversed(found):
                loop = fit(work, steps, *((log, checkpointer, steps // 2) if kind == "full" else ()))
                assert loop.calls["data"] == steps
                assert loop.calls["copy"] == (2 if kind == "full" else 0)
                if turn:
                    found[kind].append(loop)
            started = time.perf_counter()
            plot_loss(folder)
            plotting = time.perf_counter() - started
            assert len((Path(folder) / "metrics.jsonl").read_text().splitlines()) == steps
    step = {kind: statistics.median(loop.total for loop in loops) / steps for kind, loops in found.items()}
    full = found["full"]
    saves = full[0].calls["copy"]
    shares = {
        what: statistics.median(loop.spent[what] / loop.total for loop in full)
        for what in ("metrics", "hashes", "copy")
    }
    limited = {what: shares[what] for what in ("metrics", "hashes")}
    print(
        f"3. shares of the loop's time, {saves} saves in {steps} steps of {step['full'] * 1e6:.0f}: "
        + ", ".join(f"{what} {share:.2%} ({verdict(share <= limits.share)})" for what, share in limited.items())
        + f", copies {shares['copy']:.2%}; {shares['copy'] * step['full'] * steps / saves * 1e3:.0f} ms a save; "
        f"wall time x {2 * step['full'] / (step['plain'] + step['again']):.3f} "
        f"(A/A {abs(step['again'] / step['plain'] - 1):.3f}), competition for processors "
        f"included; plotting {plotting:.2f} s, after the last step",
        flush=True,
    )
    return max(limited.values()) <= limits.share


def verdict(within: bool) -> str:
    return "pass" if within else "FAIL"


if __name__ == "__main__":
    main()
