"""From process start to the first completed step: `shardtrain train` compared with the step of `floor.py`.

    python benchmarks/startup.py            # the quickstart, cold and warm, 3 rounds
    python benchmarks/startup.py --tiny     # a tiny model, one round: to see that the benchmark runs

Both train the same Llama on the same tokens, prepared beforehand, each in its own process and with its own
compilation cache: `cold` finds it empty, `warm` as the cold process left it. The clock stops when the loss of step 1 is
on standard output. Seconds are medians over the rounds, in which all processes take turns; `cpu s` is user and system
time until then and repeats better on a busy machine. The last lines are what `import shardtrain`, and all that a run
imports, add to importing jax, flax and optax.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

HERE = Path(__file__).parent
QUICKSTART = HERE.parent / "configs/quickstart.yaml"
TINY = ("model.d_model=32", "model.d_ff=64", "model.n_layers=2", "model.vocab_size=512", "data.seq_len=32")


@dataclasses.dataclass(frozen=True)
class Cost:
    """What a process took until it had printed a marker."""

    wall: float
    cpu: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--floor", nargs=2, help=argparse.SUPPRESS)  # resolved config, cache: be the floor's process
    args = parser.parse_args()
    if args.floor:
        run_floor(*args.floor)
    else:
        compare(1 if args.tiny else args.rounds, TINY if args.tiny else ())


def compare(rounds: int, overrides: tuple[str, ...]) -> None:
    """Print the table of ratios."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        data = prepare(folder, overrides)
        costs: dict[str, list[Cost]] = {}
        for turn in range(rounds):
            ours = folder / f"ours{turn}"
            ours.mkdir()
            for state in ("cold", "warm"):
                run = ours / state
                run.mkdir()
                (run / "data").symlink_to(data)
                train = [sys.executable, "-u", "-m", "shardtrain", "train", str(QUICKSTART), *overrides]
                costs.setdefault(f"shardtrain {state}", []).append(measure([*train, f"run.dir={run}"], "step   1/"))
                floor = [sys.executable, __file__, "--floor", str(folder / "config.json"), str(folder / f"floor{turn}")]
                costs.setdefault(f"floor {state}", []).append(measure(floor, "step 1"))
        print("first step   shardtrain s  floor s  ratio   cpu s  floor cpu s  ratio")
        for state in ("cold", "warm"):
            wall, cpu = ([median(costs[f"{who} {state}"], kind) for who in ("shardtrain", "floor")] for kind in KINDS)
            print(
                f"{state:12} {wall[0]:12.2f} {wall[1]:8.2f} {wall[0] / wall[1]:6.2f} "
                f"{cpu[0]:7.2f} {cpu[1]:12.2f} {cpu[0] / cpu[1]:6.2f}"
            )
    peers = "import jax, flax, optax"
    imports = {"": peers, "shardtrain": f"{peers}, shardtrain", "a run": f"{peers}, shardtrain.cli, shardtrain.run"}
    for code in list(imports.values()) * rounds:
        command = [sys.executable, "-c", f"{code}; print('done', flush=True)"]
        costs.setdefault(code, []).append(measure(command, "done"))
    _, *names = imports
    base, *ours = (median(costs[code], "wall") for code in imports.values())
    print(f"{peers}: {base:.2f} s; " + "; ".join(f"{n} {s - base:+.2f} s" for n, s in zip(names, ours, strict=True)))


KINDS = ("wall", "cpu")


def median(costs: list[Cost], kind: str) -> float:
    return statistics.median(getattr(cost, kind) for cost in costs)


def measure(command: list[str], marker: str) -> Cost:
    """Run a command until a line begins with `marker`, then end it."""
    start = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        clock = psutil.Process(process.pid)
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith(marker):
                times = clock.cpu_times()
                process.kill()
                return Cost(time.perf_counter() - start, times.user + times.system)
    sys.exit(f"{command} ended with {process.returncode} before it printed {marker!r}")


