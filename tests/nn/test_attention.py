"""Attention: every implementation against loops over single scores, and what each refuses."""

from functools import partial
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import tiny
from helpers import equations, filled, quick
from shardtrain import nn
from shardtrain.errors import UserError
from shardtrain.nn.attention_kernels import attend, attention_mask
from shardtrain.sharding import use

B, S, K = 2, 7, 4
SEGMENTS = np.array([[1, 1, 1, 2, 2, 2, 2], [1, 2, 2, 2, 2, 3, 3]])


def loops(q, k, v, *, causal=True, window=None, segments=None, soft_cap=None, scale=None):
    """One score at a time, in float64."""
    heads, groups = q.shape[2], k.shape[2]
    out = np.zeros(q.shape)
    for b, s, h in np.ndindex(q.shape[:3]):
        g = h // (heads // groups)
        scores, values = [], []
        for t in range(k.shape[1]):
            if causal and t > s:
                continue
            if window is not None and abs(s - t) >= window:
                continue
            if segments is not None and segments[b, s] != segments[b, t]:
                continue
            score = q[b, s, h] @ k[b, t, g] * (K**-0.5 if scale is None else scale)
            scores.append(score if soft_cap is None else soft_cap * np.tanh(score / soft_cap))
            values.append(v[b, t, g])
        weights = np.exp(np.array(scores) - max(scores))
        out[b, s, h] = (weights / weights.sum()) @ np.array(values)
    return out


def qkv(heads: int, groups: int, dtype=np.float64):
    rng = np.random.default_rng(0)
    return tuple(jnp.asarray(2 * rng.normal(size=(B, S, n, K)), dtype) for n in (heads, groups, groups))


HEADS = [(4, 4), (4, 2), (6, 1)]
MASKS = {
    "all": {"causal": False},
    "causal": {},
    "window": {"window": 3},
    "window of one": {"window": 1},
    "window both ways": {"causal": False, "window": 2},
    "segments": {"segments": SEGMENTS},
    "segments and window": {"segments": SEGMENTS, "window": 2},
    "scale": {"scale": 0.3},
}


def call(heads, options, dtype, **more):
    options = dict(options)
    segments = options.pop("segments", None)
    segments = None if segments is None else jnp.asarray(segments, jnp.int32)
    return quick(partial(nn.attend, segment_ids_BS=segments, **options, **more))(*qkv(*heads, dtype))


CAPPED = [{"soft_cap": 2.0}, {"soft_cap": 2.0, "window": 3}]
#: Every mask with grouped queries; every grouping with two of the masks.
CASES = [(heads, o) for heads in HEADS for o in ([*MASKS.values()] if heads == (4, 2) else [{}, MASKS["segments"]])]


@pytest.mark.parametrize(("heads", "options"), [*CASES, *(((4, 2), o) for o in CAPPED)], ids=str)
def test_einsum_equals_loops_in_float64(x64, heads, options):
    expected = loops(*map(np.asarray, qkv(*heads)), **options)
    y = call(heads, options, np.float64, implementation="einsum")
    assert y.dtype == jnp.float64
    np.testing.assert_allclose(y, expected, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize(("heads", "options"), CASES, ids=str)
def test_xla_equals_einsum(heads, options):
    einsum, xla = (call(heads, options, np.float32, implementation=i) for i in ("einsum", "xla"))
    np.testing.assert_allclose(xla, einsum, rtol=1e-5, atol=1e-6)


def test_auto_on_a_cpu_is_einsum():
    assert np.array_equal(call((4, 2), {}, np.float32), call((4, 2), {}, np.float32, implementation="einsum"))


def test_the_softmax_never_runs_below_float32():
    q, k, v = qkv(4, 2, jnp.bfloat16)
    found = equations(lambda q, k, v: jax.grad(lambda q: nn.attend(q, k, v).astype(jnp.float32).sum())(q), q, k, v)
    exps = [e for e in found if e.primitive.name in ("exp", "reduce_max", "div")]
    assert exps
    assert all(v.aval.dtype == jnp.float32 for e in exps for v in e.outvars)
    exact = loops(*(np.asarray(a, np.float64) for a in (q, k, v)))
    y = nn.attend(q, k, v, implementation="einsum")
    assert y.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(y, np.float64), exact, rtol=0.02, atol=0.02)


