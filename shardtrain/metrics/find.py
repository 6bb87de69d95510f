"""Runs by path or name: the directory that is meant, or what there is instead."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from shardtrain.errors import UserError, nearest
from shardtrain.metrics.log import FILE

#: Where runs are, unless their configs say otherwise.
HOME = Path("runs")
_DEPTH = 3


def find_run(name: str) -> Path:
    """The directory of a run.

    Args:
      name: its path, or the name of a run below `runs`.

    Raises:
      UserError: there is no such run; names those that there are.
    """
    for place in (Path(name), HOME / name):
        if _is_run(place):
            return place
    raise UserError(_absent(name))


def find_step(name: str) -> tuple[Path, int | None]:
    """The directory of a run, and the number of the step where the name is that of a checkpoint.

    Args:
      name: as for `find_run`, or that with a step: `runs/quickstart/checkpoints/100`, `quickstart/100`.

    Raises:
      UserError: there is no such run.
    """
    path = Path(name)
    if path.name.isdecimal() and not _is_run(path):
        run = path.parent.parent if path.parent.name == "checkpoints" else path.parent
        return find_run(str(run)), int(path.name)
    return find_run(name), None


def runs_below(folder: Path, depth: int = _DEPTH) -> Iterator[Path]:
    """Yield the run directories in a folder and in its folders, by name."""
    try:
        inner = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
    except OSError:  # a folder of somebody else
        return
    for path in inner:
        if _is_run(path):
            yield path
        elif depth > 1:
            yield from runs_below(path, depth - 1)


def _is_run(path: Path) -> bool:
    return (path / FILE).is_file() or (path / "checkpoints").is_dir()


def _absent(name: str) -> str:
    """There is no such run, and what there is."""
    path = Path(name)
    known = [str(run) for place in dict.fromkeys((HOME, path.parent)) for run in runs_below(place)]
    if not known:
        return f"there is no run {name}, nor any other in {HOME}/; `shardtrain train CONFIG` makes one"
    near = nearest(path.name, [Path(run).name for run in known])
    if near is not None:
        return f"there is no run {name}; did you mean {next(run for run in known if Path(run).name == near)}?"
    more = f" and {len(known) - 10} more (`shardtrain runs` lists them)" if len(known) > 10 else ""
    return f"there is no run {name}; there are {', '.join(known[:10])}{more}"
