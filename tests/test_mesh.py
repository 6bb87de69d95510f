"""Meshes: sizes, the arithmetic of their errors, device order, and choosing devices in a fresh process."""

import math
import subprocess
import sys

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType

from shardtrain.errors import UserError
from shardtrain.launch.devices import select_devices
from shardtrain.sharding.mesh import AXES, MeshSpec, divisors, interleave

SIZES = st.lists(st.sampled_from([1, 1, 2, 3, 4, 5]), min_size=7, max_size=7)


def fits(text: str) -> MeshSpec:
    """The mesh that an error recommends, as a spec."""
    inside = text.partition("{")[2].partition("}")[0]
    return MeshSpec(**{axis: int(size) for axis, _, size in (item.partition(": ") for item in inside.split(", "))})


def test_axes_go_from_the_slowest_network_to_the_fastest():
    assert AXES == ("island", "pipe", "data", "fsdp", "expert", "context", "tensor")
    assert tuple(MeshSpec().sizes) == AXES


def test_build_keeps_all_axes_and_makes_them_auto():
    mesh = MeshSpec(fsdp=4, tensor=2).build()
    assert dict(mesh.shape) == dict.fromkeys(AXES, 1) | {"fsdp": 4, "tensor": 2}
    assert mesh.axis_types == (AxisType.Auto,) * 7
    assert [d.id for d in mesh.devices.flat] == [d.id for d in jax.devices()]


@pytest.mark.parametrize("axis", AXES)
def test_minus_one_takes_what_is_left(axis):
    other = "data" if axis != "data" else "tensor"
    assert MeshSpec(**{axis: -1, other: 2}).resolve(8).sizes[axis] == 4
    assert MeshSpec(**{axis: -1}).build().shape[axis] == 8


@given(SIZES, st.sampled_from(AXES))
def test_minus_one_finds_the_size_that_was_taken_out(sizes, axis):
    spec = MeshSpec(**dict(zip(AXES, sizes, strict=True)))
    free = MeshSpec(**(spec.sizes | {axis: -1}))
    assert free.resolve(math.prod(sizes)) == spec


@pytest.mark.parametrize(
    ("sizes", "devices", "parts"),
    [
        ({"fsdp": 3, "tensor": 2}, 8, ["devices, 8", "fsdp 3 x tensor 2 = 6", "{fsdp: 4, tensor: 2}"]),
        (
            {"data": -1, "tensor": 3},
            8,
            ["tensor 3", "must divide the devices, 8 (found); data takes the rest", "{data: 4, tensor: 2}"],
        ),
        ({"tensor": 16}, 8, ["tensor 16 = 16", "{tensor: 8}"]),
        ({}, 8, ["data 1 = 1", "{data: 8}"]),
        ({"fsdp": 2}, 1, ["devices, 1 (found)", "fsdp 2 = 2"]),
    ],
)
def test_a_mesh_that_does_not_fit_shows_the_arithmetic(sizes, devices, parts):
    with pytest.raises(UserError, match=r"nearest mesh that fits is") as error:
        MeshSpec(**sizes).resolve(devices)
    for part in parts:
        assert part in str(error.value)


@given(SIZES, st.integers(1, 64), st.sampled_from([None, *AXES]))
def test_the_recommended_mesh_fits(sizes, devices, free):
    spec = MeshSpec(**(dict(zip(AXES, sizes, strict=True)) | ({free: -1} if free else {})))
    fits(spec.nearest(devices)).resolve(devices)


@pytest.mark.parametrize("size", [0, -2])
def test_an_axis_size_is_positive_or_minus_one(size):
    with pytest.raises(UserError, match=rf"mesh.pipe = {size}: .*-1"):
        MeshSpec(pipe=size)


def test_two_free_axes_are_named():
    with pytest.raises(UserError, match=r"mesh.data and mesh.fsdp are all -1; at most one"):
        MeshSpec(data=-1, fsdp=-1)


