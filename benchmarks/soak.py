"""Does an ordinary run ever hang? Many starts of tiny runs over meshes and schedules, in one process and in two.

    python benchmarks/soak.py                  # 1,000 starts, about an hour on two cores
    python benchmarks/soak.py --starts 40      # two of each case
    python benchmarks/soak.py --unprepared     # with the threads and the scheduler that XLA has by itself

Shapes are tiny, because the race is most likely where a step is shortest. A start is a new process, or two, with its
own backend. It is forked from a process that has imported the libraries, which saves half of the time but skips no part
that can hang. It trains 30 steps from a config, evaluates, and exits. All starts of a case share a compilation cache,
and must report the losses of the first one to the last bit, and those of one device within 1e-4. A start that is not
over after two minutes, or that is ended by a signal (XLA's abort), counts as a hang. The exit status is 1 if one hung
or was wrong.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import signal
import socket
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any, NamedTuple

import grain  # noqa: F401  (imported by the parent, so that no start does)
import jax
import numpy as np

from shardtrain import Trainer, load_config
from shardtrain.config import dump
from shardtrain.launch.cpu_collectives import FLAG
from shardtrain.launch.processes import join

LIMIT_S = 120
BASE = {
    "run": {"name": "soak", "steps": 30, "seed": 3},
    "data": {"type": "synthetic", "seq_len": 16, "global_batch": 16, "held_out": 0.1},
    "optimizer": {"lr": 1e-2, "schedule": {"type": "constant"}},
    "checkpoint": {"every": 1000},
    "eval": {"every": None, "batches": 2},
    "log": {"tensorboard": False},
}
SIZES = {"n_layers": 4, "d_model": 32, "d_ff": 64, "vocab_size": 64}
MLP = {"model": {"type": "mlp", **SIZES}}
LLAMA = {"model": {"type": "llama", **SIZES, "n_heads": 4}}


class Case(NamedTuple):
    """A mesh, what else its config says, and the number of processes."""

    mesh: dict[str, int]
    sections: dict[str, Any]
    processes: int = 1

    def __str__(self) -> str:
        parts = [" ".join(f"{axis} {size}" for axis, size in self.mesh.items()), self.sections["model"]["type"]]
        parts += [str(self.sections.get("pipeline", {}).get("schedule", ""))]
        parts += ["accumulate" * ("optimizer" in self.sections), "2 processes" * (self.processes - 1)]
        return ", ".join(part for part in parts if part)


def pipe(schedule: str, microbatches: int = 4, chunks: int = 1, **more: Any) -> dict[str, Any]:
    """The sections of a pipelined Llama."""
    return {**LLAMA, "pipeline": {"schedule": schedule, "microbatches": microbatches, "chunks": chunks, **more}}


CASES = [
    Case({"data": 2, "fsdp": 2}, MLP),
    Case({"fsdp": 4}, MLP),
    Case({"data": 2}, LLAMA),
    Case({"data": 2, "fsdp": 2}, LLAMA),
    Case({"fsdp": 4, "tensor": 2}, LLAMA),
    Case({"data": 2, "fsdp": 2, "tensor": 2}, LLAMA),
    Case({"data": 2, "fsdp": 2, "tensor": 2}, {**LLAMA, "optimizer": {**BASE["optimizer"], "accumulate": 2}}),
    Case({"island": 2, "data": 2, "expert": 2}, LLAMA),
    Case({"fsdp": 2, "context": 2, "tensor": 2}, LLAMA),
    Case({"pipe": 2, "fsdp": 2, "tensor": 2}, pipe("1f1b")),
    Case({"pipe": 4, "data": 2}, pipe("1f1b", 8)),
    Case({"pipe": 4}, pipe("gpipe")),
    Case({"pipe": 2, "fsdp": 2}, pipe("interleaved", 4, 2)),
    Case({"pipe": 2, "fsdp": 2, "tensor": 2}, pipe("zb_h1")),
    Case({"pipe": 2, "fsdp": 2}, pipe("zb_v", 4, 2)),
    Case({"pipe": 2, "context": 2, "tensor": 2}, pipe("1f1b", backward="save")),
    Case({"data": 2, "fsdp": 2}, MLP, 2),
    Case({"fsdp": 4}, LLAMA, 2),
    Case({"data": 2, "tensor": 2}, LLAMA, 2),
    Case({"pipe": 2, "fsdp": 2}, pipe("1f1b"), 2),
]


def main() -> None:
    """Run the starts, case after case in turns, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--starts", type=int, default=1000, help="of all cases together")
    parser.add_argument("--unprepared", action="store_true", help="XLA's own number of threads, and scheduler")
    names = [str(case) for case in CASES]
    parser.add_argument("--case", choices=names, metavar="NAME", action="append", help="only 'fsdp 4, mlp', say")
    args = parser.parse_args()
    if args.unprepared:
        os.environ |= {"XLA_FLAGS": f"--{FLAG}=CPU_SCHEDULER_TYPE_DEFAULT", "PJRT_NPROC": str(os.cpu_count())}
    cases = [case for case in CASES if args.case is None or str(case) in args.case]
    way = "unprepared" if args.unprepared else "prepared"
    print(f"jax {jax.__version__}, {os.cpu_count()} cores, {time.strftime('%Y-%m-%d')}; {way}", flush=True)
    failed = 0
    with tempfile.TemporaryDirectory() as folder:
        for case in cases:
            failed += soak(case, max(1, args.starts // len(cases)), Path(folder))
    sys.exit(failed > 0)


def soak(case: Case, starts: int, folder: Path) -> int:
    """Print what came of a case's starts; how many of them hung or were wrong."""
    begin, hung, wrong = time.monotonic(), 0, 0
    single, first = start(Case({}, case.sections), folder), []
    if not single:
        return 1
    for _ in range(starts):
        losses = start(case, folder)
        first = first or losses
        hung += not losses
        wrong += bool(losses) and (losses != first or not np.allclose(losses, single, atol=1e-4))
    seconds = time.monotonic() - begin
    print(f"{case!s:60} {starts:4} starts, {hung} hung, {wrong} wrong, {seconds / starts:.1f} s each", flush=True)
    return hung + wrong


def start(case: Case, folder: Path) -> list[float]:
    """The losses of one run; none if it hung or failed, which is printed."""
    with tempfile.TemporaryDirectory(dir=folder) as name, socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        own = [fork(case, Path(name), folder / "compiled", process, port) for process in range(case.processes)]
        codes = [ended(process) for process in own]  # each is waited for
        if any(codes):
            print(f"{case}: exit codes {codes}\n{(Path(name) / 'output').read_text()[-2000:]}", flush=True)
            return []
        return json.loads((Path(name) / "losses.json").read_text())


def fork(case: Case, folder: Path, cache: Path, process: int, port: int) -> int:
    """Start a run in a new process, whose output goes into a file; its number."""
    sys.stdout.flush()
    if child := os.fork():
        return child
    code = 1
    try:
        with open(folder / "output", "a") as output:
            os.dup2(output.fileno(), 1)
            os.dup2(output.fileno(), 2)
        run(case, folder, cache, process, port)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code)


def run(case: Case, folder: Path, cache: Path, process: int, port: int) -> None:
    """Train as a config says, and write down the losses."""
    config = folder / f"{process}.yaml"
    run_section = {**BASE["run"], "dir": str(folder / "run"), "compile_cache": str(cache)}
    devices = {"platform": "cpu", "emulate": math.prod(case.mesh.values())}
    config.write_text(
        dump(
            {
                **BASE,
                "run": run_section,
                "devices": devices,
                "mesh": {**case.mesh, "max_replicated": 1.0},
                **case.sections,
            }
        )
    )
    if case.processes > 1:
        join(f"127.0.0.1:{port}", case.processes, process, LIMIT_S).close()
    trained = Trainer.from_config(load_config(config), processes=case.processes)
    trained.fit()
    if process == 0:
        rows = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
        (folder / "losses.json").write_text(json.dumps([*(row["loss"] for row in rows), rows[-1]["eval_loss"]]))
    if case.processes > 1:
        jax.distributed.shutdown()


def ended(process: int) -> int:
    """Wait for a process, at most `LIMIT_S`, and then end it; its exit code, or minus the signal that ended it."""
    deadline = time.monotonic() + LIMIT_S
    while time.monotonic() < deadline:
        found, status = os.waitpid(process, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    os.kill(process, signal.SIGKILL)
    used = os.wait4(process, 0)[2]
    print(f"over {LIMIT_S} s, {used.ru_utime + used.ru_stime:.0f} s of them on a CPU", flush=True)  # few if it hung
    return -signal.SIGKILL


if __name__ == "__main__":
    main()
