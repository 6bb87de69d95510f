"""One of two processes that save, meet a corrupt step, and restore. Run by test_processes.py."""

import logging
import sys
from pathlib import Path

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from shardtrain.checkpoint import Checkpointer, manifest
from shardtrain.errors import UserError
from shardtrain.host.files import sha256


def expected(step: int) -> np.ndarray:
    return np.random.default_rng(step).standard_normal((16, 8), np.float32)


def damage(path: Path) -> None:
    """So that only the process that hashes this file can tell."""
    content = bytearray(path.read_bytes())
    content[0] ^= 1
    path.write_bytes(content)


def main(port: str, index: int, directory: Path, report: Path) -> None:
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 4)
    jax.distributed.initialize(f"127.0.0.1:{port}", 2, index, cluster_detection_method="deactivate")
    logging.getLogger("shardtrain").setLevel(logging.ERROR)
    grid = jax.make_mesh((4, 2), ("fsdp", "tensor"), axis_types=(AxisType.Auto,) * 2)
    sharding = NamedSharding(grid, P("fsdp", "tensor"))
    abstract = {"w": jax.ShapeDtypeStruct((16, 8), np.float32, sharding=sharding)}

    hashed: list[str] = []
    manifest.sha256 = lambda path: hashed.append(str(path.relative_to(directory))) or sha256(path)
    lines = []
    with Checkpointer(directory) as checkpointer:
        for step in (1, 2):
            w = jax.make_array_from_callback((16, 8), sharding, lambda index, step=step: expected(step)[index])
            checkpointer.save(step, {"w": w}, {"step": step})
        for wanted in (2, 1):
            checkpointer.wait()
            hashed.clear()
            restored = checkpointer.restore(abstract)
            lines.append(f"hashed {' '.join(hashed)}")
            assert restored is not None
            assert (restored.step, restored.extra) == (wanted, {"step": wanted})
            for shard in restored.state["w"].addressable_shards:
                np.testing.assert_array_equal(shard.data, expected(wanted)[shard.index])
            lines.append(f"restored {restored.step}")
            if index == 0:
                damage(directory / str(wanted) / "state" / "_METADATA")
        try:
            checkpointer.restore(abstract)
        except UserError as error:
            lines.append(str(error))
    report.write_text("\n".join(lines))  # Gloo prints on stdout


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]), Path(sys.argv[4]))
