"""Every schedule, for all sizes: right by the checker, and right by running it with tokens for values."""

import itertools

import numpy as np
import pytest
from schedules.check_program import check_program
from schedules.tokens import BUILT_IN, runs

from shardtrain.errors import UserError
from shardtrain.host.import_path import modules_of
from shardtrain.pipeline import schedules
from shardtrain.pipeline.schedules import (
    Schedule,
    allocate,
    make,
    published_order,
    register,
    registered,
    registry,
    ring,
    simulate,
    tabulate,
    vee,
)

CHUNKS = {"zb_v": (2,)}


def sizes(ranks, microbatches):
    for name in BUILT_IN:
        for chunks in CHUNKS.get(name, (1, 2, 3, 4)):
            yield from itertools.product([name], ranks, microbatches, [chunks])


def verify(name, ranks, microbatches, chunks):
    schedule = make(name, ranks, microbatches, chunks)  # which checks it
    assert runs(schedule)
    forms = [schedule]
    if not (name == "zb_h1" and chunks > 1):
        forms.append(published_order(name, ranks, microbatches, chunks).lockstep())
        assert runs(forms[-1])
    for form in forms:
        for save in (False, True):
            check_program(allocate(form, save_residuals=save))


@pytest.mark.parametrize("name", BUILT_IN)
def test_a_covering_subset_of_sizes_is_right(name):
    # Fewer microbatches than ranks, as many, one more, one less than twice, a multiple, no multiple.
    for ranks, microbatches in [
        (1, 1),
        (1, 5),
        (2, 1),
        (2, 2),
        (2, 7),
        (3, 2),
        (3, 5),
        (4, 3),
        (4, 8),
        (5, 6),
        (8, 11),
    ]:
        for chunks in CHUNKS.get(name, (1, 2, 3, 4)):
            verify(name, ranks, microbatches, chunks)


@pytest.mark.full
@pytest.mark.parametrize("ranks", range(1, 9))
def test_every_size_is_right(ranks):
    for size in sizes([ranks], range(1, 34)):
        verify(*size)


def test_tables_do_not_change():
    with pytest.raises(ValueError, match="read-only"):
        make("1f1b", 2, 2).table[0, 0, 0] = 1


def test_with_one_chunk_interleaved_is_1f1b_and_1f1b_with_several_is_interleaved():
    assert (make("interleaved", 4, 6, 1).table == make("1f1b", 4, 6).table).all()
    assert (make("interleaved", 4, 6, 2).table == make("1f1b", 4, 6, 2).table).all()


@pytest.mark.parametrize(
    ("name", "size", "message"),
    [
        ("1f1c", (4, 8, 1), "pipeline.schedule = 1f1c: there is no such schedule; did you mean 1f1b"),
        ("1f1b", (0, 8, 1), "pipeline ranks 0 must be 1 or more"),
        ("1f1b", (4, 0, 1), "pipeline microbatches 0 must be 1 or more"),
        ("1f1b", (4, 8, -1), "pipeline chunks -1 must be 1 or more"),
        ("1f1b", (28225, 8, 1), "the largest table of a schedule; use fewer"),
        ("gpipe", (2, 10**12, 1), "the largest table of a schedule; use fewer"),
        ("zb_v", (4, 8, 1), r"zb_v has chunks 1, but needs 2.*4 ranks x 2 chunks = 8 stages"),
    ],
)
def test_sizes_that_do_not_go_are_refused(name, size, message):
    with pytest.raises(UserError, match=message) as refused:
        make(name, *size)
    assert (refused.value.key, refused.value.value) == ("pipeline.schedule", name)


@pytest.fixture
def unregister():
    yield
    registry._ENTRIES.pop("test_reversed", None)


@pytest.mark.usefixtures("unregister")
def test_a_user_registers_a_schedule_and_it_is_checked():
    @register("test_reversed")
    def _(ranks: int, microbatches: int, chunks: int) -> Schedule:
        """The backward starts with the microbatch that came last."""
        r, c, m = np.ogrid[:ranks, :1, :microbatches]
        total = microbatches + ranks - 1
        return tabulate("test_reversed", ring(ranks), {"F": r + m + c, "B": 2 * total - 1 - (r + m) + c})

    assert "test_reversed" in registered
    schedule = make("test_reversed", 3, 4)
    assert runs(schedule)
    assert simulate(schedule).makespan == simulate(make("gpipe", 3, 4)).makespan
    assert published_order("test_reversed", 3, 4) is None
    with pytest.raises(UserError, match="is for chunks 1, not 2"):
        make("test_reversed", 3, 4, 2)
    with pytest.raises(UserError, match="is taken"):
        register("gpipe")


FILE = """
from shardtrain.pipeline.schedules import make, register

@register("dropped_in")
def dropped_in(ranks, microbatches, chunks):
    return make("gpipe", ranks, microbatches, chunks)
"""


def test_a_file_in_the_folder_is_a_schedule(tmp_path, monkeypatch):
    (tmp_path / "dropped_in_schedule.py").write_text(FILE)
    monkeypatch.setattr(schedules, "__path__", [*schedules.__path__, str(tmp_path)])
    assert "dropped_in_schedule" in modules_of(schedules)  # as importing the package does
    try:
        assert "dropped_in" in registered
        assert make("dropped_in", 2, 4).name == "gpipe"
    finally:
        registry._ENTRIES.pop("dropped_in")


def test_placements():
    assert ring(3, 2) == ((0, 0), (1, 0), (2, 0), (0, 1), (1, 1), (2, 1))
    assert vee(3) == ((0, 0), (1, 0), (2, 0), (2, 1), (1, 1), (0, 1))
    assert make("zb_v", 3, 2, 2).stage_RC.tolist() == [[0, 5], [1, 4], [2, 3]]
