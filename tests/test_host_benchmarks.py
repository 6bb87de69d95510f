"""The benchmarks of data and host still run, count right, and tell a missed limit; times are not judged here."""

import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


def run_tiny(name, rows, *options):
    """The exit status and the lines of the tables."""
    command = [sys.executable, BENCHMARKS / f"{name}.py", "--tiny", *options]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    lines = run.stdout.splitlines()[-len(rows) :]
    assert [line.split()[0] for line in lines] == rows, run.stderr
    return run.returncode, lines


TABLES = [("data", ["tiny", "tiny"], "--limit=1e9"), ("host", ["1.", "1.", "2.", "3."], "--share=-1")]


@pytest.mark.full
@pytest.mark.parametrize(("name", "rows", "too_strict"), TABLES)
def test_it_runs_at_a_tiny_size_and_tells_a_missed_limit(name, rows, too_strict):
    """With --tiny times have no limit; that batches, saves and lines of metrics are as many as they should, has."""
    code, lines = run_tiny(name, rows)
    assert code == 0
    assert all("pass" in line and "FAIL" not in line for line in lines)
    code, lines = run_tiny(name, rows, too_strict)
    assert code == 1
    assert sum("FAIL" in line for line in lines) == 2
