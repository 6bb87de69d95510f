"""One GPU: the library's training step compared with the same model in PyTorch, in alternating turns of one run.

    python benchmarks/gpu.py                                     # 125M, 1B, 3B at 4096 and 8192, the most telling first
    python benchmarks/gpu.py --case 1b/4096 --attention cudnn --attention xla --no-torch
    python benchmarks/gpu.py --case 1b/4096 --matmul compute --matmul float8 --profile
    python benchmarks/gpu.py --tiny                              # anywhere, in seconds: does it run?

Each repeated option adds a contestant. All contestants are processes that stay alive and share the memory, each at its
own best batch. Tokens/s and MFU are those of whole steps: clipping to norm 1, AdamW, bfloat16 compute on float32
weights. MFU counts the FLOPs that the maths of the model needs (causal attention once, half of the square, nothing
recomputed) relative to the dense peak (989 TFLOP/s in bfloat16 on H100 and H200, even if matmuls run in float8).
Results are printed and appended to OUT/gpu.jsonl as they come in. Needs jax, flax, optax and numpy, and PyTorch for the
comparison.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from cases import CASES, SHAPES
from contestant import PRESET, Contestant

MEMORY = 0.92  # of the device, shared out among the contestants; the rest is for their contexts and libraries


def main(argv: list[str] | None = None) -> None:
    args = arguments(argv)
    os.environ.pop("XLA_PYTHON_CLIENT_MEM_FRACTION", None)  # JAX refuses both names, and ours decides
    run = Run(args)
    run.report("run", date=f"{datetime.datetime.now():%Y-%m-%d %H:%M}", command=" ".join(sys.argv[1:]))
    find = "import importlib.util, sys; sys.exit(importlib.util.find_spec('torch') is None)"
    if args.torch and subprocess.run([args.torch_python, "-c", find]).returncode:
        run.say(f"{args.torch_python} has no torch: shardtrain runs alone")
        args.torch = False
    for i, case in enumerate(args.case):
        if run.left() < (0 if args.tiny else 45):
            run.say(f"time is up: {', '.join(args.case[i:])} not run; ask for them by --case")
            break
        run.case(case, first=i == 0)
    run.say(f"done in {args.minutes * 60 - run.left():.0f} s")


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--case", action="append", metavar="SIZE/SEQ", help=f"default: {' '.join(CASES)}")
    add("--minutes", type=float, default=8.0, help="stop by then (default 8)")
    add("--out", type=Path, default=Path(os.environ.get("OUT", "gpu-results")), help="folder (default $OUT)")
    add("--turns", type=int, help="turns of each contestant (default 5)")
    add("--seconds", type=float, default=2.0, help="length of a turn (default 2)")
    add("--max-tokens", type=int, help="largest batch, in tokens (default 65536)")
    add("--batch", type=int, help="rows, instead of a search")
    add("--limit-gib", type=float, help="memory that shardtrain's search stays under, instead of the device's")
    add("--compute", default="bfloat16", choices=("bfloat16", "float32"))
    add("--attention", action="append", choices=("auto", "einsum", "xla", "cudnn"))
    add("--remat", action="append", help="policies to choose from, least recomputation first (default none/dots/full)")
    add("--rivals", type=int, default=1, help="policies that fit to time (default 1); if several, half the batch too")
    add("--matmul", action="append", choices=("compute", "float8"))
    add("--flags", action="append", help="XLA options: 'xla_name=value xla_name=value'; gpu-default: the preset")
    add("--loss-chunk", action="append", help="positions whose logits are alive at a time; none: all (default auto)")
    add("--no-torch", dest="torch", action="store_false")
    add("--torch-python", default=sys.executable, help="an interpreter that has torch")
    add("--no-forward", dest="forward", action="store_false", help="leave out the forward pass alone")
    add("--torch-compile", default="block", choices=("block", "model", "none"), help="what is compiled as one piece")
    add("--torch-attention", default="auto", choices=("auto", "flash", "cudnn"), help="auto: the faster one here")
    add("--torch-remat", default="auto", choices=("auto", "none", "full"))
    add("--alone", action="store_true", help="one after the other, each with all of the memory; turns do not alternate")
    add("--profile", action="store_true", help="trace two steps of shardtrain: top operations, and the trace in OUT")
    add("--tiny", action="store_true", help="a tiny model, one turn, nothing to learn about speed")
    args = parser.parse_args(argv)
    if args.tiny:
        args.case, args.seconds = args.case or ["tiny/64"], 0.0
        args.turns, args.max_tokens = args.turns or 1, args.max_tokens or 256
    args.case, args.turns, args.max_tokens = args.case or list(CASES), args.turns or 5, args.max_tokens or 65_536
    for case in args.case:
        size, _, seq = case.partition("/")
        if size not in SHAPES or not seq.isdecimal():
            parser.error(f"--case {case}: SIZE/SEQ, of the sizes {', '.join(SHAPES)}")
    for flag in " ".join(args.flags or []).split():
        if "=" not in flag and flag != PRESET:
            parser.error(f"--flags {flag}: write {flag}=value, or {PRESET} for the library's preset")
    return args


class Run:
    """The clock, the results, and the contestants of one case at a time."""

    def __init__(self, args: argparse.Namespace):
        self.args, self.start = args, time.monotonic()
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "workers.log").unlink(missing_ok=True)

    def left(self) -> float:
        return self.args.minutes * 60 - (time.monotonic() - self.start)

    def say(self, line: str) -> None:
        print(line, flush=True)

    def report(self, kind: str, **values: Any) -> None:
        with (self.args.out / "gpu.jsonl").open("a") as file:
            file.write(json.dumps({"kind": kind, **values}) + "\n")

    def case(self, case: str, *, first: bool) -> None:
        """Build all contestants of one case, let them take turns, and sum up."""
        contestants, done = self.contestants(), []
        share = MEMORY if self.args.alone else MEMORY / len(contestants)
        for group in [[c] for c in contestants] if self.args.alone else [contestants]:
            players = [Contestant(self, case, share=share, **contestant) for contestant in group]
            try:
                done += self.play([player for player in players if player.ready(check=first)])
            finally:
                for player in players:
                    player.worker.close()
        (self.args.out / "check.npz").unlink(missing_ok=True)
        how = "one after the other" if self.args.alone else "in alternating turns"
        for other in done[1:]:
            ratio = done[0].tokens_per_s / other.tokens_per_s
            self.say(f"{case}: {done[0].name} / {other.name} = {ratio:.3f} in tokens/s, medians {how}")
            self.report("ratio", case=case, of=done[0].name, to=other.name, ratio=ratio, how=how)

    def contestants(self) -> list[dict[str, Any]]:
        a = self.args
        choices = {
            "attention": a.attention or ["auto"],
            "remat": a.remat or ["none/dots/full"],
            "matmul": a.matmul or ["compute"],
            "loss_chunk": a.loss_chunk or ["auto"],
            "flags": a.flags or [""],
        }
        varied = [name for name, values in choices.items() if len(values) > 1]
        found = [
            {"name": " ".join(["shardtrain", *(o[n] or "default" for n in varied)]), "options": o}
            for o in (dict(zip(choices, values, strict=True)) for values in itertools.product(*choices.values()))
        ]
        return [*found, {"name": "torch", "options": None}] if a.torch else found

    def play(self, players: list[Contestant]) -> list[Contestant]:
        """Let them take turns; those that have times to show for it."""
        for turn in range(self.args.turns):
            for player in players if turn % 2 == 0 else players[::-1]:
                player.turn()
        for player in players:
            player.sum_up()
        return [player for player in players if player.seconds]


if __name__ == "__main__":
    main()
