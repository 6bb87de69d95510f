"""The picture is drawn from the log alone."""

import math
import sys

import pytest

from shardtrain.errors import UserError
from shardtrain.metrics import MetricsLog, plot_loss
from shardtrain.metrics.plot import _smooth


def write(directory, losses, every=10):
    with MetricsLog(directory, tensorboard=False) as log:
        for step, loss in enumerate(losses, start=1):
            held_out = {"eval_loss": loss + 0.1} if step % every == 0 else {}
            log.write(step, {"loss": loss, **held_out})


def size(png):
    data = png.read_bytes()
    assert data.startswith(b"\x89PNG\r\n\x1a\n")
    return int.from_bytes(data[16:20], "big"), int.from_bytes(data[20:24], "big")


def test_plot(tmp_path):
    write(tmp_path, [2 + 5 * math.exp(-step / 30) for step in range(100)])
    path = plot_loss(tmp_path)
    assert path == tmp_path / "loss.png"
    assert size(path) == (1200, 675)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["loss.png", "metrics.jsonl"]
    assert "matplotlib.pyplot" not in sys.modules


@pytest.mark.parametrize("losses", [[3.0], [3.0, math.nan, math.inf, 2.0], [1.0] * 5])
def test_odd_logs_are_drawn(tmp_path, losses):
    write(tmp_path, losses, every=2)
    assert size(plot_loss(tmp_path)) == (1200, 675)


def test_held_out_loss_changes_the_picture(tmp_path):
    for name, every in (("with", 10), ("without", 1000)):
        write(tmp_path / name / "run", [5 - step / 50 for step in range(100)], every)
    assert plot_loss(tmp_path / "with/run").read_bytes() != plot_loss(tmp_path / "without/run").read_bytes()


def test_smoothing_keeps_a_line_and_quiets_noise():
    line = [7 - i / 10 for i in range(200)]
    assert _smooth(line) == pytest.approx(line)
    noise = [math.sin(i * 2.3) for i in range(300)]
    assert max(map(abs, _smooth(noise)[10:-10])) < 0.2
    assert _smooth([7.0, 1.0]) == [7.0, 1.0]


def test_nothing_to_draw(tmp_path):
    with pytest.raises(UserError, match=r"no metrics.jsonl"):
        plot_loss(tmp_path)
    write(tmp_path, [math.nan])
    with pytest.raises(UserError, match="no finite loss"):
        plot_loss(tmp_path)
