"""What a user's functions return: refused by name where it is wrong, while the step is traced, before anything runs."""

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx

import tiny
from shardtrain import nn
from shardtrain.errors import UserError
from shardtrain.models.llama import Llama
from shardtrain.nn.returned import RESERVED
from shardtrain.pipeline import schedules
from shardtrain.train.model_def import ModelDef
from shardtrain.train.state import abstract_state
from shardtrain.train.step import make_eval_step, make_train_step

ONE = jnp.ones(())
EVERYWHERE = pytest.mark.parametrize(("kind", "pipe"), [(k, p) for k in ("train", "eval") for p in (1, 2)])


class Lm(Llama):
    """A tiny Llama whose head returns what `change` makes of it."""

    change = staticmethod(lambda *loss: loss)

    def __init__(self, rngs):
        super().__init__(**tiny.SIZES, rngs=rngs)

    def head(self, x, batch, ctx):
        return type(self).change(*super().head(x, batch, ctx))


class Block(nnx.Module):
    """A block that returns what `change` makes of `(x, aux)`."""

    change = staticmethod(lambda x: (x, {}))

    def __init__(self, rngs):
        self.mlp = nn.GatedMLP(32, 64, rngs=rngs)

    def __call__(self, x, ctx):
        return type(self).change(x + self.mlp(x, ctx))


def with_head(change) -> type:
    return type("Odd", (Lm,), {"change": staticmethod(change)})


def with_block(change, block: type = Block) -> type:
    odd = type("OddBlock", (block,), {"change": staticmethod(change)})

    def init(self, rngs):
        Lm.__init__(self, rngs)
        self.blocks = nn.Stack(odd, 2, rngs=rngs)

    return type("Odd", (Lm,), {"__init__": init})


def trace(module, kind="train", pipe=1, loss=None, **options):
    """Trace a step, as its first call would."""
    place, tx = tiny.partitioner(pipe=pipe), optax.sgd(0.1)
    model = ModelDef(module, schedule=schedules.make("1f1b", 2, 4) if pipe > 1 else None)
    if kind == "eval":
        step = make_eval_step(model, place, loss=loss)
    else:
        step = make_train_step(model, tx, place, loss=loss, **options)
    return step.lower(abstract_state(model, tx, place), tiny.batch(place))


@EVERYWHERE
def test_a_metric_may_not_take_the_name_of_the_loss(kind, pipe):
    with pytest.raises(UserError, match=r"Odd.head returned, among its metrics, 'loss', which is how the step"):
        trace(with_head(lambda loss, weight, metrics: (loss, weight, {"loss": (ONE, ONE)})), kind, pipe)


@EVERYWHERE
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("loss", "returned, among its auxiliary terms, 'loss'"),
        ("cross_entropy", "names a metric of the head and an auxiliary term"),
    ],
)
def test_an_auxiliary_term_may_not_take_a_name_that_is_taken(kind, pipe, name, message):
    with pytest.raises(UserError, match=message):
        trace(with_block(lambda x: (x, {name: (x.sum(), ONE)})), kind, pipe)


@pytest.mark.parametrize("name", [*RESERVED, "eval_loss"])
def test_no_name_of_the_step_or_the_log_may_be_taken(name):
    def loss(module, batch, ctx):
        return ONE, ONE, {name: (ONE, ONE)}

    with pytest.raises(UserError, match=f"the loss function loss returned, among its metrics, '{name}'"):
        trace(Lm, loss=loss)


def test_every_metric_of_a_step_is_reserved_or_the_models():
    _, metrics = trace(Lm, lr=lambda count: 0.1 * count).out_info
    assert {*metrics} - {*RESERVED} == {"cross_entropy"}


HEADS = {
    "a scalar": (lambda loss, weight, metrics: loss, r"returned float32\[\], but must return \(loss_sum, weight_sum"),
    "nothing": (lambda loss, weight, metrics: None, r"returned None, but must return \(loss_sum"),
    "a mean": (lambda loss, weight, metrics: (loss / weight, metrics), "returned a tuple of .* must return"),
    "a loss per row": (
        lambda loss, weight, metrics: (jnp.ones(16), weight, {}),
        r"loss_sum of Odd.head is float32\[16\]",
    ),
    "no weight": (lambda loss, weight, metrics: (loss, None, {}), "weight_sum of Odd.head is None, but must be a"),
    "a list of metrics": (lambda loss, weight, metrics: (loss, weight, [loss]), "a dict of .* pairs"),
    "a metric without weight": (
        lambda loss, weight, metrics: (loss, weight, {"a": loss}),
        "for the metric 'a', but must",
    ),
    "a metric without name": (
        lambda loss, weight, metrics: (loss, weight, {1: (loss, weight)}),
        "for a name of its metrics 1; a name is text",
    ),
}


