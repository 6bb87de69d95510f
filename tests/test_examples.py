"""Each example runs, and learns where it has the time to."""

import ast
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from commands import compiled_once  # noqa: F401

FOLDER = Path(__file__).parent.parent / "examples"
#: Arguments of `main`, and how much the loss must fall.
SHORT = {
    "batchnorm": ({"steps": 15}, 0.2),
    "ema": ({"steps": 60}, 1.0),
    "gpt": ({"steps": 8}, 0.05),
    "own_loss": ({"steps": 20}, 0.1),
    "own_source": ({"steps": 15}, 0.5),
    "pipeline": ({"steps": 2, "names": ("1f1b", "zb_v")}, 0.0),
    "pretrain": ({"steps": 8}, 0.3),
}
LONG = ("ema", "pipeline", "pretrain")  # of ema, the default suite has the test of its average


def test_every_example_is_here():
    assert {path.stem for path in FOLDER.glob("*.py")} == {*SHORT}


@pytest.mark.parametrize("name", [pytest.param(n, marks=[pytest.mark.full] if n in LONG else []) for n in SHORT])
def test_an_example_learns(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments, fall = SHORT[name]
    losses = runpy.run_path(str(FOLDER / f"{name}.py"))["main"](**arguments)
    assert losses[-1] < losses[0] - fall, losses


def test_the_average_of_ema_is_better_than_the_last_weights(capsys):
    losses = runpy.run_path(str(FOLDER / "ema.py"))["main"]()
    last, average = (float(line.split()[-1]) for line in capsys.readouterr().out.splitlines())
    assert average < last < losses[0]


@pytest.mark.full
@pytest.mark.parametrize("name", SHORT)
def test_an_example_is_a_program(name, tmp_path):
    run = subprocess.run([sys.executable, FOLDER / f"{name}.py"], cwd=tmp_path, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr


def test_pretraining_takes_forty_lines():
    (main,) = (node for node in ast.parse((FOLDER / "pretrain.py").read_text()).body if hasattr(node, "args"))
    assert main.end_lineno - main.lineno < 40
