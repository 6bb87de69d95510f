"""The commands around a run: `eval`, `runs`, `compare`, `train --dry-run`, `init`, and what Tab completes."""

import json
import math
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from commands import CONFIG, compiled_once, fit, metrics, saved, shardtrain, start  # noqa: F401
from shardtrain.config import load_config
from shardtrain.data import TokenWindows, open_tokens, split
from shardtrain.run.data import rows_of
from shardtrain.run.report import report
from shardtrain.run.trained import Trained, build_here

TEXT = "To be, or not to be, that is the question. " * 200


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run on text of 6 steps with checkpoints after 3 and 6, in a folder `runs` of its own."""
    home = tmp_path_factory.mktemp("home")
    (home / "a.txt").write_text(TEXT)
    overrides = (
        f"run={{name: words, dir: {home / 'runs/words'}, steps: 6}}",
        "model.vocab_size=258",
        f"data={{type: text, path: {home / 'a.txt'}, tokenizer: byte, seq_len: 16, global_batch: 8, held_out: 0.1}}",
        "checkpoint.every=3",
    )
    assert shardtrain("train", CONFIG, *overrides).code == 0
    return SimpleNamespace(home=home, directory=home / "runs/words", overrides=overrides)


@pytest.fixture
def home(trained, monkeypatch):
    monkeypatch.chdir(trained.home)
    return trained.home


def evaluated(*words):
    result = shardtrain("eval", *words, "--json")
    assert result.code == 0, result.err
    return json.loads(result.out)


def test_eval_is_what_the_run_found_itself(trained, home):
    found = evaluated("words")
    loss = metrics(trained.directory)[-1]["eval_loss"]
    assert found["step"] == 6
    assert found["rows"] == 16  # eval.batches=2 of 8 rows
    assert found["targets"] == 16 * 16
    assert found["loss"] == pytest.approx(loss, rel=1e-6)
    assert found["perplexity"] == pytest.approx(math.exp(loss), rel=1e-6)
    assert found["bits_per_byte"] == pytest.approx(loss / math.log(2), rel=1e-6)  # a token is a byte
    printed = shardtrain("eval", "words").out
    assert "runs/words, step 6: 16 held-out rows, 256 targets" in printed
    assert f"{loss:.4f}" in printed


def test_eval_counts_the_likeliest_token(trained, home):
    opened = Trained.open(trained.directory)
    model, state = opened.job.model, jax.tree.map(jnp.asarray, jax.device_get(opened.state))
    source = split(TokenWindows(open_tokens(trained.directory / "data/tokens.bin"), 16), 0.1)[1]
    batch = {name: jnp.stack([source[row][name] for row in range(16)]) for name in source[0]}
    module = model.merge(state.params, state.model_state)
    ctx = model.context(batch)
    logits = module.logits(module.blocks(module.embedder(batch, ctx), ctx)[0])
    right = float(np.mean(np.argmax(logits, -1) == batch["targets"]))
    assert 0 < right < 1
    assert report(opened).values["accuracy"] == pytest.approx(right, abs=1e-6)


def test_eval_on_other_devices_and_meshes_is_the_same(home):
    want = evaluated("words")
    for words in (["devices.emulate=2"], ["mesh.pipe=2", "mesh.tensor=1", "pipeline.microbatches=2"]):
        found = evaluated("words", *words)
        assert found == pytest.approx(want, rel=1e-5), words


@pytest.mark.parametrize("growth", ["data.first_batch=2", "optimizer.accumulate=4"])
def test_what_only_training_does_with_a_batch_need_not_fit_the_devices_here(growth):
    wide = ("devices.emulate=2", "mesh={fsdp: 2}", "data.growth_rows=8" if "first" in growth else "run.seed=1")
    stored = load_config(CONFIG, [growth, *wide]).to_dict()
    assert build_here(stored, ["devices.emulate=8"]).partitioner.mesh.shape["fsdp"] == 8


def test_eval_of_a_step_and_of_other_text(trained, home):
    (home / "b.txt").write_text("Nothing like that at all, dear Sir! " * 10)
    third = evaluated("runs/words/checkpoints/3")
    assert third["step"] == evaluated("words/3")["step"] == evaluated("words", "--step", "3")["step"] == 3
    assert third["loss"] > evaluated("words")["loss"]
    other = evaluated("words", "--data", "b.txt")
    assert other["rows"] == 22
    assert other["loss"] > third["loss"]
    assert evaluated("words", "--data", "b.txt", "--rows", "3")["rows"] == 3
    assert evaluated("words", "--data", "runs/words/data/tokens.bin")["targets"] == len(TEXT) // 16 * 16


def test_eval_says_what_is_missing(trained, home):
    near = shardtrain("eval", "wrods")
    assert (near.code, near.err) == (2, "error: there is no run wrods; did you mean runs/words?\n")
    assert "the verifiable steps are [3, 6]" in shardtrain("eval", "words", "--step", "4").err
    assert "--step = 3: words/6 is already step 6; leave" in shardtrain("eval", "words/6", "--step", "3").err
    assert "no-such.txt" in shardtrain("eval", "words", "--data", "no-such.txt").err
    shutil.copytree(trained.directory, home / "runs/bare", ignore=shutil.ignore_patterns("data"))
    assert "bare/data is missing" in shardtrain("eval", "bare").err
    shutil.rmtree(home / "runs/bare")


def test_runs_lists_all_with_their_state(trained, home):
    result = shardtrain("runs")
    (line,) = [line for line in result.out.splitlines() if "runs/words" in line]
    assert "6/6" in line
    assert line.rstrip().endswith("finished")
    assert f"{metrics(trained.directory)[-1]['eval_loss']:.4f}" in line
    empty = shardtrain("runs", home / "nowhere")
    assert empty.code == 2
    assert "`shardtrain runs` lists those in runs/" in empty.err


def test_compare_shows_results_and_the_differing_settings(trained, home, tmp_path):
    other = home / "runs/faster"
    assert shardtrain("train", CONFIG, *trained.overrides, f"run.dir={other}", "optimizer.lr=2e-2").code == 0
    result = shardtrain("compare", "words", other, "--out", tmp_path / "two.png")
    assert result.code == 0, result.err
    cells = {line.split()[0]: line.split()[1:] for line in result.out.splitlines() if len(line.split()) > 2}
    assert cells["optimizer.lr"] == ["0.01", "0.02"]
    assert cells["loss"] == [f"{metrics(run)[-1]['loss']:.4f}" for run in (trained.directory, other)]
    assert "run.dir" not in cells
    assert (tmp_path / "two.png").read_bytes().startswith(b"\x89PNG")
    assert "needs two runs" in shardtrain("compare", "words", trained.directory).err
    shutil.rmtree(other)


def test_a_dry_run_tells_all_and_makes_no_step(trained, tmp_path):
    directory = tmp_path / "dry"
    result = shardtrain("train", CONFIG, *trained.overrides, f"run.dir={directory}", "--dry-run")
    assert result.code == 0, result.err
    for part in (
        "words: mlp, ",
        "layers, embed, mlp",
        "tokens      8 x 16",
        "100% of its targets count",
        "memory of a step on each device: ",
        "of weights and optimizer",
        "fsdp     all-gather",
        "no step was made",
    ):
        assert part in result.out, part
    tokens, targets = (re.search(rf"{name} +of row 0: '(.*)'", result.out)[1] for name in ("tokens", "targets"))
    assert tokens[1:] + targets[-1] == targets
    assert targets in TEXT
    assert sorted(path.name for path in directory.iterdir()) == ["data", "lock"]
    resumed = shardtrain("train", CONFIG, *trained.overrides, "run.steps=8", "--dry-run")
    assert "it would resume from the checkpoint of step 6" in resumed.out
    other = shardtrain("train", CONFIG, *trained.overrides, "run.seed=1", "--dry-run")
    assert other.code == 2
    assert "run.seed" in other.err
    (tmp_path / "empty").mkdir()
    for words, message in (
        (["run.steps=5"], "run.steps = 5 is below step 6"),
        ([f"run.dir={directory}", f"init_from={tmp_path / 'empty'}"], "no checkpoints: "),
        ([f"run.dir={directory}", f"init_from={trained.directory}", "model.d_model=64"], "does not fit this model"),
    ):
        refused = shardtrain("train", CONFIG, *trained.overrides, *words, "--dry-run")
        assert refused.code == 2
        assert message in refused.err
    assert saved(trained.directory) == [3, 6]


def test_a_dry_run_of_a_growing_batch_tells_the_memory_of_its_last_size(tmp_path):
    words = ("train", CONFIG, f"run.dir={tmp_path / 'dry'}", "data.global_batch=16", "--dry-run")
    constant, growing = (shardtrain(*words, *more).out for more in ([], ["data.first_batch=4", "data.growth_rows=64"]))
    memory = [next(line for line in out.splitlines() if "memory of a step" in line) for out in (constant, growing)]
    assert memory[0] == memory[1]
    data = load_config(CONFIG, ["data.global_batch=16", "data.first_batch=4", "data.growth_rows=64"]).data
    assert [rows_of(data, steps) for steps in (1, 8, 10, 12, 14)] == [4, 32, 48, 64, 96]


def test_a_new_project_trains_at_once(tmp_path):
    made = shardtrain("init", tmp_path / "project")
    assert made.code == 0, made.err
    again = shardtrain("init", tmp_path / "project")
    assert again.code == 2
    assert "config.yaml" in again.err
    test = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tmp_path / "project")]
    run = subprocess.run(test, capture_output=True, text=True, check=False, cwd=tmp_path / "project")
    assert run.returncode == 0, run.stdout
    assert {path.name for path in Path(tmp_path / "project").glob("*.*")} == {
        "config.yaml",
        "my_data.py",
        "my_model.py",
        "test_project.py",
    }


@pytest.mark.full
def test_the_commands_of_a_new_project_train_and_write_a_sample(tmp_path):
    assert shardtrain("init", tmp_path / "project").code == 0
    words = ("train", "config.yaml", "run.steps=2", "optimizer.schedule.warmup_steps=1")
    with start(words, folder=tmp_path / "project") as (process,):
        assert process.end() == 0, process.output
        assert "done: 2 steps; results in " in process.output
    assert "7+5=" in (tmp_path / "project/runs/sums/sample.txt").read_text()


def completed(monkeypatch, *words):
    with monkeypatch.context() as patch:
        patch.setenv("_SHARDTRAIN_COMPLETE", "complete_bash")
        patch.setenv("COMP_WORDS", " ".join(words))
        patch.setenv("COMP_CWORD", str(len(words) - 1))
        return shardtrain().out.split()


def test_tab_completes_verbs_runs_files_and_settings(home, monkeypatch):
    assert "compare" in completed(monkeypatch, "shardtrain", "com")
    assert "words" in completed(monkeypatch, "shardtrain", "eval", "w")
    assert "mesh.tensor=" in completed(monkeypatch, "shardtrain", "train", "a.yaml", "mesh.t")
    assert "devices.platform=cuda" in completed(monkeypatch, "shardtrain", "train", "a.yaml", "devices.platform=")
    (home / "a.yaml").touch()
    assert completed(monkeypatch, "shardtrain", "train", "a") == ["a.yaml"]
    assert "_SHARDTRAIN_COMPLETE" in shardtrain("--show-completion", "bash").out
