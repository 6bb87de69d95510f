"""Attention to a kept past is that of the whole text."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from helpers import quick
from shardtrain.nn import attend
from shardtrain.nn.attention_past import attend_past

#: Rows of one text each, whose new tokens begin at these positions.
STARTS, SLOTS, HEADS, DIM = np.array([0, 3, 7]), 12, 4, 8


@pytest.mark.parametrize("new", [1, 3])
@pytest.mark.parametrize(
    ("groups", "options"),
    [(4, {}), (2, {"window": 4}), (1, {"soft_cap": 2.0}), (2, {"window": 1}), (2, {"window": 5, "soft_cap": 3.0})],
)
@pytest.mark.usefixtures("x64", "strict")
def test_it_equals_attention_of_the_whole_text(new, groups, options):
    length = int(STARTS.max()) + new
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.normal(size=(3, length, heads, DIM))) for heads in (HEADS, groups, groups))
    want = attend(q, k, v, implementation="einsum", **options)
    positions = jnp.asarray(STARTS[:, None] + np.arange(new), jnp.int32)

    def at(a):
        return jnp.take_along_axis(a, positions[:, :, None, None], axis=1)

    # Slots from the first new position on hold something else, which must not be seen.
    junk = (jnp.arange(SLOTS) >= STARTS[:, None])[:, :, None, None]
    past = tuple(jnp.where(junk, 1e3, jnp.pad(a, ((0, 0), (0, SLOTS - length), (0, 0), (0, 0)))) for a in (k, v))
    got = quick(lambda *a: attend_past(*a, **options))(at(q), (at(k), at(v)), past, positions)
    np.testing.assert_allclose(got, at(want), atol=1e-12)


def test_it_keeps_the_dtype_with_a_softmax_in_float32():
    a = jax.random.normal(jax.random.key(0), (2, 1, 2, 4), jnp.bfloat16)
    past = jnp.zeros((2, 8, 2, 4), jnp.bfloat16)
    positions = jnp.full((2, 1), 5, jnp.int32)
    program = jax.make_jaxpr(lambda *a: attend_past(*a))(a, (a, a), (past, past), positions)
    assert program.out_avals[0].dtype == jnp.bfloat16
    assert {str(e.outvars[0].aval.dtype) for e in program.eqns if e.primitive.name == "exp"} == {"float32"}
