"""One of several processes: loads batches on two meshes and writes down what it read and holds.

python load.py ADDRESS PROCESSES PROCESS OUT
"""

import json
import os
import sys

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from shardtrain.data import Loader, SyntheticTokens

AXES = ("pipe", "data", "fsdp", "tensor")
MESHES = {"pipe outermost": (2, 2, 1, 2), "data outermost": (1, 2, 2, 2)}


class Recorded(SyntheticTokens):
    """Remembers which rows were asked for."""

    def __init__(self, **sizes: int):
        super().__init__(**sizes)
        self.read: set[int] = set()

    def __getitem__(self, row: int) -> dict[str, np.ndarray]:
        self.read.add(row)
        return super().__getitem__(row)


def load(sizes: tuple[int, ...], batches: int, **options: int) -> dict:
    """Returns the rows read, the state, and each shard of each batch as [start, content]."""
    source = Recorded(seq_len=4, vocab_size=50, seed=1, rows=options.pop("rows", 64))
    mesh = jax.make_mesh(sizes, AXES, (AxisType.Auto,) * 4)
    sharding = NamedSharding(mesh, P(("data", "fsdp")))
    with Loader(source, global_batch=8, seed=0, sharding=sharding, prefetch=0, **options) as loader:
        shards = []
        for _ in range(batches):
            batch = next(loader)
            assert batch["tokens"].shape == (8, 4)
            shards.append(
                {
                    name: [[s.index[0].start or 0, np.asarray(s.data).tolist()] for s in leaf.addressable_shards]
                    for name, leaf in batch.items()
                }
            )
        # Reading waits for one device alone. A process that left while another of its devices was still at it would
        # leave its peer in that collective for ever: seen once in 30 trials, with gdb.
        total = int(jax.block_until_ready(jax.jit(lambda tokens: tokens.sum())(batch["tokens"])))
    return {"read": sorted(source.read), "state": loader.state, "shards": shards, "total": total}


if __name__ == "__main__":
    address, processes, process, out = sys.argv[1:]
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 4)
    jax.distributed.initialize(
        address,
        int(processes),
        int(process),
        cluster_detection_method="deactivate",
        coordinator_bind_address=address,
        initialization_timeout=30,
    )
    with open(f"{out}.part", "w") as file:
        report = {name: load(sizes, 3) for name, sizes in MESHES.items()}
        report["ends"] = load(MESHES["data outermost"], 3, rows=19, epochs=1)
        json.dump(report, file)
    os.replace(f"{out}.part", out)