@pytest.mark.parametrize(
    ("spec", "slow", "match"),
    [
        (
            {"data": 6},
            {"data": 4},
            r"mesh.slow.data = 4: .* must divide it, and mesh.data is 6; use one of \[1, 2, 3, 6\]",
        ),
        ({"data": -1}, {"data": 0}, r"mesh.slow.data = 0: .*use one of \[1\]"),
        ({"data": 4}, {"dta": 2}, "mesh.slow.dta = 2: there is no such mesh axis"),
    ],
)
def test_a_slow_factor_divides_a_known_axis(spec, slow, match):
    with pytest.raises(UserError, match=match):
        MeshSpec(**spec, slow=slow)


def test_a_slow_factor_is_checked_again_once_minus_one_is_known():
    with pytest.raises(UserError, match=r"mesh.slow.data = 3: .* must divide it, and mesh.data is 8"):
        MeshSpec(data=-1, slow={"data": 3}).build()


@settings(max_examples=50)
@given(st.lists(st.tuples(st.integers(1, 3), st.integers(1, 3)), min_size=1, max_size=5))
def test_interleave_keeps_each_slow_group_together(factors):
    slow, fast = zip(*factors, strict=True)
    merged = interleave(np.arange(math.prod(slow) * math.prod(fast)).reshape(slow + fast))
    assert merged.shape == tuple(s * f for s, f in factors)
    for group in np.ndindex(slow):
        block = merged[tuple(slice(g * f, (g + 1) * f) for g, f in zip(group, fast, strict=True))]
        first = block.flat[0]  # a group is one block of the mesh, and consecutive devices in order
        assert first % block.size == 0
        assert np.array_equal(block.ravel(), np.arange(first, first + block.size))


def test_slow_groups_of_emulated_devices_are_consecutive():
    # Two hosts of four: data crosses the hosts once, pipe not at all.
    mesh = MeshSpec(pipe=2, data=4, slow={"data": 2}).build()
    ids = np.vectorize(lambda d: d.id)(mesh.devices).reshape(2, 4)
    assert ids.tolist() == [[0, 1, 4, 5], [2, 3, 6, 7]]


def fresh(code: str) -> str:
    """What a new Python process prints; select_devices acts before JAX's backend starts."""
    head = "import jax\nfrom shardtrain.errors import UserError\nfrom shardtrain.launch.devices import select_devices\n"
    body = "".join(f"    {line}\n" for line in code.splitlines())
    program = f"{head}try:\n{body}except UserError as error:\n    print('UserError', error)"
    done = subprocess.run([sys.executable, "-W", "error", "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_emulated_devices_in_a_fresh_process():
    out = fresh(
        "print(len(select_devices(emulate=4)), jax.devices()[0].platform, jax.device_count())\n"
        "print(len(select_devices('cpu', 2)))\n"  # fewer than there are: the first ones
        "select_devices('cpu', 8)"  # more: too late
    ).splitlines()
    assert out[:2] == ["4 cpu 4", "2"]
    assert out[2].startswith("UserError devices.emulate is 8, but JAX already runs with 4 CPU devices")
    assert "start a fresh process" in out[2]


@pytest.mark.skipif(any(d.platform == "gpu" for d in jax.devices()), reason="needs a machine without a GPU")
def test_cuda_on_a_machine_without_one():
    out = fresh("select_devices('cuda')")
    assert out.startswith("UserError devices.platform is cuda, but JAX finds no such device here")
    assert "shardtrain[cuda12]" in out
    assert "devices.platform=cpu" in out


def test_another_platform_after_jax_started():
    try:
        with pytest.raises(UserError, match=r"platform is cuda, but JAX already runs on cpu.*fresh process"):
            select_devices("cuda")
    finally:
        jax.config.update("jax_platforms", "cpu")


def test_emulation_is_of_cpus_and_divides_over_processes():
    with pytest.raises(UserError, match=r"set devices.emulate=null or devices.platform=cpu"):
        select_devices("cuda", emulate=8)
    with pytest.raises(UserError, match=r"emulate 8 is not a multiple of the 3 processes"):
        select_devices(emulate=8, processes=3)
    assert select_devices(emulate=8) == jax.devices()


def test_divisors_are_all_of_them():
    for number in (1, 2, 36, 97, 360, 1024):
        assert divisors(number) == [each for each in range(1, number + 1) if number % each == 0]
    assert divisors(10**18)[:3] == [1, 2, 4]
