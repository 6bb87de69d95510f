"""Each key by itself: types, ranges, names."""

import pickle

import pytest
from pydantic import ValidationError

from shardtrain.config import load_config


@pytest.mark.parametrize(
    ("override", "rule", "fix"),
    [
        ("run.steps=0", "greater than or equal to 1", "run.steps=200"),
        ("run.steps='200'", "must be an integer", "run.steps=200"),
        ("run.steps=1e3", "must be an integer", "write 1000"),
        ("run.steps=true", "must be an integer", "run.steps=200"),
        ("run.seed=-1", "greater than or equal to 0", "default: 0"),
        ("run.name=a/b", "letters", "quickstart"),
        ("devices.platform=gpu", "'auto', 'cpu' or 'cuda'", "cuda"),
        ("mesh=8", "section", "island, pipe, data, fsdp"),
        ("mesh.fsdp=-2", "1 or more, or -1", "use 1"),
        ("mesh.slow.data=x", "must be an integer", "whole number"),
        ("mesh.slow.data=0", "greater than or equal to 1", ""),
        ("rules=a", "must be a mapping", "{a: 1}"),
        ("rules.mlp=3", "must be a list", "[a, b]"),
        ("data.type=corpora", "there is no such type", "did you mean corpus?"),
        ("data.held_out=0.9", "less than or equal to 0.5", "0.02"),
        ("data.shuffle=no", "must be a boolean", "true or false"),
        ("data.path=3", "must be text, or must be a list", "data/*.txt"),
        ("optimizer.lr=0", "greater than 0", "0.001"),
        ("optimizer.lr=11", "less than or equal to 10", "0.001"),
        ("optimizer.lr=.nan", "finite", "0.001"),
        ("optimizer.lr=fast", "must be a number", "0.001"),
        ("optimizer.clip_norm=-1", "greater than 0", "1.0"),
        ("optimizer.weight_decay=-0.1", "greater than or equal to 0", "0.1"),
        ("optimizer.accumulate=0", "greater than or equal to 1", "1"),
        ("optimizer.schedule=cosine", "section", "type, warmup_steps"),
        ("optimizer.schedule.type=cosin", "'cosine'", "did you mean cosine?"),
        ("optimizer.schedule.final_ratio=2", "less than or equal to 1", "0.1"),
        ("precision.params=float16", "'float32'", "did you mean bfloat16?"),
        ("checkpoint.every=0", "greater than or equal to 1", "50"),
        ("checkpoint.keep=null", "must be an integer", "3"),
        ("eval.batches=0", "greater than or equal to 1", "8"),
        ("sample.temperature=-1", "greater than or equal to 0", "0.8"),
        ("init_from=3", "must be text", "quotes"),
    ],
)
def test_a_bad_value_names_path_value_rule_and_fix(problems, override, rule, fix):
    path = override.partition("=")[0]
    found = problems(override)
    assert set(found) == {path}
    assert rule in found[path].rule
    assert fix in found[path].fix


def test_an_item_of_a_list_is_named_by_its_place(problems):
    found = problems("optimizer.decay_roles=[matrix, mattrix]", "data.path=[a, 3]")
    assert set(found) == {"optimizer.decay_roles.1", "data.path.1"}
    assert "did you mean matrix?" in found["optimizer.decay_roles.1"].fix


def test_all_problems_come_at_once(problems):
    found = problems("run.step=3", "mesh.tensor=8", "optimizer.lr=-1", "data.seq_len=x", "lr=1", "model.d_ff=511")
    assert {"run.step", "mesh", "optimizer.lr", "data.seq_len", "lr", "model.d_ff"} <= set(found)


def test_the_message_is_readable(base):
    with pytest.raises(ValueError, match=r"lr") as caught:
        load_config(base, ["optimizer.lr=-1", "run.seed=-1"])
    assert str(caught.value) == (
        "base.yaml has 2 problems:\n"
        "  run.seed = -1\n"
        "    rule: must be greater than or equal to 0\n"
        "    fix:  choose a value in that range (default: 0)\n"
        "  optimizer.lr = -1\n"
        "    rule: must be greater than 0\n"
        "    fix:  for example optimizer.lr=0.001"
    )
    assert pickle.loads(pickle.dumps(caught.value)).problems == caught.value.problems


def test_nothing_in_a_config_can_change(base):
    config = load_config(base, ["model.remat=[query, key]", "optimizer.options.b1=0.9", "rules.vocab=[tensor, fsdp]"])
    hash(config)  # only immutable things have one
    assert config.model.options["remat"] == ("query", "key")
    with pytest.raises(ValidationError):
        config.run.steps = 3
    for mapping in (config.rules, config.mesh.slow, config.model.options, config.optimizer.options):
        with pytest.raises(TypeError):
            mapping["x"] = 1


def test_null_is_an_empty_section(base):
    assert load_config(base, ["checkpoint=null"]) == load_config(base)
