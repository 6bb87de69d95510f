"""The example of an average runs, and shows what it is for."""

import runpy
from pathlib import Path

EXAMPLE = Path(__file__).parent.parent / "examples" / "ema.py"


def test_the_average_is_better_than_the_last_weights(capsys):
    losses = runpy.run_path(str(EXAMPLE))["main"]()
    last, average = (float(line.split()[-1]) for line in capsys.readouterr().out.splitlines())
    assert average < last < losses[0]
