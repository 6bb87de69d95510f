"""The command line as a user meets it: in this process where that loses nothing, else in real ones."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import logging
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache

from conftest import REMATERIALIZATION
from shardtrain import cli, load_config
from shardtrain.run import Trainer

#: What `train` says on standard error when all goes well.
PREPARED = re.compile(r"preparing data and state \.\.\.\nprepared in \d+\.\d s\n")
#: A tiny model on synthetic data, on eight emulated devices.
CONFIG = Path(__file__).parent / "small.yaml"


@pytest.fixture(scope="module", autouse=True)
def compiled_once(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A compilation cache for the runs of a module and for the processes that it starts: each program compiles once."""
    folder = tmp_path_factory.getbasetemp() / "compiled"
    options = {
        "jax_compilation_cache_dir": str(folder),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    old = {name: getattr(jax.config, name) for name in options}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in options.items():
            jax.config.update(name, value)
            patch.setenv(name.upper(), str(value))
        compilation_cache.reset_cache()
        yield folder
        for name, value in old.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()


@dataclasses.dataclass(frozen=True)
class Result:
    """What a command left: exit code, standard output, standard error."""

    code: int
    out: str
    err: str


def shardtrain(*words: object) -> Result:
    """Run a command line in this process."""
    out, err = io.StringIO(), io.StringIO()
    handler = logging.StreamHandler(err)
    handler.setLevel(logging.WARNING)
    code = 0
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patch.setattr(sys, "argv", ["shardtrain", *map(str, words)])
        logging.getLogger().addHandler(handler)
        try:
            cli.main()
        except SystemExit as end:
            code = int(end.code or 0)
        finally:
            logging.getLogger().removeHandler(handler)
    return Result(code, out.getvalue(), err.getvalue())


def train(directory: Path, *words: object) -> Result:
    """`shardtrain train` with `CONFIG` and a run directory."""
    return shardtrain("train", CONFIG, f"run.dir={directory}", *words)


def fit(directory: Path, *overrides: str, stop_after: int | None = None, **options: Any) -> Trainer:
    """Train in this process, to the end or, as if asked to, until after a step."""
    run = Trainer.from_config(
        load_config(CONFIG, [f"run.dir={directory}", *overrides]),
        should_stop=lambda step: step == stop_after,
        **options,
    )
    run.fit()
    return run


def metrics(directory: Path) -> list[dict[str, Any]]:
    """The lines of `metrics.jsonl`, the last of which may be half written."""
    path = directory / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def losses(directory: Path) -> list[float]:
    """The loss of steps 1, 2, 3, ...; each must stand there once."""
    rows = metrics(directory)
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    return [row["loss"] for row in rows]


def saved(directory: Path) -> list[int]:
    """The steps with a checkpoint and its manifest."""
    names = [path.name.removesuffix(".manifest.json") for path in directory.glob("checkpoints/*.manifest.json")]
    return sorted(int(name) for name in names if name.isdecimal())


def flip_a_byte(directory: Path, step: int) -> None:
    """Damage the array data of a checkpoint."""
    path = max(directory.glob(f"checkpoints/{step}/state/**/d/*"), key=lambda file: file.stat().st_size)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def assert_same_bits(got: Any, want: Any) -> None:
    """Two trees of arrays are equal in every bit."""
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for (path, a), b in zip(jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes(), jax.tree_util.keystr(path)


class Process:
    """A real `shardtrain` in a process group of its own; made by `start`."""

    def __init__(self, words: tuple[object, ...], folder: Path):
        self._log = open(folder / f"{time.time_ns()}.log", "w+")  # noqa: SIM115
        self.popen = subprocess.Popen(
            [sys.executable, "-m", "shardtrain", *map(str, words)],
            stdout=self._log,
            stderr=subprocess.STDOUT,
            cwd=folder,
            start_new_session=True,
        )

    @property
    def output(self) -> str:
        """All that it has printed so far."""
        return Path(self._log.name).read_text()

    def send(self, number: int) -> None:
        """Send a signal to this process alone."""
        self.popen.send_signal(number)

    def until(self, condition: Callable[[], bool], seconds: float = 120) -> None:
        """Wait for something that it shall bring about."""
        deadline = time.monotonic() + seconds
        while not condition():
            assert self.popen.poll() is None, f"it ended with {self.popen.returncode}:\n{self.output}"
            assert time.monotonic() < deadline, f"not within {seconds} s:\n{self.output}"
            time.sleep(0.01)

    def end(self, seconds: float = 120) -> int:
        """Wait for its end; the exit code, or minus the signal."""
        code = self.popen.wait(seconds)
        assert REMATERIALIZATION not in self.output
        return code

    def kill(self) -> None:
        """End it and whatever it started."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.popen.pid, signal.SIGKILL)
        self.popen.wait()
        self._log.close()


@contextlib.contextmanager
def start(*commands: tuple[object, ...], folder: Path) -> Iterator[list[Process]]:
    """Start commands together, in `folder`; none of them outlives the block."""
    processes: list[Process] = []
    try:
        for words in commands:
            processes.append(Process(words, folder))
        yield processes
    finally:
        for process in processes:
            process.kill()


def free_address() -> str:
    """HOST:PORT on this machine, where nobody listens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{free.getsockname()[1]}"


def pair(directory: Path, *overrides: str) -> list[tuple[object, ...]]:
    """The two commands of a run of two processes of four devices each."""
    address = free_address()
    command = ("train", CONFIG, f"run.dir={directory}", *overrides)
    return [(*command, "--coordinator", address, "--processes", 2, "--process", i) for i in range(2)]
