"""The reference of keys: none without a meaning, and the whole of it a config."""

import yaml

from commands import shardtrain
from shardtrain.config.reference import as_yaml, keys
from shardtrain.config.schema import RunConfig


def test_every_key_says_what_it_means():
    assert [key.path for key in keys() if len(key.meaning) < 8] == []
    assert len(list(keys())) > 80


def test_the_reference_holds_the_defaults():
    printed = yaml.safe_load(as_yaml())
    assert printed["init_from"] is None
    assert printed["rules"] == {}
    for name, field in RunConfig.model_fields.items():
        if hasattr(field.default, "model_dump"):
            assert printed[name] == field.default.model_dump(mode="json")


def test_the_command_prints_a_config_that_only_lacks_the_models_sizes(tmp_path):
    out = shardtrain("config", "--reference").out
    assert out == as_yaml()
    assert "# updates over the whole run; more of them extend a finished run (required, integer from 1)" in out
    (tmp_path / "all.yaml").write_text(out)
    sizes = ["model.n_layers=2", "model.d_model=32", "model.n_heads=2", "model.d_ff=64", "model.vocab_size=300"]
    assert "lr: 0.001" in shardtrain("config", tmp_path / "all.yaml", *sizes).out


def test_without_a_file_it_says_what_it_needs():
    result = shardtrain("config")
    assert result.code == 2
    assert "name a config file" in result.err
