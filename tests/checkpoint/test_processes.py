"""Two real processes: one decision about which step to restore."""

import os
import socket
import subprocess
import sys
from pathlib import Path

from shardtrain.checkpoint import verify

WORKER = Path(__file__).with_name("pair_worker.py")


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_two_processes_save_fall_back_and_refuse_together(tmp_path):
    port, steps = free_port(), tmp_path / "steps"
    reports = [tmp_path / "report0", tmp_path / "report1"]
    environment = {**os.environ, "JAX_COORDINATOR_BIND_ADDRESS": f"127.0.0.1:{port}"}
    processes = [
        subprocess.Popen(
            [sys.executable, str(WORKER), str(port), str(index), str(steps), str(reports[index])],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for index in range(2)
    ]
    try:
        errors = [process.communicate(timeout=100)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    assert [process.returncode for process in processes] == [0, 0], errors
    lines = [report.read_text().splitlines() for report in reports]
    hashed = [[set(line.split()[1:]) for line in each if line.startswith("hashed ")] for each in lines]
    assert all(first and second and not first & second for first, second in zip(*hashed, strict=True)), hashed
    decided = [[line for line in each if not line.startswith("hashed ")] for each in lines]
    assert decided[0][:2] == decided[1][:2] == ["restored 2", "restored 1"]
    assert "no intact checkpoint is left" in decided[0][2]
    assert "process 0 refused to continue" in decided[1][2]
    assert verify(steps) == []
