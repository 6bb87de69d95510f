"""What the compiler made of a training step: which collectives, over which mesh axes, in which loops."""

import re
from functools import cache

import jax
import jax.numpy as jnp
import pytest

import conftest
import tiny
from shardtrain.hlo import Collective, collectives
from shardtrain.optim import optimizer
from shardtrain.train.state import abstract_state
from shardtrain.train.step import make_train_step
from shardtrain.weights.paths import flatten

# Sizes that no weight has, so that a shape tells what it is of.
LAYERS, ROWS, LENGTH, VOCAB = 3, 80, 24, 112
#: Per layer: query, key, value, out, gate, up, down.
MATRICES = 7


@cache
def step_collectives(accumulate: int = 1, n_kv_heads: int = 2, **mesh: int) -> list[Collective]:
    place = tiny.partitioner(**mesh)
    model = tiny.llama(n_layers=LAYERS, vocab_size=VOCAB, n_kv_heads=n_kv_heads)
    tx = optimizer("adamw", model.weights, lr=1e-3, clip_norm=1.0)
    step = make_train_step(model, tx, place, accumulate=accumulate)
    batch = tiny.batch(place, rows=ROWS, length=LENGTH)
    program = step.lower(abstract_state(model, tx, place), batch).compile()
    return collectives(program.as_text(), place.mesh)


def big(shape: tuple[int, ...]) -> bool:
    return len(shape) > 1


def weight_shapes() -> set[tuple[int, ...]]:
    """Shapes of all weights, and of one layer of each stacked one."""
    weights = flatten(tiny.llama(n_layers=LAYERS, vocab_size=VOCAB).weights).values()
    return {w.shape for w in weights} | {w.shape[w.stack :] for w in weights}


def squeezed(shape: tuple[int, ...]) -> tuple[int, ...]:
    return shape[1:] if shape[:1] == (1,) else shape


def test_fsdp_gathers_weights_and_never_activations():
    found = step_collectives(fsdp=8)
    assert {c.kind for c in found} <= {"all-gather", "all-reduce", "reduce-scatter"}
    for c in found:
        for shape in filter(big, c.shapes):
            assert squeezed(shape) in weight_shapes(), c
    in_layers = [c for c in found if c.kind == "all-gather" and [loop.trips for loop in c.loops] == [LAYERS]]
    # Once per layer forward, once backward.
    assert sum(len(c.shapes) for c in in_layers) == 2 * MATRICES


@pytest.mark.parametrize("mesh", [{"data": 2, "fsdp": 2, "tensor": 2}, {"fsdp": 4, "tensor": 2}])
def test_fsdp_gathers_only_weights_beside_other_axes_too(mesh):
    rows_without_fsdp = ROWS // mesh.get("data", 1)
    for c in step_collectives(**mesh):
        if c.kind == "all-gather" and c.axes == {"tensor"}:  # a device's rows, of which it held a part of the sequence
            assert set(c.shapes) == {(rows_without_fsdp // mesh["fsdp"], LENGTH, tiny.SIZES["d_model"])}, c
        elif c.kind == "all-gather":
            assert c.axes == {"fsdp"}, c
            assert all(rows_without_fsdp not in shape and LENGTH not in shape for shape in c.shapes), c


def test_tensor_parallel_gathers_and_reduces_activations_twice_per_block_forward():
    found = [c for c in step_collectives(tensor=2) if big(c.shapes[0])]
    forward = [c for c in found if c.loops and not re.search("transpose|rematted", c.op_name)]
    # Where the compiler has a reduce-scatter (not on CPU), it takes the place of the all-reduce.
    assert sorted(c.kind for c in forward) == ["all-gather"] * 2 + ["all-reduce"] * 2
    assert {c.shapes for c in forward} == {((ROWS, LENGTH, tiny.SIZES["d_model"]),)}, forward
    assert {c.kind for c in found} == {"all-gather", "all-reduce"}
    # No logits, whole or in parts, ever travel.
    assert not any(VOCAB // n in shape for c in found for shape in c.shapes for n in (1, 2))


def test_context_parallel_sends_the_keys_and_values_of_groups_and_not_of_each_query_head():
    def keys(n_kv_heads: int) -> dict[str, int]:
        sent = {"all-gather": 0, "all-reduce": 0}
        for c in step_collectives(context=2, n_kv_heads=n_kv_heads):
            whole = (ROWS, LENGTH, n_kv_heads, tiny.SIZES["d_model"] // tiny.SIZES["n_heads"])
            for array in c.results:
                sent[c.kind] += array.bytes if sorted(array.shape) == sorted(whole) else 0
        return sent

    assert keys(4)["all-gather"] > 0 < keys(4)["all-reduce"]
    assert keys(4) == {kind: 2 * sent for kind, sent in keys(2).items()}


@pytest.mark.parametrize(
    ("mesh", "accumulate"),
    [({"data": 8}, 1), ({"data": 4}, 4), ({"data": 2, "fsdp": 2, "tensor": 2}, 2), ({"island": 2, "data": 2}, 2)],
)
def test_each_gradient_is_reduced_over_data_once_per_step(mesh, accumulate):
    found = [c for c in step_collectives(accumulate, **mesh) if c.axes & {"data", "island"}]
    assert {c.kind for c in found} == {"all-reduce"}
    weights = flatten(tiny.llama(n_layers=LAYERS, vocab_size=VOCAB).weights).values()
    if accumulate == 1:  # where it is made: a layer's beside the layer below's backward pass
        assert sum(a.bytes * c.times for c in found for a in c.results if a.shape) == sum(w.nbytes for w in weights)
        return
    assert all(c.loops == () for c in found), "a reduction over data inside of a loop"
    assert len([shape for c in found for shape in c.shapes if shape]) == len(weights)


def test_the_warning_that_the_suite_looks_for_is_really_printed(capfd):
    mesh = tiny.partitioner(data=2, fsdp=2, tensor=2).mesh

    def laid(x: jax.Array, *spec: object) -> jax.Array:
        return jax.lax.with_sharding_constraint(x, jax.NamedSharding(mesh, jax.P(*spec)))

    jax.jit(lambda x: laid(laid(x, ("data", "fsdp")) * 2, None, "data")).lower(jnp.ones((16, 32))).compile()
    assert conftest.REMATERIALIZATION in capfd.readouterr().err
