"""Benchmarks run by hand, seldom: here each is at least imported, with all that it takes from the library."""

import subprocess
import sys
from pathlib import Path

FOLDER = Path(__file__).parent.parent / "benchmarks"


def test_all_benchmarks_import():
    names = sorted(path.stem for path in FOLDER.glob("*.py") if "torch" not in path.stem)
    program = f"import sys; sys.path.insert(0, {str(FOLDER)!r}); import {', '.join(names)}"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
