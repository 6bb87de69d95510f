"""Llama and its relatives: sizes, declarations, and what a change of one token may change."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import tiny
from helpers import equations, filled, quick
from shardtrain import nn
from shardtrain.errors import UserError
from shardtrain.models.llama import Llama
from shardtrain.nn.remat import ACTIVATIONS
from shardtrain.train.model_def import ModelDef
from shardtrain.weights.paths import flatten
from shardtrain.weights.precision import Precision

TINY = {"n_layers": 2, "d_model": 16, "n_heads": 4, "n_kv_heads": 2, "d_ff": 12, "vocab_size": 20, "remat": "none"}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
VARIANTS = {
    "llama": {},
    "qwen 2": {"qkv_bias": True, "tie_embeddings": True, "rope_theta": 1e6},
    "qwen 3": {"qk_norm": True, "head_dim": 6, "rope_scaling": YARN},
    "mistral": {"sliding_window": 3, "n_kv_heads": None},
    "gemma-like": {"logit_soft_cap": 5.0, "rope_scaling": {"type": "linear", "factor": 2.0}},
}

LLAMA2_7B = {"n_layers": 32, "d_model": 4096, "n_heads": 32, "d_ff": 11008, "vocab_size": 32000}
LLAMA3_8B = LLAMA2_7B | {"n_kv_heads": 8, "d_ff": 14336, "vocab_size": 128256}
QWEN2_05B = {"n_layers": 24, "d_model": 896, "n_heads": 14, "n_kv_heads": 2, "d_ff": 4864, "vocab_size": 151936}
QWEN3_06B = {"n_layers": 28, "d_model": 1024, "n_heads": 16, "n_kv_heads": 8, "d_ff": 3072, "vocab_size": 151936}
PUBLISHED = {
    "Llama 2 7B": (LLAMA2_7B, 6_738_415_616),
    "Llama 3 8B": (LLAMA3_8B, 8_030_261_248),
    "Llama 3 70B": (LLAMA3_8B | {"n_layers": 80, "d_model": 8192, "n_heads": 64, "d_ff": 28672}, 70_553_706_496),
    "Mistral 7B": (LLAMA3_8B | {"vocab_size": 32000, "sliding_window": 4096}, 7_241_732_096),
    "Qwen 2 0.5B": (QWEN2_05B | {"qkv_bias": True, "tie_embeddings": True}, 494_032_768),
    "Qwen 3 0.6B": (QWEN3_06B | {"head_dim": 128, "qk_norm": True, "tie_embeddings": True}, 596_049_920),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_models_have_their_published_number_of_parameters(name):
    options, count = PUBLISHED[name]
    weights = flatten(ModelDef(lambda rngs: Llama(**options, rngs=rngs)).weights)
    assert sum(w.size for w in weights.values()) == count


def test_every_weight_says_what_it_is():
    options = TINY | {"qkv_bias": True, "qk_norm": True}
    weights = flatten(ModelDef(lambda rngs: Llama(**options, rngs=rngs)).weights)
    said = {path: (w.role, w.shape, w.axes, w.stack, w.inputs) for path, w in weights.items()}
    layer = {
        "attention.key.bias": ("bias", (2, 2, 4), ("kv_heads", "head_dim"), 0),
        "attention.key.weight": ("matrix", (2, 16, 2, 4), ("embed", "kv_heads", "head_dim"), 1),
        "attention.key_norm.scale": ("norm", (2, 4), ("norm",), 0),
        "attention.out.weight": ("matrix", (2, 4, 4, 16), ("heads", "head_dim", "embed"), 2),
        "attention.query.bias": ("bias", (2, 4, 4), ("heads", "head_dim"), 0),
        "attention.query.weight": ("matrix", (2, 16, 4, 4), ("embed", "heads", "head_dim"), 1),
        "attention.query_norm.scale": ("norm", (2, 4), ("norm",), 0),
        "attention.value.bias": ("bias", (2, 2, 4), ("kv_heads", "head_dim"), 0),
        "attention.value.weight": ("matrix", (2, 16, 2, 4), ("embed", "kv_heads", "head_dim"), 1),
        "attention_norm.scale": ("norm", (2, 16), ("norm",), 0),
        "mlp.down.weight": ("matrix", (2, 12, 16), ("mlp", "embed"), 1),
        "mlp.gate.weight": ("matrix", (2, 16, 12), ("embed", "mlp"), 1),
        "mlp.up.weight": ("matrix", (2, 16, 12), ("embed", "mlp"), 1),
        "mlp_norm.scale": ("norm", (2, 16), ("norm",), 0),
    }
    expected = {
        f"blocks.layer.{path}": (role, shape, ("layers", *axes), 1, inputs)
        for path, (role, shape, axes, inputs) in layer.items()
    } | {
        "embedding.weight": ("embedding", (20, 16), ("vocab", "embed"), 0, 1),
        "norm.scale": ("norm", (16,), ("norm",), 0, 0),
        "unembedding.weight": ("head", (16, 20), ("embed", "vocab"), 0, 1),
    }
    assert said == expected


def test_a_tied_model_has_one_table():
    tied = ModelDef(lambda rngs: Llama(**TINY, tie_embeddings=True, rngs=rngs))
    assert [path for path in flatten(tied.weights) if "embedding" in path] == ["embedding.weight"]


def model(variant="llama", precision=nn.Precision(), **options) -> Llama:
    return filled(lambda: Llama(**TINY | VARIANTS[variant] | options, precision=precision, rngs=nnx.Rngs(0)))


def logits_of(module):
    """`(tokens, segment_ids, positions) -> logits`."""

    def run(tokens, segments, positions):
        batch = {"tokens": tokens, "segment_ids": segments, "positions": positions}
        ctx = nn.Context(batch)
        return module.logits(module.blocks(module.embedder(batch, ctx), ctx)[0])

    return quick(run)


LENGTH = 10
TOKENS = np.random.default_rng(0).integers(0, 20, (2, LENGTH)).astype("i4")
WHOLE = np.zeros((2, LENGTH), "i4"), np.tile(np.arange(LENGTH, dtype="i4"), (2, 1))


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_token_changes_nothing_before_it(variant):
    run = logits_of(model(variant))
    before = np.asarray(run(TOKENS, *WHOLE))
    for t in (4, LENGTH - 1):
        changed = TOKENS.copy()
        changed[:, t] = (changed[:, t] + 7) % 20
        after = np.asarray(run(changed, *WHOLE))
        assert np.array_equal(after[:, :t], before[:, :t])
        assert (np.abs(after - before)[:, t].max(-1) > 1e-3).all()


@pytest.mark.parametrize("variant", VARIANTS)
def test_packed_documents_do_not_see_each_other(variant):
    run = logits_of(model(variant))
    cut = 4
    segments = np.where(np.arange(LENGTH) < cut, 1, 2)[None].repeat(2, 0).astype("i4")
    positions = np.where(np.arange(LENGTH) < cut, np.arange(LENGTH), np.arange(LENGTH) - cut)[None].repeat(2, 0)
    packed = np.asarray(run(TOKENS, segments, positions.astype("i4")))
    changed = TOKENS.copy()
    changed[:, :cut] = (changed[:, :cut] + 7) % 20
    assert np.array_equal(run(changed, segments, positions.astype("i4"))[:, cut:], packed[:, cut:])
    # The second document, packed, is the document alone.
    alone = np.concatenate([TOKENS[:, cut:], TOKENS[:, :cut]], 1)
    np.testing.assert_allclose(run(alone, *WHOLE)[:, : LENGTH - cut], packed[:, cut:], rtol=1e-4, atol=1e-4)


def test_a_sliding_window_reaches_back_by_its_size_per_layer():
    run = logits_of(model("mistral"))  # window 3, two layers: 2 * (3 - 1) tokens back
    changed = TOKENS.copy()
    changed[:, 2] = (changed[:, 2] + 7) % 20
    moved = np.abs(np.asarray(run(changed, *WHOLE)) - np.asarray(run(TOKENS, *WHOLE))).max((0, 2)) > 0
    assert moved.tolist() == [False, False, True, True, True, True, True, False, False, False]


OPTIONS = [{"rope_theta": 50.0}, {"norm_eps": 0.5}, {"sliding_window": 2}, {"logit_soft_cap": 0.1}]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_an_option_changes_the_model(options):
    plain, other = (logits_of(model(**o))(TOKENS, *WHOLE) for o in ({}, options))
    assert np.abs(plain - other).max() > 1e-2


BATCH = tiny.batch(rows=4, length=6, vocab=20, packed=True)


def loss_of(module, batch=BATCH, train=False):
    graph, state = nnx.split(module)
    ctx = nn.Context(batch, key=jax.random.key(3), train=train)
    return quick(lambda state: nn.forward(nnx.merge(graph, state), batch, ctx))(state)


def test_the_contract_of_a_model():
    module = model()
    assert isinstance(module, nn.Model)
    (loss, weight, metrics), aux = loss_of(module)
    logits = logits_of(module)(BATCH["tokens"], BATCH["segment_ids"], BATCH["positions"])
    expected, total, _ = nn.cross_entropy(logits, BATCH["targets"], BATCH["loss_mask"])
    np.testing.assert_allclose([loss, weight], [expected, total], rtol=1e-5)
    np.testing.assert_allclose(metrics["cross_entropy"], (expected, total), rtol=1e-5)
    assert aux == {}


def test_loss_options_reach_the_loss():
    whole = loss_of(model(z_loss=0.1))
    for got, want in zip(
        jax.tree.leaves(loss_of(model(z_loss=0.1, loss_chunk=2))), jax.tree.leaves(whole), strict=True
    ):
        np.testing.assert_allclose(got, want, rtol=1e-5)
    assert whole[0][0] > loss_of(model())[0][0] * 1.01
    assert whole[0][2]["cross_entropy"][0] < whole[0][0]


def test_the_order_of_rows_does_not_matter_even_with_dropout():
    module, order = model(dropout=0.3), np.array([2, 0, 3, 1])
    permuted = {name: leaf[order] for name, leaf in BATCH.items()}
    (loss, *_), _ = loss_of(module, train=True)
    np.testing.assert_allclose(loss_of(module, permuted, train=True)[0][0], loss, rtol=1e-5)
    renumbered = permuted | {"row": BATCH["row"]}  # other rows, other masks
    assert abs(loss_of(module, renumbered, train=True)[0][0] / loss - 1) > 1e-3


def test_a_fresh_model_knows_nothing():
    options = TINY | {"d_model": 64, "head_dim": 16, "vocab_size": 256}
    init = quick(lambda: nnx.state(Llama(**options, rngs=nnx.Rngs(0))))
    module = nnx.eval_shape(lambda: Llama(**options, rngs=nnx.Rngs(0)))
    nnx.update(module, init())
    (loss, weight, _), _ = loss_of(module)
    assert abs(loss / weight - np.log(256)) < 0.2  # nats: all tokens are about equally likely


@pytest.mark.parametrize("variant", ["qwen 3", "gemma-like"])
def test_float64_is_float64_in_every_equation(x64, variant):
    f64 = Precision(jnp.float64, jnp.float64, jnp.float64)
    graph, state = nnx.split(model(variant, f64, dropout=0.1, z_loss=0.1, loss_chunk=3, remat="full"))
    batch = BATCH | {"loss_mask": BATCH["loss_mask"].astype(jnp.float64)}
    ctx = nn.Context(batch, key=jax.random.key(3), train=True)
    loss = lambda state: nn.forward(nnx.merge(graph, state), batch, ctx)[0][0]  # noqa: E731
    kinds = {getattr(v.aval, "dtype", None) for e in equations(jax.grad(loss), state) for v in e.outvars}
    assert {str(k) for k in kinds if k is not None and jnp.issubdtype(k, jnp.floating)} == {"float64"}


def test_the_attention_kernel_is_an_option():
    einsum, xla = (loss_of(model(attention=kind))[0][0] for kind in ("einsum", "xla"))
    np.testing.assert_allclose(einsum, xla, rtol=1e-5)
    with pytest.raises(UserError, match="cudnn is not available here"):
        loss_of(model(attention="cudnn"))


def test_a_policy_decides_which_matmuls_run_again():
    counts = {remat: count_matmuls(remat) for remat in ("none", "dots", "offload", "full")}
    # Of attention's own two, no policy keeps the scores, and by names alone the result.
    assert counts["dots"] == counts["offload"] == counts["none"] + 2
    assert count_matmuls(list(ACTIVATIONS)) == count_matmuls(f"offload:{','.join(ACTIVATIONS)}") == counts["none"] + 1
    assert counts["full"] >= counts["dots"] + 4


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_every_activation_that_has_a_name_saves_a_matmul(name):
    others = [other for other in ACTIVATIONS if other != name]
    assert count_matmuls(list(ACTIVATIONS)) < count_matmuls(others)


def count_matmuls(remat):
    graph, state = nnx.split(model(n_layers=1, remat=remat, scan=False))
    loss = lambda state: nn.forward(nnx.merge(graph, state), BATCH, nn.Context(BATCH))[0][0]  # noqa: E731
    return len([e for e in equations(jax.grad(loss), state) if e.primitive.name == "dot_general"])
