"""How much of a text BPE learns from."""

import pytest

from shardtrain.data.sample import sample
from shardtrain.data.watch import Watch
from shardtrain.errors import UserError


def learnt(pieces, limit):
    return list(sample(lambda: iter(pieces), Watch(), limit))


def test_ordinary_text_is_learnt_from_as_a_whole():
    assert learnt(["ab cd"] * 3, 100) == ["ab cd"] * 3
    assert learnt(["ab cd"] * 300, 100) == ["ab cd"] * 300, "the words are few"


@pytest.mark.parametrize(("limit", "every"), [(300, 1), (150, 2), (149, 4), (30, 16)])
def test_of_text_with_too_many_words_pieces_from_all_over_it(limit, every):
    pieces = [f"{number:03}" for number in range(100)]
    assert learnt(pieces, limit) == pieces[::every]


def test_runs_of_spaces_are_words_too():
    pieces = ["a" + " " * (20 + number) + "b" for number in range(100)]
    assert len(learnt(pieces, 1000)) < 60


def test_it_can_be_stopped():
    with pytest.raises(UserError, match="stopped while preparing data; nothing was trained; the same command starts"):
        sample(lambda: iter(["a"]), Watch(lambda: True))
