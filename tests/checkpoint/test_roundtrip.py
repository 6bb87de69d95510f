"""What is saved comes back, bit for bit, on any mesh."""

import threading

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from shardtrain.checkpoint import Checkpointer, load_weights, manifest, read_extra, store
from shardtrain.errors import UserError

EXTRA = {"config": {"run": {"name": "x"}}, "data_state": {"epoch": 0, "next_row": 2**40}, "lr": 1e-4}


@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize("asynchronous", [False, True])
def test_state_and_extra_come_back_bitwise(tmp_path, make_state, make_abstract, bits, compress, asynchronous):
    state = make_state(3)
    with Checkpointer(tmp_path, compress=compress, asynchronous=asynchronous) as checkpointer:
        assert checkpointer.restore(make_abstract()) is None
        assert checkpointer.latest() is None
        checkpointer.save(3, state, EXTRA)
        restored = checkpointer.restore(make_abstract())
        assert checkpointer.latest() == 3
    assert (restored.step, restored.extra) == (3, EXTRA)
    assert bits(restored.state) == bits(state)
    assert jax.tree.structure(restored.state) == jax.tree.structure(state)
    assert read_extra(tmp_path, 3) == EXTRA


@pytest.mark.parametrize("shapes", [((8, 1), (4, 2)), ((4, 2), (8, 1)), ((4, 2), (1,)), ((1,), (2, 4))])
def test_restored_straight_into_another_mesh(tmp_path, make_state, make_abstract, mesh, bits, shapes):
    source, target = (mesh(*shape) for shape in shapes)
    state, abstract = make_state(1, source), make_abstract(target)
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, state, {})
        restored = checkpointer.restore(abstract).state
    assert bits(restored) == bits(state)
    for leaf, wanted in zip(jax.tree.leaves(restored), jax.tree.leaves(abstract), strict=True):
        assert leaf.sharding.is_equivalent_to(wanted.sharding, leaf.ndim)
        assert leaf.committed


def test_buffers_may_be_donated_right_after_save(tmp_path, mesh):
    overwrite = jax.jit(lambda tree: jax.tree.map(lambda x: x * 0 - 7, tree), donate_argnums=0)
    grid = mesh(4, 2)
    specs = {"split": P("fsdp", "tensor"), "rows": P("fsdp"), "whole": P()}
    with Checkpointer(tmp_path, keep=1) as checkpointer:
        for step in range(1, 4):
            rng = np.random.default_rng(step)
            values = {name: rng.standard_normal((512, 1024), np.float32) for name in specs}
            state = {name: jax.device_put(values[name].copy(), NamedSharding(grid, specs[name])) for name in specs}
            abstract = {name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding) for name, x in state.items()}
            checkpointer.save(step, state, {})
            jax.block_until_ready(overwrite(state))
            assert state["whole"].is_deleted()
            restored = checkpointer.restore(abstract)
            assert restored.step == step
            for name in specs:
                np.testing.assert_array_equal(restored.state[name], values[name])


def test_save_returns_before_the_hashes_and_the_next_one_waits(tmp_path, make_state, monkeypatch):
    gate, order, write = threading.Event(), [], manifest.write

    def slow_write(directory, step):
        assert gate.wait(30)
        write(directory, step)
        order.append(f"hashed {step}")

    monkeypatch.setattr(manifest, "write", slow_write)
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(1, make_state(1), {})
        order.append("trained on")
        gate.set()
        checkpointer.save(2, make_state(2), {})
        order.append("saved 2")
        assert checkpointer.latest() == 2
    assert order == ["trained on", "hashed 1", "saved 2", "hashed 2"]


def test_container_types_do_not_matter_on_disk(tmp_path, make_state, make_abstract, bits):
    state, abstract = make_state(5), make_abstract()
    adam = abstract.opt_state[0]
    as_dicts = {
        "params": abstract.params,
        "opt_state": [{"count": adam.count, "mu": adam.mu, "nu": adam.nu}],
        "step": abstract.step,
        "key": abstract.key,
    }
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(5, state, {})
        restored = checkpointer.restore(as_dicts).state
    assert bits(restored["opt_state"][0]["mu"]) == bits(state.opt_state[0].mu)


def test_python_and_numpy_numbers_are_saved_as_arrays(tmp_path):
    state = {"count": 3, "rate": np.float32(0.5), "flag": True, "table": np.arange(4, dtype=np.int32)}
    abstract = jax.tree.map(lambda x: jnp.zeros_like(jnp.asarray(x)), state)
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(0, state, {})
        restored = checkpointer.restore(abstract).state
    assert jax.tree.map(lambda x: x.tolist(), restored) == {
        "count": 3,
        "rate": 0.5,
        "flag": True,
        "table": [0, 1, 2, 3],
    }


