"""Pictures of schedules: in the terminal, and as SVG, PNG or PDF."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from shardtrain.errors import UserError
from shardtrain.pipeline.schedules.schedule import Action, PublishedOrder, Schedule
from shardtrain.pipeline.schedules.simulate import Costs, Simulation, simulate, spans_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from rich.console import RenderableType
    from rich.text import Text

#: For each phase: the colours of the first chunk, of the last chunk, and of text on them. Dark, light and medium, so
#: that they also differ in greyscale.
_COLOURS = {
    "F": ("#2f5d9b", "#5b8fd0", "#ffffff"),
    "B": ("#f2b134", "#f9d98c", "#2b2b2b"),
    "I": ("#f2b134", "#f9d98c", "#2b2b2b"),
    "W": ("#5f9e6e", "#8cc49a", "#10240f"),
}
_WORDS = {"F": "forward", "B": "backward", "I": "input gradient", "W": "weight gradient"}
_IDLE = "#eeeeee"
_SUFFIXES = (".svg", ".png", ".pdf")


@dataclasses.dataclass(frozen=True)
class Chart:
    """A schedule with its simulated times, ready to be drawn.

    Attributes:
      pipeline: a table or a published order.
      simulation: its simulated times.
    """

    pipeline: Schedule | PublishedOrder
    simulation: Simulation

    @classmethod
    def of(cls, pipeline: Schedule | PublishedOrder, costs: Costs | None = None) -> Chart:
        """Simulate a schedule, with all phases of equal time by default."""
        return cls(pipeline, simulate(pipeline, costs))

    @property
    def title(self) -> str:
        """The schedule's name, form and chunks."""
        form = "" if isinstance(self.pipeline, Schedule) else ", as published"
        return f"{self.pipeline.name}{form}" + f", {self.pipeline.chunks} chunks" * (self.pipeline.chunks > 1)

    @property
    def facts(self) -> str:
        """The schedule's time, bubble and memory in one line."""
        return (
            f"time {self.simulation.makespan:g}, bubble {self.simulation.bubble_fraction:.1%}, "
            f"peak in flight {_by_rank(self.simulation.peak_activations)}"
        )


def terminal(chart: Chart, width: int) -> Text:
    """Draw one row per rank, time to the right, `F3` for the forward of microbatch 3 (`F3b` through chunk b).

    Args:
      chart: the chart. A cell's width is its time.
      width: columns of the terminal; a wider picture continues below.
    """
    from rich.style import Style
    from rich.text import Text

    pipeline, spans = chart.pipeline, chart.simulation.spans
    lettered = pipeline.chunks > 1
    wide = 1 + len(str(pipeline.microbatches - 1)) + lettered
    unit = min(span.stop - span.start for span in spans if span.stop > span.start)
    columns = round(chart.simulation.makespan / unit) * wide
    rows = []
    for rank in range(pipeline.ranks):
        row = Text("·" * columns, Style(color="grey50"))
        for span in spans_of(spans, rank):
            start, stop = round(span.start / unit) * wide, round(span.stop / unit) * wide
            cell = _label(span.action, lettered).ljust(stop - start, "─")[: stop - start]
            colour, ink = _colours(span.action, pipeline.chunks)
            row = row[:start] + Text(cell, Style(color=ink, bgcolor=colour)) + row[stop:]
        rows.append(row)

    head = len(f"rank {pipeline.ranks - 1}  ")
    step = max((width - head) // wide, 1) * wide
    text = Text.assemble((chart.title, "bold"), f": {chart.facts}\n")
    for start in range(0, columns, step):
        for rank, row in enumerate(rows):
            text.append(f"rank {rank}".ljust(head))
            text.append_text(row[start : start + step]).append("\n")
        text.append("\n" if start + step < columns else "")
    return text.append_text(_legend(pipeline))


def _legend(pipeline: Schedule | PublishedOrder) -> Text:
    from rich.text import Text

    parts = [f"{phase} {_WORDS[phase]}" for phase in pipeline.phases]
    if pipeline.chunks > 1:
        parts.append(f"a to {_letter(pipeline.chunks - 1)} chunks")
    return Text(", ".join([*parts, "· idle"]) + "\n", "dim")


def table(charts: Sequence[Chart]) -> RenderableType:
    """Compare schedules in a table of numbers.

    In flight counts (chunk, microbatch) pairs. Memory is the most of them on any rank, divided by chunks: the unit is
    microbatches.
    """
    from rich.table import Table

    grid = Table(box=None, header_style="bold", pad_edge=False, padding=(0, 2, 0, 0))
    for name in ("schedule", "chunks", "ticks", "time", "bubble", "memory", "peak in flight by rank"):
        grid.add_column(name, justify="left" if name in {"schedule", "peak in flight by rank"} else "right")
    for chart in charts:
        pipeline, simulation = chart.pipeline, chart.simulation
        grid.add_row(
            pipeline.name + ("" if isinstance(pipeline, Schedule) else " (published)"),
            str(pipeline.chunks),
            str(pipeline.ticks) if isinstance(pipeline, Schedule) else "",
            f"{simulation.makespan:g}",
            f"{simulation.bubble_fraction:.1%}",
            f"{max(simulation.peak_activations) / pipeline.chunks:g}",
            _by_rank(simulation.peak_activations),
        )
    return grid


def picture(charts: Sequence[Chart]) -> Figure:
    """Draw one panel per schedule, all on one scale of time."""
    # Imported here, because it is slow. A Figure without pyplot has no global state and needs no display.
    from matplotlib.figure import Figure

    end = max(chart.simulation.makespan for chart in charts)
    heights = [chart.pipeline.ranks + 1.6 for chart in charts]
    figure = Figure(figsize=(13, 0.29 * sum(heights) + 0.6), dpi=150, layout="constrained")
    for axes, chart in zip(
        figure.subplots(len(charts), height_ratios=heights, squeeze=False)[:, 0], charts, strict=True
    ):
        _panel(axes, chart, end)
    axes.set_xlabel("time of a microbatch's forward through one rank", fontsize=8, color="#555555")
    axes.tick_params("x", labelbottom=True, labelsize=8, colors="#555555")
    _picture_legend(figure, charts)
    return figure


def save(figure: Figure, path: Path | str) -> Path:
    """Write a picture and return its path; the same picture gives the same bytes.

    Args:
      figure: the picture.
      path: a file name that ends with .svg, .png or .pdf.

    Raises:
      UserError: the suffix is another one, or the folder does not exist.
    """
    import matplotlib

    path = Path(path)
    if path.suffix not in _SUFFIXES:
        raise UserError(f"picture {path} has the suffix {path.suffix!r}; use one of {', '.join(_SUFFIXES)}")
    if not path.parent.is_dir():
        raise UserError(f"picture {path}: there is no folder {path.parent}; make it first")
    dated = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}}.get(path.suffix)
    with matplotlib.rc_context({"svg.hashsalt": "shardtrain", "svg.fonttype": "none"}):
        figure.savefig(path, metadata=dated)
    return path


