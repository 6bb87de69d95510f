"""Rows, windows and the held-out split."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardtrain.data import TokenWindows, open_tokens, split, window, write_tokens
from shardtrain.data.synthetic import SyntheticTokens
from shardtrain.errors import UserError


def test_window_predicts_each_next_id():
    row = window(np.array([5, 7, 9, 11], np.uint16))
    np.testing.assert_array_equal(row["tokens"], [5, 7, 9])
    np.testing.assert_array_equal(row["targets"], [7, 9, 11])
    np.testing.assert_array_equal(row["positions"], [0, 1, 2])
    np.testing.assert_array_equal(row["loss_mask"], [1, 1, 1])
    assert {name: leaf.dtype for name, leaf in row.items()} == {
        "tokens": np.int32,
        "targets": np.int32,
        "loss_mask": np.float32,
        "positions": np.int32,
    }


@settings(max_examples=30, deadline=None)
@given(rows=st.integers(2, 300), fraction=st.floats(0.001, 0.6))
def test_split_parts_are_the_source_cut_in_two(rows, fraction):
    source = SyntheticTokens(seq_len=2, vocab_size=8, seed=0, rows=rows)
    train, held_out = split(source, fraction)
    assert len(train) >= 1
    assert len(held_out) >= 1
    assert len(held_out) == max(1, round(rows * fraction))
    joined = [row["tokens"] for part in (train, held_out) for row in part]
    np.testing.assert_array_equal(joined, [row["tokens"] for row in source])
    assert len({source.fingerprint, train.fingerprint, held_out.fingerprint}) == 3


def test_split_windows_share_no_target(tmp_path):
    """Every target of the stream is in exactly one row of exactly one part."""
    write_tokens(tmp_path / "t.bin", [np.arange(101)], vocab_size=101)
    train, held_out = split(TokenWindows(open_tokens(tmp_path / "t.bin"), seq_len=5), 0.25)
    targets = [set(np.concatenate([row["targets"] for row in part])) for part in (train, held_out)]
    assert targets[0].isdisjoint(targets[1])
    assert targets[0] | targets[1] == set(range(1, 101))


@pytest.mark.parametrize("fraction", [0, 1, -0.1, 1.5, float("nan")])
def test_split_refuses_fractions_outside_of_0_and_1(fraction):
    with pytest.raises(UserError, match=rf"fraction {fraction}: it must be above 0 and below 1; 0.05"):
        split(SyntheticTokens(seq_len=2, vocab_size=8, seed=0, rows=10), fraction)


def test_split_refuses_to_leave_nothing_to_train_on():
    source = SyntheticTokens(seq_len=2, vocab_size=8, seed=0, rows=1)
    with pytest.raises(UserError, match=r"0.1 of 1 rows leaves none to train on: use more data"):
        split(source, 0.1)


@pytest.mark.parametrize("row", [-1, 10])
def test_rows_outside_of_a_source_do_not_exist(row):
    source = SyntheticTokens(seq_len=2, vocab_size=8, seed=0, rows=20)
    for part in split(source, 0.5):
        with pytest.raises(IndexError, match=f"row {row} of a source of 10 rows"):
            part[row]


def test_rows_of_one_document_have_no_segment_ids(tmp_path):
    write_tokens(tmp_path / "t.bin", [np.arange(101)], vocab_size=101)
    for source in (TokenWindows(open_tokens(tmp_path / "t.bin"), 5), SyntheticTokens(seq_len=5, vocab_size=8, seed=0)):
        train, held_out = split(source, 0.25)
        assert not any("segment_ids" in part[0] for part in (source, train, held_out))
