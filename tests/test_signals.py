"""Signals to real runs: acknowledged at once, obeyed at the next step or batch, and a second one at once."""

import os
import pty
import re
import signal
import subprocess
import sys
import time

import pytest

from commands import (
    CONFIG,
    compiled_once,  # noqa: F401
    free_address,
    metrics,
    pair,
    saved,
    start,
)
from shardtrain.launch.signals import stop_on_signals

ENDLESS = ("run.steps=1000000", "checkpoint.every=100")
#: Takes a second or more to compile.
LARGER = (
    "model={type: llama, n_layers: 2, d_model: 32, n_heads: 4, n_kv_heads: 2, d_ff: 64, vocab_size: 64, scan: false}"
)
EVALUATES = ("run.steps=50", "checkpoint.every=5", "eval={every: 5, batches: 1000000}", "data.held_out=0.5")


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGHUP, marks=pytest.mark.full)])
def test_a_long_evaluation_ends_at_its_next_batch(tmp_path, number):
    directory = tmp_path / "run"
    command = ("train", CONFIG, "run.dir=run", *EVALUATES)
    with start(command, folder=tmp_path) as (process,):
        process.until(lambda: saved(directory) == [5])  # which comes first
        time.sleep(1)
        process.send(number)
        begun = time.monotonic()
        assert process.end() == 0, process.output
        assert time.monotonic() - begun < 20  # the whole evaluation takes an hour
    assert f"{number.name}: saving after this step, then stopping" in process.output
    assert "the evaluation of step 5 was interrupted; the resumed run makes it" in process.output
    assert "stopped and saved after step 5; to resume:" in process.output
    assert (saved(directory), len(metrics(directory))) == ([5], 5)


@pytest.mark.parametrize("number", [signal.SIGHUP, pytest.param(signal.SIGINT, marks=pytest.mark.full)])
def test_a_signal_in_a_compilation_is_acknowledged_at_once(tmp_path, monkeypatch, number):
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    command = ("train", CONFIG, "run.dir=run", "run.compile_cache=null", LARGER, *ENDLESS)
    with start(command, folder=tmp_path) as (process,):
        process.until(lambda: "compiling the step ..." in process.output)
        process.send(number)
        assert process.end() == 0, process.output
    assert process.output.index(f"{number.name}: saving") < process.output.index("compiled in"), process.output
    assert f"{number.name}: saving after this step, then stopping; send it again to stop at once" in process.output
    assert "stopped and saved after step 1; to resume:" in process.output
    assert saved(tmp_path / "run") == [1]


def test_a_signal_ends_the_preparation_of_data(tmp_path):
    """Within a second or so, of a text that takes minutes."""
    (tmp_path / "text.txt").write_text("".join(f"word{i} " for i in range(4_000_000)))
    text = "data={type: text, path: text.txt, vocab_size: 32768, seq_len: 16, global_batch: 8}"
    command = ("train", CONFIG, "run.dir=run", text, "model.vocab_size=32768", *ENDLESS)
    with start(command, folder=tmp_path) as (process,):
        process.until(lambda: (tmp_path / "run/lock").exists())
        time.sleep(3)
        process.send(signal.SIGTERM)
        begun = time.monotonic()
        assert process.end() == 2, process.output
        assert time.monotonic() - begun < 10
    assert "SIGTERM: stopping while data is prepared" in process.output
    assert "error: stopped while preparing data" in process.output


def test_a_second_signal_says_what_is_lost_and_ends_at_once(tmp_path):
    command = ("train", CONFIG, "run.dir=run", *EVALUATES, "checkpoint.every=3")
    with start(command, folder=tmp_path) as (process,):
        process.until(lambda: saved(tmp_path / "run") == [3] and len(metrics(tmp_path / "run")) >= 4)
        time.sleep(1)  # in the evaluation of step 5 by now
        for number in (signal.SIGSTOP, signal.SIGINT, signal.SIGTERM, signal.SIGCONT):  # both before it goes on
            process.send(number)
        code, output = process.end(), process.output
    second = re.search(r"(SIGINT|SIGTERM) again: stopped at once, losing the steps since 3, up to 5\n", output)
    assert second, output
    assert code == 128 + getattr(signal, second[1])
    assert "saving after this step, then stopping; send it again to stop at once and lose the steps since 3" in output
    assert "Traceback" not in output


def test_a_terminal_that_closes_does_not_end_a_run(tmp_path):
    """Its writes fail with EIO from then on; without a controlling terminal no SIGHUP comes."""
    ours, theirs = pty.openpty()
    command = [
        sys.executable,
        "-m",
        "shardtrain",
        "train",
        str(CONFIG),
        "run.dir=run",
        "run.steps=300",
        "checkpoint.every=100",
    ]
    process = subprocess.Popen(
        command, stdin=theirs, stdout=theirs, stderr=theirs, cwd=tmp_path, start_new_session=True
    )
    os.close(theirs)
    seen = b""
    while b"compiled in" not in seen:
        seen += os.read(ours, 4096)
    os.close(ours)
    assert process.wait(100) == 0
    assert saved(tmp_path / "run")[-1] == 300


