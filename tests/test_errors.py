"""A mistake names the value, the rule and the fix, in the same words to research code and in a config."""

import pickle
from pathlib import Path

import pytest
from flax import nnx

from shardtrain import MeshSpec, load_config, make_rules, nn, open_source
from shardtrain.config import ConfigError
from shardtrain.errors import UserError, mistakes, refuse
from shardtrain.launch.devices import select_devices
from shardtrain.optim.lr_schedules import schedule
from shardtrain.pipeline.layers import layers_per_stage

QUICKSTART = Path(__file__).parents[1] / "configs" / "quickstart.yaml"


def test_a_mistake_is_a_setting_a_rule_and_a_fix_or_a_text():
    error = UserError("mesh.fsdp", 0, "must be 1 or more", "use 1")
    assert str(error) == "mesh.fsdp = 0: must be 1 or more; use 1"
    assert str(UserError("data.path", None, "is needed", "give one")) == "data.path: is needed; give one"
    assert (str(UserError("a text")), UserError("a text").key, UserError("a text").rule) == ("a text", "", "a text")
    again = pickle.loads(pickle.dumps(error))
    assert (again.key, again.value, again.rule, again.fix) == ("mesh.fsdp", 0, "must be 1 or more", "use 1")


def test_code_gets_the_first_mistake_and_a_config_all_of_them():
    def check(last):
        yield UserError("first")
        yield UserError("second")
        raise UserError(last)

    with pytest.raises(UserError, match="first"):
        refuse(check("third"))
    assert list(map(str, mistakes(check, "third"))) == ["first", "second", "third"]
    assert list(mistakes(refuse, ())) == []


@pytest.mark.parametrize(
    ("overrides", "key", "call"),
    [
        (["mesh.fsdp=0"], "mesh.fsdp", lambda: MeshSpec(fsdp=0)),
        (["mesh={fsdp: 3}"], "mesh", lambda: MeshSpec(fsdp=3).resolve(8, "devices.emulate")),
        (["rules.mlp=tensr"], "rules.mlp", lambda: make_rules({"mlp": "tensr"})),
        (["devices={platform: cuda, emulate: 8}"], "devices.emulate", lambda: select_devices("cuda", 8)),
        (["data.path=x"], "data.path", lambda: open_source("corpus", seq_len=8, vocab_size=300, path="x")),
        (["model.dropout=1.0"], "model.dropout", lambda: nn.Dropout(1.0, "site")),
        (["model.remat=ful"], "model.remat", lambda: nn.Stack(nn.RMSNorm, n_layers=1, remat="ful", rngs=nnx.Rngs(0))),
        (["model.n_kv_heads=6"], "model.n_kv_heads", lambda: nn.Attention(128, 4, 6, rngs=nnx.Rngs(0))),
        (
            ["optimizer.schedule={type: wsd, warmup_steps: 9, decay_steps: 10}"],
            "optimizer.schedule.stable_ratio",
            lambda: schedule("wsd", lr=0.1, warmup_steps=9, decay_steps=10),
        ),
        (["mesh={pipe: 8}", "devices.emulate=8"], "model.n_layers", lambda: layers_per_stage(4, 8)),
    ],
)
def test_code_and_config_meet_the_same_rule(overrides, key, call):
    with pytest.raises(UserError) as in_code:
        call()
    with pytest.raises(ConfigError) as in_config:
        load_config(QUICKSTART, overrides)
    (problem,) = [each for each in in_config.value.problems if each.path == key]
    error = in_code.value
    assert (problem.value, problem.rule, problem.fix) == (error.value, error.rule, error.fix)
    assert key.endswith(error.key)
