"""Values against each other, and paths against the disk."""

import os
from pathlib import Path

import pytest

from shardtrain.config import load_config
from shardtrain.data import open_source


@pytest.mark.parametrize(
    ("overrides", "path", "rule", "fix"),
    [
        (["devices.platform=cuda"], "devices.emulate", "CPU devices", "devices.emulate=null"),
        (["model.n_layers=0"], "model.n_layers", "greater than 0", "positive"),
        (["model.n_heads=-4", "rules.heads=null"], "model.n_heads", "greater than 0", "positive"),
        (["model.norm_eps=0.0"], "model.norm_eps", "greater than 0", "positive"),
        (["model.dropout=1.0"], "model.dropout", "from 0 to below 1", "dropout=0.1"),
        (["model.dropout=-0.1"], "model.dropout", "from 0 to below 1", "dropout=0.1"),
        (["model.z_loss=-1.0"], "model.z_loss", "from 0 to 1", "1e-4"),
        (["model.remat=ful"], "model.remat", "is not a policy", "did you mean full?"),
        (["model.remat=names:querry,key"], "model.remat", "keeps 'querry'", "did you mean query?"),
        (["model.remat=[]"], "model.remat", "names nothing to keep", "full"),
        (["model.n_heads=6", "model.n_kv_heads=6"], "model.n_heads", "128 / 6", "head_dim"),
        (["model.n_kv_heads=6", "model.n_heads=8"], "model.n_kv_heads", "divide n_heads = 8", "[1, 2, 4, 8]"),
        (["data.type=tokens"], "data.path", "needs their path", "set data.path"),
        (["data.type=tokens", "data.path=[base.yaml]"], "data.path", "one file", "join"),
        (["data.path=base.yaml"], "data.path", "reads no files", "data.path=null"),
        (["data.type=synthetic", "data.tokenizer=bpe"], "data.tokenizer", "nothing to tokenize", "data.tokenizer=null"),
        (["data.type=synthetic", "data.vocab_size=300"], "data.vocab_size", "only a bpe", "data.vocab_size=null"),
        (["model.vocab_size=256"], "model.vocab_size", "at least 257", "2048"),
        (["data.vocab_size=256"], "data.vocab_size", "at least 257", "2048"),
        (["data.tokenizer=byte", "model.vocab_size=256"], "model.vocab_size", "257 ids", "model.vocab_size=257"),
        (["data.vocab_size=4096"], "data.vocab_size", "model.vocab_size is 2048", "model.vocab_size=4096"),
        (["optimizer.type=adam"], "optimizer.type", "no such optimizer", "did you mean adamw?"),
        (["optimizer.options.beta1=0.9"], "optimizer.options.beta1", "adamw has no such option", ""),
        (["optimizer.schedule.warmup_steps=200"], "optimizer.schedule.warmup_steps", "decay_steps = 200", "=20"),
        (["optimizer.schedule={type: constant, decay_steps: 9}"],
         "optimizer.schedule.decay_steps", "does not decay", "decay_steps=null"),
        (["optimizer.schedule.stable_ratio=0.5"],
         "optimizer.schedule.stable_ratio", "only wsd has it", "optimizer.schedule.type=wsd"),
        (["optimizer.schedule={type: wsd, stable_ratio: 0.5, decay_start: 9}"],
         "optimizer.schedule.decay_start", "one of the two", "stable_ratio=null"),
        (["optimizer.schedule={type: wsd, decay_start: 200}"],
         "optimizer.schedule.decay_start", "below decay_steps = 200", "=160"),
        (["data.type=synthetic", "sample.prompt=a"], "sample.prompt", "needs a tokenizer", "sample.prompt=null"),
        (["init_from=runs/none"], "init_from", "no such directory", "run directory"),
    ],
)  # fmt: skip
def test_a_bad_combination_names_path_rule_and_fix(problems, overrides, path, rule, fix):
    found = problems(*overrides)
    assert set(found) == {path}
    assert rule in found[path].rule
    assert fix in found[path].fix


def test_optimizers_by_import_path_are_for_the_optimizer_to_judge(base):
    load_config(base, ["optimizer.type=optax:lamb", "optimizer.options.anything=1"])


@pytest.mark.parametrize("path", ["nowhere.txt", "nowhere/*.txt", "[base.yaml, nowhere.txt]", "empty"])
def test_missing_data(problems, path):
    Path("empty").mkdir()
    problem = problems("data.type=text", f"data.path={path}")["data.path"]
    assert str(problem.value) in ("nowhere.txt", "nowhere/*.txt", "empty")
    assert any(words in problem.rule for words in ("no such file or folder", "matches no file", "empty"))


def test_a_device_is_no_data(problems):
    assert problems("data.type=text", "data.path=/dev/null")["data.path"].rule == "it is neither a file nor a folder"


@pytest.mark.parametrize("path", ["base.yaml", "base.*", ".", "[base.yaml, '*.yaml']"])
def test_data_that_is_there(base, path):
    load_config(base, ["data.type=text", f"data.path={path}"])


@pytest.mark.parametrize(("path", "rule"), [("''", "it is empty"), ("[]", "it is empty"), ("['']", "it is empty")])
def test_an_empty_path(problems, path, rule):
    problem = problems("data.type=text", f"data.path={path}")["data.path"]
    assert rule in problem.rule


def test_a_run_that_has_kept_its_tokens_needs_no_text(base, problems, tmp_path):
    overrides = ["data.type=text", "data.path=nowhere", f"run.dir={tmp_path}/run"]
    assert set(problems(*overrides)) == {"data.path"}
    open_source("text", seq_len=4, vocab_size=300, path=base, directory=tmp_path / "run" / "data")
    load_config(base, overrides)


def test_files_need_not_be_here_when_nobody_asks(base):
    overrides = ["data.type=text", "data.path=nowhere", "init_from=nowhere", "run.dir=base.yaml/x"]
    assert load_config(base, overrides, check_files=False).data.path == "nowhere"


def test_a_run_directory_that_cannot_be_written(problems):
    problem = problems("run.dir=base.yaml/run")["run.dir"]  # a file stands where a folder should be
    assert problem.value == "base.yaml/run"
    assert "cannot be written" in problem.rule
    assert "base.yaml" in problem.rule
    assert "run.dir" in problem.fix


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_run_directory_without_permission(problems, tmp_path):
    (tmp_path / "closed").mkdir(mode=0o500)
    assert "closed" in problems("run.dir=closed/deep/run")["run.dir"].rule


def test_looking_leaves_nothing_behind(base, tmp_path):
    before = sorted(tmp_path.rglob("*"))
    load_config(base, ["run.dir=a/b/c"])
    assert sorted(tmp_path.rglob("*")) == before
