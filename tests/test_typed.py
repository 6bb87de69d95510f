"""What Python does not check: an argument of another simple type than declared is refused by name."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import tiny
from shardtrain import MeshSpec, UserError, make_rules, make_train_step, open_source
from shardtrain.host.typed import is_of, typed
from shardtrain.models.llama import Llama


def llama(**options):
    return lambda: nnx.eval_shape(lambda: Llama(**{**tiny.SIZES, **options}, rngs=nnx.Rngs(0)))


def step(**options):
    return lambda: make_train_step(tiny.llama(), optax.sgd(0.1), tiny.partitioner(), **options)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (llama(n_heads="4"), "n_heads = 4: must be a whole number, not '4'; give one"),
        (llama(n_heads=None), "n_heads: must be a whole number, not None"),
        (llama(n_layers=2.0), "n_layers = 2.0: must be a whole number, not 2.0"),
        (llama(vocab_size="64"), "vocab_size = 64: must be a whole number, not '64'"),
        (llama(norm_eps="x"), "eps = x: must be a number, not 'x'"),
        (llama(attention="cudn"), "implementation = cudn: .*; did you mean cudnn?"),
        (lambda: MeshSpec(fsdp="2"), "fsdp = 2: must be a whole number, not '2'"),
        (lambda: MeshSpec(slow=3), "slow = 3: must be a mapping of text to a whole number, not 3"),
        (
            lambda: make_rules({"embed": 3}),
            r"overrides = \{.embed.: 3\}: must be a mapping of text to text or a list or None;",
        ),
        (lambda: make_rules({"embed": [3]}), "rules.embed = 3: there is no such mesh axis"),
        (lambda: open_source("synthetic", seq_len="8", vocab_size=9), "seq_len = 8: must be a whole number, not '8'"),
        (lambda: open_source(3, seq_len=8, vocab_size=9), "type = 3: must be text, not 3"),
        (step(gather="tock"), "gather = tock: must be one of tick, step, not 'tock'; did you mean tick"),
        (step(accumulate="2"), "accumulate = 2: must be a whole number, not '2'"),
        (step(lr=0.1), "lr = 0.1: must be a function or None, not 0.1"),
        (step(reduce_dtype="float33"), "reduce_dtype = float33: there is no such dtype"),
    ],
)
def test_an_argument_of_another_type_is_refused_by_name(call, message):
    with pytest.raises(UserError, match=message):
        call()


@pytest.mark.parametrize(
    ("value", "hint", "fits"),
    [
        (4, int, True),
        (np.int64(4), int, True),
        (True, int, False),
        (4, float, True),
        (jnp.float32(0.5), float, True),
        (jnp.ones(2), float, False),
        (None, int | None, True),
        ("a", Literal["a", "b"], True),
        (["a"], Literal["a", "b"], False),
        (np.array(["a", "b"]), Literal["a", "b"], False),
        (np.ones(2), Literal[1, 2], False),
        (True, Literal[1, 2], False),
        (1, Literal[True], False),
        (2, Literal[1, 2], True),
        (True, bool, True),
        (np.True_, bool, True),
        (np.True_, int, False),
        (1, bool, False),
        (len, Callable[[int], int] | float, True),
        (("a", "b"), Sequence[str], True),
        ({"a": None}, Mapping[str, str | None], True),
        ({"a": 1}, Mapping[str, str | None], False),
        (object(), Any, True),  # not a simple type: for the function to judge
        (object(), nnx.Module, True),
    ],
)
def test_what_has_a_type(value, hint, fits):
    assert is_of(value, hint) is fits


def test_further_arguments_are_left_to_the_function():
    @typed
    def total(first: int, *others: int, **named: int) -> int:
        return first + sum(others) + sum(named.values())

    assert total(1, 2, 3, last=4) == 10


def test_a_call_with_a_wrong_name_stays_pythons_own_error():
    with pytest.raises(TypeError, match="unexpected keyword argument 'tensr'"):
        make_rules(tensr=1)
