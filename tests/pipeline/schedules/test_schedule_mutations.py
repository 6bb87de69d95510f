"""Every small corruption of a table or a program is found."""

import dataclasses
import random

import numpy as np
import pytest
from schedules.check_program import check_program
from schedules.tokens import BUILT_IN, runs

from shardtrain.errors import UserError
from shardtrain.pipeline.schedules import (
    Program,
    Schedule,
    allocate,
    check,
    forward,
    make,
    published_order,
)

SIZES = {"gpipe": (2, 4, 2), "1f1b": (3, 5, 1), "interleaved": (3, 4, 2), "zb_h1": (3, 5, 1), "zb_v": (2, 4, 2)}
OPTIONS = [
    pytest.param({}, id="remat"),
    pytest.param({"save_residuals": True}, id="save"),
]


def accepted(schedule, cells):
    """Whether `check` accepts the table with some cells changed."""
    table = schedule.table.copy()
    for cell, item in cells:
        table[tuple(cell)] = item
    mutated = dataclasses.replace(schedule, table=table)
    try:
        check(mutated)
    except UserError:
        return False
    # What it accepts must be a right schedule, if another one.
    assert runs(mutated)
    return True


@pytest.fixture(params=[*BUILT_IN, "published 1f1b", "published zb_v", "forward interleaved", "forward zb_v"])
def schedule(request) -> Schedule:
    *form, name = request.param.split()
    if form == ["published"]:
        return published_order(name, *SIZES[name]).lockstep()
    return forward(make(name, *SIZES[name])) if form else make(name, *SIZES[name])


def test_a_dropped_action_is_rejected(schedule):
    for cell in np.argwhere(schedule.table >= 0):
        assert not accepted(schedule, [(cell, -1)])


def test_a_doubled_action_is_rejected(schedule):
    chosen = random.Random(0)
    idle = np.argwhere(schedule.table < 0).tolist()
    for cell in np.argwhere(schedule.table >= 0).tolist():
        item = schedule.table[tuple(cell)]
        own = [other for other in idle if other[1:] == cell[1:]]
        for other in chosen.sample(own, min(len(own), 3)) + chosen.sample(idle, 2):
            assert not accepted(schedule, [(other, item)]), "in an idle cell"
    for first, second in pairs(schedule, chosen):
        assert not accepted(schedule, [(first, schedule.table[tuple(second)])]), "in place of another"


def test_an_action_that_does_not_exist_is_rejected(schedule):
    for cell in np.argwhere(schedule.table >= 0)[::7]:
        for item in (schedule.chunks * schedule.microbatches, -2, 10**6):
            assert not accepted(schedule, [(cell, item)])


def test_swapped_actions_are_rejected_unless_the_order_stays_right(schedule):
    """Such as two weight gradients, which nobody waits for. `runs` is the judge, in both directions."""
    for first, second in pairs(schedule, random.Random(1)):
        one, two = schedule.table[tuple(first)], schedule.table[tuple(second)]
        table = schedule.table.copy()
        table[tuple(first)], table[tuple(second)] = two, one
        assert accepted(schedule, [(first, two), (second, one)]) == runs(dataclasses.replace(schedule, table=table))


@pytest.mark.parametrize("name", ["1f1b", "interleaved"])
def test_where_every_message_is_used_at_once_every_swap_is_rejected(name):
    schedule = make(name, 3, 6, 1 if name == "1f1b" else 2)
    cells = np.argwhere(schedule.table >= 0).tolist()
    for i, first in enumerate(cells):
        for second in cells[i + 1 :]:
            one, two = schedule.table[tuple(first)], schedule.table[tuple(second)]
            if one != two:
                assert not accepted(schedule, [(first, two), (second, one)])


def pairs(schedule, chosen, count=150):
    """Pairs of busy cells with different items: of one rank and phase, and any."""
    cells = np.argwhere(schedule.table >= 0).tolist()
    for _ in range(count):
        first = chosen.choice(cells)
        second = chosen.choice([cell for cell in cells if cell[1:] == first[1:]] if chosen.random() < 0.7 else cells)
        if schedule.table[tuple(first)] != schedule.table[tuple(second)]:
            yield first, second


def changed(program: Program, changes) -> Program:
    columns = {name: cells.copy() for name, cells in program.columns.items()}
    for name, cell, value in changes:
        columns[name][cell] = value
    return dataclasses.replace(program, columns=columns)


