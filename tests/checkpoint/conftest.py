"""A training state with every kind of leaf, on any mesh, and what it takes to compare and to damage one."""

import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P


@jax.tree_util.register_dataclass
@dataclass
class State:
    params: dict
    opt_state: Any
    step: jax.Array
    key: jax.Array


def mesh_of(*shape: int) -> Mesh:
    axes = ("fsdp", "tensor")[: len(shape)]
    devices = np.array(jax.devices()[: int(np.prod(shape))]).reshape(shape)
    return Mesh(devices, axes, axis_types=(AxisType.Auto,) * len(axes))


def sharding_of(mesh: Mesh, leaf: Any) -> NamedSharding:
    if leaf.ndim != 2:
        return NamedSharding(mesh, P())
    return NamedSharding(mesh, P(*mesh.axis_names))


def build(seed: int) -> State:
    rng = np.random.default_rng(seed)
    params = {
        "embed": {"table": jnp.asarray(rng.standard_normal((32, 16)), jnp.float32)},
        "blocks": {"w": jnp.asarray(rng.standard_normal((16, 8)), jnp.bfloat16), "b": jnp.ones(5)},
    }
    return State(params, optax.adamw(1e-3).init(params), jnp.int32(seed), jax.random.key(seed))


@pytest.fixture
def make_state() -> Callable[..., State]:
    def make(seed: int, mesh: Mesh | None = None) -> State:
        mesh = mesh or mesh_of(4, 2)
        return jax.tree.map(lambda x: jax.device_put(x, sharding_of(mesh, x)), build(seed))

    return make


@pytest.fixture
def make_abstract() -> Callable[..., State]:
    def make(mesh: Mesh | None = None) -> State:
        mesh = mesh or mesh_of(4, 2)
        shapes = jax.eval_shape(lambda: build(0))
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding_of(mesh, x)), shapes)

    return make


@pytest.fixture
def mesh() -> Callable[..., Mesh]:
    return mesh_of


def content(tree: Any) -> list[tuple[str, str, tuple[int, ...], bytes]]:
    """Path, dtype, shape and bits of each leaf."""
    found = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        array = np.asarray(leaf)
        found.append((jax.tree_util.keystr(path), array.dtype.name, array.shape, array.tobytes()))
    return found


@pytest.fixture
def bits() -> Callable[[Any], list]:
    return content


def damage_file(path: Path, how: str, rng: np.random.Generator) -> None:
    size = path.stat().st_size
    if how == "delete":
        path.unlink()
    elif how == "truncate":
        with open(path, "r+b") as file:
            file.truncate(int(rng.integers(size)))
    elif how == "append":
        with open(path, "ab") as file:
            file.write(b"\0")
    else:
        assert how == "flip"
        offset, bit = int(rng.integers(size)), int(rng.integers(8))
        with open(path, "r+b") as file:
            file.seek(offset)
            byte = file.read(1)[0]
            file.seek(offset)
            file.write(bytes([byte ^ (1 << bit)]))


@pytest.fixture
def open_path() -> Iterator[Path]:
    """A folder that other users may enter: pytest's own is closed to them as a whole."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        yield Path(name)


@pytest.fixture
def damage() -> Callable[[Path, str, np.random.Generator], None]:
    return damage_file
