"""What a user sees and gets: the lines, the files of a run directory, the commands around them."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

import shardtrain as package
from commands import (
    CONFIG,
    PREPARED,
    compiled_once,  # noqa: F401
    flip_a_byte,
    losses,
    metrics,
    saved,
    shardtrain,
)
from shardtrain import cli, load_config
from shardtrain.checkpoint import RunLock

PNG = b"\x89PNG\r\n\x1a\n"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run on text, by the command line: 6 steps, checkpoints after 2, 4 and 6."""
    folder = tmp_path_factory.mktemp("trained")
    (folder / "text").mkdir()
    (folder / "text/a.txt").write_text("To be, or not to be, that is the question. " * 200)
    overrides = (
        f"run={{name: words, dir: {folder / 'run'}, steps: 6}}",
        "model.vocab_size=258",
        f"data={{type: text, path: {folder / 'text'}, tokenizer: byte, seq_len: 16, global_batch: 8, held_out: 0.1}}",
        "checkpoint.every=2",
        "sample={prompt: To be, tokens: 8}",
    )
    command = ("train", CONFIG, *overrides)
    return SimpleNamespace(directory=folder / "run", command=command, result=shardtrain(*command))


@pytest.fixture
def copy(trained, tmp_path):
    """A copy of its directory, to spoil."""
    return Path(shutil.copytree(trained.directory, tmp_path / "run"))


def test_plain_lines_tell_step_and_loss(trained):
    result = trained.result
    assert result.code == 0
    assert PREPARED.fullmatch(result.err)
    lines = result.out.splitlines()
    assert "words: mlp" in lines[0]
    assert "fsdp 4, tensor 2" in lines[0]
    rows = metrics(trained.directory)
    for row in rows:
        (line,) = [line for line in lines if line.startswith(f"step {row['step']}/6")]
        assert f"loss {row['loss']:.4f}" in line
    assert f"held-out {rows[-1]['eval_loss']:.4f}" in result.out
    assert f"done: 6 steps; results in {trained.directory}" in lines
    assert "\x1b" not in result.out, "no terminal, no escape sequences"


def test_every_line_of_metrics_has_the_public_keys(trained):
    assert len(losses(trained.directory)) == 6
    for row in metrics(trained.directory):
        assert {"step", "loss", "grad_norm", "lr", "step_time_s", "tokens_per_s"} <= set(row)
        assert "mfu" not in row  # there is none on a CPU
        assert row["tokens_per_s"] == pytest.approx(8 * 16 / row["step_time_s"])
    assert [row["step"] for row in metrics(trained.directory) if "eval_loss" in row] == [6]


def test_the_run_directory_holds_the_results(trained):
    directory = trained.directory
    assert (directory / "loss.png").read_bytes().startswith(PNG)
    assert saved(directory) == [2, 4, 6]
    assert any((directory / "tensorboard").iterdir())
    assert (directory / "data/tokens.bin").exists()
    sample = (directory / "sample.txt").read_text()
    assert sample.startswith("--- prompt\nTo be\n--- continuation\n")
    assert sample.rstrip() in trained.result.out
    assert not list(directory.rglob("*.tmp")), "nothing half written is left"


def test_a_longer_run_writes_a_new_sample(trained, copy):
    before = (copy / "sample.txt").stat().st_mtime_ns
    more = ("run.steps=8", f"run.dir={copy}", "sample.temperature=0")
    assert shardtrain(*trained.command, *more).code == 0
    assert (copy / "sample.txt").stat().st_mtime_ns > before
    assert len(losses(copy)) == 8


def test_the_stored_config_is_the_resolved_one_and_reads_back_equal(trained, tmp_path):
    stored = trained.directory / "config.yaml"
    printed = shardtrain("config", *trained.command[1:])
    assert (printed.code, printed.err) == (0, "")
    assert printed.out == stored.read_text()
    again = shardtrain("config", stored)
    assert again.out == printed.out
    assert load_config(stored).optimizer.schedule.decay_steps == 12


