"""Schedules from and to CSV."""

import pytest
from schedules.tokens import BUILT_IN

from shardtrain.errors import UserError
from shardtrain.pipeline.schedules import check, from_csv, make, published_order, to_csv


@pytest.mark.parametrize("name", BUILT_IN)
def test_a_schedule_comes_back_from_a_file(name, tmp_path):
    chunks = 2 if name in {"interleaved", "zb_v"} else 1
    path = tmp_path / f"{name}.csv"
    for schedule in (make(name, 3, 5, chunks), published_order(name, 3, 5, chunks).lockstep()):
        to_csv(schedule, path)
        again = from_csv(path)
        assert (again.table == schedule.table).all()
        for field in ("name", "ranks", "microbatches", "chunks", "phases", "placement"):
            assert getattr(again, field) == getattr(schedule, field)
    assert (make(str(path), 3, 5, chunks).table == schedule.table).all()


def test_the_format_of_a_file(tmp_path):
    to_csv(make("1f1b", 2, 2), tmp_path / "mine.csv")
    assert (tmp_path / "mine.csv").read_text().split() == [
        *["0F0,0F1,0B0,0B1"],
        *[",1F0", "1B0,1F1", "1B1,"],
    ]


def test_a_file_from_a_spreadsheet(tmp_path):
    """With a byte order mark, spaces, and rows of unequal length."""
    (tmp_path / "mine.csv").write_bytes(b"\xef\xbb\xbf0F0, 0F1 ,0B0,0B1\r\n,1F0 1B0,1F1  1B1\r\n")
    assert (make(str(tmp_path / "mine.csv"), 2, 2).table == make("1f1b", 2, 2).table).all()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0F0,0B0,0X1", "line 1, column 3: '0X1' is not an action; write the stage"),
        ("0F0,\n1F0,F1", "line 2, column 2: 'F1' is not an action"),
        ("\n,,\n", "contains no action"),
        ("0F0,0B0 0I0", r"has the phases B, F, I; use F and B, or F, I and W"),
        ("0F0,0B0\n0F1,0B1", "tick 0, rank 1: 0F1 is of stage 0, which rank 0 already holds"),
        ("0F0,0B0\n2F0,2B0", r"has the stages \[0, 2\] on 2 ranks, \[1, 1\] each; number them from 0 without a gap"),
        ("0F0,1F0,1B0,0B0\n2F0,2B0", r"\[2, 1\] each; number them .* the same number"),
        ("0F0 0F1,0B0,0B1", "tick 0, rank 0: two F in one tick; move one"),
        ("0B0,0F0", "tick 0, rank 0: B of microbatch 0 .* comes too early"),
        ("0F0,0F1,0B0", "B of microbatch 1 .* is in no tick"),
        ("0F0,0F0,0B0", "tick 1, rank 0: F of microbatch 0 .* was done in tick 0 already"),
    ],
)
def test_files_that_are_wrong_are_refused(text, message, tmp_path):
    (tmp_path / "mine.csv").write_text(text)
    with pytest.raises(UserError, match=message):
        check(from_csv(tmp_path / "mine.csv"))


def test_a_file_for_other_sizes_is_refused(tmp_path):
    path = tmp_path / "mine.csv"
    with pytest.raises(UserError, match=r"mine\.csv does not exist; give the path"):
        make(str(path), 2, 2)
    to_csv(make("1f1b", 2, 3), path)
    with pytest.raises(UserError, match="is for microbatches 3, not 4; ask for microbatches 3"):
        make(str(path), 2, 4)
