"""Several values for a key: which runs they make, and that these are trained, resumed and compared."""

import shlex
import signal
import subprocess
import sys

import pytest

from commands import CONFIG, compiled_once, metrics, shardtrain  # noqa: F401
from shardtrain.config import dump
from shardtrain.config.grid import chosen, grid, label
from shardtrain.errors import UserError


@pytest.mark.parametrize(
    ("overrides", "choices"),
    [
        ([], [{}]),
        (["run.steps=3"], [{}]),
        (["optimizer.lr=1e-4, 3e-4"], [{"optimizer.lr": "1e-4"}, {"optimizer.lr": "3e-4"}]),
        (["a.x=1,2", "b.x=p,q"], [{"a.x": x, "b.x": y} for x in "12" for y in "pq"]),
        (["mesh={fsdp: 4, tensor: 2}", "rules.vocab=[fsdp,tensor]", "model.name='a,b'"], [{}]),
        (["mesh={fsdp: 4},{fsdp: 2}"], [{"mesh": "{fsdp: 4}"}, {"mesh": "{fsdp: 2}"}]),
        (["sample.prompt=Well, then", "data.path=a,b"], [{}]),
    ],
)
def test_a_grid_has_one_choice_for_each_combination(overrides, choices):
    assert grid(overrides) == choices


@pytest.mark.parametrize("later", ["optimizer.lr=1e-3", "optimizer={lr: 5e-3}", "optimizer.lr=1,2"])
def test_a_later_override_of_a_swept_key_is_refused(later):
    with pytest.raises(UserError, match=r"optimizer\.lr = 1e-4,3e-4: .* later one would win") as refused:
        grid(["optimizer.lr=1e-4,3e-4", later])
    assert later in str(refused.value)


def test_a_choice_becomes_overrides_and_a_name():
    overrides = ["optimizer.lr=1e-4,3e-4", "run.steps=3", "optimizer.schedule.type=cosine,wsd", "data.type=a:B,c:D"]
    choice = grid(overrides)[-1]
    assert chosen(overrides, choice) == [
        "optimizer.lr=3e-4",
        "run.steps=3",
        "optimizer.schedule.type=wsd",
        "data.type=c:D",
    ]
    assert label(choice) == "lr=3e-4,schedule.type=wsd,data.type=c_D"


@pytest.mark.full
def test_a_sweep_trains_resumes_and_shows_all(tmp_path, capfd):
    words = ("train", CONFIG, f"run.dir={tmp_path / 'run'}", "optimizer.lr=1e-2,1e-9", "run.steps=6")
    assert shardtrain(*words).code == 0
    folder = tmp_path / "run.sweep"
    assert sorted(path.name for path in folder.iterdir()) == ["lr=1e-2", "lr=1e-9", "sweep.png"]
    assert [metrics(folder / name)[-1]["step"] for name in ("lr=1e-2", "lr=1e-9")] == [6, 6]
    capfd.readouterr()
    again = shardtrain(*words)
    assert capfd.readouterr().out == "", "nothing is trained twice"
    assert again.code == 0
    names = [line.split()[0] for line in again.out.splitlines() if line.strip().startswith("lr=")]
    assert names == ["lr=1e-2", "lr=1e-9"], "the best first"
    assert f"drawn into {folder / 'sweep.png'}" in again.out


def test_a_sweep_goes_on_after_a_break_and_a_failing_run_keeps_no_other_from_running(tmp_path, monkeypatch):
    """With a stand-in for the processes that train."""
    words = ("train", CONFIG, f"run.dir={tmp_path / 'run'}", "optimizer.lr=1,2,3", "run.steps=6", "--debug")
    codes = {"lr=1": 0, "lr=2": 1, "lr=3": 0}
    trained, broken = [], ["lr=3"]

    def train(signals, run):
        assert run.words[-1] == "--debug"
        trained.append(run.label)
        run.directory.mkdir(parents=True, exist_ok=True)
        (run.directory / "config.yaml").write_text(dump(run.config.to_dict()))
        done = codes[run.label] == 0 and run.label not in broken
        (run.directory / "metrics.jsonl").write_text(f'{{"step": {6 if done else 3}, "loss": 1.5}}\n')
        return codes[run.label]

    monkeypatch.setattr("shardtrain.cli.sweep._Signals.train", train)
    first = shardtrain(*words)
    assert (first.code, trained) == (0, ["lr=1", "lr=2", "lr=3"])
    assert first.out.splitlines()[-1] == "the sweep was stopped; the same command goes on with it"
    broken.clear()
    second = shardtrain(*words)
    assert (second.code, trained[3:]) == (1, ["lr=2", "lr=3"]), "one has failed"
    rows = [line.split() for line in second.out.splitlines() if line.strip().startswith("lr=")]
    assert sorted(row[:2] for row in rows) == [["lr=1", "6/6"], ["lr=2", "3/6"], ["lr=3", "6/6"]]
    codes["lr=2"] = 0
    assert (shardtrain(*words).code, trained[5:]) == (0, ["lr=2"])
    assert (shardtrain(*words).code, trained[6:]) == (0, [])
    assert shardtrain(*words[:-1], "optimizer.clip_norm=2", "--debug").code == 0
    assert trained[6:] == ["lr=1", "lr=2", "lr=3"], "another config than that of the finished runs"


@pytest.mark.parametrize(("number", "times"), [(signal.SIGINT, 2), (signal.SIGTERM, 1)])
def test_a_signal_ends_a_sweep(tmp_path, number, times):
    words = ["train", str(CONFIG), f"run.dir={tmp_path / 'run'}", "run.seed=1,2", "run.steps=4000"]
    with subprocess.Popen([sys.executable, "-m", "shardtrain", *words], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "--- run 1 of 2: seed=1\n"
        for _ in range(times):
            process.send_signal(number)
        out, _ = process.communicate(timeout=60)
    assert (process.returncode, out.splitlines()[-1]) == (0, "the sweep was stopped; the same command goes on with it")
    assert "run 2" not in out


def test_jobs_are_written_for_an_engine(tmp_path):
    words = ("train", CONFIG, f"run.dir={tmp_path / 'run'}", "optimizer.lr=1e-2,2e-2", "run.steps=6")
    result = shardtrain(*words, "--write-jobs", tmp_path / "jobs.txt")
    assert result.code == 0, result.err
    first, second = map(shlex.split, (tmp_path / "jobs.txt").read_text().splitlines())
    assert first[:3] == ["shardtrain", "train", str(CONFIG)]
    assert second[3:] == [
        f"run.dir={tmp_path / 'run'}",
        "optimizer.lr=2e-2",
        "run.steps=6",
        f"run.dir={tmp_path / 'run.sweep/lr=2e-2'}",
    ]
    assert not (tmp_path / "run.sweep").exists()


def test_every_config_of_a_sweep_is_checked_first(tmp_path):
    run = f"run.dir={tmp_path / 'run'}"
    wrong = shardtrain("train", CONFIG, run, "optimizer.lr=1e-2,-1", "run.steps=6")
    assert wrong.code == 2
    assert "optimizer.lr = -1" in wrong.err
    assert not (tmp_path / "run.sweep").exists()
    assert "several values" in shardtrain("train", CONFIG, run, "--write-jobs", tmp_path / "jobs.txt").err
    assert "--write-jobs" in shardtrain("train", CONFIG, run, "optimizer.lr=1e-2,2e-2", "--dry-run").err
