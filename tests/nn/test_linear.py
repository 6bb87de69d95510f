"""Matmuls with sharded weights: values, gradients, the dtypes of both, and what crosses the mesh."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import tiny
from helpers import equations, filled
from shardtrain import nn
from shardtrain.hlo import collectives
from shardtrain.models.llama import Llama
from shardtrain.models.mlp import MLP
from shardtrain.nn.linear import fan_in_normal
from shardtrain.nn.matmul import einsum
from shardtrain.sharding import use

SIZES = dict(zip("BSDFVHGK", (2, 3, 4, 6, 10, 4, 2, 5), strict=True))
EQUATIONS = {
    "BSD,DF->BSF": ("embed", "mlp"),
    "BSF,FD->BSD": ("mlp", "embed"),
    "BSD,DHK->BSHK": ("embed", "heads", "head_dim"),
    "BSD,DGK->BSGK": ("embed", "kv_heads", "head_dim"),
    "BSHK,HKD->BSD": ("heads", "head_dim", "embed"),
    "BSD,DV->BSV": ("embed", "vocab"),
    "BSD,VD->BSV": ("vocab", "embed"),
}
F32 = nn.Precision()
F64 = nn.Precision(jnp.float64, jnp.float64, jnp.float64)
MIXED = nn.Precision(jnp.float32, jnp.bfloat16, jnp.float32)


def terms(equation: str, dtype=np.float64) -> tuple[jax.Array, jax.Array]:
    rng = np.random.default_rng(0)
    x, w = equation.partition("->")[0].split(",")
    return tuple(jnp.asarray(rng.normal(size=[SIZES[c] for c in labels]), dtype) for labels in (x, w))


@pytest.mark.parametrize("equation", EQUATIONS)
def test_values_and_gradients_are_those_of_einsum(x64, equation):
    x, w = terms(equation)
    y, back = jax.vjp(lambda x, w: einsum(equation, x, w, EQUATIONS[equation], F64), x, w)
    expected, expected_back = jax.vjp(lambda x, w: jnp.einsum(equation, x, w), x, w)
    np.testing.assert_allclose(y, expected, rtol=1e-13)
    for got, want in zip(back(jnp.cos(y)), expected_back(jnp.cos(y)), strict=True):
        assert got.dtype == jnp.float64
        np.testing.assert_allclose(got, want, rtol=1e-12, atol=1e-13)


def test_the_equations_above_are_all_that_the_models_use():
    sizes = {"n_layers": 1, "d_model": 8, "d_ff": 8, "vocab_size": 8}
    make = (lambda: Llama(n_heads=2, **sizes, rngs=nnx.Rngs(0)), lambda: MLP(**sizes, rngs=nnx.Rngs(0)))
    models = map(nnx.eval_shape, make)
    used = {module.equation for model in models for _, module in nnx.iter_modules(model) if hasattr(module, "equation")}
    assert used | {"BSD,VD->BSV"} == set(EQUATIONS)  # the last is Embedding.attend's


@pytest.mark.parametrize("equation", EQUATIONS)
def test_with_bfloat16_compute_the_weight_gradient_is_made_in_reduce(equation):
    x, w = terms(equation, jnp.float32)
    narrow = x.astype(jnp.bfloat16)
    layer = lambda x, w: einsum(equation, x, w, EQUATIONS[equation], MIXED)  # noqa: E731
    dots = [
        e for e in equations(lambda x, w: jax.vjp(layer, x, w)[1](layer(x, w)), narrow, w) if "dot" in str(e.primitive)
    ]
    assert all(v.aval.dtype == jnp.bfloat16 for e in dots for v in e.invars)
    made = {tuple(sorted(e.outvars[0].aval.shape)): e.outvars[0].aval.dtype for e in dots}
    assert made[tuple(sorted(w.shape))] == jnp.float32
    assert made[tuple(sorted(x.shape))] == jnp.bfloat16


def test_a_weight_gradient_counts_further_than_bfloat16_does():
    x, w = jnp.ones((1, 4099, 1), jnp.bfloat16), jnp.ones((1, 1))
    grad = jax.grad(lambda w: einsum("BSD,DF->BSF", x, w, ("embed", "mlp"), MIXED).astype(jnp.float32).sum())
    assert grad(w).item() == 4099


def test_float64_gradients_are_not_narrowed_by_the_default_policy(x64):
    x, w = terms("BSD,DF->BSF")
    half = nn.Precision(jnp.float64, jnp.float64)  # reduce stays at its default, float32
    grad = jax.grad(lambda w, p: jnp.sin(einsum("BSD,DF->BSF", x, w, ("embed", "mlp"), p)).sum())
    assert np.array_equal(grad(w, half), grad(w, F64))


def test_the_backward_pass_keeps_no_gathered_copy_of_the_weight():
    x, w = jnp.ones((2, 3, 4), jnp.bfloat16), jnp.ones((4, 6))
    _, back = jax.vjp(lambda x, w: einsum("BSD,DF->BSF", x, w, ("embed", "mlp"), MIXED), x, w)
    kept = [(a.shape, a.dtype) for a in jax.tree.leaves(back)]
    assert sorted(kept, key=str) == [((2, 3, 4), jnp.bfloat16), ((4, 6), jnp.float32)]


def dense(bias: bool = False, precision: nn.Precision = F32) -> nn.Linear:
    axes = ("embed", "heads", "head_dim")
    options = {"bias": bias, "precision": precision}
    return filled(lambda: nn.Linear("BSD,DHK->BSHK", (4, 4, 5), axes, **options, rngs=nnx.Rngs(0)))


def test_the_bias_has_the_output_dims():
    axes = ("heads", "head_dim", "embed")
    layer = filled(lambda: nn.Linear("BSHK,HKD->BSD", (2, 3, 4), axes, bias=True, rngs=nnx.Rngs(0)))
    # The bias is added where the activation is whole along embed.
    assert (layer.bias.shape, layer.bias.axes, layer.bias.role) == ((4,), (None,), "bias")
    assert (dense(True).bias.shape, dense(True).bias.axes) == ((4, 5), ("heads", "head_dim"))


def test_linear_with_bias():
    layer, x = dense(True), terms("BSD,DHK->BSHK", jnp.float32)[0]
    expected = np.einsum("BSD,DHK->BSHK", x, layer.weight[...]) + layer.bias[...]
    np.testing.assert_allclose(layer(x), expected, rtol=1e-5, atol=1e-6)


def test_a_bias_gradient_counts_further_than_bfloat16_does():
    graph, state = nnx.split(dense(True, MIXED))
    x = jnp.ones((1, 4099, 4))
    assert nnx.merge(graph, state)(x).dtype == jnp.bfloat16
    grads = jax.grad(lambda s: nnx.merge(graph, s)(x).astype(jnp.float32).sum())(state)
    assert np.array_equal(grads.bias[...], np.full((4, 5), 4099.0))


@pytest.mark.parametrize(("shape", "inputs"), [((256, 16, 8), 1), ((16, 16, 64), 2)])
def test_initial_weights_have_variance_one_over_fan_in(shape, inputs):
    w = fan_in_normal(inputs)(jax.random.key(0), shape, jnp.float32)
    assert w.size * 0.98 < (w**2).sum() * np.prod(shape[:inputs]) < w.size * 1.02
    assert abs(w).max() < 2.5 * np.prod(shape[:inputs]) ** -0.5  # truncated


def step(partitioner, equation, axes, x, w, dx_axes, dy_axes):
    """The compiled forward and backward pass of one layer, and its collectives."""

    def run(x, w):
        with use(partitioner):
            y, back = jax.vjp(lambda x, w: einsum(equation, x, w, axes, F32), x, w)
            dx, dw = back(partitioner.constrain(jnp.cos(y), *dy_axes))
            return partitioner.constrain(dx, *dx_axes), dw

    place = lambda a, axes: jax.ShapeDtypeStruct(a, jnp.float32, sharding=partitioner.sharding(axes, a))  # noqa: E731
    compiled = jax.jit(run).lower(place(x, dx_axes), place(w, axes)).compile()
    return compiled, collectives(compiled.as_text(), partitioner.mesh)


def test_fsdp_moves_weights_and_never_activations():
    _, found = step(
        tiny.partitioner(fsdp=8),
        "BSD,DF->BSF",
        ("embed", "mlp"),
        (16, 32, 64),
        (64, 24),
        ("batch", None, None),
        ("batch", None, None),
    )
    assert {c.kind for c in found} <= {"all-gather", "all-reduce", "reduce-scatter"}
    assert "all-gather" in {c.kind for c in found}
    assert all(set(shape) <= {64, 24, 8} for c in found for shape in c.shapes)  # [D, F], or [D / 8, F]: no B, no S


def test_gradients_come_back_as_the_weight_is_kept():
    partitioner = tiny.partitioner(data=2, fsdp=2, tensor=2)
    compiled, _ = step(
        partitioner,
        "BSD,DF->BSF",
        ("embed", "mlp"),
        (8, 4, 16),
        (16, 12),
        ("batch", None, None),
        ("batch", None, "mlp"),
    )
    assert compiled.output_shardings[1].is_equivalent_to(partitioner.sharding(("embed", "mlp")), 2)
    rng = np.random.default_rng(0)
    x, w = rng.normal(size=(8, 4, 16)).astype("f4"), rng.normal(size=(16, 12)).astype("f4")
    placed = jax.device_put(
        (x, w), (partitioner.sharding(("batch", None, None)), partitioner.sharding(("embed", "mlp")))
    )
    dx, dw = compiled(*placed)
    dy = np.cos(x @ w)
    np.testing.assert_allclose(dx, dy @ w.T, atol=1e-4)
    np.testing.assert_allclose(dw, np.einsum("BSD,BSF->DF", x, dy), atol=1e-4)
