"""Other places for metrics: found by name, fed with everything, and never the end of a run."""

import pytest

from commands import CONFIG, compiled_once, fit, metrics  # noqa: F401
from shardtrain import UserError, load_config
from shardtrain.metrics.logger import LoggedRun, grouped, open_logger
from shardtrain.run import Job
from shardtrain.run.start import open_log

KEPT: list[tuple] = []


class Diary:
    def __init__(self, run):
        KEPT.append(("opened", run.name))

    def write(self, step, values):
        KEPT.append((step, set(values)))
        if step == 3:
            raise ConnectionError("the server is away")

    def text(self, name, text, step):
        KEPT.append((name, step))

    def forget_from(self, step):
        KEPT.append(("forget", step))

    def flush(self):
        pass

    def close(self):
        KEPT.append(("closed",))


def test_a_logger_of_ones_own_gets_everything_and_may_fail(tmp_path, caplog):
    KEPT.clear()
    fit(tmp_path / "run", "run.steps=4", f"log.also=['{__name__}:Diary']")
    assert KEPT[:3] == [("opened", "small"), ("forget", 1), ("config", 0)]
    assert [entry[0] for entry in KEPT[3:]] == [1, 2, 3], "nothing after its failure"
    assert {"train/loss", "train/lr", "system/tokens_per_s"} <= KEPT[3][1]
    assert "no more metrics to " in caplog.text
    assert "ConnectionError: the server is away" in caplog.text
    assert len(metrics(tmp_path / "run")) == 4


def test_a_logger_that_cannot_be_opened_is_a_warning(tmp_path, caplog):
    logger = open_logger(f"{__name__}:away", LoggedRun(tmp_path, "small", {}))
    logger.write(1, {})
    logger.close()
    (record,) = caplog.records
    assert "ConnectionError: the server is away" in record.getMessage()


def away(run):
    raise ConnectionError("the server is away")


def test_tensorboard_twice_is_once(tmp_path):
    config = load_config(CONFIG, ["log.also=[tensorboard]"])
    with open_log(config, tmp_path, -1):
        pass
    assert len([*(tmp_path / "tensorboard").iterdir()]) == 1


def test_names_are_grouped():
    assert [*map(grouped, ("loss", "eval_loss", "mfu", "a/b"))] == ["train/loss", "held_out/loss", "system/mfu", "a/b"]


def test_a_name_that_no_logger_has():
    with pytest.raises(UserError, match="did you mean wandb"):
        load_config(CONFIG, ["log.also=[wandbb]"])


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_the_real_packages_write_without_a_network(tmp_path, monkeypatch, name):
    pytest.importorskip(name)
    monkeypatch.setenv("WANDB_MODE", "offline")
    run = LoggedRun(tmp_path / "run", "small", {"run": {"steps": 3}, "log": {"also": [name]}})
    run.directory.mkdir()
    for step in (1, 2):  # the second continues the first
        logger = open_logger(name, run)
        logger.write(step, {"train/loss": 1.0 / step})
        logger.text("sample", "To be", step)
        logger.flush()
        logger.close()
    if name == "wandb":
        assert len(list((run.directory / "wandb").glob("offline-run-*"))) == 2
        return
    client = pytest.importorskip("mlflow").MlflowClient(f"sqlite:///{tmp_path / 'mlflow.db'}")
    history = client.get_metric_history((run.directory / "mlflow.id").read_text(), "train/loss")
    assert [(each.step, each.value) for each in history] == [(1, 1.0), (2, 0.5)]


def test_a_package_that_is_not_installed_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "wandb", None)
    with pytest.raises(UserError, match=r"pip install 'shardtrain\[wandb\]'"):
        open_logger("wandb", LoggedRun(tmp_path, "small", {}))
    monkeypatch.setattr(Job, "init_state", None)  # it is told before a state is made
    with pytest.raises(UserError, match=r"pip install 'shardtrain\[wandb\]'"):
        fit(tmp_path / "run", "log.also=[wandb]")