@pytest.mark.parametrize("options", OPTIONS)
def test_every_changed_or_swapped_cell_of_a_program_is_rejected(schedule, options):
    """Actions and slots alike: an action has its slots beside it, so no swap of one without the other is right."""
    program = allocate(schedule, **options)
    check_program(program)
    chosen = random.Random(2)
    cells = [
        (name, tuple(cell)) for name, column in program.columns.items() for cell in np.argwhere(column >= -1).tolist()
    ]
    for name, cell in chosen.sample(cells, min(len(cells), 120)):
        old = program.columns[name][cell]
        for value in {-1, 0, 1, old + 1, 10**6} - {old}:
            with pytest.raises(UserError):
                check_program(changed(program, [(name, cell, value)]))
    used = [(name, cell) for name, cell in cells if program.columns[name][cell] >= 0]
    swaps = 0
    while swaps < 60:
        (name, first), (other, second) = chosen.choice(used), chosen.choice(used)
        one, two = program.columns[name][first], program.columns[other][second]
        if name == other and one != two:
            swaps += 1
            with pytest.raises(UserError):
                check_program(changed(program, [(name, first, two), (name, second, one)]))


def test_a_program_without_a_column_a_slot_or_an_edge_is_rejected():
    program = allocate(make("zb_v", 3, 5, 2))
    for name in program.columns:
        columns = {other: cells for other, cells in program.columns.items() if other != name}
        with pytest.raises(UserError):
            check_program(dataclasses.replace(program, columns=columns))
    for kind in ("x", "g", "w"):
        with pytest.raises(UserError):
            check_program(dataclasses.replace(program, slots={**program.slots, kind: program.slots[kind] - 1}))
    for name, edges in program.edges.items():
        for edge in edges:
            fewer = tuple(other for other in edges if other != edge)
            with pytest.raises(UserError):
                check_program(dataclasses.replace(program, edges={**program.edges, name: fewer}))


def message(schedule, **changes):
    with pytest.raises(UserError) as error:
        check(dataclasses.replace(schedule, **changes))
    return str(error.value)


def test_messages_name_tick_rank_and_action():
    schedule = make("1f1b", 2, 3)
    table = schedule.table.copy()
    table[1, 1, 0], table[2, 1, 0] = 1, 0
    assert message(schedule, table=table) == (
        "schedule 1f1b, tick 1, rank 1: F of microbatch 1 through chunk 0 (stage 1) comes too early; it needs F of "
        "microbatch 1 through chunk 0 (stage 0) on rank 0, done in tick 1, so move it to tick 2 or later"
    )
    table = schedule.table.copy()
    table[0, 0, 0] = -1
    assert "rank 0: F of microbatch 0 through chunk 0 (stage 0) is in no tick" in message(schedule, table=table)
    table[0, 0, 0] = 1
    assert "tick 1, rank 0: F of microbatch 1 through chunk 0 (stage 0) was done in tick 0 already" in message(
        schedule, table=table
    )
    table[0, 0, 0] = 3
    assert "tick 0, rank 0, phase F: 3 is not an action; with 1 chunks x 3 microbatches = 3" in message(
        schedule, table=table
    )


def test_shapes_phases_and_placements_are_checked():
    schedule = make("1f1b", 4, 3)
    assert "has phases ('B', 'F'); use one of" in message(schedule, phases=("B", "F"))
    assert "table of shape (9, 3, 2); it must be [ticks, ranks, phases], here [any, 4, 2]" in message(
        schedule, table=schedule.table[:, :3]
    )
    assert "must hold one stage" in message(schedule, placement=((0, 0), (1, 0), (2, 0), (2, 0)))
    assert "places stage 0 on rank 0 and stage 1 on rank 2; messages go to the same rank or a neighbour" in message(
        schedule, placement=((0, 0), (2, 0), (1, 0), (3, 0))
    )


def test_an_order_that_deadlocks_is_refused():
    order = published_order("1f1b", 2, 2)
    stuck = dataclasses.replace(order, orders=(order.orders[0], tuple(reversed(order.orders[1]))))
    with pytest.raises(UserError, match=r"never ends: .*rank 1 waits at B of microbatch 1 through chunk 0 \(stage 1\)"):
        stuck.lockstep()