def test_a_cast_needs_the_flag_and_rounds_as_jax_does(tmp_path, make_state, make_abstract):
    state, abstract = make_state(2), make_abstract()
    table = abstract.params["embed"]["table"]
    narrow = jax.ShapeDtypeStruct(table.shape, jnp.bfloat16, sharding=table.sharding)
    abstract.params["embed"]["table"] = narrow
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(2, state, {})
        with pytest.raises(UserError, match=r"dtype: params\.embed\.table float32 != bfloat16 \(checkpoint.cast=true"):
            checkpointer.restore(abstract)
        restored = checkpointer.restore(abstract, cast=True).state
    np.testing.assert_array_equal(
        restored.params["embed"]["table"], state.params["embed"]["table"].astype(jnp.bfloat16)
    )


def test_another_model_is_refused_path_by_path(tmp_path, make_state, mesh):
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(2, make_state(2), {})
        other = {"w": jnp.zeros((32, 17)), "head": jnp.zeros(3)}
        abstract = {"params": {"embed": {"table": other["w"]}, "head": other["head"]}, "step": jnp.int32(0)}
        abstract["opt_state"] = optax.adamw(1e-3).init(abstract["params"])
        with pytest.raises(UserError) as caught:
            checkpointer.restore(abstract)
    message = str(caught.value)
    assert f"{tmp_path / '2'} does not fit this model" in message
    assert "missing: params.head float32 (3,)" in message
    assert "unexpected: key uint32 (2,)" in message
    assert message.splitlines()[-1] == "  ... and 3 more"


def test_a_wrong_shape_is_named(tmp_path, make_state, make_abstract):
    abstract = make_abstract()
    b = abstract.params["blocks"]["b"]
    abstract.params["blocks"]["b"] = jax.ShapeDtypeStruct((6,), b.dtype, sharding=b.sharding)
    with Checkpointer(tmp_path) as checkpointer:
        checkpointer.save(2, make_state(2), {})
        with pytest.raises(UserError, match=r"shape: params\.blocks\.b \(5,\) != \(6,\)"):
            checkpointer.restore(abstract)


def test_a_newer_format_is_refused(tmp_path, make_state, make_abstract, monkeypatch):
    with Checkpointer(tmp_path) as checkpointer:
        with monkeypatch.context() as future:
            future.setattr(store, "FORMAT_VERSION", 7)
            checkpointer.save(1, make_state(1), {})
        with pytest.raises(UserError, match=r"format_version 7, and this shardtrain reads up to 1"):
            checkpointer.restore(make_abstract())
        assert checkpointer.latest() == 1, "a newer format is not corruption"


def test_weights_alone_from_another_run(tmp_path, make_state, make_abstract, mesh, bits):
    state = make_state(9)
    with Checkpointer(tmp_path / "checkpoints") as checkpointer:
        checkpointer.save(9, state, {})
    before = sorted(tmp_path.rglob("*"))
    wanted = make_abstract(mesh(2)).params
    for directory, step in ((tmp_path, None), (tmp_path / "checkpoints", 9)):
        params = load_weights(directory, wanted, step)
        assert bits(params) == bits(state.params)
        assert params["embed"]["table"].sharding == wanted["embed"]["table"].sharding
    del wanted["embed"]
    with pytest.raises(UserError, match=r"unexpected: params\.embed\.table"):
        load_weights(tmp_path, wanted)
    with pytest.raises(UserError, match="not a directory"):
        load_weights(tmp_path / "nowhere", wanted)
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("extra", [{"a": object()}, {"a": {1, 2}}, {("a",): 1}])
def test_extra_must_be_json(tmp_path, make_state, extra):
    with Checkpointer(tmp_path) as checkpointer, pytest.raises(UserError, match="must be JSON"):
        checkpointer.save(1, make_state(1), extra)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("settings", [{"keep": 0}, {"keep_every": 0}])
def test_impossible_retention_is_refused(tmp_path, settings):
    with pytest.raises(UserError, match=r"checkpoint\.keep\w* = 0 must be at least 1"):
        Checkpointer(tmp_path, **settings)


def test_a_failed_save_does_not_hide_the_error_that_ended_the_run(tmp_path, make_state, monkeypatch, caplog):
    def write(directory, step):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(manifest, "write", write)

    def train():
        with Checkpointer(tmp_path) as checkpointer:
            checkpointer.save(1, make_state(1), {})
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train()
    assert "saving step 1" in caplog.text
    assert "there is no earlier checkpoint" in caplog.text
