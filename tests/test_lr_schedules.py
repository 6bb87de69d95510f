"""Learning-rate schedules against hand-written formulas."""

import math

import pytest

from shardtrain.errors import UserError
from shardtrain.optim.lr_schedules import SCHEDULES, schedule

LR, WARMUP, STEPS, FINAL = 0.02, 7, 50, 0.2


def expected(type, step):
    """The definition, in plain Python."""
    if step < WARMUP:
        return LR * (step + 1) / (WARMUP + 1)
    start = {"wsd": 40}.get(type, WARMUP)
    done = min(max(step - start, 0) / (STEPS - start), 1.0)
    if type == "constant":
        return LR
    if type == "cosine":
        return LR * (FINAL + (1 - FINAL) * (1 + math.cos(math.pi * done)) / 2)
    return LR * (1 - done * (1 - FINAL))


@pytest.mark.parametrize("type", SCHEDULES)
def test_every_step_follows_the_definition(type):
    rate = schedule(type, lr=LR, decay_steps=STEPS, warmup_steps=WARMUP, final_ratio=FINAL)
    for step in range(STEPS + 10):
        assert float(rate(step)) == pytest.approx(expected(type, step), rel=1e-5), step


@pytest.mark.parametrize("type", SCHEDULES)
def test_without_warmup_the_first_step_is_the_peak(type):
    assert float(schedule(type, lr=LR, decay_steps=STEPS)(0)) == pytest.approx(LR)


@pytest.mark.parametrize("type", SCHEDULES)
def test_one_step_of_each_phase(type):
    rate = schedule(type, lr=LR, decay_steps=2, warmup_steps=1, stable_ratio=0.5 if type == "wsd" else None)
    assert [float(rate(s)) for s in range(2)] == pytest.approx([LR / 2, LR])


def test_wsd_decay_start_and_stable_ratio_say_the_same():
    by_ratio = schedule("wsd", lr=LR, decay_steps=STEPS, warmup_steps=5, stable_ratio=0.6)
    by_start = schedule("wsd", lr=LR, decay_steps=STEPS, warmup_steps=5, decay_start=30)
    assert [float(by_ratio(s)) for s in range(60)] == [float(by_start(s)) for s in range(60)]
    assert float(by_start(30)) == pytest.approx(LR)
    assert float(by_start(31)) < 0.99 * LR


@pytest.mark.parametrize(
    ("type", "changes", "message"),
    [
        ("cosin", {}, "did you mean cosine"),
        ("banana", {}, "constant, linear, cosine, wsd"),
        ("cosine", {"lr": 0.0}, "lr = 0.0: must be a positive"),
        ("cosine", {"lr": math.nan}, "lr = nan: must be a positive"),
        ("cosine", {"warmup_steps": -1}, "warmup_steps = -1: must be 0 or more"),
        ("linear", {"warmup_steps": 50}, "warmup_steps = 50: the warm-up must end before decay_steps = 50"),
        ("linear", {"final_ratio": 1.5}, "final_ratio = 1.5: .* from 0 to 1"),
        ("linear", {"stable_ratio": 0.5}, "set .*type=wsd"),
        ("wsd", {"stable_ratio": 0.5, "decay_start": 20}, "decay_start = 20: stable_ratio = 0.5 says the same"),
        ("wsd", {"warmup_steps": 20, "decay_start": 10}, "decay_start = 10: the decay would start at step 10"),
        ("wsd", {"stable_ratio": 1.0}, "below decay_steps"),
    ],
)
def test_mistakes(type, changes, message):
    with pytest.raises(UserError, match=message):
        schedule(type, **({"lr": LR, "decay_steps": STEPS} | changes))
