"""Real processes, real signals: what claims to survive them is tested by causing them."""

import os
import random
import re
import shlex
import shutil
import signal
import time
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from commands import (
    CONFIG,
    assert_same_bits,
    compiled_once,  # noqa: F401
    fit,
    losses,
    metrics,
    pair,
    saved,
    shardtrain,
    start,
)
from shardtrain import load_config
from shardtrain.checkpoint import RunLock
from shardtrain.run import Trainer

STEPS = 60
ENDLESS = "run.steps=1000000"


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """A run of 60 steps in this process."""
    folder = tmp_path_factory.mktemp("undisturbed")
    run = fit(folder / "run", f"run.steps={STEPS}", "checkpoint.every=7")
    return SimpleNamespace(directory=run.directory, state=jax.device_get(run.state), losses=losses(run.directory))


def state_of(directory):
    """What a run would go on with."""
    run = Trainer.from_config(load_config(CONFIG, [f"run.dir={directory}", f"run.steps={STEPS}"]))
    run.close()
    return jax.device_get(run.state)


@pytest.mark.parametrize("trial", [0, *(pytest.param(i, marks=pytest.mark.full) for i in (1, 2))])
def test_killed_at_a_random_moment_it_ends_with_the_same_bits(undisturbed, tmp_path, trial):
    directory = tmp_path / "run"
    command = ("train", CONFIG, "run.dir=run", f"run.steps={STEPS}", "checkpoint.every=7")
    line = random.randrange(1, STEPS // 2)
    print(f"killed once the line of step {line} is there")
    with start(command, folder=tmp_path) as (process,):
        process.until(lambda: len(metrics(directory)) >= line)
        process.send(signal.SIGKILL)
        assert process.end() == -signal.SIGKILL
    assert len(metrics(directory)) < STEPS, "it had ended by itself"
    with start(command, folder=tmp_path) as (process,):
        assert process.end() == 0, process.output
        assert f"done: {STEPS} steps" in process.output
    assert losses(directory) == undisturbed.losses
    assert_same_bits(state_of(directory), undisturbed.state)


@pytest.mark.parametrize("number", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.full)])
def test_a_signal_saves_and_tells_how_to_resume(undisturbed, tmp_path, number):
    directory = tmp_path / "run"
    with start(("train", CONFIG, "run.dir=run", ENDLESS), folder=tmp_path) as (process,):
        process.until(lambda: len(metrics(directory)) >= 5)
        process.send(number)
        assert process.end() == 0, process.output
        output = process.output
    step = len(losses(directory))
    assert saved(directory)[-1] == step
    assert f"stopped and saved after step {step}; to resume:" in output
    assert "Traceback" not in output
    words = shlex.split(output.splitlines()[-1])
    assert words == ["python", "-m", "shardtrain", "train", str(CONFIG), "run.dir=run", ENDLESS]
    assert losses(directory)[:STEPS] == undisturbed.losses[:step]
    run = fit(directory, f"run.steps={step + 2}")
    assert run.resumed_from == step
    assert losses(directory)[:STEPS] == undisturbed.losses[: step + 2]


@pytest.mark.full
def test_an_impatient_user_interrupts_the_saving_and_loses_little(undisturbed, tmp_path):
    directory = tmp_path / "run"
    with start(("train", CONFIG, "run.dir=run", ENDLESS), folder=tmp_path) as (process,):
        process.until(lambda: len(metrics(directory)) >= 9)
        while process.popen.poll() is None:
            process.send(signal.SIGINT)
            time.sleep(0.05)
        assert process.end() != 0
        assert "to resume" not in process.output
        lost = re.search(r"SIGINT again: stopped at once, losing the steps since (\d+), up to", process.output)
        assert lost, process.output
    run = fit(directory, "run.steps=20")
    assert run.resumed_from >= int(lost[1]) >= 4  # that of step 8 may have been under way
    assert losses(directory) == undisturbed.losses[:20]


@pytest.mark.parametrize(
    ("number", "who"),
    [
        (signal.SIGTERM, [1]),
        pytest.param(signal.SIGTERM, [0], marks=pytest.mark.full),
        pytest.param(signal.SIGINT, [0, 1], marks=pytest.mark.full),  # as a terminal sends it
    ],
)
def test_two_processes_train_as_one_and_stop_at_the_same_step(undisturbed, tmp_path, number, who):
    directory = tmp_path / "run"
    with start(*pair(directory, ENDLESS), folder=tmp_path) as processes:
        processes[0].until(lambda: len(metrics(directory)) >= 5)
        others = [process for i, process in enumerate(processes) if i not in who]
        for process in others:
            process.send(signal.SIGSTOP)  # so that they cannot agree yet
        for i in who:
            processes[i].send(number)
            processes[i].until(lambda i=i: f"{number.name}: saving after this step" in processes[i].output)
        for process in others:
            process.send(signal.SIGCONT)
        assert [process.end() for process in processes] == [0, 0], [process.output for process in processes]
        outputs = [process.output for process in processes]
    step = len(losses(directory))
    assert saved(directory)[-1] == step
    assert f"stopped and saved after step {step}; to resume:" in outputs[0]
    np.testing.assert_allclose(losses(directory)[:STEPS], undisturbed.losses[:step], rtol=1e-6)
    run = fit(directory, f"run.steps={step + 2}")  # by one process
    assert run.resumed_from == step
    np.testing.assert_allclose(losses(directory)[:STEPS], undisturbed.losses[: step + 2], rtol=1e-5)


