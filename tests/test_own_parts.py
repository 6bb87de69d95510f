"""Parts of the user's own in a run: a source object, and a loss function for a plain Flax module."""

import numpy as np
import pytest

from commands import CONFIG, compiled_once, fit, losses, metrics  # noqa: F401
from shardtrain import UserError, load_config, nn
from shardtrain.data import ByteTokenizer, window
from shardtrain.run.data import OpenedData, _facts

PLAIN = """
from flax import nnx

class Bigram(nnx.Module):
    def __init__(self, *, vocab_size: int, rngs: nnx.Rngs):
        init = nnx.with_partitioning(nnx.initializers.zeros, ("vocab", "embed"))
        self.logits_of = nnx.Embed(vocab_size, vocab_size, embedding_init=init, rngs=rngs)
"""


class Counting:
    """Rows of consecutive numbers."""

    fingerprint, vocab_size, packed = "counting", 64, False

    def __len__(self):
        return 400

    def __getitem__(self, row):
        return window((row + np.arange(17)) % 64)


def loss(module, batch, ctx):
    return nn.cross_entropy(module.logits_of(batch["tokens"]), batch["targets"], batch["loss_mask"])


@pytest.fixture
def plain(tmp_path, monkeypatch):
    (tmp_path / "plain_model.py").write_text(PLAIN)
    monkeypatch.syspath_prepend(str(tmp_path))
    return "model={type: 'plain_model:Bigram', vocab_size: 64}"


def test_a_source_replaces_the_type_of_a_config(tmp_path):
    run = fit(tmp_path / "run", "run.steps=3", source=Counting())
    assert run.loop.batches.state["fingerprint"] == "counting rows=0:392"
    assert len(losses(tmp_path / "run")) == 3
    assert fit(tmp_path / "run", "run.steps=4", source=Counting()).resumed_from == 3
    with pytest.raises(UserError, match="the data differs from what this run was trained on"):
        fit(tmp_path / "run", "run.steps=5")


def test_the_tokenizer_of_a_source_makes_a_sample(tmp_path):
    source = Counting()
    source.tokenizer = ByteTokenizer()
    run = fit(tmp_path / "run", "run.steps=1", source=source)
    assert run.tokenizer is source.tokenizer
    assert "--- continuation" in (tmp_path / "run/sample.txt").read_text()


@pytest.mark.parametrize(
    ("source", "message"),
    [([1, 2], "source is a list; give an object with __len__"), (object(), "object has no __len__, no __getitem__")],
)
def test_what_is_no_source_is_refused(tmp_path, source, message):
    with pytest.raises(UserError, match=message):
        fit(tmp_path / "run", source=source)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.vocab_size=32", "model.vocab_size = 32: the source has a vocabulary of 64, and each id needs a row"),
        ("data.seq_len=8", "data.seq_len = 8: the source has rows of 16 tokens; set data.seq_len=16"),
    ],
)
def test_a_source_fits_the_model_and_the_length_of_a_row(tmp_path, override, message):
    with pytest.raises(UserError, match=message):
        fit(tmp_path / "run", override, source=Counting())


def test_a_tokenizer_that_is_none_is_refused(tmp_path):
    source = Counting()
    source.tokenizer = 3
    with pytest.raises(UserError, match="the source's tokenizer is 3, which has no encode, no decode, no separator"):
        fit(tmp_path / "run", source=source)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"callbacks": 3}, "callbacks = 3: must be a list, not 3"),
        ({"callbacks": [3]}, "a callback is 3, but must be a Callback; make a subclass"),
        ({"loss": 3}, "loss = 3: must be a function or None, not 3"),
        ({"loss": lambda module, batch: 0}, r"loss cannot be called with \(module, batch, ctx\): too many positional"),
    ],
)
def test_what_a_run_is_given(tmp_path, given, message):
    with pytest.raises(UserError, match=message):
        fit(tmp_path / "run", source=Counting(), **given)


def test_processes_compare_the_name_of_the_loss(tmp_path):
    config = load_config(CONFIG)
    facts = _facts(config, OpenedData(Counting(), None, None), loss)
    assert facts["loss"] == f"{__name__}:loss"
    assert _facts(config, OpenedData(Counting(), None, None), None)["loss"] is None


def test_a_loss_function_trains_a_plain_module(tmp_path, plain):
    run = fit(tmp_path / "run", plain, "optimizer.lr=1.0", "eval.every=6", source=Counting(), loss=loss)
    found = losses(run.directory)
    assert found[0] == pytest.approx(np.log(64))
    assert found[-1] < 2
    assert [row["step"] for row in metrics(run.directory) if "eval_loss" in row] == [6, 12]


def test_a_plain_module_needs_a_loss_function(tmp_path, plain):
    with pytest.raises(UserError, match=r"no parameter precision, no method embedder.*pass a loss function"):
        fit(tmp_path / "run", plain, source=Counting())
