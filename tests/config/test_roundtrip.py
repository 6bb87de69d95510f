"""The resolved config, written and read back, is the same config."""

import pickle
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shardtrain.config import load_config, parse_config
from shardtrain.config.strict_yaml import parse
from shardtrain.sharding.mesh import AXES

text = st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=8)  # YAML holds no NUL
positive = st.integers(1, 10**6)
maybe = {
    "run": {"seed": st.integers(0, 2**32 - 1), "dir": text, "max_skipped_steps": positive},
    "rules": {"vocab": st.none() | st.sampled_from(AXES), "mlp": st.lists(st.sampled_from(AXES), max_size=1)},
    "model": {
        "rope_theta": st.floats(1, 1e8),
        "rope_scaling": st.none()
        | st.dictionaries(text, text | st.floats(allow_nan=False) | st.booleans(), max_size=3),
        "norm_eps": st.floats(1e-12, 1e-2),
        "tie_embeddings": st.booleans(),
        "dropout": st.floats(0, 0.9),
        "remat": st.sampled_from(["none", "full"]) | st.lists(st.sampled_from(["query", "mlp_up"]), min_size=1),
        "loss_chunk": st.none() | positive,
    },
    "data": {"held_out": st.floats(0, 0.5), "shuffle": st.booleans(), "tokenizer": st.sampled_from(["bpe", "byte"])},
    "optimizer": {
        "lr": st.floats(1e-12, 10),
        "clip_norm": st.none() | st.floats(1e-6, 1e6),
        "decay_roles": st.lists(st.sampled_from(["matrix", "head", "bias"]), max_size=3),
        "options": st.fixed_dictionaries(
            {}, optional={"b1": st.floats(0, 1), "b2": st.floats(0, 1), "nesterov": st.booleans()}
        ),
    },
    "precision": {"params": st.sampled_from(["float32", "float64"]), "compute": st.sampled_from(["auto", "bfloat16"])},
    "checkpoint": {"every": positive, "keep_every": st.none() | positive, "compress": st.booleans()},
    "sample": {"prompt": st.none() | text, "temperature": st.floats(0, 10)},
    "eval": {"every": st.none() | positive},
}
schedules = st.one_of(
    st.just({"type": "constant"}),
    st.just({"type": "cosine", "warmup_steps": 3}),
    st.fixed_dictionaries({"type": st.just("linear"), "decay_steps": st.integers(1, 10**9)}),
    st.fixed_dictionaries({"type": st.just("wsd")}, optional={"stable_ratio": st.floats(0, 0.9)}),
    st.fixed_dictionaries({"type": st.just("wsd"), "decay_start": st.integers(0, 5)}),
)
sections = st.fixed_dictionaries(
    {}, optional={name: st.fixed_dictionaries({}, optional=keys) for name, keys in maybe.items()}
)

REQUIRED = {
    "run": {"steps": 10},
    "model": {"type": "llama", "n_layers": 2, "d_model": 32, "n_heads": 2, "d_ff": 64, "vocab_size": 512},
    "data": {"type": "corpus", "seq_len": 16, "global_batch": 16},
    "optimizer": {"lr": 0.1},
}


@settings(suppress_health_check=[HealthCheck.too_slow], deadline=None)
@given(sections, schedules)
def test_resolved_yaml_gives_the_same_config(given_sections, schedule):
    raw = {name: {**REQUIRED.get(name, {}), **given_sections.get(name, {})} for name in {**REQUIRED, **given_sections}}
    raw["optimizer"]["schedule"] = schedule
    config = parse_config(raw, check_files=False)
    again = parse_config(parse(config.to_yaml(), "yaml"), check_files=False)
    assert again == config
    assert again.to_yaml() == config.to_yaml()
    assert again.model.arguments() == config.model.arguments()
    assert pickle.loads(pickle.dumps(config)) == config


def test_from_file_to_file(base, tmp_path):
    config = load_config(base, ["rules={vocab: null, mlp: tensor}", "optimizer.lr=1e-5"])
    (tmp_path / "again.yaml").write_text(config.to_yaml())
    assert load_config("again.yaml") == config


def test_defaults_that_depend_on_others_are_written_out(base):
    config = load_config(base, ["optimizer.schedule.type=wsd"])
    assert config.run.dir == "runs/test"
    assert config.data.tokenizer == "bpe"
    assert config.data.vocab_size == 2048
    assert config.optimizer.schedule.decay_steps == 200
    assert config.optimizer.schedule.stable_ratio == 0.8
    synthetic = load_config(base, ["data.type=synthetic", "optimizer.schedule={type: constant}"])
    assert (synthetic.data.tokenizer, synthetic.data.vocab_size) == (None, None)
    assert synthetic.optimizer.schedule.decay_steps is None


@pytest.mark.parametrize("name", ["run", "model"])
def test_a_parsed_config_does_not_share_what_it_was_made_of(base: Path, name):
    raw = load_config(base).to_dict()
    config = parse_config(raw)
    raw[name].clear()
    assert getattr(config, name) == getattr(load_config(base), name)
