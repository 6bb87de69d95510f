import jax
import jax.numpy as jnp
import numpy as np
import pytest

from shardtrain.checkpoint.compare import ArrayInfo, differences, summary


def info(shape, dtype=jnp.float32):
    return ArrayInfo(shape, np.dtype(dtype))


def test_each_kind_of_difference_is_one_line():
    saved = {"a": info((4, 8)), "b": info((3,)), "gone": info(()), "same": info((2,))}
    wanted = {"a": info((4, 16)), "b": info((3,), jnp.bfloat16), "new": info((5,)), "same": info((2,))}
    assert differences(saved, wanted) == [
        "missing: new float32 (5,)",
        "unexpected: gone float32 ()",
        "shape: a (4, 8) != (4, 16)",
        "dtype: b float32 != bfloat16 (checkpoint.cast=true converts it)",
    ]


@pytest.mark.parametrize(
    ("saved", "wanted", "accepted"),
    [
        (jnp.float32, jnp.bfloat16, True),
        (jnp.bfloat16, jnp.float32, True),
        (jnp.int32, np.int64, True),
        (np.int64, jnp.int32, False),  # may wrap
        (jnp.float32, jnp.int32, False),
        (jnp.int32, jnp.float32, False),
        (jnp.uint32, jnp.int32, False),
        (jnp.bool_, jnp.int32, False),
    ],
)
def test_a_cast_keeps_the_meaning_and_needs_to_be_asked_for(saved, wanted, accepted):
    pair = {"x": info((2,), saved)}, {"x": info((2,), wanted)}
    assert differences(*pair)
    assert (not differences(*pair, cast=True)) == accepted


def test_a_random_key_is_compared_by_its_words():
    keys = jax.random.split(jax.random.key(0), 3)
    assert ArrayInfo.of(keys) == info((3, 2), jnp.uint32)


def test_bytes_of_an_array():
    assert info((3, 5), jnp.bfloat16).bytes == 30
    assert info(()).bytes == 4


def test_a_long_summary_ends_in_a_count():
    lines = [f"line {i}" for i in range(14)]
    assert summary(lines).splitlines()[9:] == ["  line 9", "  ... and 4 more"]
    assert summary(lines[:10]).count("\n") == 9