def test_checkpoint_list(trained):
    result = shardtrain("checkpoint", "list", trained.directory)
    assert (result.code, result.err) == (0, "")
    rows = [line.split() for line in result.out.splitlines() if "verified" in line]
    assert [row[0] for row in rows] == ["2", "4", "6"]


def test_checkpoint_verify_finds_a_flipped_bit(copy):
    whole = shardtrain("checkpoint", "verify", copy)
    assert (whole.code, whole.out.splitlines()) == (0, [f"step {step}: verified" for step in (2, 4, 6)])
    flip_a_byte(copy, 4)
    damaged = shardtrain("checkpoint", "verify", copy)
    assert damaged.code == 2
    assert "step 4: corrupt: 4/state/" in damaged.out
    assert "step 6: verified" in damaged.out
    assert shardtrain("checkpoint", "verify", copy, "--step", "6").code == 0
    assert "corrupt" in shardtrain("checkpoint", "list", copy).out
    assert (copy / "checkpoints/4").is_dir(), "looking changes nothing"


def test_checkpoint_show(trained, copy):
    same = shardtrain("checkpoint", "show", trained.directory)
    assert (same.code, same.err) == (0, "")
    assert "step 6" in same.out
    assert "258 x 32" in same.out
    assert "'next_row': 48" in same.out
    assert "{'fsdp': 4, 'tensor': 2}" in same.out
    assert "config: the same" in same.out
    (copy / "config.yaml").write_text((copy / "config.yaml").read_text().replace("tensor: 2", "tensor: 1"))
    other = shardtrain("checkpoint", "show", copy, "--step", "2")
    assert "step 2" in other.out
    assert "-  tensor: 2\n+  tensor: 1" in other.out


@pytest.mark.parametrize("command", ["list", "verify", "show"])
@pytest.mark.parametrize("place", ["nothing here", "."])
def test_checkpoint_commands_where_there_is_none(tmp_path, command, place):
    (tmp_path / "checkpoints").mkdir()
    result = shardtrain("checkpoint", command, tmp_path / place)
    assert "Traceback" not in result.err
    if (command, place) == ("list", "."):
        assert result.code == 0
    else:
        assert result.code == 2
        assert result.err.startswith("error: ")
        assert str(tmp_path) in result.err


def test_a_checkpoint_step_that_does_not_exist(trained):
    for command in ("verify", "show"):
        result = shardtrain("checkpoint", command, trained.directory, "--step", "5")
        assert result.code == 2
        assert result.err.startswith("error: step 5 ")
        assert "[2, 4, 6]" in result.err


def test_version_and_help():
    assert shardtrain("--version").out == f"shardtrain {package.__version__}\n"
    result = shardtrain("--help")
    assert result.code == 0
    for command in ("train", "config", "checkpoint"):
        assert command in result.out
        assert "Usage" in shardtrain(command, "--help").out
    assert "--allow-changes" in shardtrain("train", "--help").out


def test_the_module_is_the_command():
    command = [sys.executable, "-m", "shardtrain", "--version"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
    assert (ended.stdout, ended.stderr) == (f"shardtrain {package.__version__}\n", "")


def test_the_reader_of_the_output_may_leave(tmp_path, monkeypatch):
    """As under `| head`; and Ctrl-C ends a `tee`, too, and must save all the same."""
    read, write = os.pipe()
    os.close(read)
    with open(write, "w") as gone:
        monkeypatch.setattr(sys, "argv", ["shardtrain", "train", str(CONFIG), f"run.dir={tmp_path / 'run'}"])
        monkeypatch.setattr(sys, "stdout", gone)
        with pytest.raises(SystemExit) as end:
            cli.main()
    assert end.value.code == 0
    assert saved(tmp_path / "run") == [4, 8, 12]


def test_a_second_writer_is_refused(copy, trained):
    with RunLock(copy):
        result = shardtrain(*trained.command, f"run.dir={copy}", "run.steps=8")
    assert result.code == 2
    assert f"is being written by process {os.getpid()} on " in result.err
    assert len(losses(copy)) == 6
    assert shardtrain(*trained.command, f"run.dir={copy}").code == 0  # free again
