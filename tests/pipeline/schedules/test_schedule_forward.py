"""Forward passes alone: right for every placement, as short as can be, and with one stage input at a time."""

import itertools

import numpy as np
import pytest
from schedules.check_program import check_program
from schedules.tokens import runs

from shardtrain.errors import UserError
from shardtrain.pipeline.schedules import (
    Schedule,
    allocate,
    check_trains,
    forward,
    from_csv,
    make,
    ring,
    simulate,
    tabulate,
    vee,
)


def table(placement, ranks, microbatches) -> Schedule:
    """Forward passes for a placement, whatever the schedule."""
    chunks = len(placement) // ranks
    any_table = np.zeros((1, ranks, 2))
    return forward(Schedule("any", ranks, microbatches, chunks, ("F", "B"), placement, any_table))


def verify(schedule) -> int:
    """The ticks of a right table of forward passes."""
    program = allocate(schedule)
    check_program(program)
    assert runs(schedule)
    assert program.slots == {"x": int(schedule.stages > 1), "g": 0, "r": 0, "w": 0}
    assert all(name[0] in "Fx" for name in program.columns)
    assert len(program.segments()) == 1
    return schedule.ticks


QUICK = [(1, 1), (1, 5), (2, 1), (2, 7), (3, 5), (4, 3), (4, 8), (5, 6), (8, 11), (8, 33)]
EVERY = list(itertools.product(range(1, 9), range(1, 34)))


@pytest.mark.parametrize("sizes", [QUICK, pytest.param(EVERY, marks=pytest.mark.full)], ids=["quick", "every"])
def test_rings_and_vees_are_right_and_take_the_least_time(sizes):
    for ranks, microbatches in sizes:
        for chunks in (1, 2, 3, 4):
            least = chunks * microbatches + ranks - 1  # the last rank starts after ranks - 1 ticks, and never stops
            holes = (chunks - 1) * (-microbatches % ranks)
            assert verify(table(ring(ranks, chunks), ranks, microbatches)) == least + holes
        # The last rank starts after ranks - 1 ticks, and its last output takes as many to get back.
        assert verify(table(vee(ranks), ranks, microbatches)) == 2 * microbatches + 2 * (ranks - 1)


def test_placements_of_a_users_own():
    for placement in [
        ((0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (2, 1)),  # neighbouring stages on one rank
        ((1, 0), (0, 0), (0, 1), (1, 1), (2, 0), (2, 1)),  # down, and up, and down
        ((2, 1), (1, 0), (0, 1), (2, 0), (1, 1), (0, 0)),  # round, the wrong way
    ]:
        for microbatches in (1, 2, 5, 12):
            ticks = verify(table(placement, 3, microbatches))
            assert 2 * microbatches <= ticks <= 6 * microbatches


def test_it_follows_the_schedule_that_trains(tmp_path):
    file = tmp_path / "mine.csv"
    file.write_text("0F0,0F1,0B0,0B1\n,1F0 1B0,1F1 1B1,\n")
    for schedule in (make("zb_v", 3, 5, 2), make("interleaved", 2, 4, 3), from_csv(file)):
        alone = forward(schedule)
        assert (alone.placement, alone.microbatches) == (schedule.placement, schedule.microbatches)
        assert alone.phases == ("F",)
        assert alone.ticks <= schedule.when("F").max() + 1 - schedule.when("F").min()
        assert forward(schedule, 7).microbatches == 7
        assert simulate(alone).makespan == alone.ticks / schedule.chunks


def test_it_trains_nothing():
    with pytest.raises(UserError, match="1f1b, forward goes forward only, which trains nothing; use phases"):
        check_trains(forward(make("1f1b", 2, 4)))
    r, c, m = np.ogrid[:2, :1, :4]
    check_trains(tabulate("any", ring(2), {"F": r + m + c, "B": r + m + c}))
