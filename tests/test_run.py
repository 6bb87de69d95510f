"""What a run writes down: a researcher's own numbers, fewer lines on demand, and losses that are not numbers."""

import jax
import pytest

from commands import CONFIG, PREPARED, compiled_once, fit, metrics, saved, shardtrain, train  # noqa: F401
from shardtrain import Callback, UserError, build, load_config
from shardtrain.checkpoint import manifest


def test_a_callback_s_metrics_join_the_line(tmp_path):
    class Mine(Callback):
        def on_step(self, step, metrics):
            return {"perplexity_times_step": step * metrics["loss"]}

        def on_eval(self, step, state):
            return {"largest": float(max(abs(leaf).max() for leaf in [state.params["embedding"]["weight"]]))}

    run = fit(tmp_path / "run", "run.steps=4", "eval.every=2", callbacks=[Mine()])
    rows = metrics(run.directory)
    assert [row["perplexity_times_step"] for row in rows] == [row["step"] * row["loss"] for row in rows]
    assert (
        [row["step"] for row in rows if "largest" in row]
        == [row["step"] for row in rows if "eval_loss" in row]
        == [2, 4]
    )


def test_a_run_may_log_less_than_it_trains(tmp_path):
    quiet = ("log.every=5", "data.held_out=0", "log.tensorboard=false")
    stopped = fit(tmp_path / "run", *quiet, stop_after=3)
    assert metrics(stopped.directory) == []
    done = train(tmp_path / "run", *quiet)
    assert done.code == 0
    assert PREPARED.fullmatch(done.err)
    assert [row["step"] for row in metrics(tmp_path / "run")] == [5, 10, 12]
    assert (tmp_path / "run/loss.png").exists()
    assert not (tmp_path / "run/tensorboard").exists()


@pytest.mark.parametrize(("name", "last"), [("constant", 1e-2), ("linear", 1e-3), ("cosine", 1e-3), ("wsd", 1e-3)])
def test_every_schedule_of_a_config_reaches_the_optimizer(name, last):
    config = load_config(CONFIG, [f"optimizer.schedule={{type: {name}, warmup_steps: 4}}"])
    lr = build(config).lr
    assert [float(lr(step)) for step in (0, 4, 12)] == pytest.approx([2e-3, 1e-2, last])


SINKING = '''
import jax
import jax.numpy as jnp
from flax import nnx
from shardtrain import nn


class Block(nnx.Module):
    def __init__(self, rngs):
        self.norm = nn.RMSNorm(32, rngs=rngs)

    def __call__(self, x, ctx):
        return self.norm(x), {}


class Sinking(nnx.Module):
    """SGD moves `level` down by lr in each step; below -4.5 the loss is not a number."""

    replicate_unannotated = True

    def __init__(self, *, vocab_size: int, rngs: nnx.Rngs, precision: nn.Precision = nn.Precision()):
        self.level = nnx.Param(jnp.zeros(()))
        self.embedding = nn.Embedding(vocab_size, 32, rngs=rngs)
        self.blocks = nn.Stack(lambda rngs: Block(rngs), 1, rngs=rngs)

    def embedder(self, batch, ctx):
        return self.embedding(batch["tokens"])

    def head(self, x, batch, ctx):
        loss, weight, metrics = nn.cross_entropy(self.embedding.attend(x), batch["targets"], batch["loss_mask"])
        level = self.level[...]
        return jnp.where(level < -4.5, jnp.nan, loss * 0.0 + level * weight), weight, metrics
'''


def test_losses_that_are_not_finite_end_the_run(tmp_path, monkeypatch):
    (tmp_path / "sinking_model.py").write_text(SINKING)
    monkeypatch.syspath_prepend(str(tmp_path))
    overrides = (
        "run.steps=20",
        "run.max_skipped_steps=3",
        "model={type: 'sinking_model:Sinking', vocab_size: 64}",
        "optimizer={type: sgd, lr: 1.0, weight_decay: 0, clip_norm: null, schedule: {type: constant}}",
    )
    result = train(tmp_path / "run", *overrides)
    assert result.code == 2
    assert "Traceback" not in result.err
    rows = metrics(tmp_path / "run")
    assert [row["loss"] for row in rows] == [0, -1, -2, -3, -4, "NaN", "NaN", "NaN"]
    assert [row["skipped_in_row"] for row in rows] == [0] * 5 + [1, 2, 3]
    for part in (
        "error: ",
        "3 steps in a row",
        "step 8",
        "run.max_skipped_steps=3",
        "checkpoint of step 4",
        "lower optimizer.lr",
    ):
        assert part in result.err
    assert saved(tmp_path / "run") == [4]
    assert shardtrain("checkpoint", "verify", tmp_path / "run").code == 0


def test_a_failed_save_does_not_hide_what_ended_the_run(tmp_path, monkeypatch, caplog):
    def full(directory, step):
        raise OSError(28, "No space left on device")

    class Mine(Callback):
        def on_step(self, step, metrics):
            if step == 3:  # while the save of step 2 is under way
                raise ValueError("a mistake of mine")
            return {}

    options = ("run.steps=6", "checkpoint.every=2")
    with monkeypatch.context() as patch:
        patch.setattr(manifest, "write", full)
        with pytest.raises(ValueError, match="a mistake of mine"):
            fit(tmp_path / "run", *options, callbacks=[Mine()])
    assert [record.getMessage()[:13] for record in caplog.records if record.levelname == "ERROR"] == ["saving step 2"]
    fit(tmp_path / "run", *options)  # the directory is free
    assert saved(tmp_path / "run") == [2, 4, 6]


def test_weights_of_another_dtype_need_a_word(tmp_path):
    old = fit(tmp_path / "old", "run.steps=1")
    overrides = ["run.steps=1", f"init_from={old.directory}", "precision.params=bfloat16"]
    with pytest.raises(UserError, match=r"float32 != bfloat16 \(checkpoint.cast=true converts it\)"):
        fit(tmp_path / "new", *overrides)
    new = fit(tmp_path / "new", *overrides, "checkpoint.cast=true")
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(new.state.params)} == {"bfloat16"}