@pytest.mark.full
def test_two_processes_end_and_resume_together(undisturbed, tmp_path):
    directory = tmp_path / "run"
    for steps, words in (
        (6, "done: 6 steps"),
        (9, "resumed from the checkpoint of step 6"),
        (9, "is finished: 9 of 9"),
    ):
        with start(*pair(directory, f"run.steps={steps}"), folder=tmp_path) as processes:
            assert [process.end() for process in processes] == [0, 0], [process.output for process in processes]
            assert words in processes[0].output
    assert saved(directory) == [4, 6, 8, 9]
    np.testing.assert_allclose(losses(directory), undisturbed.losses[:9], rtol=1e-6)


@pytest.mark.full
def test_where_process_0_refuses_none_waits_for_it(tmp_path):
    (tmp_path / "run").mkdir()
    with RunLock(tmp_path / "run"), start(*pair(tmp_path / "run"), folder=tmp_path) as processes:
        assert [process.end(30) for process in processes] == [2, 2]
        assert f"is being written by process {os.getpid()}" in processes[0].output
        assert "process 0 refused" in processes[1].output


FAILING = '''
"""The MLP; once a file appears, an error that nobody expects strikes the main thread of one process."""

import ctypes, os, sys, threading, time
from shardtrain.models.mlp import MLP as Failing


def strike(main):
    while not os.path.exists("now"):
        time.sleep(0.02)
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(main), ctypes.py_object(ZeroDivisionError))


if sys.argv[sys.argv.index("--process") + 1] == os.environ["WHO_FAILS"]:
    threading.Thread(target=strike, args=(threading.main_thread().ident,), daemon=True).start()
'''


@pytest.mark.full
@pytest.mark.parametrize("who", [0, 1])
def test_when_one_process_fails_all_end_at_once(tmp_path, monkeypatch, who):
    """Not after the minutes in which each would wait for the other."""
    monkeypatch.setenv("WHO_FAILS", str(who))
    (tmp_path / "failing.py").write_text(FAILING)
    commands = pair(tmp_path / "run", ENDLESS, "model.type=failing:Failing", "eval.every=1")
    with start(*commands, folder=tmp_path) as processes:
        processes[0].until(lambda: len(metrics(tmp_path / "run")) >= 5)
        (tmp_path / "now").touch()
        begun = time.monotonic()
        codes = [process.end() for process in processes]
        seconds = time.monotonic() - begun
        outputs = [process.output for process in processes]
    assert codes[who] == 1
    assert all(codes)
    assert "ZeroDivisionError" in outputs[who]
    assert "ZeroDivisionError" not in outputs[1 - who]
    assert seconds < 20  # 0.3 s when all goes well; a heartbeat would take 30 s, the runtime's own exit 300 s
    assert shardtrain("checkpoint", "verify", tmp_path / "run").code == 0


@pytest.mark.full
def test_the_quickstart_killed_and_restarted_ends_with_the_same_loss(tmp_path, monkeypatch):
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    quickstart = shutil.copy(CONFIG.parent.parent / "configs/quickstart.yaml", tmp_path)
    with start(("train", quickstart, "run.name=undisturbed"), folder=tmp_path) as (process,):
        assert process.end(600) == 0, process.output
    command = ("train", quickstart, "run.name=killed")
    line = random.randrange(1, 190)
    print(f"killed once the line of step {line} is there")
    with start(command, folder=tmp_path) as (process,):
        process.until(lambda: len(metrics(tmp_path / "runs/killed")) >= line, seconds=600)
        process.send(signal.SIGKILL)
        assert process.end() == -signal.SIGKILL
    with start(command, folder=tmp_path) as (process,):
        assert process.end(600) == 0, process.output
    assert losses(tmp_path / "runs/killed") == losses(tmp_path / "runs/undisturbed")
    first, last = (metrics(tmp_path / "runs/killed")[i] for i in (0, -1))
    assert last["eval_loss"] == metrics(tmp_path / "runs/undisturbed")[-1]["eval_loss"]
    assert last["eval_loss"] < first["loss"] - 1.5
