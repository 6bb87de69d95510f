"""Pictures of loss curves: of a run, and of several side by side."""

import itertools
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from shardtrain.errors import UserError
from shardtrain.host.files import atomic
from shardtrain.metrics.log import read

_RAW, _SMOOTH, _HELD_OUT = "#a9c4e4", "#1f5fa8", "#d1571f"


def plot_loss(directory: Path | str) -> Path:
    """Draw `loss` (of each step, and smoothed) and `eval_loss` into the `loss.png` of a run directory.

    Steps with a value that is not finite are left out.

    Returns:
      The path of the picture.

    Raises:
      UserError: there are no metrics, or none of the losses is finite.
    """
    rows = read(directory)
    steps, loss = _series(rows, "loss")
    eval_steps, eval_loss = _series(rows, "eval_loss")
    if not steps:
        raise UserError(f"no finite loss in {directory}/metrics.jsonl: train at least one step before drawing")

    figure, ax = _axes(Path(directory).resolve().name)
    ax.plot(steps, loss, color=_RAW, linewidth=0.8, label="training")
    ax.plot(steps, _smooth(loss), color=_SMOOTH, linewidth=1.8, label="training, smoothed")
    if eval_steps:
        ax.plot(eval_steps, eval_loss, color=_HELD_OUT, linewidth=1.2, marker="o", markersize=4, label="held out")
        ax.annotate(
            f"{eval_loss[-1]:.3f}",
            (eval_steps[-1], eval_loss[-1]),
            textcoords="offset points",
            xytext=(0, 8),
            ha="right",
            color=_HELD_OUT,
            bbox={"boxstyle": "square,pad=0.1", "facecolor": "white", "edgecolor": "none", "alpha": 0.8},
        )
    ax.legend(frameon=False)
    return _save(figure, Path(directory) / "loss.png")


def plot_runs(directories: Mapping[str, Path], path: Path) -> Path:
    """Draw the losses of several runs into one picture: the smoothed `loss`, and `eval_loss` as dots.

    Args:
      directories: the run directory of each label.
      path: of the PNG to write.

    Raises:
      UserError: one of them has no metrics.
    """
    figure, ax = _axes(f"{len(directories)} runs")
    for label, directory in directories.items():
        rows = read(directory)
        steps, loss = _series(rows, "loss")
        (line,) = ax.plot(steps, _smooth(loss), linewidth=1.6, label=label)
        ax.plot(*_series(rows, "eval_loss"), color=line.get_color(), linestyle="", marker="o", markersize=4)
    ax.legend(frameon=False, title="dots: held out", title_fontsize=8, fontsize=8)
    return _save(figure, path)


def _axes(title: str) -> tuple[Any, Any]:
    # Only here: matplotlib takes longer to import than everything else in this room, and a run draws only once.
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(8, 4.5), dpi=150, layout="constrained")  # no pyplot: no global state, no display
    ax = figure.add_subplot()
    ax.set_xlabel("step")
    ax.set_ylabel("loss")
    ax.set_title(title, loc="left", fontsize=11)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.margins(x=0.01)
    ax.grid(color="#e6e6e6", linewidth=0.8)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)
    return figure, ax


def _save(figure: Any, path: Path) -> Path:
    with atomic(path) as file:
        figure.savefig(file, format="png")
    return path


def _series(rows: list[dict[str, float]], key: str) -> tuple[list[float], list[float]]:
    points = [(row["step"], row[key]) for row in rows if math.isfinite(row.get(key, math.nan))]
    return [step for step, _ in points], [value for _, value in points]


def _smooth(values: list[float]) -> list[float]:
    """Return the mean over about a thirtieth of the points around each point, so that a falling curve does not lag.

    The window shrinks to the point itself at both ends.
    """
    sums = [0.0, *itertools.accumulate(values)]
    last, reach = len(values) - 1, len(values) // 60
    windows = ((i, min(i, last - i, reach)) for i in range(len(values)))
    return [(sums[i + r + 1] - sums[i - r]) / (2 * r + 1) for i, r in windows]
