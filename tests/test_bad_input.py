"""Every mistake gets one clear error: exit code 2, the value, the rule, the fix, and no traceback unless asked for."""

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from commands import (
    CONFIG,
    Result,
    compiled_once,  # noqa: F401
    fit,
    flip_a_byte,
    losses,
    saved,
    shardtrain,
    train,
)
from shardtrain import UserError
from shardtrain.data import write_tokens

TEXT = ("data.type=text", "data.tokenizer=byte", "model.vocab_size=300")
HEADS_6 = "model={type: llama, n_layers: 1, d_model: 48, n_heads: 6, d_ff: 64, vocab_size: 64}"

#: Overrides, and what the message must contain. HERE is a folder of the test's own.
MISTAKES = {
    "unknown key": (["model.n_layer=2"], ["model.n_layer = 2", "no such key", "did you mean n_layers?"]),
    "override of a key that does not exist": (["mesh.tensr=4"], ["mesh.tensr = 4", "did you mean tensor?"]),
    "override of a section that does not exist": (["optimzer.lr=1"], ["optimzer", "did you mean optimizer?"]),
    "override without a value": (["mesh.tensor"], ["'mesh.tensor'", "write it like mesh.tensor=4"]),
    "typo in a rule": (["rules.embd=fsdp"], ["rules.embd", "no such logical axis", "did you mean embed?"]),
    "typo in a rule's mesh axis": (["rules.embed=fdsp"], ["rules.embed = fdsp", "did you mean fsdp?"]),
    "mesh product 6 on 8 devices": (["mesh.fsdp=3"], ["fsdp 3 x tensor 2 = 6", "devices, 8", "{fsdp: 4, tensor: 2}"]),
    "mesh product 6 on 8 devices that were found": (
        ["mesh={fsdp: 2, data: 3}", "devices.emulate=null", "data.global_batch=12"],
        ["data 3 x fsdp 2 = 6", "devices, 8 (found)", "nearest mesh that fits"],
    ),
    "two -1": (["mesh={fsdp: -1, tensor: -1}"], ["mesh.fsdp and mesh.tensor are all -1", "give mesh.fsdp a size"]),
    "heads 6 on tensor 4": ([HEADS_6, "mesh={fsdp: 2, tensor: 4}"], ["n_heads = 6", "over tensor 4", "n_heads=4 or 8"]),
    "batch 10 on fsdp 4": (["data.global_batch=10"], ["data.global_batch = 10", "fsdp 4", "global_batch=8 or 12"]),
    "missing data file": (
        [*TEXT, "data.path=no/such.txt"],
        ["data.path = no/such.txt", "no such file", "check the path"],
    ),
    "data folder empty": ([*TEXT, "data.path=HERE/empty"], ["HERE/empty", "the folder is empty", "put files there"]),
    "vocabulary too small": (["data.type=corpus"], ["model.vocab_size = 64", "at least 257", "vocab_size=257 or more"]),
    "run directory below a file": (["run.dir=HERE/file/run"], ["HERE/file/run", "cannot be written"]),
    "run directory in /proc": (["run.dir=/proc/run"], ["run.dir = /proc/run", "cannot be written", "set run.dir"]),
    "several mistakes": (["run.steps=0", "mesh.fsdp=3", "data.seq_len=x"], ["run.steps", "mesh", "data.seq_len"]),
}


def assert_one_error(result: Result) -> None:
    assert result.code == 2
    assert "Traceback" not in result.err + result.out
    lines = result.err.splitlines()
    assert [line.startswith("error: ") for line in lines].count(True) == 1


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_in_the_config(tmp_path, name):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").touch()
    overrides, fragments = ([text.replace("HERE", str(tmp_path)) for text in part] for part in MISTAKES[name])
    result = train(tmp_path / "run", *overrides)
    assert_one_error(result)
    for fragment in (*fragments, "rule: ", "fix:  "):
        assert fragment in result.err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "file"], "nothing was written"


def test_a_yaml_syntax_error_names_file_line_and_column(tmp_path):
    file = tmp_path / "open.yaml"
    file.write_text("run: {steps: 1}\nmesh: {fsdp: 4\nmodel: {type: mlp}\n")
    result = shardtrain("train", file)
    assert_one_error(result)
    assert f"{file}:3:6\n" in result.err
    assert "fix:  correct this line" in result.err


def test_a_missing_config_names_the_nearest():
    result = shardtrain("train", CONFIG.with_name("smal.yaml"))
    assert_one_error(result)
    assert f"did you mean {CONFIG}?" in result.err


def test_token_ids_above_the_vocabulary(tmp_path):
    write_tokens(tmp_path / "tokens.bin", [np.arange(9999) % 300], 300)
    result = train(tmp_path / "run", "data.type=tokens", f"data.path={tmp_path / 'tokens.bin'}")
    assert_one_error(result)
    assert "model.vocab_size = 64" in result.err
    assert "300" in result.err


