"""The smallest model."""

import jax
import numpy as np
from flax import nnx

import tiny
from helpers import filled, quick
from shardtrain import nn
from shardtrain.models.mlp import MLP
from shardtrain.train.model_def import ModelDef
from shardtrain.weights.paths import flatten

SIZES = {"n_layers": 3, "d_model": 4, "d_ff": 6, "vocab_size": 10}
BATCH = tiny.batch(rows=2, length=5, vocab=10, packed=True)


def test_parameters():
    weights = flatten(ModelDef(lambda rngs: MLP(**SIZES, rngs=rngs)).weights)
    assert sum(w.size for w in weights.values()) == 10 * 4 + 3 * (3 * 4 * 6 + 2 * 4) + 2 * 4
    assert {path: w.role for path, w in weights.items()} == {
        "blocks.layer.mlp.down.weight": "matrix",
        "blocks.layer.mlp.gate.weight": "matrix",
        "blocks.layer.mlp.up.weight": "matrix",
        "blocks.layer.norm.bias": "bias",
        "blocks.layer.norm.scale": "norm",
        "embedding.weight": "embedding",
        "norm.bias": "bias",
        "norm.scale": "norm",
    }


def test_it_follows_the_contract_and_sees_the_current_token_only():
    module = filled(lambda: MLP(**SIZES, rngs=nnx.Rngs(0)))
    assert isinstance(module, nn.Model)
    ctx = nn.Context(BATCH)
    run = quick(lambda tokens: module.logits(module.blocks(module.embedder({"tokens": tokens}, ctx), ctx)[0]))
    logits = run(BATCH["tokens"])
    changed = run((BATCH["tokens"] + (np.arange(5) == 2)) % 10)
    assert (np.abs(changed - logits).max((0, 2)) > 0).tolist() == [False, False, True, False, False]

    (loss, weight, _), aux = quick(lambda: nn.forward(module, BATCH, ctx))()
    np.testing.assert_allclose(loss, nn.cross_entropy(logits, BATCH["targets"], BATCH["loss_mask"])[0], rtol=1e-5)
    assert weight == BATCH["loss_mask"].sum()
    assert aux == {}


def test_dropout_acts_in_training_only():
    module = filled(lambda: MLP(**SIZES, dropout=0.5, rngs=nnx.Rngs(0)))

    def loss(train):
        return nn.forward(module, BATCH, nn.Context(BATCH, key=jax.random.key(0), train=train))[0][0]

    assert abs(quick(lambda: loss(True))() / quick(lambda: loss(False))() - 1) > 1e-3
