"""What the display shows, in a terminal and outside of one."""

from io import StringIO

import pytest
from rich.console import Console

from shardtrain.metrics import progress

VALUES = {
    "loss": 5.12341,
    "grad_norm": 0.8123,
    "lr": 1e-3,
    "tokens_per_s": 12345.6,
    "memory_bytes": 1.2 * 2**30,
}


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def plain(total, seconds=1.0, start=0, width=80, values=lambda step: VALUES):
    out, clock = StringIO(), Clock()
    with progress(total, start, console=Console(file=out, width=width), clock=clock) as display:
        for step in range(start + 1, total + 1):
            clock.now += 600 if step == start + 1 else seconds  # the first one compiles
            display.update(step, values(step))
    return out.getvalue().splitlines()


def test_plain_line():
    assert plain(200)[2] == ("step  20/200  loss 5.1234  grad_norm 0.812  lr 1.0e-03  12.3k tok/s  1.2 GiB  eta 3:00")


def test_plain_lines_are_first_regular_and_last():
    shown = [int(line.split()[1].split("/")[0]) for line in plain(200)]
    assert shown == [1, *range(10, 201, 10)]
    assert plain(203)[-1].startswith("step 203/203")
    assert len(plain(1)) == 1


def test_plain_is_never_silent_for_long():
    assert len(plain(200, seconds=31)) == 200


def test_held_out_loss_is_always_printed():
    lines = plain(200, values=lambda step: {"loss": 1.0} | ({"eval_loss": 2.5} if step == 37 else {}))
    assert next(line for line in lines if "held-out 2.5000" in line).startswith("step  37/200")


@pytest.mark.parametrize("start", [0, 150])
def test_eta_leaves_compilation_out(start):
    lines = plain(200, seconds=2, start=start)
    assert lines[0].endswith("eta -")
    assert next(line for line in lines if "190/200" in line).endswith("eta 0:20")
    assert lines[-1].endswith("eta 0:00")


def test_long_times():
    assert plain(101, seconds=5000, values=lambda step: {})[1].endswith("eta 5d 17:30:00")


def test_only_what_is_known_is_shown():
    line = plain(1, values=lambda step: {"loss": 1.0, "skipped": 0, "something": 3.0})[0]
    assert line == "step 1/1  loss 1.0000  eta 0:00"
    assert "MFU 41.3%  256 MiB" in plain(1, values=lambda step: {"mfu": 0.4127, "memory_bytes": 2**28})[0]
    assert "loss nan" in plain(1, values=lambda step: {"loss": float("nan"), "skipped": 2})[0]
    assert "skipped 2" in plain(1, values=lambda step: {"loss": float("nan"), "skipped": 2})[0]


@pytest.mark.parametrize(
    ("rate", "text"),
    [(0.5, "0.5"), (999.4, "999"), (999.7, "1k"), (1234, "1.23k"), (999_900, "1M"), (2.5e9, "2.5G")],
)
def test_rates(rate, text):
    assert f"  {text} tok/s" in plain(1, values=lambda step: {"tokens_per_s": rate})[0]


def test_messages_are_printed_as_they_are():
    out = StringIO()
    with progress(10, 0, console=Console(file=out, width=20)) as display:
        display.message("saved [red]step[/red] 5 to /a/rather/long/path/name")
    assert out.getvalue() == "saved [red]step[/red] 5 to /a/rather/long/path/name\n"


def test_terminal():
    out = StringIO()
    console = Console(file=out, force_terminal=True, width=100, color_system=None, _environ={})
    clock = Clock()
    with progress(200, 0, console=console, clock=clock) as display:
        assert "compiling" in out.getvalue()
        display.update(1, VALUES | {"eval_loss": 6.5})
        clock.now += 2
        display.update(2, VALUES | {"mfu": 0.4})
        display.message("checkpoint 2 saved")
    last = out.getvalue().rsplit("step 2/200", 1)[1]
    assert "eta 6:36" in last
    for text in ("loss 5.1234", "held-out 6.5000", "MFU 40.0%", "12.3k tok/s", "1.2 GiB"):
        assert text in last
    assert "checkpoint 2 saved" in out.getvalue()


def test_the_terminal_is_given_back_after_an_error():
    out = StringIO()
    console = Console(file=out, force_terminal=True, width=100, _environ={})
    with pytest.raises(RuntimeError, match="boom"), progress(5, 0, console=console):
        raise RuntimeError("boom")
    assert out.getvalue().rindex("\x1b[?25h") > out.getvalue().rindex("\x1b[?25l")  # the cursor is shown again