def test_a_token_that_sees_only_itself_returns_its_value():
    q, k, v = qkv(4, 4, np.float32)
    np.testing.assert_allclose(nn.attend(q, k, v, window=1), v, rtol=1e-6)


def test_masks():
    assert attention_mask(3, causal=False) is None
    assert attention_mask(3)[0, 0].tolist() == [[1, 0, 0], [1, 1, 0], [1, 1, 1]]
    assert attention_mask(3, window=2)[0, 0].tolist() == [[1, 0, 0], [1, 1, 0], [0, 1, 1]]
    assert attention_mask(3, None, jnp.asarray([[5, 5, 4]]))[0, 0].tolist() == [[1, 0, 0], [1, 1, 0], [0, 0, 1]]


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (
            {"implementation": "cudnn"},
            "cudnn is not available here: the devices are cpu, not NVIDIA GPUs; it needs bfloat16.*; use attention: ",
        ),
        (
            {"implementation": "xla", "soft_cap": 30.0},
            r"xla has no logit_soft_cap, which is 30.0; use .*einsum",
        ),
    ],
)
def test_a_kernel_that_cannot_is_an_error_and_never_replaced(options, match):
    with pytest.raises(UserError, match=match):
        call((4, 2), options, np.float32)
    with use(tiny.partitioner(data=8)), pytest.raises(UserError, match=match):
        call((4, 2), options, np.float32)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"n_heads": 4, "n_kv_heads": 3}, "n_kv_heads = 3: must divide n_heads = 4"),
        ({"n_heads": 4, "n_kv_heads": 0}, "n_kv_heads = 0: must be greater than 0"),
        ({"n_heads": 0}, "n_heads = 0: must be greater than 0"),
        ({"n_heads": -4, "head_dim": 4}, "n_heads = -4: must be greater than 0"),
        ({"n_heads": 4, "head_dim": 0}, "head_dim = 0: must be greater than 0"),
        ({"n_heads": 4, "norm_eps": 0.0}, "norm_eps = 0.0: must be greater than 0"),
        ({"n_heads": 4, "rope_theta": -1.0}, "rope_theta = -1.0: must be greater than 0"),
        ({"n_heads": 4, "logit_soft_cap": 0.0}, "logit_soft_cap = 0.0: must be greater than 0"),
        ({"n_heads": 3}, "n_heads = 3: .*16 / 3 dims, .*; use a divisor of 16, or set head_dim"),
        ({"n_heads": 4, "window": 0}, "sliding window 0 leaves nothing for a token to see"),
        ({"n_heads": 2, "head_dim": 3}, "head_dim 3 is odd"),
    ],
)
def test_sizes_that_make_no_attention_are_refused(options, match):
    with pytest.raises(UserError, match=match):
        nnx.eval_shape(lambda: nn.Attention(16, **options, rngs=nnx.Rngs(0)))


def test_head_dim_is_free_of_the_width():
    layer = nnx.eval_shape(lambda: nn.Attention(10, 3, 1, 8, rngs=nnx.Rngs(0)))
    assert [layer.query.weight.shape, layer.key.weight.shape, layer.out.weight.shape] == [
        (10, 3, 8),
        (10, 1, 8),
        (3, 8, 10),
    ]


def layer(**options):
    return filled(lambda: nn.Attention(16, 4, 2, **options, rngs=nnx.Rngs(0)))


