"""The time and memory for compiling the train step of a large config ahead of time, without making any array.

    python benchmarks/aot.py                     # the 70B config on 512 emulated devices, on three meshes
    python benchmarks/aot.py configs/llama_8b.yaml mesh.data=4 mesh.fsdp=16 --devices 64
    python benchmarks/aot.py --tiny              # a tiny model: to see that the benchmark runs

Each config compiles in a separate process, without a compilation cache. `peak` is the largest resident memory of the
process. `state` and `temp` are bytes per device, as XLA counts them for the CPU program, whose temporaries differ from
those on a GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path

CONFIGS = Path(__file__).parent.parent / "configs"
LARGE = (
    (),
    ("mesh={data: 1, fsdp: 64, tensor: 8, slow: {}}",),
    ("mesh={pipe: 4, data: 1, fsdp: 16, tensor: 8, slow: {}}", "optimizer.accumulate=1", "pipeline.microbatches=16"),
)
TINY = ("model.d_model=32", "model.d_ff=64", "model.n_layers=2", "model.vocab_size=512", "data.seq_len=32")
PHASES = ("import", "build", "trace", "lower", "compile")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", nargs="?", default=str(CONFIGS / "llama_70b.yaml"))
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    parser.add_argument("--devices", type=int, default=512)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--json", action="store_true", help="one JSON object a line instead of the table")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)  # the process of one row
    args = parser.parse_args()
    if args.one:
        print(json.dumps(compile_step(args.config, args.devices, args.overrides)))
        return
    if args.tiny:
        args.config, args.devices, meshes = str(CONFIGS / "quickstart.yaml"), 8, (TINY,)
    else:
        meshes = LARGE if args.config.endswith("llama_70b.yaml") and not args.overrides else (tuple(args.overrides),)
    if not args.json:
        print(
            f"{'mesh':36} {' '.join(f'{phase:>7}' for phase in PHASES)}  cpu s  peak GiB  HLO ops  state GiB  temp GiB"
        )
    for overrides in meshes:
        command = [sys.executable, __file__, "--one", f"--devices={args.devices}", args.config, *overrides]
        env = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
        row = json.loads(subprocess.run(command, env=env, check=True, stdout=subprocess.PIPE, text=True).stdout)
        if args.json:
            print(json.dumps(row), flush=True)
            continue
        print(
            f"{row['mesh']:36} {' '.join(f'{row[phase]:7.2f}' for phase in PHASES)} {row['cpu']:6.1f} "
            f"{row['peak'] / 2**30:9.2f} {row['ops']:8,} {row['state'] / 2**30:10.2f} {row['temp'] / 2**30:9.2f}",
            flush=True,
        )


def compile_step(path: str, devices: int, overrides: list[str]) -> dict[str, float | str]:
    """Seconds of each phase, bytes, and the number of instructions of the compiled step."""
    clock = [time.perf_counter()]

    def lap() -> float:
        clock.append(time.perf_counter())
        return clock[-1] - clock[-2]

    import jax
    import numpy as np

    from shardtrain import build, load_config, open_source

    seconds = [lap()]
    job = build(load_config(path, ["devices.platform=cpu", f"devices.emulate={devices}", *overrides]))
    data, place = job.config.data, job.partitioner
    source, _ = open_source("synthetic", seq_len=data.seq_len, vocab_size=job.config.model.size("vocab"))
    rows = {**source[0], "row": np.int32(0)}
    batch = {
        name: jax.ShapeDtypeStruct(
            (data.global_batch, *np.shape(leaf)), leaf.dtype, sharding=place.sharding(("batch", "seq")[: leaf.ndim + 1])
        )
        for name, leaf in rows.items()
    }
    step, state = job.train_step(), job.abstract_state()
    seconds.append(lap())
    traced = step.trace(state, batch)
    seconds.append(lap())
    lowered = traced.lower()
    seconds.append(lap())
    compiled = lowered.compile()
    seconds.append(lap())
    memory = compiled.memory_analysis()
    return {
        "mesh": " ".join(f"{axis}={size}" for axis, size in place.mesh.shape.items() if size > 1),
        **dict(zip(PHASES, seconds, strict=True)),
        "cpu": time.process_time(),
        "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024),
        "ops": compiled.as_text().count(" = "),
        "state": memory.argument_size_in_bytes,
        "temp": memory.temp_size_in_bytes,
    }


if __name__ == "__main__":
    main()
