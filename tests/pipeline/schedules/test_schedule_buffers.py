"""Programs: as few slots as can be, and segments, messages and sizes that do not grow with microbatches."""

import itertools

import numpy as np
import pytest
from schedules.tokens import BUILT_IN

from shardtrain.pipeline.schedules import Schedule, allocate, make, ring, vee
from shardtrain.pipeline.schedules.buffers import direction

ALL = [(name, 2 if name in {"interleaved", "zb_v"} else 1) for name in BUILT_IN]


@pytest.mark.parametrize(("name", "chunks"), [*ALL, ("gpipe", 2), ("zb_h1", 3)])
def test_slots_are_as_many_as_values_are_ever_alive_at_once(name, chunks):
    """Counted moment by moment (four to a tick: arrival, F, B or I, W), which no allocation can beat."""
    for ranks, microbatches in [(1, 3), (2, 5), (4, 3), (4, 9)]:
        schedule = make(name, ranks, microbatches, chunks)
        program = allocate(schedule)
        split = "W" in schedule.phases
        f, b = schedule.when("F"), schedule.when(schedule.phases[1])
        alive = {kind: np.zeros((ranks, 4 * schedule.ticks), int) for kind in "xgw"}
        for (stage, (rank, _)), m in itertools.product(enumerate(schedule.placement), range(microbatches)):
            born = 4 * (f[stage - 1, m] + 1) if stage else 4 * f[0, m] + 1
            alive["x"][rank, born : 4 * b[stage, m] + 3] += 1
            if stage < schedule.stages - 1:
                alive["g"][rank, 4 * (b[stage + 1, m] + 1) : 4 * b[stage, m] + 3] += 1
            if split:
                alive["w"][rank, 4 * b[stage, m] + 2 : 4 * schedule.when("W")[stage, m] + 4] += 1
        for kind, counts in alive.items():
            assert program.slots_by_rank[kind] == tuple(counts.max(axis=1)), (kind, ranks, microbatches)
            assert program.slots[kind] == counts.max()


@pytest.mark.parametrize(("name", "chunks"), [pair for pair in ALL if pair[0] != "gpipe"])
@pytest.mark.parametrize("options", [{}, {"save_residuals": True}])
def test_buffers_and_segments_do_not_grow_with_microbatches(name, chunks, options):
    small, large = (allocate(make(name, 4, m, chunks), **options) for m in (8, 64))
    assert small.slots == large.slots
    assert [(s.phases, s.messages) for s in small.segments()] == [(s.phases, s.messages) for s in large.segments()]


@pytest.mark.parametrize(
    ("name", "chunks", "phases"),
    [
        ("gpipe", 1, ["F", "B"]),
        ("1f1b", 1, ["F", "FB", "B"]),
        ("interleaved", 2, ["F", "FB", "B"]),
        ("zb_h1", 1, ["F", "FI", "FIW", "IW"]),
        ("zb_v", 2, ["F", "FI", "FIW", "IW"]),
    ],
)
def test_segments(name, chunks, phases):
    program = allocate(make(name, 4, 11, chunks))
    segments = program.segments()
    assert ["".join(segment.phases) for segment in segments] == phases
    assert [segment.start for segment in segments[1:]] == [segment.stop for segment in segments[:-1]]
    assert (segments[0].start, segments[-1].stop) == (0, program.schedule.ticks)
    for segment in segments:
        for phase in program.schedule.phases:
            busy = (program.columns[phase][segment.start : segment.stop] >= 0).any(axis=1)
            assert (busy == (phase in segment.phases)).all()
        for name in program.edges:
            assert (program.columns[name][segment.start : segment.stop] >= 0).any() == (name in segment.messages)


def test_messages_of_each_placement():
    def edges(name, ranks, chunks):
        return dict(allocate(make(name, ranks, 4, chunks)).edges)

    # One chunk: open chains. Several in a ring: they close. A V: chains both ways, and the turn stays on its rank.
    assert edges("1f1b", 3, 1) == {"x_down": ((0, 1), (1, 2)), "g_up": ((1, 0), (2, 1))}
    assert edges("interleaved", 3, 2) == {"x_down": ((0, 1), (1, 2), (2, 0)), "g_up": ((0, 2), (1, 0), (2, 1))}
    chains = {"down": ((0, 1), (1, 2)), "up": ((1, 0), (2, 1)), "same": ()}
    assert edges("zb_v", 3, 2) == {f"{kind}_{way}": pairs for kind in "xg" for way, pairs in chains.items()}
    # Two ranks, where both neighbours are the same one.
    assert edges("interleaved", 2, 2) == {"x_down": ((0, 1), (1, 0)), "g_up": ((0, 1), (1, 0))}
    assert edges("zb_v", 2, 2)["x_down"] == ((0, 1),)
    assert edges("zb_v", 2, 2)["x_up"] == ((1, 0),)
    assert edges("1f1b", 1, 1) == {}
    assert edges("interleaved", 1, 2) == {"x_same": (), "g_same": ()}


def test_every_message_joins_each_rank_with_at_most_one_other():
    """What a permute needs."""
    for (name, chunks), ranks in itertools.product(ALL, range(1, 9)):
        for pairs in allocate(make(name, ranks, 3, chunks)).edges.values():
            for ends in zip(*pairs, strict=True):
                assert len(set(ends)) == len(ends)


@pytest.mark.parametrize(("placement", "expected"), [(ring(5, 3), {"down"}), (vee(5), {"down", "same", "up"})])
def test_directions(placement, expected):
    chunks = len(placement) // 5
    schedule = Schedule("any", 5, 1, chunks, ("F", "B"), placement, np.zeros((1, 5, 2)))
    assert {direction(schedule, stage) for stage in range(5 * chunks - 1)} == expected
