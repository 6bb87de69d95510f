"""The check of a program's buffers: it is run with names for values, and every use must find the value it needs.

If a slot is overwritten while its value is alive, the next use finds the wrong name. The check does not depend on how
slots were chosen, so it works for any program.
"""

from __future__ import annotations

import numpy as np

from shardtrain.errors import UserError
from shardtrain.pipeline.schedules.buffers import BACK, Program, direction
from shardtrain.pipeline.schedules.check import check
from shardtrain.pipeline.schedules.schedule import FORWARD, Action

#: A value: its kind, stage and microbatch.
_Name = tuple[str, int, int]


def check_program(program: Program) -> None:
    """Refuse a program that reads or writes a wrong slot, or does not run its schedule.

    Raises:
      UserError: the program is not valid; names the first mistake with tick, rank and column.
    """
    check(program.schedule)
    _Run(program).run()


class _Run:
    """The state while a program runs: the values in each rank's slots, and the messages under way."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.schedule = program.schedule
        self.memory: dict[tuple[str, int, int], _Name] = {}  # (kind, rank, slot)
        self.sent: dict[str, dict[int, _Name]] = {}  # column -> receiving rank -> value, for the next tick
        self.used: set[tuple[str, int, int]] = set()  # (column, tick, rank)

    def run(self) -> None:
        actions: dict[int, list[tuple[int, Action]]] = {}
        for tick, rank, action in self.schedule.actions():
            actions.setdefault(tick, []).append((rank, action))
        for tick in range(self.schedule.ticks):
            arriving, self.sent = self.sent, {}
            for column, values in arriving.items():
                for rank, value in values.items():
                    self.write(column, tick, rank, value)
            for rank, action in actions.get(tick, []):
                self.act(tick, rank, action)
        for name, cells in self.program.columns.items():
            for tick, rank in np.argwhere(cells >= 0).tolist():
                if (name, tick, rank) not in self.used:
                    raise self.error(name, tick, rank, "nothing uses this cell; set it to -1")

    def act(self, tick: int, rank: int, action: Action) -> None:
        phase, chunk, m = action
        stage = int(self.schedule.stage_RC[rank, chunk])
        item = chunk * self.schedule.microbatches + m
        if self.slot(phase, tick, rank) != item:
            raise self.error(
                phase, tick, rank, f"the schedule has {self.schedule.describe(rank, action)} ({item}) here"
            )
        first, last = stage == 0, stage == self.schedule.stages - 1
        saves = "F_r" in self.program.columns
        stored, split = "r" if saves else "x", "W" in self.schedule.phases
        if phase == "F":
            if first and not saves and self.schedule.phases != FORWARD:
                self.write("F_x", tick, rank, ("x", stage, m))
            elif not first:
                self.read("F_x", tick, rank, ("x", stage, m))
            if saves:
                self.write("F_r", tick, rank, ("r", stage, m))
                if last:
                    self.write("F_g", tick, rank, ("g", stage, m))
            if not last:
                self.send("x", stage, stage + 1, m)
        elif phase in {"B", "I"}:
            self.read(f"{phase}_{stored}", tick, rank, (stored, stage, m))
            if not last or saves:
                self.read(f"{phase}_g", tick, rank, ("g", stage, m))
            if split:
                self.write("I_w", tick, rank, ("w", stage, m))
            if not first:
                self.send("g", stage, stage - 1, m)
        else:
            self.read("W_w", tick, rank, ("w", stage, m))

    def send(self, kind: str, stage: int, to: int, m: int) -> None:
        """Send a message to the rank that the column's permute joins with the sender."""
        where = direction(self.schedule, min(stage, to))
        column = f"{kind}_{where if to > stage else BACK[where]}"
        rank, receiver = self.schedule.placement[stage][0], self.schedule.placement[to][0]
        if where != "same" and (rank, receiver) not in self.program.edges.get(column, ()):
            raise UserError(f"program of {self.schedule.name}: {column} has no edge from rank {rank} to {receiver}")
        self.sent.setdefault(column, {})[receiver] = (kind, to, m)

    def slot(self, column: str, tick: int, rank: int) -> int:
        cells = self.program.columns.get(column)
        self.used.add((column, tick, rank))
        return -1 if cells is None else int(cells[tick, rank])

    def write(self, column: str, tick: int, rank: int, value: _Name) -> None:
        slot, slots = self.slot(column, tick, rank), self.program.slots[value[0]]
        if not 0 <= slot < slots:
            raise self.error(column, tick, rank, f"{_words(value)} needs a slot from 0 to {slots - 1}")
        self.memory[value[0], rank, slot] = value

    def read(self, column: str, tick: int, rank: int, value: _Name) -> None:
        found = self.memory.get((value[0], rank, self.slot(column, tick, rank)))
        if found != value:
            there = _words(found) if found else "nothing"
            raise self.error(column, tick, rank, f"expected {_words(value)} in that slot, which holds {there}")

    def error(self, column: str, tick: int, rank: int, problem: str) -> UserError:
        cells = self.program.columns.get(column)
        value = "missing" if cells is None else cells[tick, rank]
        return UserError(
            f"program of {self.schedule.name}, tick {tick}, rank {rank}: {column} is {value}: {problem}; "
            "`allocate` makes one that fits"
        )


def _words(value: _Name) -> str:
    kind, stage, microbatch = value
    what = {"x": "the input", "g": "the output gradient", "r": "the residuals", "w": "the operands of W"}[kind]
    return f"{what} of stage {stage}, microbatch {microbatch}"
