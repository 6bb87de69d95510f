"""Files, what they extend, and overrides."""

import pytest

from shardtrain.config import ConfigError, load_config


def refused(path, *overrides):
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    return caught.value.problems


def test_extends_merges_mappings_and_replaces_anything_else(base, tmp_path):
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep/mid.yaml").write_text(
        "extends: ../base.yaml\noptimizer: {decay_roles: [matrix, head], options: {b1: 0.8}}\n"
    )
    (tmp_path / "top.yaml").write_text(
        "extends: deep/mid.yaml\nmesh: {tensor: 1, data: 2}\noptimizer: {decay_roles: [bias], options: {b2: 0.9}}\n"
    )
    config = load_config("top.yaml")
    assert (config.mesh.data, config.mesh.fsdp, config.mesh.tensor) == (2, 4, 1)
    assert config.optimizer.decay_roles == ("bias",)
    assert config.optimizer.options == {"b1": 0.8, "b2": 0.9}
    assert config.optimizer.schedule.warmup_steps == 20


def test_extending_in_a_circle_shows_the_circle(base, tmp_path):
    (tmp_path / "a.yaml").write_text("extends: b.yaml\n")
    (tmp_path / "b.yaml").write_text("extends: a.yaml\n")
    (problem,) = refused("a.yaml")
    assert problem.path == "extends"
    assert "a.yaml -> b.yaml -> a.yaml" in problem.rule


def test_a_missing_file_names_the_nearest(base, tmp_path):
    (problem,) = refused("bse.yaml")
    assert problem.value == "bse.yaml"
    assert "base.yaml" in problem.fix
    (tmp_path / "a.yaml").write_text("extends: bas.yaml\n")
    (problem,) = refused("a.yaml")
    assert (problem.path, problem.value) == ("extends", "bas.yaml")
    assert "base.yaml" in problem.fix


@pytest.mark.parametrize(
    ("content", "rule"),
    [(b"- a\n", "mapping"), (b"\xff\xfea", "UTF-8"), (b"extends: [a, b]\n", "path of one file")],
)
def test_content_that_is_no_config(base, tmp_path, content, rule):
    (tmp_path / "a.yaml").write_bytes(content)
    (problem,) = refused("a.yaml")
    assert rule in problem.rule


def test_a_folder_is_no_config(base, tmp_path):
    (problem,) = refused(tmp_path)
    assert "cannot be read" in problem.rule


def test_an_empty_file_lacks_everything_that_is_required(tmp_path):
    (tmp_path / "a.yaml").write_text("")
    paths = {problem.path for problem in refused(tmp_path / "a.yaml")}
    assert {"run.steps", "model.type", "data.type", "data.seq_len", "data.global_batch", "optimizer.lr"} == paths


def test_overrides_are_yaml_and_the_last_one_wins(base):
    config = load_config(
        base, ["mesh={data: 8}", "optimizer.lr=1", "optimizer.lr=3e-4", "data.held_out=0", "run.name=b"]
    )
    assert (config.mesh.data, config.mesh.fsdp, config.mesh.tensor) == (8, 1, 1)
    assert config.optimizer.lr == 3e-4
    assert config.run.dir == "runs/b"


def test_an_override_may_open_a_mapping(base):
    config = load_config(base, ["model.rope_scaling.factor=8.0", "mesh.slow.fsdp=2", "rules.vocab=null"])
    assert config.model.options["rope_scaling"] == {"factor": 8.0}
    assert config.mesh.slow == {"fsdp": 2}
    assert config.rules == {"vocab": ()}


@pytest.mark.parametrize(
    ("override", "path", "fix"),
    [
        ("mesh.tensr=2", "mesh.tensr", "tensor"),
        ("model.n_layer=2", "model.n_layer", "n_layers"),
        ("optimizer.schedule.warmup=2", "optimizer.schedule.warmup", "warmup_steps"),
        ("optimiser.lr=2", "optimiser", "optimizer"),
        ("global_batch=8", "global_batch", "data.global_batch"),
        ("model.lr=8", "model.lr", "optimizer.lr"),
    ],
)
def test_an_override_of_a_key_that_does_not_exist_names_the_nearest(problems, override, path, fix):
    problem = problems(override)[path]
    assert "no such key" in problem.rule
    assert f"did you mean {fix}?" in problem.fix


@pytest.mark.parametrize(
    ("override", "path", "rule"),
    [
        ("run.steps", "override 'run.steps'", "equals sign"),
        ("run..steps=3", "override 'run..steps=3'", "equals sign"),
        ("run.steps.x=3", "run.steps.x", "not a section"),
        ("extends=base.yaml", "extends", "override"),
        ("mesh={a", "override 'mesh={a':1:3", "not YAML"),
        ("mesh={fsdp: 8, fsdp: 8}", "override 'mesh={fsdp: 8, fsdp: 8}':1:11", "appear once"),
    ],
)
def test_overrides_that_are_none(problems, override, path, rule):
    assert rule in problems(override)[path].rule


def test_problems_of_overrides_come_together_with_all_others(problems):
    assert set(problems("run.steps", "mesh.fsdp=3", "optimizer.lr=-1")) == {
        "override 'run.steps'",
        "mesh",
        "model.d_model",
        "data.global_batch",
        "optimizer.lr",
    }
