"""Benchmarks run by hand, seldom: here each is at least imported, with all that it takes from the library."""

import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent.parent / "benchmarks"


def test_the_index_names_all_files():
    index = (FOLDER / "README.md").read_text()
    assert [path.stem for path in FOLDER.glob("*.py") if f"`{path.stem}`" not in index] == []


def test_all_benchmarks_import():
    names = sorted(path.stem for path in FOLDER.glob("*.py") if "torch" not in path.stem)
    program = f"import sys; sys.path.insert(0, {str(FOLDER)!r}); import {', '.join(names)}"
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr


@pytest.mark.full
def test_all_remat_policies_find_the_same_gradient_and_no_committed_page_is_written(tmp_path):
    import remat

    command = [sys.executable, FOLDER / "remat.py", "--tiny", "--pairs", "1", "--length", "32", "--compute", "bfloat16"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    page = tmp_path / "remat-results/remat.md"
    table = [line for line in page.read_text().splitlines() if "`" in line and line[0] == "|"]
    assert [row.split(" | ")[0] for row in table] == [f"| {name}" for name in remat.POLICIES]
    assert "bfloat16" in result.stdout
