"""Every config of `configs/` can be built for its own number of devices, without making a single array."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

CONFIGS = Path(__file__).parent.parent / "configs"
DEVICES = {"quickstart": 8, "llama_125m": 1, "llama_1b": 8, "llama_8b": 64, "llama_70b": 512}
#: Parameters, counted by hand from the published shapes, in billions.
PUBLISHED = {"llama_1b": 1.236, "llama_8b": 8.030, "llama_70b": 70.554}

BUILD = """
import json, math, sys
import jax
from shardtrain import build, load_config, select_devices
from shardtrain.weights.paths import flatten

select_devices("cpu", 512)
for name, devices in json.loads(sys.argv[1]).items():
    path = f"{sys.argv[2]}/{name}.yaml"
    job = build(load_config(path, ["devices.platform=cpu", f"devices.emulate={devices}"]))
    state = job.abstract_state()
    held = sum(
        leaf.dtype.itemsize * math.prod(leaf.sharding.shard_shape(leaf.shape)) for leaf in jax.tree.leaves(state)
    )
    count = sum(weight.size for weight in flatten(job.model.weights).values())
    mesh = job.partitioner.mesh
    print(json.dumps([name, mesh.size, mesh.shape["data"], count, held, len(jax.live_arrays())]))
"""


@pytest.fixture(scope="module")
def built() -> dict[str, list]:
    command = [sys.executable, "-c", BUILD, json.dumps(DEVICES), str(CONFIGS)]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    return {row[0]: row[1:] for row in map(json.loads, run.stdout.splitlines())}


def test_all_configs_are_covered():
    assert set(DEVICES) == {path.stem for path in CONFIGS.glob("*.yaml")}


@pytest.mark.parametrize("name", DEVICES)
def test_a_config_initialises_abstractly_on_its_mesh(built, name):
    devices, data, count, held, arrays = built[name]
    assert devices == DEVICES[name]
    assert arrays == 0
    assert held < 60 * 2**30  # parameters and optimizer state on one device, bytes
    # float32 weights and two moments, split over all devices but along `data`, where they are whole by intent
    assert held < 1.1 * 12 * count / (devices // data) + 2**20
    if name in PUBLISHED:
        assert count / 1e9 == pytest.approx(PUBLISHED[name], abs=5e-4)
