"""Float8 matmuls: their rounding, where they apply, and that training keeps its course."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import tiny
from helpers import equations
from shardtrain import ModelDef, UserError, init_state, make_train_step, nn, optimizer
from shardtrain.models.llama import Llama
from shardtrain.nn import float8
from shardtrain.nn.matmul import einsum

F8 = nn.Precision(jnp.float32, jnp.bfloat16, jnp.float32, "float8")
BF16 = nn.Precision(jnp.float32, jnp.bfloat16, jnp.float32)
AXES = ("embed", "mlp")


def normal(*shape: int, seed: int = 0, dtype=jnp.float32) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


@pytest.mark.parametrize(("dtype", "rounding"), [(float8.E4M3, 2**-4), (float8.E5M2, 2**-3)])
@pytest.mark.parametrize("scale", [1.0, 3e-20, 7e20, 0.0])
def test_quantized_values_are_within_half_a_unit_of_mantissa(dtype, rounding, scale):
    a = normal(64) * scale
    a8, unit = float8.quantize(a, dtype)
    big = jnp.abs(a) > jnp.abs(a).max() / 64  # smaller ones lose bits at e4m3's lower end
    np.testing.assert_allclose((a8.astype(jnp.float32) * unit)[big], a[big], rtol=rounding)


def test_what_is_not_finite_stays_so():
    for bad in (np.inf, -np.inf, np.nan):
        a8, unit = float8.quantize(normal(8).at[3].set(bad), float8.E4M3)
        assert not np.isfinite(np.asarray(a8.astype(jnp.float32) * unit)[3])


def test_scaling_an_operand_by_a_power_of_two_scales_the_result_exactly():
    x, w = normal(2, 3, 16), normal(16, 8, seed=1)
    y = einsum("BSD,DF->BSF", x, w, AXES, F8)
    np.testing.assert_array_equal(einsum("BSD,DF->BSF", x * 2.0**20, w * 2.0**-9, AXES, F8), y * 2.0**11)


def test_values_and_gradients_are_near_those_of_float32():
    x, w, dy = normal(4, 16, 64), normal(64, 32, seed=1), normal(4, 16, 32, seed=2)
    y, back = jax.vjp(lambda x, w: einsum("BSD,DF->BSF", x, w, AXES, F8), x, w)
    exact, exact_back = jax.vjp(lambda x, w: jnp.einsum("BSD,DF->BSF", x, w), x, w)
    for got, want in zip((y, *back(dy.astype(y.dtype))), (exact, *exact_back(dy)), strict=True):
        error = jnp.linalg.norm(got.astype(jnp.float32) - want) / jnp.linalg.norm(want)
        assert 0.005 < error < 0.08  # float8's rounding, and not bfloat16's (0.003)


def test_the_blocks_multiply_in_float8_and_the_vocabulary_does_not():
    sizes = {"n_layers": 1, "d_model": 16, "n_heads": 2, "d_ff": 32, "vocab_size": 64}
    make = nnx.graphdef(nnx.eval_shape(lambda: Llama(**sizes, attention="einsum", precision=F8, rngs=nnx.Rngs(0))))
    state = nnx.state(nnx.eval_shape(lambda: Llama(**sizes, precision=F8, rngs=nnx.Rngs(0))))

    def loss(state):
        model, batch = nnx.merge(make, state), tiny.batch(rows=2, length=8, vocab=64, packed=True)
        return nn.forward(model, batch, nn.Context(inputs=batch))[0][0]

    dots = [e for e in equations(jax.grad(loss), state) if e.primitive.name == "dot_general"]
    in_float8 = [{str(v.aval.dtype) for v in e.invars} for e in dots if "float8" in str(e.invars[0].aval.dtype)]
    assert in_float8.count({"float8_e4m3fn"}) == 7 + 6  # forward, and again in the backward pass but for the last
    assert in_float8.count({"float8_e4m3fn", "float8_e5m2"}) == 7 * 2  # both gradients
    assert not any(64 in v.aval.shape for e in dots for v in e.invars if "float8" in str(v.aval.dtype))


@pytest.mark.full
def test_the_loss_curve_stays_with_that_of_bfloat16():
    """A sentence with its letters to learn; 40 of the library's own steps."""
    text = np.frombuffer(b"the quick brown fox jumps over the lazy dog and then sleeps. " * 12, np.uint8)[: 8 * 65]
    rows = text.reshape(8, 65).astype(np.int32)
    host = {"tokens": rows[:, :-1], "targets": rows[:, 1:], "loss_mask": np.ones((8, 64), np.float32)}
    host |= {"positions": np.tile(np.arange(64, dtype=np.int32), (8, 1)), "row": np.arange(8, dtype=np.int32)}
    sizes = {"n_layers": 1, "d_model": 32, "n_heads": 2, "d_ff": 64, "vocab_size": 128, "attention": "einsum"}
    place = tiny.partitioner()
    curves = {}
    for precision in (BF16, F8):
        model = ModelDef(lambda rngs, precision=precision: Llama(**sizes, precision=precision, rngs=rngs))
        tx = optimizer("adamw", model.weights, lr=1e-2)
        state, step = init_state(model, tx, place), make_train_step(model, tx, place)
        batch = tiny.placed(host, place)
        curve = curves[precision.matmul] = []
        for _ in range(40):
            state, metrics = step(state, batch)
            curve.append(float(metrics["loss"]))
    bf16, f8 = np.array(curves["compute"]), np.array(curves["float8"])
    assert f8[0] > 4.5
    assert f8[-1] < 0.2
    assert (bf16 != f8).any()
    assert np.abs(f8 - bf16).mean() < 0.05, (bf16[::10], f8[::10])


def test_another_word_is_refused():
    with pytest.raises(UserError, match=r"precision.matmul = float16: must be compute or float8"):
        nn.Precision(matmul="float16")
