"""Declarations: what a weight says about itself, and what plain Flax layers say."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from shardtrain.errors import UserError
from shardtrain.nn.param import describe, param, stacked
from shardtrain.weights.weight import Weight

ZEROS = jax.nn.initializers.zeros


def declared(shape=(4, 2, 3), axes=("embed", "heads", None), **options):
    return nnx.eval_shape(lambda: param(jax.random.key(0), shape, axes, ZEROS, jnp.float32, **options))


def test_a_declaration_is_one_line_and_is_read_back():
    weight = describe(declared(role="head", inputs=1))
    assert weight == Weight((4, 2, 3), jnp.dtype("float32"), ("embed", "heads", None), "head", stack=0, inputs=1)
    assert (weight.size, weight.nbytes) == (24, 96)


@pytest.mark.parametrize(("stack", "inputs"), [(0, 1), (1, 2), (3, 1), (1, 0)])
def test_dims_are_stack_then_inputs_then_outputs(stack, inputs):
    weight = Weight((2,) * 5, jnp.float32, (None,) * 5, "matrix", stack=stack, inputs=inputs)
    assert weight.input_dims + weight.output_dims == tuple(range(stack, 5))
    assert len(weight.input_dims) == inputs


def test_stacking_prepends_layers_and_shifts_the_dims():
    one = describe(declared(inputs=1, role="router"))
    many = describe(stacked(declared((7, 4, 2, 3), (None,) * 4), one))
    assert (many.axes, many.stack, many.role) == (("layers", *one.axes), 1, "router")
    assert (many.input_dims, many.output_dims) == ((1,), (2, 3))


def test_a_scalar_is_annotated_too():
    assert describe(declared((), (), role="bias")).annotated


def test_mistakes_are_named():
    with pytest.raises(UserError, match=r"shape \(4, 2\) needs 2 logical axes, not \('embed',\)"):
        declared((4, 2), ("embed",))
    with pytest.raises(UserError, match="role 'kernel' is not one of matrix, embedding, head, norm, bias, router"):
        declared(role="kernel")
    for size in (0, -2):
        with pytest.raises(UserError, match=rf"shape \(4, {size}, 3\) has no elements; give each of its dims"):
            declared((4, size, 3))


def test_plain_flax_layers():
    init = nnx.with_partitioning(nnx.initializers.ones_init(), ("embed", "mlp"))
    with nnx.use_eager_sharding(False):
        named, bare = nnx.eval_shape(lambda: nnx.Linear(4, 6, kernel_init=init, rngs=nnx.Rngs(0))), None
        bare = nnx.eval_shape(lambda: nnx.Linear(4, 6, rngs=nnx.Rngs(0)))
    kernel = describe(named.kernel)
    assert (kernel.axes, kernel.annotated, kernel.role, kernel.input_dims) == (("embed", "mlp"), True, "matrix", (0,))
    assert not describe(bare.kernel).annotated
    bias = describe(bare.bias)
    assert (bias.axes, bias.annotated, bias.role, bias.output_dims) == ((None,), False, "bias", (0,))
