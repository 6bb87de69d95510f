import itertools

from shardtrain.checkpoint.retention import expired


def test_the_newest_and_the_multiples_stay_over_a_range_of_settings():
    for count, keep, every in itertools.product(range(9), range(1, 5), (None, 1, 3, 4)):
        steps = [2 * i for i in range(count)]
        gone = expired(reversed(steps), keep, every)
        stay = [step for step in steps if step not in gone]
        assert stay[-keep:] == steps[-keep:]
        assert all(step in stay for step in steps if every and step % every == 0)
        assert len(stay) <= keep + len([step for step in steps if every and step % every == 0])
        assert gone == sorted(gone)
