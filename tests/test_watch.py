"""The state of a run and what happens in it, from its files alone."""

import json
import os
import signal
import threading

import pytest

from commands import CONFIG, compiled_once, fit, metrics, shardtrain, start  # noqa: F401
from shardtrain.host.lock import RunLock
from shardtrain.metrics.follow import Follower, Line
from shardtrain.metrics.status import RunStatus
from shardtrain.train.callbacks import Callback


def test_the_state_of_a_run_follows_its_lock(tmp_path):
    directory = tmp_path / "run"
    fit(directory, "run.steps=4", stop_after=2)
    assert RunStatus.of(directory).state == "stopped"
    lock = RunLock(directory)
    assert RunStatus.of(directory).state == "running"
    assert RunStatus.of(directory).holder["pid"] == os.getpid()
    lock.release()
    (directory / "lock").write_text(json.dumps({"pid": 2**22 + 1, "host": os.uname().nodename}))
    assert RunStatus.of(directory).state == "died"
    (directory / "lock").write_text(json.dumps({"pid": 1, "host": "elsewhere"}))
    assert RunStatus.of(directory).state == "running"
    for name in ("lock", "metrics.jsonl"):
        os.utime(directory / name, (0, 0))
    assert RunStatus.of(directory).state == "silent"


def test_a_follower_sees_steps_checkpoints_and_a_resume(tmp_path):
    directory, seen = tmp_path / "run", []

    class Look(Callback):
        def on_step(self, step, values):
            seen.extend(follower.poll())
            return {}

    fit(directory, "run.steps=4", "checkpoint.every=2", stop_after=2)
    follower = Follower(directory)
    assert [each.step for each in follower.poll()] == [1, 2]
    with open(directory / "metrics.jsonl", "a") as file:
        file.write('{"step": 3, "loss": 9.0}\n{"step": 4, "lo')  # of a run that was killed before it saved them
    assert [each.step for each in follower.poll()] == [3]
    fit(directory, "run.steps=4", "checkpoint.every=2", callbacks=[Look()])
    seen += follower.poll()
    assert f"started by process {os.getpid()} on {os.uname().nodename}" in seen
    assert "went back from step 3 to 2" in seen
    assert [each.step for each in seen if isinstance(each, Line)] == [3, 4]
    assert "checkpoint 4 is saved" in seen
    assert follower.status.state == "finished"


def test_a_damaged_line_is_left_out(tmp_path):
    directory = tmp_path / "runs/torn"
    directory.mkdir(parents=True)
    follower = Follower(directory)
    (directory / "metrics.jsonl").write_bytes(b'{"step": 1, "loss": 2}\n{"\xff": 2\n[3]\n{"step": 4, "loss": 1.0}\n')
    assert [each.step for each in follower.poll()] == [1, 4]
    listed = shardtrain("runs", tmp_path / "runs")
    assert listed.code == 0, listed.err
    assert "1.0000" in listed.out


@pytest.mark.parametrize(("file", "content"), [("config.yaml", "run: null"), ("config.yaml", "[]"), ("lock", "{}")])
def test_a_damaged_run_is_listed_with_the_others(tmp_path, file, content):
    for name in ("torn", "whole"):
        directory = tmp_path / "runs" / name
        directory.mkdir(parents=True)
        (directory / "config.yaml").write_text("run: {steps: 6}")
        (directory / "metrics.jsonl").write_text('{"step": 6, "loss": 1.5}\n')
    (tmp_path / "runs/torn" / file).write_text(content)
    listed = shardtrain("runs", tmp_path / "runs")
    assert listed.code == 0, listed.err
    assert "torn" in listed.out
    assert "whole" in listed.out


@pytest.mark.full
def test_watch_follows_a_run_of_another_process_until_it_ends(tmp_path):
    directory = tmp_path / "runs/live"
    with start(
        ("train", CONFIG, f"run.dir={directory}", "run.steps=100000", "log.tensorboard=false"), folder=tmp_path
    ) as (process,):
        process.until(lambda: len(metrics(directory)) > 2)
        threading.Timer(1.5, process.send, [signal.SIGTERM]).start()
        result = shardtrain("watch", directory, "--every", "0.1")
        assert process.end() == 0
    assert result.code == 0, result.err
    lines = result.out.splitlines()
    assert lines[0].startswith(f"small in {directory}: running, step ")
    assert any(line.startswith("loss ") for line in lines)
    assert any(line.endswith(" is saved") for line in lines)
    assert lines[-1].endswith("  stopped")
