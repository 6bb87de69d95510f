"""FLOPs against a count by hand, and the peak table's own consistency."""

import jax
import jax.numpy as jnp
import pytest

from shardtrain.metrics import memory_bytes, mfu, peak_flops, transformer_flops_per_token
from shardtrain.metrics.flops import PEAK

KINDS = {
    "NVIDIA A100-SXM4-40GB": "A100",
    "NVIDIA A100-SXM4-80GB": "A100",
    "NVIDIA A100 80GB PCIe": "A100",
    "NVIDIA H100 80GB HBM3": "H100",
    "NVIDIA H200": "H200",
    "NVIDIA B200": "B200",
    "NVIDIA L40S": "L40S",
    "NVIDIA GeForce RTX 4090": "RTX 4090",
}


@pytest.mark.parametrize("kind", KINDS)
def test_peak_by_device_kind(kind):
    row = PEAK[KINDS[kind]]
    assert peak_flops(kind, jnp.bfloat16) == peak_flops(kind, "float16") == row["bfloat16"]
    assert peak_flops(kind, jnp.float32) == row["float32"]
    assert peak_flops(kind, jnp.float8_e4m3fn) == row.get("float8")
    assert peak_flops(kind, jnp.float64) is None


@pytest.mark.parametrize("gpu", PEAK)
def test_half_the_bits_twice_the_speed(gpu):
    """True of the tensor cores; a figure with sparsity by mistake would break it."""
    row = PEAK[gpu]
    assert row["bfloat16"] == pytest.approx(2 * row["float32"], rel=0.03)
    if "float8" in row:
        assert row["float8"] == pytest.approx(2 * row["bfloat16"], rel=0.03)


@pytest.mark.parametrize(
    "kind",
    [
        *("cpu", "NVIDIA H100 PCIe", "NVIDIA H100 NVL", "NVIDIA GB200", "NVIDIA A100-SXM4-80GB MIG 1g.10gb"),
        *("NVIDIA GeForce RTX 4090 D", "NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA L40", "Radeon", ""),
    ],
)
def test_no_peak_is_better_than_a_wrong_one(kind):
    assert peak_flops(kind, jnp.bfloat16) is None


@pytest.mark.parametrize("causal", [True, False])
def test_flops_equal_a_count_over_all_pairs(causal):
    layers, heads, head_dim, seq, params = 3, 4, 8, 16, 1000
    pairs = sum(1 for query in range(seq) for key in range(seq) if key <= query or not causal)
    forward = 2 * params * seq + layers * heads * pairs * 2 * (2 * head_dim)  # scores, and weighted sum
    got = transformer_flops_per_token(params, layers, heads, head_dim, seq, causal)
    assert got * seq == pytest.approx(3 * forward, rel=1e-12)


def test_flops_equal_what_xla_counts():
    """XLA's own cost model for the matrix products of a training step of one layer without a mask."""
    seq, dim, ff, heads = 64, 32, 128, 4

    def forward(w, x_SD):
        q, k, v = (jnp.reshape(x_SD @ w[n], (seq, heads, -1)) for n in "qkv")
        p_HST = jax.nn.softmax(jnp.einsum("shd,thd->hst", q, k))
        x_SD = jnp.einsum("hst,thd->shd", p_HST, v).reshape(seq, dim) @ w["o"]
        return ((x_SD @ w["up"]) @ w["down"]).sum()

    shapes = {**dict.fromkeys("qkvo", (dim, dim)), "up": (dim, ff), "down": (ff, dim)}
    w = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items()}
    x = jax.ShapeDtypeStruct((seq, dim), jnp.float32)
    # Gradients of weights and of the input, as in a block that has blocks before it.
    step = jax.jit(jax.grad(forward, argnums=(0, 1)))
    counted = step.lower(w, x).cost_analysis()["flops"]
    params = 4 * dim * dim + 2 * dim * ff
    expected = seq * transformer_flops_per_token(params, 1, heads, dim // heads, seq, causal=False)
    assert expected == pytest.approx(counted, rel=0.1)  # XLA also counts the softmax


def test_mfu():
    """Four devices that do nothing but the model's maths at half of their peak."""
    assert mfu(tokens_per_s=4e3, flops_per_token=5e9, peak=4e13) == pytest.approx(0.5)


def test_memory_on_cpu_follows_the_process():
    before = memory_bytes()
    block = bytearray(b"x" * (64 << 20))
    grown = memory_bytes()
    assert before
    assert grown
    assert len(block) * 0.5 < grown - before < len(block) * 4
