"""A process that saves without end, to be killed; or that meets a full disk. Run by test_crash.py."""

import resource
import sys
from pathlib import Path

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from shardtrain import select_devices
from shardtrain.checkpoint import Checkpointer
from shardtrain.errors import UserError


def sharding() -> NamedSharding:
    return NamedSharding(jax.make_mesh((8,), ("fsdp",), axis_types=(AxisType.Auto,)), P("fsdp"))


def expected(step: int) -> np.ndarray:
    return np.random.default_rng(step).standard_normal((2048, 512), np.float32)


def state(step: int) -> dict:
    return {"params": {"w": jax.device_put(expected(step), sharding())}}


def abstract() -> dict:
    return {"params": {"w": jax.ShapeDtypeStruct((2048, 512), np.float32, sharding=sharding())}}


def train_until_killed(directory: Path) -> None:
    with Checkpointer(directory) as checkpointer:
        restored = checkpointer.restore(abstract())
        start = restored.step if restored else 0
        if restored:
            np.testing.assert_array_equal(restored.state["params"]["w"], expected(start))
        print("resumed", start, flush=True)
        for step in range(start + 1, 10**6):
            checkpointer.save(step, state(step), {"step": step})
            print("trusted", step - 1, flush=True)  # save has waited for the one before


def meet_a_file_size_limit(directory: Path) -> None:
    with Checkpointer(directory) as checkpointer:
        checkpointer.save(1, state(1), {})
        checkpointer.wait()
        resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, resource.RLIM_INFINITY))
        checkpointer.save(2, state(2), {})
        try:
            checkpointer.save(3, state(3), {})
        except UserError as error:
            print(error, flush=True)
        else:
            raise AssertionError("the failed save of step 2 went unnoticed")
        restored = checkpointer.restore(abstract())
        assert restored is not None
        assert restored.step == 1
        np.testing.assert_array_equal(restored.state["params"]["w"], expected(1))
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        checkpointer.save(3, state(3), {})
        assert checkpointer.latest() == 3
    print("recovered", flush=True)


if __name__ == "__main__":
    select_devices("cpu", emulate=8)
    {"train": train_until_killed, "limit": meet_a_file_size_limit}[sys.argv[1]](Path(sys.argv[2]))
