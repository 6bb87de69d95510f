"""Faults that are caused, not simulated: kill -9 during saves, a file size limit, a disk that is full."""

import importlib.util
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from shardtrain.checkpoint import Checkpointer, list_steps
from shardtrain.errors import UserError

WORKER = Path(__file__).with_name("worker.py")


def load_worker():
    spec = importlib.util.spec_from_file_location("checkpoint_worker", WORKER)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def start(mode, directory):
    command = [sys.executable, str(WORKER), mode, str(directory)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def train_and_kill(directory, delay):
    """Kills a training process `delay` seconds after its second verified save; its last trusted step."""
    process = start("train", directory)
    try:
        lines = [process.stdout.readline() for _ in range(4)]
        time.sleep(delay)
        process.send_signal(signal.SIGKILL)
        rest, errors = process.communicate()
    finally:
        process.kill()
        process.wait()
    assert lines[0].startswith("resumed "), errors
    assert "Error" not in errors, errors
    trusted = [int(line.split()[1]) for line in [*lines, *rest.splitlines()] if line.startswith("trusted ")]
    return int(lines[0].split()[1]), trusted[-1]


def kill_repeatedly(directory, trials, seed):
    worker, rng, last = load_worker(), random.Random(seed), 0
    for _ in range(trials):
        resumed, trusted = train_and_kill(directory, rng.random() * 0.3)
        assert resumed >= last, "a trusted step was lost"
        last = trusted
    with Checkpointer(directory) as checkpointer:
        restored = checkpointer.restore(worker.abstract())
    assert restored.step >= last
    assert restored.extra == {"step": restored.step}
    np.testing.assert_array_equal(restored.state["params"]["w"], worker.expected(restored.step))
    statuses = {record.status for record in list_steps(directory)}
    assert statuses <= {"verified", "unverified"}, "a kill is no corruption"


def test_no_trusted_step_is_lost_to_kill_9(tmp_path):
    kill_repeatedly(tmp_path, trials=3, seed=0)


@pytest.mark.full
def test_no_trusted_step_is_lost_to_many_kills(tmp_path):
    kill_repeatedly(tmp_path, trials=25, seed=1)


def test_a_file_size_limit_stops_the_run_with_one_message(tmp_path):
    process = start("limit", tmp_path)
    output, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
    message, last = output.splitlines()
    assert message.startswith(f"saving step 2 in {tmp_path} failed: ")
    assert "File too large" in message
    assert "the last good checkpoint, step 1, is intact" in message
    assert last == "recovered"
    assert "Traceback" not in errors


def test_a_full_disk_leaves_the_last_good_step(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = shutil.which("mount")
    command = [mount, "-t", "tmpfs", "-o", "size=10m", "none", str(disk)]
    if mount is None or subprocess.run(command, capture_output=True).returncode != 0:
        pytest.skip("mounting a small tmpfs is not permitted here")
    worker = load_worker()
    try:
        checkpointer = Checkpointer(disk)
        checkpointer.save(1, worker.state(1), {})  # 4 MiB each
        checkpointer.save(2, worker.state(2), {})
        checkpointer.save(3, worker.state(3), {})
        with pytest.raises(UserError, match=r"saving step 3 .*No space left.*step 2, is intact.*full disk"):
            checkpointer.close()
        with Checkpointer(disk) as checkpointer:
            restored = checkpointer.restore(worker.abstract())
        assert restored.step == 2
        np.testing.assert_array_equal(restored.state["params"]["w"], worker.expected(2))
    finally:
        subprocess.run(["umount", str(disk)], check=True)
