"""Our Llama against transformers' implementations, weight by weight: tiny, random, offline."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from helpers import quick
from shardtrain import nn
from shardtrain.models.llama import Llama

pytestmark = [pytest.mark.full, pytest.mark.filterwarnings("ignore")]  # what torch warns of is not ours

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 61,
    "max_position_embeddings": 128,
}
LLAMA3 = {"factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 32}
QKV = ("query", "key", "value")
YARN = {"factor": 4.0, "original_max_position_embeddings": 32}

#: name -> transformers' class, its further options, and ours.
CASES = {
    "llama": ("Llama", {"rms_norm_eps": 1e-5}, {}),
    "llama tied": ("Llama", {"rms_norm_eps": 1e-5, "tie_word_embeddings": True}, {"tie_embeddings": True}),
    "llama linear": ("Llama", {"scaling": {"rope_type": "linear", "factor": 4.0}}, {}),
    "llama 3": ("Llama", {"scaling": {"rope_type": "llama3", **LLAMA3}, "rope_theta": 5e5}, {}),
    "llama yarn": ("Llama", {"scaling": {"rope_type": "yarn", **YARN}}, {}),
    "mistral": ("Mistral", {"sliding_window": 7, "head_dim": 8}, {"sliding_window": 7}),
    "qwen 2": ("Qwen2", {"rope_theta": 1e6, "tie_word_embeddings": True}, {"tie_embeddings": True, "qkv_bias": True}),
    "qwen 3": ("Qwen3", {"head_dim": 12, "rope_theta": 1e6}, {"head_dim": 12, "qk_norm": True}),
}


def theirs(name, theta, scaling, options):
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    rope = {"rope_type": "default", **(scaling or {}), "rope_theta": theta}
    config = getattr(transformers, f"{name}Config")(
        **SIZES, **options, rope_parameters=rope, attn_implementation="eager", use_cache=False
    )
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    with torch.no_grad():
        for weight in model.parameters():  # the default init hides bugs: its logits are nearly uniform
            weight.add_(0.15 * torch.randn_like(weight))
    return model


def ours(state, **options):
    """Our module, filled from a transformers state dict by name."""
    layers, width = SIZES["num_hidden_layers"], SIZES["hidden_size"]
    make = lambda: Llama(  # noqa: E731
        n_layers=layers,
        d_model=width,
        n_heads=SIZES["num_attention_heads"],
        n_kv_heads=SIZES["num_key_value_heads"],
        d_ff=SIZES["intermediate_size"],
        vocab_size=SIZES["vocab_size"],
        **options,
        rngs=nnx.Rngs(0),
    )
    names = {
        "attention_norm.scale": "input_layernorm.weight",
        "mlp_norm.scale": "post_attention_layernorm.weight",
        "attention.query_norm.scale": "self_attn.q_norm.weight",
        "attention.key_norm.scale": "self_attn.k_norm.weight",
        **{f"attention.{a}.{w}": f"self_attn.{a[0]}_proj.{w}" for a in QKV for w in ("weight", "bias")},
        "attention.out.weight": "self_attn.o_proj.weight",
        **{f"mlp.{a}.weight": f"mlp.{a}_proj.weight" for a in ("gate", "up", "down")},
    }
    used = set()

    def read(key, shape):
        used.add(key)
        array = state[key].numpy()
        return (array.T if array.ndim == 2 else array).reshape(shape)  # torch keeps [out, in]

    def value(path, variable):
        if path[0] == "embedding":
            used.add("model.embed_tokens.weight")
            return state["model.embed_tokens.weight"].numpy()
        if path[0] != "blocks":
            return read({"norm": "model.norm.weight", "unembedding": "lm_head.weight"}[path[0]], variable.shape)
        key = names[".".join(path[2:])]
        return np.stack([read(f"model.layers.{i}.{key}", variable.shape[1:]) for i in range(layers)])

    graph, abstract = nnx.split(nnx.eval_shape(make))
    flat = [(path, v.replace(jnp.asarray(value(path, v), v.dtype))) for path, v in nnx.to_flat_state(abstract)]
    left = set(state) - used - ({"lm_head.weight"} if options.get("tie_embeddings") else set())
    assert not left, f"weights that our model has no place for: {left}"
    return nnx.merge(graph, nnx.from_flat_state(flat))


@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_transformers(case):
    torch = pytest.importorskip("torch")
    name, options, mine = CASES[case]
    options = {"rms_norm_eps": 1e-6} | options
    theta, scaling = options.pop("rope_theta", 1e4), options.pop("scaling", None)
    model = theirs(name, theta, scaling, options)
    tokens = np.random.default_rng(0).integers(0, SIZES["vocab_size"], (3, 40))
    with torch.no_grad():
        expected = model(torch.tensor(tokens)).logits.numpy()

    mine = mine | {"rope_theta": theta, "rope_scaling": scaling, "norm_eps": options["rms_norm_eps"]}
    module = ours(model.state_dict(), **mine)
    batch = {"tokens": jnp.asarray(tokens, jnp.int32), "positions": jnp.tile(jnp.arange(40), (3, 1))}
    ctx = nn.Context(batch)
    logits = quick(lambda: module.logits(module.blocks(module.embedder(batch, ctx), ctx)[0]))()
    error = np.abs(np.asarray(logits) - expected).max()
    print(f"{case}: max |difference| {error:.1e}, logits' standard deviation {expected.std():.2f}")
    assert expected.std() > 0.5
    assert error < 5e-5


def test_a_wrong_option_would_be_seen():
    """The bar is far below what any one mistake costs."""
    torch = pytest.importorskip("torch")
    model = theirs("Llama", 1e4, None, {"rms_norm_eps": 1e-5})
    tokens = np.random.default_rng(0).integers(0, SIZES["vocab_size"], (3, 40))
    with torch.no_grad():
        expected = model(torch.tensor(tokens)).logits.numpy()
    batch = {"tokens": jnp.asarray(tokens, jnp.int32), "positions": jnp.tile(jnp.arange(40), (3, 1))}
    ctx = nn.Context(batch)
    for wrong in ({"norm_eps": 1e-6}, {"rope_theta": 9e3}, {"sliding_window": 39}):
        module = ours(model.state_dict(), **{"norm_eps": 1e-5} | wrong)
        logits = jax.jit(lambda m=module: m.logits(m.blocks(m.embedder(batch, ctx), ctx)[0]))()
        assert np.abs(np.asarray(logits) - expected).max() > 2e-4, wrong
