import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from shardtrain.checkpoint import names
from shardtrain.errors import UserError


def test_paths_are_dotted_and_free_of_container_types(make_state):
    state = make_state(1)
    paths = set(names.flatten(state))
    assert {"params.embed.table", "opt_state.0.mu.embed.table", "opt_state.0.count", "step", "key"} <= paths
    as_dicts = {
        "params": state.params,
        "opt_state": [{"count": state.opt_state[0].count, "mu": state.opt_state[0].mu, "nu": state.opt_state[0].nu}],
        "step": state.step,
        "key": state.key,
    }
    assert set(names.flatten(as_dicts)) == paths


def test_unflatten_inverts_flatten_whatever_the_order(make_state):
    state = make_state(1)
    leaves = dict(reversed(names.flatten(state).items()))
    restored = names.unflatten(state, leaves)
    assert jax.tree.structure(restored) == jax.tree.structure(state)
    assert all(a is b for a, b in zip(jax.tree.leaves(restored), jax.tree.leaves(state), strict=True))


def test_a_sgd_state_without_leaves_is_no_problem():
    params = {"w": jnp.ones(3)}
    assert list(names.flatten({"params": params, "opt_state": optax.sgd(0.1).init(params)})) == ["params.w"]


@pytest.mark.parametrize(
    ("tree", "message"),
    [
        ({"a.b": 1, "a": {"b": 2}}, "share the path 'a.b'"),
        (np.ones(3), "must be a container"),
    ],
)
def test_ambiguous_trees_are_refused(tree, message):
    with pytest.raises(UserError, match=message):
        names.flatten(tree)


def test_only_arrays_and_numbers_are_stored():
    assert names.storable("a", np.float16(2)).dtype == np.float16
    assert names.storable("a", 3).dtype == jnp.asarray(3).dtype
    with pytest.raises(UserError, match=r"cannot checkpoint model\.name: str"):
        names.storable("model.name", "llama")


def test_restoring_needs_a_sharding_and_a_dtype_that_jax_can_hold():
    with pytest.raises(UserError, match=r"cannot restore w: ShapeDtypeStruct carries no sharding"):
        names.restorable("w", jax.ShapeDtypeStruct((2,), jnp.float32))
    sharding = jnp.ones(2).sharding
    with pytest.raises(UserError, match="jax_enable_x64"):
        names.restorable("w", jax.ShapeDtypeStruct((2,), np.dtype("float64"), sharding=sharding))
    assert names.restorable("w", jnp.ones(2)).sharding == sharding
