"""What a model states in addition to its parts: which options are sizes, and its FLOPs."""

import pytest
from flax import nnx

import tiny
from shardtrain import nn
from shardtrain.errors import UserError
from shardtrain.metrics import transformer_flops_per_token
from shardtrain.models.llama import Llama
from shardtrain.models.mlp import MLP
from shardtrain.nn.sizes import SIZE_OPTIONS, flops_per_token, size_options
from shardtrain.pipeline import schedules
from shardtrain.train.model_def import ModelDef

D, F, V = (tiny.SIZES[name] for name in ("d_model", "d_ff", "vocab_size"))
KV = D // 2  # two key and value heads for four query heads
LAYER = 2 * D * D + 2 * D * KV + 3 * D * F


@pytest.mark.parametrize("options", [{}, {"tie_embeddings": True}, {"qkv_bias": True, "head_dim": 16}], ids=str)
@pytest.mark.parametrize("pipe", [1, 2])
def test_the_flops_of_a_llama_are_those_of_its_matmuls_and_its_attention(options, pipe):
    schedule = schedules.make("1f1b", 2, 2, 1) if pipe > 1 else None
    model = ModelDef(lambda rngs: Llama(**tiny.SIZES, **options, rngs=rngs), schedule=schedule)
    head_dim = options.get("head_dim", D // 4)
    matmul = 2 * (LAYER + (3 * D * (head_dim - D // 4) * 4)) + D * V
    expected = transformer_flops_per_token(matmul, n_layers=2, n_heads=4, head_dim=head_dim, seq_len=24)
    assert flops_per_token(model.outline({}), 24) == expected


def test_a_model_that_states_nothing_has_the_flops_of_its_matmuls():
    module = nnx.eval_shape(lambda: MLP(n_layers=3, d_model=4, d_ff=6, vocab_size=10, rngs=nnx.Rngs(0)))
    assert flops_per_token(module, 8) == flops_per_token(module, 16) == 6 * (3 * 3 * 4 * 6 + 4 * 10)
    positions = nn.PositionEmbedding(9, 4, rngs=nnx.Rngs(0))
    assert nn.matmul_flops(positions) == 0


class Own:
    size_options = {"embed": "hidden_size", "state": "d_state"}  # noqa: RUF012

    def __init__(self, *, hidden_size: int, d_state: int, vocab_size: int, rngs): ...


def test_a_class_states_the_options_whose_names_are_not_the_usual_ones():
    assert size_options(Llama) == SIZE_OPTIONS
    assert size_options(Own) == {**SIZE_OPTIONS, "embed": "hidden_size", "state": "d_state"}


@pytest.mark.parametrize(
    ("stated", "message"),
    [
        ({"embed": "hiden_size"}, "names 'hiden_size' as the size of 'embed', .* did you mean hidden_size?"),
        (["hidden_size"], r"Other.size_options is a list of \('hidden_size'\), but must map logical axes to options"),
    ],
)
def test_a_wrong_statement_is_refused(stated, message):
    with pytest.raises(UserError, match=message):
        size_options(type("Other", (Own,), {"size_options": stated}))
