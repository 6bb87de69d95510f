"""Rotary embedding: frequencies against the formulas of transformers' modeling_rope_utils, and what rotation means."""

import math

import jax.numpy as jnp
import numpy as np
import pytest

from shardtrain.errors import UserError
from shardtrain.nn.rope import rope_frequencies, rotate

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
YARN = {"rope_type": "yarn", "factor": 40.0, "original_max_position_embeddings": 4096}


def reference_default(dim: int, base: float) -> list[float]:
    return [1 / base ** (2 * i / dim) for i in range(dim // 2)]


def reference_llama3(dim: int, base: float, o: dict) -> list[float]:
    """`_compute_llama3_parameters`, one frequency at a time."""
    old = o["original_max_position_embeddings"]
    low_wavelength, high_wavelength = old / o["low_freq_factor"], old / o["high_freq_factor"]
    out = []
    for freq in reference_default(dim, base):
        wavelength = 2 * math.pi / freq
        if wavelength < high_wavelength:
            out.append(freq)
        elif wavelength > low_wavelength:
            out.append(freq / o["factor"])
        else:
            smooth = (old / wavelength - o["low_freq_factor"]) / (o["high_freq_factor"] - o["low_freq_factor"])
            out.append((1 - smooth) * freq / o["factor"] + smooth * freq)
    return out


def reference_yarn(dim: int, base: float, o: dict) -> tuple[list[float], float]:
    """`_compute_yarn_parameters`, one frequency at a time."""
    factor, old = o["factor"], o["original_max_position_embeddings"]

    def get_mscale(scale, mscale=1.0):
        return 1.0 if scale <= 1 else 0.1 * mscale * math.log(scale) + 1.0

    attention_factor = o.get("attention_factor")
    if attention_factor is None:
        if o.get("mscale") and o.get("mscale_all_dim"):
            attention_factor = get_mscale(factor, o["mscale"]) / get_mscale(factor, o["mscale_all_dim"])
        else:
            attention_factor = get_mscale(factor)

    def find_correction_dim(rotations):
        return (dim * math.log(old / (rotations * 2 * math.pi))) / (2 * math.log(base))

    low, high = find_correction_dim(o.get("beta_fast", 32)), find_correction_dim(o.get("beta_slow", 1))
    if o.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001
    out = []
    for i, freq in enumerate(reference_default(dim, base)):
        ramp = min(max((i - low) / (high - low), 0), 1)
        extrapolated = 1 - ramp
        out.append(freq / factor * (1 - extrapolated) + freq * extrapolated)
    return out, attention_factor


@pytest.mark.parametrize(("dim", "base"), [(8, 1e4), (64, 1e4), (128, 5e5)])
@pytest.mark.parametrize("scaling", [None, {}, {"rope_type": "default"}, {"rope_theta": ...}])
def test_plain(dim, base, scaling):
    scaling = {"rope_type": "default", "rope_theta": base} if scaling and ... in scaling.values() else scaling
    freq, factor = rope_frequencies(dim, base, scaling)
    assert freq.dtype == np.float64
    np.testing.assert_allclose(freq, reference_default(dim, base), rtol=1e-14)
    assert factor == 1.0


@pytest.mark.parametrize("key", ["type", "rope_type"])
def test_linear(key):
    freq, factor = rope_frequencies(64, 1e4, {key: "linear", "factor": 4.0})
    np.testing.assert_allclose(freq, np.array(reference_default(64, 1e4)) / 4, rtol=1e-14)
    assert factor == 1.0


@pytest.mark.parametrize(("dim", "base"), [(64, 5e5), (128, 5e5), (128, 1e4)])
@pytest.mark.parametrize("changes", [{}, {"factor": 32.0}, {"low_freq_factor": 2.0, "high_freq_factor": 16.0}])
def test_llama3(dim, base, changes):
    freq, factor = rope_frequencies(dim, base, LLAMA3 | changes)
    expected = reference_llama3(dim, base, LLAMA3 | changes)
    np.testing.assert_allclose(freq, expected, rtol=1e-14)
    assert factor == 1.0
    plain = reference_default(dim, base)  # all three regimes are in play
    ratios = np.array(plain) / expected
    assert (ratios == 1).any()
    assert ((ratios > 1.01) & (ratios < (LLAMA3 | changes)["factor"] * 0.99)).any()


@pytest.mark.parametrize(("dim", "base"), [(64, 1e4), (128, 1e6)])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"beta_fast": 16, "beta_slow": 2},
        {"truncate": False},
        {"attention_factor": 1.5},
        {"mscale": 0.707, "mscale_all_dim": 1.2},  # DeepSeek's
        {"mscale": 0.707},
        {"factor": 1.0},
        {"original_max_position_embeddings": 8},  # the ramp's ends meet
    ],
)
def test_yarn(dim, base, changes):
    freq, factor = rope_frequencies(dim, base, YARN | changes)
    expected, expected_factor = reference_yarn(dim, base, YARN | changes)
    np.testing.assert_allclose(freq, expected, rtol=1e-14)
    assert factor == pytest.approx(expected_factor, rel=1e-14)


