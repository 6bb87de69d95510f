"""The project trains. Run with `pytest`."""

from pathlib import Path

from shardtrain import Trainer, load_config
from shardtrain.metrics import read

CONFIG = Path(__file__).parent / "config.yaml"


def test_the_loss_falls(tmp_path: Path) -> None:
    """In twenty steps from the start, on the config's own mesh."""
    short = ["run.steps=20", "optimizer.schedule.warmup_steps=2", "data.global_batch=16", "sample.tokens=0"]
    config = load_config(CONFIG, [f"run.dir={tmp_path}", *short])
    Trainer.from_config(config).fit()
    losses = [row["loss"] for row in read(tmp_path)]
    assert losses[-1] < 0.8 * losses[0]
