"""Outputs that cannot take what is written to them."""

import os
import subprocess
import sys

import pytest

from commands import CONFIG, compiled_once, shardtrain  # noqa: F401
from shardtrain import cli

FULL = "/dev/full"
TEXT = "data={type: text, path: text.txt, tokenizer: byte, seq_len: 16, global_batch: 8, held_out: 0.1}"
pytestmark = pytest.mark.skipif(not os.path.exists(FULL), reason="no /dev/full here")


@pytest.fixture
def train(tmp_path, monkeypatch):
    """Train on a text that no 8-bit encoding has, with a given standard output; the exit code."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text("Ünïcödé “wörds” ☃ 日本語. " * 300, encoding="utf-8")

    def run(output):
        words = [
            "train",
            str(CONFIG),
            "run.dir=run",
            "run.steps=2",
            "model.vocab_size=258",
            TEXT,
            "sample={prompt: 日本}",
        ]
        monkeypatch.setattr(sys, "argv", ["shardtrain", *words])
        monkeypatch.setattr(sys, "stdout", output)
        with pytest.raises(SystemExit) as end:
            cli.main()
        assert (tmp_path / "run/sample.txt").exists()
        return end.value.code

    return run


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_a_finished_run_prints_its_sample_in_any_encoding(train, tmp_path, encoding):
    with open(tmp_path / "out", "w", encoding=encoding) as output:
        assert train(output) == 0
    printed = (tmp_path / "out").read_text(encoding)
    assert "done: 2 steps" in printed
    assert "--- prompt\n??\n--- continuation\n" in printed


def test_a_finished_run_is_finished_though_its_output_could_not_be_written(train):
    with open(FULL, "w") as output:
        assert train(output) == 0


def test_a_command_that_is_what_it_prints_fails_with_its_output(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["shardtrain", "config", str(CONFIG)])
    with open(FULL, "w") as output, monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", output)
        with pytest.raises(SystemExit) as end:
            cli.main()
    assert end.value.code == 2
    assert capsys.readouterr().err == "error: standard output cannot be written: No space left on device\n"


@pytest.mark.parametrize(
    ("shell", "code", "error"),
    [
        ("{} >&-", 0, ""),
        ("{} | true; exit ${{PIPESTATUS[0]}}", 2, ""),
        (
            "mkdir gone; cd gone; rmdir ../gone; {}",
            2,
            "error: the current directory cannot be used: No such file or directory; cd to one that exists\n",
        ),
    ],
    ids=["closed", "left", "deleted directory"],
)
def test_a_real_command(tmp_path, shell, code, error):
    command = shell.format(f"{sys.executable} -m shardtrain config {CONFIG}")
    end = subprocess.run(["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)
    assert (end.returncode, end.stderr) == (code, error)


def test_streams_are_as_before_after_a_command(capsys):
    before = sys.stdout, sys.stderr
    assert shardtrain("--version").code == 0
    assert (sys.stdout, sys.stderr) == before
