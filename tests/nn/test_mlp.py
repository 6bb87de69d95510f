"""The gated feed-forward layer."""

import jax
import numpy as np
from flax import nnx

from helpers import filled, quick
from shardtrain import nn


def test_gated_mlp_is_swiglu():
    layer = filled(lambda: nn.GatedMLP(4, 6, rngs=nnx.Rngs(0)))
    x = np.random.default_rng(0).normal(size=(2, 3, 4)).astype("f4")
    gate, up, down = (np.asarray(part.weight[...], np.float64) for part in (layer.gate, layer.up, layer.down))
    a = x @ gate
    expected = (a / (1 + np.exp(-a)) * (x @ up)) @ down
    np.testing.assert_allclose(quick(layer)(x, nn.Context(inputs={})), expected, rtol=1e-5, atol=1e-6)


def test_gated_mlp_drops_its_output_in_training():
    layer = filled(lambda: nn.GatedMLP(4, 6, dropout=0.5, rngs=nnx.Rngs(0)))
    x = np.ones((2, 3, 4), "f4")
    inputs = {"row": np.arange(2, dtype=np.int32)}
    whole = quick(layer)(x, nn.Context(inputs))
    dropped = quick(layer)(x, nn.Context(inputs, key=jax.random.key(0), train=True))
    assert (dropped == 0).any()
    assert ((dropped == 0) | np.isclose(dropped, 2 * whole)).all()
