"""Fixtures, and helpers for modules and traced programs, that tests share."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

#: `jax.jit` that compiles twice as fast: for tests of values, not of the compiled program.
quick = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})


@pytest.fixture
def x64() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


@pytest.fixture
def strict() -> Iterator[None]:
    with jax.numpy_dtype_promotion("strict"):
        yield


def filled(make: Callable[[], Any], std: float = 0.4, seed: int = 0) -> Any:
    """The module that `make` builds, with noise in every weight (around 1 for norms), so that no constant hides a bug.

    NumPy draws it, so nothing is compiled.
    """
    rng = np.random.default_rng(seed)
    graph, state = nnx.split(nnx.eval_shape(make))

    def noise(v: nnx.Variable) -> nnx.Variable:
        mean = 1.0 if v.get_metadata().get("role") == "norm" else 0.0
        return v.replace(jnp.asarray(rng.normal(mean, std, v.shape), v.dtype))

    return nnx.merge(graph, jax.tree.map(noise, state, is_leaf=lambda v: isinstance(v, nnx.Variable)))


def equations(f: Callable[..., Any], *args: Any) -> list[Any]:
    """All equations of the traced program, including those of inner programs."""

    def inner(value: Any) -> bool:
        return hasattr(value, "eqns") or hasattr(value, "jaxpr")

    def walk(jaxpr: Any) -> Iterator[Any]:
        for equation in jaxpr.eqns:
            yield equation
            for value in jax.tree.leaves(equation.params, is_leaf=inner):
                if inner(value):
                    yield from walk(getattr(value, "jaxpr", value))

    return list(walk(jax.make_jaxpr(f)(*args).jaxpr))
