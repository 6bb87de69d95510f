"""The docstrings of the public names: every example runs, and every argument is described."""

import doctest
import inspect
import re
from types import FunctionType

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from shardtrain import nn

#: Those with a docstring of their own; the others are aliases of types.
DOCUMENTED = sorted(name for name in nn.__all__ if isinstance(getattr(nn, name), type | FunctionType))
ALIASES = {"Batch", "Implementation", "Loss"}


def test_only_aliases_have_no_docstring():
    assert set(nn.__all__) - set(DOCUMENTED) == ALIASES


@pytest.mark.parametrize("name", DOCUMENTED)
def test_the_example_runs(name):
    names = {"jax": jax, "jnp": jnp, "nn": nn, "nnx": nnx}
    example = doctest.DocTestParser().get_doctest(getattr(nn, name).__doc__, names, name, None, None)
    assert example.examples, f"nn.{name} has no example"
    said: list[str] = []
    failed, _ = doctest.DocTestRunner(verbose=False).run(example, out=said.append)
    assert not failed, "".join(said)


@pytest.mark.parametrize("name", DOCUMENTED)
def test_every_argument_is_described(name):
    documented = getattr(nn, name)
    described = set(re.findall(r"^ +(\w+): ", documented.__doc__, re.MULTILINE))
    called = documented.__init__ if inspect.isclass(documented) else documented
    arguments = set() if name == "Model" else set(inspect.signature(called).parameters)  # nobody calls a protocol
    assert arguments - {"self"} <= described