@pytest.mark.parametrize(
    ("dim", "scaling", "match"),
    [
        (7, None, "head_dim 7 is odd"),
        (8, {"type": "ntk", "factor": 2.0}, r"'ntk' is not one of default, linear, llama3, yarn"),
        (8, {"factor": 2.0}, "type None is not one of"),
        (8, {"type": "linear"}, "linear lacks factor; it takes factor"),
        (8, LLAMA3 | {"fctor": 1.0}, "llama3 has unknown fctor"),
        (8, {"rope_type": "default", "factor": 8.0}, "default has unknown factor"),
        (
            8,
            {"rope_type": "linear", "factor": 2.0, "rope_theta": 5e5},
            "rope_theta is 500000.0, but rope_theta is 10000",
        ),
    ],
)
def test_what_is_not_understood_is_refused(dim, scaling, match):
    with pytest.raises(UserError, match=match):
        rope_frequencies(dim, 1e4, scaling)


def qk(dim: int = 8):
    rng = np.random.default_rng(0)
    return rng.normal(size=(2, 2, 6, 3, dim))  # q and k [B 2, S 6, H 3, K]


def test_rotation_is_by_position_times_frequency_over_half_split_pairs(x64):
    (x, _), (freq, _) = qk(), rope_frequencies(8, 100.0)
    positions = np.array([[0, 1, 2, 3, 4, 5], [7, 0, 0, 2, 9, 1]])
    y = rotate(jnp.asarray(x), jnp.asarray(positions), freq, 1.5)
    pairs = x[..., :4] + 1j * x[..., 4:]  # a pair is (k, k + K / 2), as in transformers
    turned = 1.5 * pairs * np.exp(1j * positions[:, :, None, None] * freq)
    np.testing.assert_allclose(y, np.concatenate([turned.real, turned.imag], -1), rtol=1e-12, atol=1e-13)


def test_scores_depend_on_position_differences_only(x64):
    (q, k), (freq, _) = map(jnp.asarray, qk()), rope_frequencies(8, 1e4)
    here = jnp.arange(6)[None].repeat(2, 0)

    def scores(positions):
        return jnp.einsum("BSHK,BTHK->BHST", rotate(q, positions, freq), rotate(k, positions, freq))

    np.testing.assert_allclose(scores(here + 1000), scores(here), rtol=1e-10, atol=1e-10)
    assert not np.allclose(scores(2 * here), scores(here), atol=1e-2)


def test_rotation_keeps_lengths_dtype_and_position_zero():
    (q, _), (freq, _) = qk(), rope_frequencies(8, 1e4)
    q = jnp.asarray(q, jnp.bfloat16)
    assert rotate(q, jnp.ones((2, 6), jnp.int32), freq).dtype == jnp.bfloat16
    assert np.array_equal(rotate(q, jnp.zeros((2, 6), jnp.int32), freq), q)
    wide = q.astype(jnp.float32)
    turned = rotate(wide, jnp.full((2, 6), 1234, jnp.int32), freq)
    np.testing.assert_allclose(jnp.linalg.norm(turned, axis=-1), jnp.linalg.norm(wide, axis=-1), rtol=1e-5)


def test_angles_are_computed_above_bfloat16():
    # Position 1001 is no bfloat16 number; an angle rounded to one would be wrong by a radian.
    x = jnp.asarray([1.0, 0.0], jnp.bfloat16).reshape(1, 1, 1, 2)
    y = rotate(x, jnp.asarray([[1001]]), [1.0])
    np.testing.assert_allclose(y.astype(jnp.float32).ravel(), [math.cos(1001), math.sin(1001)], atol=4e-3)