def test_the_layer_is_projection_norm_rotation_attention_projection(x64):
    f64 = nn.Precision(jnp.float64, jnp.float64, jnp.float64)
    module = layer(qkv_bias=True, qk_norm=True, norm_eps=1e-3, rope_theta=100.0, window=3, precision=f64)
    batch = tiny.batch(rows=2, length=7, vocab=10, packed=True)
    x = np.random.default_rng(0).normal(size=(2, 7, 16))
    y = quick(lambda: module(jnp.asarray(x), nn.Context(batch)))()

    value = lambda v: np.asarray(v[...], np.float64)  # noqa: E731
    position = np.asarray(batch["positions"])[:, :, None, None] * 100.0 ** -(np.arange(2) / 2)

    def project(part, norm=None):
        z = np.einsum("bsd,dhk->bshk", x, value(part.weight)) + value(part.bias)
        if norm is None:
            return z
        z = z / np.sqrt((z**2).mean(-1, keepdims=True) + 1e-3) * value(norm.scale)
        turned = (z[..., :2] + 1j * z[..., 2:]) * np.exp(1j * position)
        return np.concatenate([turned.real, turned.imag], -1)

    mixed = loops(
        project(module.query, module.query_norm),
        project(module.key, module.key_norm),
        project(module.value),
        window=3,
        segments=np.asarray(batch["segment_ids"]),
    )
    np.testing.assert_allclose(y, np.einsum("bshk,hkd->bsd", mixed, value(module.out.weight)), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("implementation", ["auto", "einsum", "xla"])
def test_a_gpu_that_is_not_nvidia_s_runs_all_but_cudnn(implementation, monkeypatch):
    client = SimpleNamespace(platform_version="rocm 60300")
    device = SimpleNamespace(platform="gpu", client=client, compute_capability="gfx942")
    monkeypatch.setattr(jax, "devices", lambda: [device])
    call((4, 2), {"implementation": implementation}, np.float32)
    with pytest.raises(UserError, match="the devices are gpu, not NVIDIA GPUs"):
        call((4, 2), {"implementation": "cudnn"}, np.float32)


@pytest.mark.parametrize("version", ["cuda 12090", "NVIDIA H100 80GB HBM3"], ids=["attached", "compile-only"])
def test_auto_takes_cudnn_on_every_nvidia_gpu(version, monkeypatch):
    """A compile-only device has its own name as its client's version."""
    client = SimpleNamespace(platform_version=version)
    device = SimpleNamespace(
        platform="gpu", device_kind="NVIDIA H100 80GB HBM3", client=client, compute_capability="9.0"
    )
    monkeypatch.setattr(jax, "devices", lambda: [device])
    asked = []
    monkeypatch.setattr(
        jax.nn, "dot_product_attention", lambda q, *_, implementation, **__: asked.append(implementation) or q
    )
    q_BSHK = jnp.zeros((1, 8, 2, 256), jnp.bfloat16)
    attend(q_BSHK, q_BSHK, q_BSHK)
    assert asked == ["cudnn"]


def test_cudnn_needs_whole_sequences():
    with use(tiny.partitioner(context=8)), pytest.raises(UserError, match="the mesh splits each into 8; use attention"):
        call((4, 2), {"implementation": "cudnn"}, np.float32)


def test_without_segment_ids_the_whole_past_is_seen():
    module, x = layer(), jnp.asarray(np.random.default_rng(0).normal(size=(2, 7, 16)), jnp.float32)
    batch = tiny.batch(rows=2, length=7, vocab=10, packed=True)
    run = quick(lambda batch: module(x, nn.Context(batch)))
    bare = {name: leaf for name, leaf in batch.items() if name != "segment_ids"}
    assert np.array_equal(run(bare), run(bare | {"segment_ids": jnp.zeros((2, 7), jnp.int32)}))
    assert not np.allclose(run(bare), run(batch), atol=1e-3)


def test_rows_without_segment_ids_compare_no_segments():
    module, x, batch = layer(), jnp.ones((2, 7, 16)), tiny.batch(rows=2, length=7, vocab=10, packed=True)
    bare = {name: leaf for name, leaf in batch.items() if name != "segment_ids"}
    program = lambda batch: str(jax.make_jaxpr(lambda b: module(x, nn.Context(b)))(batch))  # noqa: E731
    assert program(bare).count(" eq ") < program(batch).count(" eq ")