@pytest.mark.full
def test_the_reader_of_the_last_line_may_have_left(tmp_path):
    command = [sys.executable, "-m", "shardtrain", "train", str(CONFIG), "run.dir=run"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, cwd=tmp_path)
    assert process.stdout is not None
    process.stdout.close()
    assert process.wait(100) == 0
    assert saved(tmp_path / "run")[-1] == 12


@pytest.mark.full
@pytest.mark.parametrize("number", [signal.SIGHUP, signal.SIGTERM])
def test_two_processes_leave_an_evaluation_together(tmp_path, number):
    directory = tmp_path / "run"
    with start(*pair(directory, *EVALUATES), folder=tmp_path) as processes:
        processes[0].until(lambda: saved(directory) == [5])
        time.sleep(1)
        processes[1].send(number)
        assert [process.end() for process in processes] == [0, 0], [process.output for process in processes]
        outputs = [process.output for process in processes]
    assert "one of the processes is to stop: saving after this step, then stopping" in outputs[0]
    assert "stopped and saved after step 5; to resume:" in outputs[0]
    assert f"{number.name}: saving after" in outputs[1]
    assert (saved(directory), len(metrics(directory))) == ([5], 5)


#: One of two processes that stop together and then save until a file says that they have.
SAVES = """
import os, sys, time, jax
from types import SimpleNamespace
from shardtrain.launch.signals import stop_together

jax.distributed.initialize(sys.argv[1], 2, int(sys.argv[2]))
with stop_together() as stop:
    stop.follow(SimpleNamespace(step=7, checkpointer=SimpleNamespace(kept=4)))
    print("waiting", file=sys.stderr)
    while not stop(7):
        time.sleep(0.02)
    while not os.path.exists("saved"):
        time.sleep(0.02)
"""


def test_the_first_signal_to_a_process_that_was_told_to_stop_does_not_interrupt_its_saving(tmp_path):
    address = free_address()
    logs = [tmp_path / f"{i}.log" for i in range(2)]
    processes = []
    try:
        for i, log in enumerate(logs):
            with log.open("w") as err:
                command = [sys.executable, "-c", SAVES, address, str(i)]
                processes.append(subprocess.Popen(command, stderr=err, cwd=tmp_path))
        for log in logs:
            until(lambda log=log: "waiting" in log.read_text())
        processes[1].send_signal(signal.SIGTERM)
        until(lambda: "one of the processes is to stop: saving after this step" in logs[0].read_text())
        processes[0].send_signal(signal.SIGTERM)
        until(lambda: "SIGTERM" in logs[0].read_text())
        (tmp_path / "saved").touch()
        assert [process.wait(60) for process in processes] == [0, 0]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert "SIGTERM: saving after this step, then stopping; send it again" in logs[0].read_text()


def until(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_without_the_service_by_which_processes_agree_the_variable_is_named(tmp_path):
    script = SAVES.replace("sys.argv[1], 2, int(sys.argv[2])", "sys.argv[1], 1, 0")
    done = subprocess.run(
        [sys.executable, "-c", script, free_address()],
        env={**os.environ, "JAX_ENABLE_PREEMPTION_SERVICE": "false"},
        capture_output=True,
        text=True,
        timeout=60,
        cwd=tmp_path,
        check=False,
    )
    assert "JAX_ENABLE_PREEMPTION_SERVICE = false: several processes agree by JAX's preemption service" in done.stderr
    assert "drop this variable" in done.stderr


def test_a_trace_that_is_asked_for_too_early_is_answered(capfd):
    with stop_on_signals() as stop:
        signal.raise_signal(signal.SIGUSR1)
        said = ""
        deadline = time.monotonic() + 5
        while "\n" not in said:
            assert time.monotonic() < deadline
            said += capfd.readouterr().err
        assert not stop(1)
    assert said == "SIGUSR1: there are no steps to trace yet; send it again later\n"


def test_the_handlers_are_there_only_as_long_as_they_are_asked_for():
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = [signal.getsignal(number) for number in numbers]
    with stop_on_signals() as stop:
        assert not stop(1)
        signal.raise_signal(signal.SIGTERM)
        deadline = time.monotonic() + 5
        while not stop(2):
            assert time.monotonic() < deadline
    assert before == [signal.getsignal(number) for number in numbers]
    ignored = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as under `nohup`
    try:
        with stop_on_signals():
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, ignored)
