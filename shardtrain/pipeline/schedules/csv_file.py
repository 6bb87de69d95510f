"""Schedules in spreadsheets: one row per rank, one column per tick.

A cell lists what the rank does in that tick, each action as `<stage><phase><microbatch>`: `0F3 0B1` is the forward of
microbatch 3 and then the backward of microbatch 1, both through stage 0. An empty cell is an idle rank. Ranks, chunks,
microbatches and the placement of the stages follow from the cells: a stage belongs to the rank in whose row it appears,
and a rank's chunks are its stages in ascending order. PyTorch's compute-only schedule files have the same format, if
their phases are F and B, or F, I and W.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from shardtrain.errors import UserError
from shardtrain.pipeline.schedules.schedule import PHASES, Schedule

_ACTION = re.compile(r"(\d+)([FBIW])(\d+)")


def to_csv(schedule: Schedule, path: Path | str) -> None:
    """Write a `schedule` to the CSV file at `path`, replacing it."""
    cells: list[list[list[str]]] = [[[] for _ in range(schedule.ticks)] for _ in range(schedule.ranks)]
    for tick, rank, (phase, chunk, microbatch) in schedule.actions():
        cells[rank][tick].append(f"{schedule.stage_RC[rank, chunk]}{phase}{microbatch}")
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([" ".join(cell) for cell in row] for row in cells)


def from_csv(path: Path | str) -> Schedule:
    """Read the schedule in the CSV file at `path`, named after the file. `check` tells whether it is valid.

    Raises:
      UserError: there is no such file, a cell is not an action, or the ranks have different numbers of stages.
    """
    found = list(_read(Path(path)))
    if not found:
        raise UserError(f"{path} contains no action; write cells such as 0F3 (stage 0, forward, microbatch 3)")
    letters = {phase for _, _, _, phase, _ in found}
    phases = next((phases for phases in PHASES if letters <= set(phases)), None)
    if phases is None:
        raise UserError(f"{path} has the phases {', '.join(sorted(letters))}; use F and B, or F, I and W")

    homes: dict[int, int] = {}
    for tick, rank, stage, phase, microbatch in found:
        if homes.setdefault(stage, rank) != rank:
            raise UserError(
                f"{path}, tick {tick}, rank {rank}: {stage}{phase}{microbatch} is of stage {stage}, which rank "
                f"{homes[stage]} already holds; keep each stage on one rank"
            )
    ranks, stages = 1 + max(rank for _, rank, *_ in found), 1 + max(homes)
    own = [sorted(stage for stage, rank in homes.items() if rank == each) for each in range(ranks)]
    if len(homes) < stages or len({len(each) for each in own}) > 1:
        raise UserError(
            f"{path} has the stages {sorted(homes)} on {ranks} ranks, {[len(each) for each in own]} each; "
            f"number them from 0 without a gap, and give every rank (row) the same number"
        )

    microbatches = 1 + max(microbatch for *_, microbatch in found)
    table = np.full((1 + max(tick for tick, *_ in found), ranks, len(phases)), -1)
    for tick, rank, stage, phase, microbatch in found:
        if table[tick, rank, phases.index(phase)] >= 0:
            raise UserError(f"{path}, tick {tick}, rank {rank}: two {phase} in one tick; move one to another tick")
        table[tick, rank, phases.index(phase)] = own[rank].index(stage) * microbatches + microbatch
    placement = tuple((homes[stage], own[homes[stage]].index(stage)) for stage in range(stages))
    return Schedule(Path(path).stem, ranks, microbatches, stages // ranks, phases, placement, table)


def _read(path: Path) -> Iterator[tuple[int, int, int, str, int]]:
    """Yield every (tick, rank, stage, phase, microbatch) of a file, row by row."""
    if not path.is_file():
        raise UserError(f"schedule file {path} does not exist; give the path of a CSV file, or a schedule's name")
    with open(path, newline="", encoding="utf-8-sig", errors="replace") as file:  # spreadsheets write a byte-order mark
        for rank, row in enumerate(csv.reader(file)):
            for tick, cell in enumerate(row):
                for token in cell.split():
                    if (match := _ACTION.fullmatch(token)) is None:
                        raise UserError(
                            f"{path}, line {rank + 1}, column {tick + 1}: {token!r} is not an action; write the stage, "
                            "one of F, B, I, W, and the microbatch, such as 0F3"
                        )
                    yield tick, rank, int(match[1]), match[2], int(match[3])
