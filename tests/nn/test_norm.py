"""RMSNorm and LayerNorm against their formulas in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from helpers import filled
from shardtrain import nn
from shardtrain.errors import UserError

F32 = nn.Precision()
EPS = 1e-3
X = np.random.default_rng(0).normal(2, 3, (4, 5, 16))
SCALE, BIAS = np.random.default_rng(1).normal(size=(2, 16))


def rms(x, scale, bias):
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + EPS) * scale


def layer_norm(x, scale, bias):
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + EPS) * scale + bias


def made(kind, precision=F32):
    layer = filled(lambda: kind(16, eps=EPS, precision=precision, rngs=nnx.Rngs(0)))
    layer.scale[...] = SCALE.astype(layer.scale.dtype)
    if kind is nn.LayerNorm:
        layer.bias[...] = BIAS.astype(layer.bias.dtype)
    return layer


@pytest.fixture(params=[(nn.RMSNorm, rms), (nn.LayerNorm, layer_norm)], ids=["rms", "layer"])
def pair(request):
    return request.param


def test_float32(pair):
    kind, formula = pair
    np.testing.assert_allclose(made(kind)(X.astype("f4")), formula(X, SCALE, BIAS), rtol=1e-5, atol=1e-6)


def test_float64_is_exact(pair, x64):
    kind, formula = pair
    y = made(kind, nn.Precision(jnp.float64, jnp.float64, jnp.float64))(jnp.asarray(X))
    assert y.dtype == jnp.float64
    np.testing.assert_allclose(y, formula(X, SCALE, BIAS), rtol=1e-13, atol=1e-14)


def test_bfloat16_is_rounded_once_at_the_end(pair):
    kind, formula = pair
    x = jnp.asarray(X, jnp.bfloat16)
    y = made(kind, nn.Precision(compute=jnp.bfloat16))(x)
    assert y.dtype == jnp.bfloat16
    exact = formula(np.asarray(x, np.float64), SCALE, BIAS)
    np.testing.assert_allclose(np.asarray(y, np.float64), exact, rtol=2**-8, atol=1e-5)


def test_rms_norm_does_not_see_the_scale_of_its_input():
    layer = nn.RMSNorm(16, eps=0.0, rngs=nnx.Rngs(0))
    np.testing.assert_allclose(layer(1000 * X.astype("f4")), layer(X.astype("f4")), rtol=1e-5)


def test_layer_norm_does_not_see_shifts():
    layer = made(nn.LayerNorm)
    np.testing.assert_allclose(layer(X.astype("f4") + 100), layer(X.astype("f4")), rtol=1e-3, atol=1e-4)


def test_roles_and_start_values():
    fresh = nn.LayerNorm(4, rngs=nnx.Rngs(0))
    assert (fresh.scale.role, fresh.bias.role) == ("norm", "bias")
    assert np.array_equal(fresh.scale[...], np.ones(4))
    assert np.array_equal(fresh.bias[...], np.zeros(4))


def test_scale_gradients_are_made_in_float32(pair):
    kind, _ = pair
    graph, state = nnx.split(kind(2, eps=0.0, precision=nn.Precision(compute=jnp.bfloat16), rngs=nnx.Rngs(0)))
    x = jnp.tile(jnp.asarray([1.0, -1.0], jnp.bfloat16), (1, 4099, 1))  # normalises to itself
    grads = jax.grad(lambda s: (nnx.merge(graph, s)(x) * x).astype(jnp.float32).sum())(state)
    assert np.array_equal(grads.scale[...], [4099.0, 4099.0])


@pytest.mark.parametrize("norm", [nn.RMSNorm, nn.LayerNorm])
def test_the_epsilon_is_not_negative(norm):
    with pytest.raises(UserError, match=r"eps = -1e-05: must be 0 or more"):
        norm(4, eps=-1e-5, rngs=nnx.Rngs(0))
