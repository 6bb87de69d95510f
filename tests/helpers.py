"""What the tests of layers and models share."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from shardtrain.sharding import Partitioner
from shardtrain.sharding.mesh import MeshSpec

#: `jax.jit` that compiles twice as fast: for values, not for what the compiler does.
quick = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


@pytest.fixture
def x64() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


@pytest.fixture
def strict() -> Iterator[None]:
    with jax.numpy_dtype_promotion("strict"):
        yield


def partition(**sizes: int) -> Partitioner:
    """`partition(fsdp=4, tensor=2)`: a partitioner on eight devices with the default rules."""
    return Partitioner(MeshSpec(**sizes).build())


def filled(make: Callable[[], Any], std: float = 0.4, seed: int = 0) -> Any:
    """The module that `make` builds, every weight noise (around 1 for norms): no constant hides a bug.

    Drawn by NumPy, which compiles nothing.
    """
    rng = np.random.default_rng(seed)
    graph, state = nnx.split(nnx.eval_shape(make))

    def noise(v: nnx.Variable) -> nnx.Variable:
        mean = 1.0 if v.get_metadata().get("role") == "norm" else 0.0
        return v.replace(jnp.asarray(rng.normal(mean, std, v.shape), v.dtype))

    return nnx.merge(graph, jax.tree.map(noise, state, is_leaf=lambda v: isinstance(v, nnx.Variable)))


def packed_batch(rows: int, length: int, vocab: int, seed: int = 0) -> dict[str, jax.Array]:
    """A batch whose rows hold two packed documents each, with unequal token weights."""
    rng = np.random.default_rng(seed)
    cut = rng.integers(1, length, (rows, 1))
    place = np.arange(length)[None]
    second = place >= cut
    return {
        "tokens": jnp.asarray(rng.integers(0, vocab, (rows, length)), jnp.int32),
        "targets": jnp.asarray(rng.integers(0, vocab, (rows, length)), jnp.int32),
        "loss_mask": jnp.asarray(rng.integers(0, 3, (rows, length)), jnp.float32),
        "segment_ids": jnp.asarray(second + 1, jnp.int32),
        "positions": jnp.asarray(np.where(second, place - cut, place), jnp.int32),
        "row": jnp.arange(rows, dtype=jnp.int32),
    }


def equations(f: Callable[..., Any], *args: Any) -> list[Any]:
    """All equations of the traced program, those of inner programs included."""

    def inner(value: Any) -> bool:
        return hasattr(value, "eqns") or hasattr(value, "jaxpr")

    def walk(jaxpr: Any) -> Iterator[Any]:
        for equation in jaxpr.eqns:
            yield equation
            for value in jax.tree.leaves(equation.params, is_leaf=inner):
                if inner(value):
                    yield from walk(getattr(value, "jaxpr", value))

    return list(walk(jax.make_jaxpr(f)(*args).jaxpr))