NO_MODEL = """
from flax import nnx


class NoModel(nnx.Module):
    def __init__(self, *, vocab_size: int, rngs: nnx.Rngs):
        self.linear = nnx.Linear(vocab_size, 8, rngs=rngs)

    def head(self, x, batch, ctx):
        return self.linear(x)
"""


def test_a_class_that_is_no_model(tmp_path, monkeypatch):
    (tmp_path / "no_model.py").write_text(NO_MODEL)
    monkeypatch.syspath_prepend(str(tmp_path))
    result = train(tmp_path / "run", "model={type: 'no_model:NoModel', vocab_size: 64}")
    assert_one_error(result)
    assert "no_model:NoModel has no parameter precision, no method embedder: " in result.err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "options", [["--processes", "2"], ["--process", "1"], ["--coordinator", "127.0.0.1:1"], ["--processes", "-1"]]
)
def test_processes_that_cannot_find_each_other(tmp_path, options):
    result = train(tmp_path / "run", *options)
    assert result.code == 2
    assert "--process" in result.err
    assert not (tmp_path / "run").exists()


def test_debug_shows_where_it_was_raised():
    with pytest.raises(UserError, match="no such key"):
        shardtrain("config", CONFIG, "mesh.tensr=4", "--debug")
    command = [sys.executable, "-m", "shardtrain", "config", str(CONFIG), "mesh.tensr=4", "--debug"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode != 0
    assert "Traceback" in ended.stderr
    assert "did you mean tensor?" in ended.stderr


@pytest.mark.skipif(any(Path("/dev").glob("nvidia*")), reason="this machine has a GPU")
def test_a_gpu_that_is_not_there(tmp_path):
    gpu = ("devices={platform: cuda}", f"run.dir={tmp_path / 'run'}")
    command = [sys.executable, "-m", "shardtrain", "train", str(CONFIG), *gpu]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert_one_error(Result(ended.returncode, ended.stdout, ended.stderr))
    assert "devices.platform is cuda" in ended.stderr
    assert "set devices.platform=cpu" in ended.stderr
    assert not (tmp_path / "run").exists()


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A finished run of 4 steps with the checkpoints 2 and 4."""
    folder = tmp_path_factory.mktemp("trained")
    return fit(folder / "run", "run.steps=4", "checkpoint.every=2").directory


@pytest.fixture
def copy(trained, tmp_path):
    """A copy of it, to spoil."""
    return Path(shutil.copytree(trained, tmp_path / "run"))


def test_a_checkpoint_of_another_model(copy):
    command = (copy, "model.d_model=64", "optimizer.lr=0.5", "run.steps=6")
    result = train(*command)
    assert_one_error(result)
    for line in (
        "model.d_model = 64",
        "was started with 32",
        "pass model.d_model=32",
        "optimizer.lr = 0.5",
        "run.name",
    ):
        assert line in result.err
    assert "mesh" not in result.err
    forced = train(*command, "--allow-changes")
    assert_one_error(forced)
    assert "does not fit this model" in forced.err
    assert "params.embedding" in forced.err
    assert "(64, 32) != (64, 64)" in forced.err
    assert saved(copy) == [2, 4]
    assert len(losses(copy)) == 4


def test_changes_that_fit_train_on_when_allowed(copy):
    command = (copy, "data.shuffle=false", "run.steps=6")
    assert_one_error(train(*command))
    assert train(*command, "--allow-changes").code == 0
    assert len(losses(copy)) == 6


def test_a_corrupt_checkpoint_falls_back_to_a_good_one(copy, trained):
    flip_a_byte(copy, 4)
    result = train(copy, "run.steps=4")
    assert result.code == 0
    assert "checkpoint 4" in result.err
    assert "is corrupt" in result.err
    assert "4.corrupt" in result.err
    assert "resumed from the checkpoint of step 2" in result.out
    assert saved(copy) == [2, 4]
    assert (copy / "checkpoints/4.corrupt").is_dir()
    assert losses(copy) == losses(trained)


def test_without_a_good_checkpoint_a_run_never_starts_again_from_step_0(copy, trained):
    flip_a_byte(copy, 2)
    flip_a_byte(copy, 4)
    for _ in range(2):  # by then the steps have been set aside, which must not look like a fresh run
        result = train(copy, "run.steps=4")
        assert result.code == 2
        assert "error: no intact checkpoint is left" in result.err
        assert "2.corrupt, 4.corrupt" in result.err
        assert "another run.name" in result.err
        assert "Traceback" not in result.err
    assert losses(copy) == losses(trained)
