"""Which changes make another run."""

import pytest

from shardtrain.config import ConfigError, changes, check_same_run, load_config
from shardtrain.optim import lr_schedules


@pytest.mark.parametrize(
    ("override", "keys"),
    [
        ("run.seed=1", ["run.seed"]),
        ("model.d_ff=1024", ["model.d_ff"]),
        ("model.dropout=0.1", ["model.dropout"]),
        ("model.rope_scaling={factor: 8.0}", ["model.rope_scaling"]),
        ("data.seq_len=64", ["data.seq_len"]),
        ("data.global_batch=32", ["data.global_batch"]),
        ("data.tokenizer=byte", ["data.tokenizer", "data.vocab_size"]),
        ("optimizer.lr=0.1", ["optimizer.lr"]),
        ("optimizer.options.b1=0.8", ["optimizer.options.b1"]),
        ("optimizer.schedule.decay_steps=300", ["optimizer.schedule.decay_steps"]),
        ("optimizer.decay_roles=[matrix]", ["optimizer.decay_roles"]),
        ("optimizer.moments=bfloat16", ["optimizer.moments"]),
        ("precision.params=bfloat16", ["precision.params"]),
        ("run.steps=300", ["optimizer.schedule.decay_steps"]),
    ],
)
def test_another_run(base, override, keys):
    old, new = load_config(base), load_config(base, [override])
    for stored in (old, old.to_dict()):
        assert sorted(changes(stored, new)) == keys
        with pytest.raises(ConfigError) as caught:
            check_same_run(stored, new, "runs/test")
        assert sorted(problem.path for problem in caught.value.problems) == keys


@pytest.mark.parametrize(
    "override",
    [
        "mesh={data: 8}",
        "devices.emulate=null",
        "rules.vocab=null",
        "pipeline.microbatches=4",
        "checkpoint={every: 7, keep: 1}",
        "log.every=3",
        "eval.every=3",
        "sample.prompt=a",
        "run={name: other, steps: 200}",
        "precision.compute=bfloat16",
        "model.scan=false",
        "model.remat=[query]",
        "model.attention=einsum",
        "model.loss_chunk=64",
        "optimizer.accumulate=2",
    ],
)
def test_the_same_run(base, override):
    old, new = load_config(base), load_config(base, [override])
    assert changes(old.to_dict(), new) == []
    check_same_run(old, new, "runs/test")


def test_more_steps_continue_a_run_that_keeps_its_schedule(base):
    old = load_config(base)
    new = load_config(base, ["run.steps=300"])
    with pytest.raises(ConfigError, match=r"optimizer\.schedule\.decay_steps=200") as caught:
        check_same_run(old, new, "runs/test")
    (problem,) = caught.value.problems
    assert problem.value == 300
    assert "run.steps" in problem.rule
    assert changes(old, load_config(base, ["run.steps=300", "optimizer.schedule.decay_steps=200"])) == []


PLANS = ["type: cosine", "type: linear", "type: wsd", "type: wsd, decay_start: 150"]


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("step", [200, 180, 40])
def test_more_steps_of_a_decay_say_how_to_keep_and_how_to_plan_it_anew(base, plan, step):
    """With numbers: what the rate would stay at, and what it would jump to."""
    schedule = f"optimizer.schedule={{{plan}, warmup_steps: 20}}"
    old, new = load_config(base, [schedule]), load_config(base, [schedule, "run.steps=400"])
    before, after = (
        lr_schedules.schedule(lr=config.optimizer.lr, **config.optimizer.schedule.model_dump()) for config in (old, new)
    )
    with pytest.raises(ConfigError, match="--allow-changes") as caught:
        check_same_run(old.to_dict(), new, "runs/test", step)
    (problem,) = caught.value.problems
    assert "planned to decay until step 200" in problem.rule
    assert f"optimizer.schedule.decay_steps=200 to keep that plan (it stays at {before(200):.3g}" in problem.fix
    if before(step) == after(step):
        assert f"at step {step} it is the same in both" in problem.fix
    else:
        assert f"it jumps from {before(step):.3g} to {after(step):.3g} at step {step}" in problem.fix
    keeps = load_config(base, [schedule, "run.steps=400", "optimizer.schedule.decay_steps=200"])
    check_same_run(old.to_dict(), keeps, "runs/test", step)


@pytest.mark.parametrize("plan", ["type: constant", *(f"{plan}, decay_steps: 250" for plan in PLANS)])
def test_more_steps_of_a_plan_that_does_not_follow_them_just_go_on(base, plan):
    schedule = f"optimizer.schedule={{{plan}}}"
    old, new = load_config(base, [schedule]), load_config(base, [schedule, "run.steps=400"])
    check_same_run(old.to_dict(), new, "runs/test", 200)


def test_only_the_author_knows_what_an_option_of_another_class_means(base, own_model):
    name = own_model("class Own:\n    def __init__(self, *, vocab_size: int, attention: str, rngs): ...\n")
    model = f"model={{type: '{name}:Own', vocab_size: 512, attention: %s}}"
    assert changes(load_config(base, [model % "a"]), load_config(base, [model % "b"])) == ["model.attention"]


def test_a_stored_config_from_before_a_key_existed(base):
    new, stored = load_config(base), load_config(base).to_dict()
    del stored["optimizer"]["weight_decay"], stored["model"]["qk_norm"], stored["precision"]
    assert changes(stored, new) == []
    stored["model"] = {"type": "gone", "d_model": 128}
    assert "model.type" in changes(stored, new)
