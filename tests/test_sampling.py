"""Tokens are drawn from the distribution that the options leave."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from shardtrain import Sampling, UserError

#: Probabilities 0.4, 0.1, 0.3, 0.2, of ids 0 to 3.
P = np.array([0.4, 0.1, 0.3, 0.2])
ROWS = 4000


def drawn(logits=P, **options):
    """How often each id is drawn."""
    logits_BV = jnp.broadcast_to(jnp.log(jnp.asarray(logits)), (ROWS, len(logits)))
    tokens = Sampling(**{"temperature": 1.0, **options}).draw(logits_BV, jax.random.key(0), jnp.arange(ROWS), 3)
    return np.bincount(tokens, minlength=len(logits)) / ROWS


@pytest.mark.parametrize(
    ("options", "want"),
    [
        ({}, P),
        ({"temperature": 0}, [1, 0, 0, 0]),
        ({"temperature": 0.5}, P**2 / (P**2).sum()),
        ({"top_k": 1}, [1, 0, 0, 0]),
        ({"top_k": 2}, [4 / 7, 0, 3 / 7, 0]),
        ({"top_k": 9}, P),
        ({"top_p": 0.39}, [1, 0, 0, 0]),
        ({"top_p": 0.41}, [4 / 7, 0, 3 / 7, 0]),
        ({"top_p": 1.0}, P),
        ({"min_p": 0.74}, [4 / 7, 0, 3 / 7, 0]),
        ({"min_p": 0.3}, [4 / 9, 0, 3 / 9, 2 / 9]),
        ({"top_k": 3, "top_p": 0.7}, [4 / 7, 0, 3 / 7, 0]),  # of the three, 0.4 / 0.9 + 0.3 / 0.9 are enough
    ],
    ids=str,
)
def test_a_token_is_drawn_as_often_as_its_probability(options, want):
    np.testing.assert_allclose(drawn(**options), want, atol=0.03)
    assert not (drawn(**options)[np.asarray(want) == 0]).any()


def test_of_equal_tokens_top_k_leaves_as_many_as_it_says():
    assert (drawn(np.ones(6) / 6, top_k=2) > 0).sum() == 2


def test_a_draw_depends_on_seed_text_and_place_alone():
    logits, draw = jnp.log(jnp.broadcast_to(jnp.asarray(P), (64, 4))), Sampling(1.0).draw
    key, rows = jax.random.key(1), jnp.arange(64)
    together = draw(logits, key, rows, 5)
    np.testing.assert_array_equal(draw(logits[:7], key, rows[20:27], 5), together[20:27])
    others = draw(logits, jax.random.key(2), rows, 5), draw(logits, key, rows + 64, 5), draw(logits, key, rows, 6)
    assert all((other != together).any() for other in others)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": -0.1}, "temperature = -0.1: must be between 0 and 100; use 0 for the likeliest"),
        ({"temperature": float("nan")}, "temperature = nan: must be"),
        ({"top_k": 0}, "top_k = 0: leaves no token to draw; use 1 or more"),
        ({"top_p": 0.0}, "top_p = 0.0: must be above 0 and at most 1; use 0.95"),
        ({"min_p": 1.5}, "min_p = 1.5: must be above 0 and at most 1; use 0.05"),
    ],
)
def test_options_out_of_range_are_refused(options, message):
    with pytest.raises(UserError) as error:
        Sampling(**options)
    assert message in str(error.value)