def _panel(axes: Axes, chart: Chart, end: float) -> None:
    from matplotlib.patches import Rectangle

    pipeline, simulation = chart.pipeline, chart.simulation
    for rank in range(pipeline.ranks):
        axes.add_patch(Rectangle((0, rank - 0.45), simulation.makespan, 0.9, facecolor=_IDLE, linewidth=0))
        axes.annotate(
            f"{simulation.peak_activations[rank]:g}",
            (1.0, rank),
            xycoords=("axes fraction", "data"),
            xytext=(8, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
            color="#333333",
        )
    inches, digits = 11.5 / end, len(str(pipeline.microbatches - 1))
    for span in simulation.spans:
        colour, ink = _colours(span.action, pipeline.chunks)
        long = span.stop - span.start
        corner, line = (span.start, span.rank - 0.45), min(0.5, 18 * inches * long)
        axes.add_patch(Rectangle(corner, long, 0.9, facecolor=colour, edgecolor="white", linewidth=line))
        size = min(8.0, 72 * inches * long / (0.68 * digits))  # one size for all cells of a length
        if size >= 3.5:
            where = (span.start + long / 2, span.rank)
            label = str(span.action.microbatch)
            axes.text(*where, label, ha="center", va="center_baseline", fontsize=size, color=ink)
    axes.set_xlim(0, end)
    axes.set_ylim(pipeline.ranks - 0.5, -0.5)
    axes.set_yticks(range(pipeline.ranks), [f"rank {rank}" for rank in range(pipeline.ranks)], fontsize=8)
    axes.tick_params(length=0, labelbottom=False)
    axes.spines[:].set_visible(False)
    axes.set_title(chart.title, loc="left", fontsize=10, fontweight="bold")
    facts = f"time {simulation.makespan:g},  bubble {simulation.bubble_fraction:.1%},  peak in flight:"
    axes.set_title(facts, loc="right", fontsize=8, color="#333333")


def _picture_legend(figure: Figure, charts: Sequence[Chart]) -> None:
    from matplotlib.patches import Patch

    words: dict[str, str] = {}  # colour to words: B and I share one
    for chart in charts:
        for phase in chart.pipeline.phases:
            known = words.get(_COLOURS[phase][0], _WORDS[phase])
            words[_COLOURS[phase][0]] = known if _WORDS[phase] in known else f"{known} or {_WORDS[phase]}"
    handles = [Patch(facecolor=colour, label=label) for colour, label in words.items()]
    handles.append(Patch(facecolor=_IDLE, label="idle"))
    if any(chart.pipeline.chunks > 1 for chart in charts):
        handles.append(Patch(facecolor=_COLOURS["F"][1], label="lighter: later chunks"))
    figure.legend(handles=handles, loc="outside upper right", ncols=len(handles), frameon=False, fontsize=8)


def _colours(action: Action, chunks: int) -> tuple[str, str]:
    """Return the colours of a cell and of its text."""
    first, last, ink = _COLOURS[action.phase]
    share = action.chunk / max(chunks - 1, 1)
    red_green_blue = (
        round(int(first[i : i + 2], 16) * (1 - share) + int(last[i : i + 2], 16) * share) for i in (1, 3, 5)
    )
    return "#" + "".join(f"{value:02x}" for value in red_green_blue), ink


def _label(action: Action, lettered: bool) -> str:
    return f"{action.phase}{action.microbatch}" + _letter(action.chunk) * lettered


def _letter(chunk: int) -> str:
    return chr(ord("a") + chunk % 26)


def _by_rank(values: Sequence[float]) -> str:
    return " ".join(f"{value:g}" for value in values)
