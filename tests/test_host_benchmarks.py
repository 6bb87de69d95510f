"""The benchmarks of data and host still run; what they measure is not judged here."""

import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.mark.full
@pytest.mark.parametrize(("name", "rows"), [("data", ["tiny", "tiny"]), ("host", ["1.", "1.", "2.", "3."])])
def test_it_runs_at_a_tiny_size(name, rows):
    command = [sys.executable, BENCHMARKS / f"{name}.py", "--tiny"]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    lines = run.stdout.splitlines()[-len(rows) :]
    assert [line.split()[0] for line in lines] == rows
    assert all("pass" in line or "FAIL" in line for line in lines)
