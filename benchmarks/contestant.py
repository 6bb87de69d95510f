"""One side of `gpu.py` in one case: a worker process, the requests to it, and its times."""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path
from typing import Any, Protocol

from cases import SHAPES, flops_module, flops_per_token, value
from top_operations import lines
from workers import Worker, WorkerError

HERE = Path(__file__).resolve().parent
PRESET = "gpu-default"


class Run(Protocol):
    """The parts of a benchmark run that a contestant needs: its options, its clock and its two outputs."""

    args: argparse.Namespace

    def left(self) -> float: ...

    def say(self, line: str) -> None: ...

    def report(self, kind: str, **values: Any) -> None: ...


class Contestant:
    """A worker and its times. `options` distinguish the contestants of shardtrain; None means PyTorch."""

    batch: int
    steps: int
    loss: float
    peak: int | None

    def __init__(self, run: Run, case: str, *, name: str, options: dict[str, Any] | None, share: float):
        self.run, self.case, self.name, self.options, self.share = run, case, name, options, share
        self.size, seq = case.split("/")
        self.seq, self.seconds = int(seq), list[float]()
        python, file = (run.args.torch_python, "gpu_torch.py") if options is None else (sys.executable, "gpu_jax.py")
        env = {"XLA_CLIENT_MEM_FRACTION": f"{share:.3f}"}
        self.worker = Worker([python, str(HERE / file)], env, run.args.out / "workers.log")

    @property
    def tokens_per_s(self) -> float:
        return self.batch * self.seq / statistics.median(self.seconds)

    def ask(self, do: str, **request: Any) -> dict[str, Any] | None:
        """Return the answer of the worker. If there is none, the reason is in the log of the run."""
        try:
            return self.worker.ask(do, self.run.left(), **request)
        except WorkerError as error:
            self.say(f"{do} failed: {error}")
            self.report("failed", do=do, error=str(error))
            return None

    def say(self, line: str) -> None:
        self.run.say(f"{self.case} {self.name}: {line}")

    def report(self, kind: str, **values: Any) -> None:
        self.run.report(kind, case=self.case, name=self.name, **values)

    def ready(self, *, check: bool) -> bool:
        """Start, find the batch, compile; False when that failed."""
        args = self.run.args
        hello = self.ask("hello", **({"share": self.share} if self.options is None else {}))
        if hello is None:
            return False
        self.peak_flops = flops_module().peak_flops(hello["device"], args.compute)
        if check:
            self.say(f"{hello['version']} on {hello['device']}, {gib(hello['limit'])} of memory")
            self.report("contestant", **hello)
            if args.torch and (found := self.ask("check", file=str(args.out / "check.npz"))) is not None:
                self.say(f"loss of one tiny model in float32 {found['loss']:.6f}")
                self.report("check", **found)
        built = self.ask("build", **self.request())
        if built is None:
            self.worker.close()  # the others need the memory that it holds
            return False
        self.batch, self.steps = built["batch"], max(1, min(50, round(args.seconds / built["step_s"])))
        self.say(
            f"batch {self.batch} ({self.batch * self.seq} tokens), remat {built['remat']}, "
            + (f"loss chunk {self.options['loss_chunk']}, " if self.options else "")
            + f"compiled in {built['compile_s']:.1f} s (search {built['search_s']:.1f} s), peak {gib(built['peak'])}"
            + "".join(f", {target} x {count}" for target, count in built.get("calls", {}).items())
        )
        self.report("built", options=self.options, **built)
        return True

    def request(self) -> dict[str, Any]:
        """The request to the worker: what to build."""
        args = vars(self.run.args)
        common = {"size": self.size, "seq": self.seq, **{k: args[k] for k in ("compute", "batch", "max_tokens")}}
        if self.options is None:
            return {**common, **{k: args["torch_" + k] for k in ("compile", "attention", "remat")}}
        limit = args["limit_gib"] and args["limit_gib"] * 2**30
        flags, chunk = self.options["flags"].split(), value(self.options["loss_chunk"])
        words = {"remat": self.options["remat"].split("/"), "loss_chunk": chunk, "flags": parsed(flags)}
        preset = PRESET if PRESET in flags else "none"
        return {**common, **self.options, **words, "preset": preset, "limit": limit, "rivals": args["rivals"]}

    def turn(self) -> None:
        """Run one turn of steps, or none if too little time is left."""
        if self.seconds and self.run.left() < 3 * self.run.args.seconds + 1:
            return
        if (found := self.ask("steps", n=self.steps)) is not None:
            self.seconds.append(found["seconds"] / self.steps)
            self.peak, self.loss = found["peak"], found["loss"]
            self.report("turn", steps=self.steps, **found)

    def sum_up(self) -> None:
        """The line that all this is about; then the forward pass alone and, where asked for, the profile."""
        if not self.seconds:
            return
        step_s, least, most = statistics.median(self.seconds), min(self.seconds), max(self.seconds)
        flops = self.tokens_per_s * flops_per_token(SHAPES[self.size], self.seq)
        mfu = self.peak_flops and flops / self.peak_flops
        self.say(
            f"{step_s * 1e3:.1f} ms a step ({least * 1e3:.1f} to {most * 1e3:.1f}), {self.tokens_per_s:.0f} tokens/s, "
            f"MFU {percent(mfu)}, {flops / 1e12:.3g} TFLOP/s, peak {gib(self.peak)}, loss {self.loss:.4f}"
        )
        speed = {"step_s": step_s, "fastest_s": least, "slowest_s": most, "tokens_per_s": self.tokens_per_s}
        rest = {
            "model_flops_per_s": flops,
            "mfu": mfu,
            "peak": self.peak,
            "loss": self.loss,
            "turns": len(self.seconds),
        }
        self.report("result", batch=self.batch, **speed, **rest)
        if (
            self.run.args.forward
            and self.run.left() > 20
            and (forward := self.ask("forward", n=self.steps)) is not None
        ):
            tokens_per_s = self.batch * self.seq * self.steps / forward["seconds"]
            flops = tokens_per_s * flops_per_token(SHAPES[self.size], self.seq, forward_only=True)
            mfu = self.peak_flops and flops / self.peak_flops
            self.say(f"forward only {tokens_per_s:.0f} tokens/s, MFU {percent(mfu)}")
            self.report("forward", tokens_per_s=tokens_per_s, model_flops_per_s=flops, mfu=mfu)
        if self.run.args.profile and self.options is not None:
            name = f"{self.case}-{self.name}.trace.json.gz".replace("/", "-").replace(" ", "-")
            if (trace := self.ask("profile", n=2, file=str(self.run.args.out / name))) is not None:
                self.say("\n".join([f"top operations ({name})", *lines(trace)]))
                self.report("profile", **trace)


def parsed(flags: list[str]) -> dict[str, Any]:
    """`a=true`, `b=3` as a dict, numbers and truth values as such; the preset is none of them."""
    return {name: value(word) for name, _, word in (flag.partition("=") for flag in flags if flag != PRESET)}


def gib(bytes: int | None) -> str:
    return "unknown" if bytes is None else f"{bytes / 2**30:.1f} GiB"


def percent(share: float | None) -> str:
    return "unknown here" if share is None else f"{share:.1%}"