def prepare(folder: Path, overrides: tuple[str, ...]) -> Path:
    """Tokens for both, and the resolved config as JSON: preparing data is no matter of the step."""
    import json

    from shardtrain import load_config, open_source

    config = load_config(QUICKSTART, overrides)
    data = config.data
    open_source(
        data.type,
        seq_len=data.seq_len,
        vocab_size=config.model.options["vocab_size"],
        seed=config.run.seed,
        tokenizer=data.tokenizer,
        tokenizer_vocab=data.vocab_size,
        directory=folder / "data",
    )
    (folder / "config.json").write_text(json.dumps({**config.to_dict(), "tokens": str(folder / "data/tokens.bin")}))
    return folder / "data"


def run_floor(path: str, cache: str) -> None:
    """The first step as one would write it manually, importing only what it needs."""
    import json

    import jax

    from shardtrain.launch.cpu_collectives import order_collectives

    config: dict[str, Any] = json.loads(Path(path).read_text())
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", config["devices"]["emulate"])
    order_collectives()
    jax.config.update("jax_compilation_cache_dir", cache)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)

    import jax.numpy as jnp
    import numpy as np
    import optax

    import floor

    sizes, data, mesh_sizes = config["model"], config["data"], config["mesh"]
    names = ("n_layers", "d_model", "n_heads", "n_kv_heads", "d_ff", "vocab_size")
    shape = floor.Shape(**{name: sizes[name] for name in names})
    axes = ("data", "fsdp", "tensor")
    auto = (jax.sharding.AxisType.Auto,) * len(axes)
    mesh = jax.make_mesh([mesh_sizes[axis] for axis in axes], axes, auto)
    shardings = jax.tree.map(lambda spec: jax.NamedSharding(mesh, spec), floor.SPECS)
    steps, section = config["run"]["steps"], config["optimizer"]
    warmup = section["schedule"]["warmup_steps"]
    lr = optax.warmup_cosine_decay_schedule(0.0, section["lr"], warmup, steps, section["lr"] * 0.1)
    tx = optax.chain(optax.clip_by_global_norm(section["clip_norm"]), optax.adamw(lr, weight_decay=0.1))

    D, H, G, K, F, V = shape.d_model, shape.n_heads, shape.n_kv_heads, shape.head_dim, shape.d_ff, shape.vocab_size
    layer = {"query": (D, H, K), "key": (D, G, K), "value": (D, G, K), "out": (H, K, D)}
    layer |= {"gate": (D, F), "up": (D, F), "down": (F, D)}

    def init(key: jax.Array) -> Any:
        keys = iter(jax.random.split(key, 9))
        layers = {name: jax.random.normal(next(keys), (shape.n_layers, *s)) * 0.02 for name, s in layer.items()}
        layers |= {name: jnp.ones((shape.n_layers, D)) for name in ("attention_norm", "mlp_norm")}
        table, head = (jax.random.normal(next(keys), s) * 0.02 for s in ((V, D), (D, V)))
        params = {"embedding": table, "head": head, "norm": jnp.ones(D), "layers": layers}
        return params, tx.init(params)

    key = jax.random.key(config["run"]["seed"])
    opt_shardings = optax.tree.map_params(
        tx,
        lambda _, sharding: sharding,
        jax.eval_shape(init, key)[1],
        shardings,
        transform_non_params=lambda _: jax.NamedSharding(mesh, jax.P()),
    )
    params, opt_state = jax.jit(init, out_shardings=(shardings, opt_shardings))(key)
    batch_size, length = data["global_batch"], data["seq_len"]
    tokens = np.memmap(config["tokens"], np.uint16, "r")
    order = np.random.default_rng(0).permutation(len(tokens) // length - 1)[:batch_size]
    rows = np.stack([tokens[i * length : (i + 1) * length + 1] for i in order]).astype(np.int32)
    batch = {"tokens": rows[:, :-1], "targets": rows[:, 1:], "loss_mask": np.ones((batch_size, length), np.float32)}
    batch["positions"] = np.tile(np.arange(length, dtype=np.int32), (batch_size, 1))
    batch = jax.device_put(batch, jax.NamedSharding(mesh, floor.BATCH))
    *_, loss, _ = floor.make_step(tx, shape, mesh)(params, opt_state, batch)
    print(f"step 1 {float(loss):.4f}", flush=True)


if __name__ == "__main__":
    os.environ.pop("JAX_COMPILATION_CACHE_DIR", None)
    main()
