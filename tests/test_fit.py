"""`fit`: a run from a model and rows of any kind, which resumes, evaluates and calls back as any other."""

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from commands import assert_same_bits, compiled_once, losses, metrics, saved, train  # noqa: F401
from shardtrain import Callback, UserError, fit
from shardtrain.data import as_source
from shardtrain.models.mlp import MLP

RNG = np.random.default_rng(0)
X = RNG.normal(size=(64, 4))
TABLE = {"x": X, "y": X @ np.array([1.0, -2.0, 3.0, 0.5])}
ROWS = [{"x": x, "y": float(y)} for x, y in zip(TABLE["x"], TABLE["y"], strict=True)]
PLAIN = {"steps": 6, "global_batch": 8, "lr": 0.3, "show": False, "checkpoint": {"every": 4}}


class Line(nnx.Module):
    replicate_unannotated = True

    def __init__(self, rngs: nnx.Rngs):
        self.layer = nnx.Linear(4, 1, rngs=rngs)


def square(module, batch, ctx):
    error = module.layer(batch["x"])[:, 0] - batch["y"]
    return jnp.square(error).sum(), jnp.float32(error.size), {}


class WithLength:
    def __len__(self):
        return len(ROWS)

    def __iter__(self):
        return iter(ROWS)


def test_a_plain_module_trains_resumes_evaluates_and_calls_back(tmp_path):
    seen = []

    class Seen(Callback):
        def on_step(self, step, metrics):
            seen.append(step)
            return {}

    whole = fit(lambda rngs: Line(rngs), TABLE, square, directory=tmp_path / "whole", held_out=0.2, **PLAIN)
    found = losses(tmp_path / "whole")
    assert found[-1] < found[0]
    assert [row["step"] for row in metrics(tmp_path / "whole") if "eval_loss" in row] == [6]
    assert saved(tmp_path / "whole") == [4, 6]
    assert (tmp_path / "whole/loss.png").exists()
    plan = {"optimizer": {"schedule": {"decay_steps": 6}}, "held_out": 0.2}
    fit(lambda rngs: Line(rngs), ROWS, square, directory=tmp_path / "run", **{**PLAIN, "steps": 4}, **plan)
    again = fit(
        lambda rngs: Line(rngs), WithLength(), square, directory=tmp_path / "run", callbacks=[Seen()], **PLAIN, **plan
    )
    assert again.resumed_from == 4
    assert seen == [5, 6]
    assert_same_bits(again.state, whole.state)


def test_a_model_of_tokens_trains_on_any_mesh_and_shows_its_progress(tmp_path, capfd):
    rows = [{"tokens": (i + np.arange(17)) % 64} for i in range(64)]

    def model(rngs: nnx.Rngs) -> MLP:
        return MLP(n_layers=2, d_model=16, d_ff=32, vocab_size=64, rngs=rngs)

    options = {**PLAIN, "steps": 2, "show": True}
    fit(model, rows, directory=tmp_path / "data", **options)
    assert "step 2/2" in capfd.readouterr().out
    mesh = {"mesh": {"pipe": 2, "fsdp": 4}, "pipeline": {"microbatches": 2}}
    fit(model, rows, directory=tmp_path / "pipe", **options, **mesh)
    np.testing.assert_allclose(losses(tmp_path / "pipe"), losses(tmp_path / "data"), rtol=1e-5)
    refused = train(tmp_path / "data", "data.seq_len=16")
    assert refused.code == 2


def test_the_config_of_such_a_run_alone_starts_none(tmp_path):
    from commands import shardtrain

    fit(lambda rngs: Line(rngs), TABLE, square, directory=tmp_path / "run", **{**PLAIN, "steps": 1})
    refused = shardtrain("train", tmp_path / "run/config.yaml", f"run.dir={tmp_path / 'other'}", "run.steps=2")
    assert refused.code == 2
    assert "passed by the program that started this run; run that program again" in refused.err


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "has no rows"),
        ((row for row in ROWS), "is a generator, but must be a list of dicts, a dict of arrays"),
        ({"x": X, "y": X[:3]}, "its arrays differ in length: {'x': 64, 'y': 3}"),
        ([1, 2], "row 0 is 1, but must be a dict"),
        ([{"x": 2**40}], "1099511627776 is too large for int32"),
    ],
)
def test_what_are_no_rows_is_refused(rows, message):
    with pytest.raises(UserError) as error:
        _ = as_source(rows, 1)[0]
    assert message in str(error.value)


def test_rows_of_any_kind_are_the_same_source():
    sources = [as_source(rows, 1) for rows in (TABLE, ROWS, WithLength())]
    assert len({source.fingerprint for source in sources}) == 1
    for source in sources:
        assert {name: leaf.dtype for name, leaf in source[3].items()} == dict.fromkeys("xy", np.dtype(np.float32))
    assert as_source(sources[0], 1) is sources[0]
    changed = {"x": X, "y": TABLE["y"] + 1}
    assert as_source(changed, 1).fingerprint != sources[0].fingerprint
    assert {*as_source([{"tokens": np.arange(5)}], 8)[0]} == {"tokens", "targets", "loss_mask", "positions"}


def test_sections_are_checked_as_in_a_file(tmp_path):
    with pytest.raises(UserError, match=r"(?s)checkpoint.evry.*did you mean .*every"):
        fit(lambda rngs: Line(rngs), TABLE, square, directory=tmp_path, **{**PLAIN, "checkpoint": {"evry": 4}})


@pytest.mark.parametrize(
    ("directory", "name"),
    [("lr=1e-3", "lr_1e-3"), ("my run", "my_run"), ("é", "_"), (".hidden", "hidden"), (".", "here")],
)
def test_any_directory_will_do(tmp_path, monkeypatch, directory, name):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    trainer = fit(lambda rngs: Line(rngs), TABLE, square, directory=directory, **PLAIN)
    assert (trainer.job.config.run.name, trainer.directory) == (name, (tmp_path / "here" / directory).absolute())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"global_batch": 0, "held_out": 0.2}, r"data.global_batch = 0\n"),
        ({"steps": "6"}, "steps = 6: must be a whole number, not '6'"),
        ({"optimizer": 3}, "optimizer"),
        ({"held_out": -0.1}, r"data.held_out = -0.1\n"),
        ({"held_out": float("nan")}, "data.held_out = nan"),
        ({"global_batch": 40, "held_out": 0.2}, "held_out = 0.2: whole batches of 40, .* are over half of 64 rows"),
    ],
    ids=str,
)
def test_a_wrong_argument_is_named(tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        fit(lambda rngs: Line(rngs), TABLE, square, directory=tmp_path, **{**PLAIN, **options})