@pytest.mark.parametrize("case", HEADS)
def test_what_a_head_returns(case):
    change, message = HEADS[case]
    with pytest.raises(UserError, match=f"Odd.head.*{message}|{message}"):
        trace(with_head(change))
    with pytest.raises(UserError, match="the loss function <lambda>"):
        trace(Lm, loss=lambda module, batch, ctx: change(ONE, ONE, {}))


BLOCKS = {
    "x alone": (lambda x: x, r"OddBlock returned float32\[16, 16, 32\], but a block must return \(x, aux\)"),
    "no aux": (lambda x: (x, None), "OddBlock returned None for its auxiliary terms"),
    "a shorter x": (
        lambda x: (x[:, :8], {}),
        r"was given x of float32\[16, 16, 32\] and returned one of float32\[16, 8",
    ),
    "another dtype": (lambda x: (x.astype(jnp.bfloat16), {}), "returned one of bfloat16"),
    "aux without weight": (lambda x: (x, {"a": x.sum()}), "for the auxiliary term 'a', but must return a"),
}


@pytest.mark.parametrize("case", BLOCKS)
def test_what_a_block_returns(case):
    change, message = BLOCKS[case]
    with pytest.raises(UserError, match=message):
        trace(with_block(change))


def test_what_a_block_returns_in_a_pipeline():
    with pytest.raises(UserError, match="OddBlock returned float32"):
        trace(with_block(lambda x: x), pipe=2)


@pytest.mark.parametrize("pipe", [1, 2])
@pytest.mark.parametrize("returned", [None, jnp.ones((8, 16))])
def test_what_an_embedder_returns(pipe, returned):
    odd = type("Odd", (Lm,), {"embedder": lambda self, batch, ctx: returned})
    with pytest.raises(UserError, match=r"Odd.embedder returned .*, but must return arrays with a first dim"):
        trace(odd, pipe=pipe)


def test_sums_of_a_user_are_added_up_in_float32():
    def loss(module, batch, ctx):
        narrow = jnp.ones((), jnp.bfloat16) * batch["tokens"].sum().astype(jnp.bfloat16)
        return narrow, narrow, {"a": (narrow, narrow)}

    for step in (trace(Lm, loss=loss).out_info[1], trace(Lm, "eval", loss=loss).out_info):
        found = {name: leaf.dtype for name in ("loss", "a") for leaf in jax.tree.leaves(step[name])}
        assert {str(dtype) for dtype in found.values()} == {"float32"}


class Sower(Block):
    def __call__(self, x, ctx):
        self.sow(nnx.Intermediate, "seen", x.sum())
        return super().__call__(x, ctx)


@EVERYWHERE
@pytest.mark.filterwarnings("ignore:Using 'Module.sow")
def test_what_is_sown_is_refused(kind, pipe):
    class SowingHead(Lm):
        def head(self, x, batch, ctx):
            self.sow(nnx.Intermediate, "seen", x.sum())
            return super().head(x, batch, ctx)

    for module in (SowingHead, with_block(lambda x: (x, {}), Sower)):
        with pytest.raises(UserError, match=r"keeps seen, an Intermediate .*return it as a metric"):
            trace(module, kind, pipe)


@pytest.mark.filterwarnings("ignore:Using 'Module.sow")
def test_what_a_loss_function_sows_is_refused():
    def loss(module, batch, ctx):
        module.sow(nnx.Intermediate, "seen", ONE)
        return ONE, ONE, {}

    with pytest.raises(UserError, match="keeps seen, an Intermediate"):
        trace(Lm, loss=loss)


def test_a_bare_array_in_a_module_is_refused():
    class Table(Lm):
        def __init__(self, rngs):
            super().__init__(rngs)
            self.table = jnp.ones((4, 2))

    class TableBlock(Block):
        def __init__(self, rngs):
            super().__init__(rngs)
            self.table = jnp.ones((4, 2))

    for module in (Table, with_block(lambda x: (x, {}), TableBlock)):
        with pytest.raises(UserError, match=r"keeps a bare array, float32\[4, 2\], as its attribute table; declare a"):
            ModelDef(module)
