"""Does it matter to training in how many bits the optimizer keeps its moments?

    python benchmarks/moments.py                     # 200 steps each, and docs/benchmarks/moments.{md,png}
    python benchmarks/moments.py --steps 8 --out /tmp/moments

The same model, data, seeds and schedule are run three times, with float32, bfloat16 and int8 moments
(`optim/moments.py`), on one device, with the text and optimizer of the quickstart. Losses and bytes repeat exactly on
one machine.
"""

from __future__ import annotations

import argparse
import datetime
import platform
import statistics
import sys
import tempfile
from pathlib import Path

import flax
import jax
import optax

from shardtrain.config import load_config
from shardtrain.metrics.log import read
from shardtrain.run import Trainer
from shardtrain.run.job import build

ROOT = Path(__file__).parent.parent
MOMENTS = {"float32": "#1f5fa8", "bfloat16": "#2e8b57", "int8": "#d1571f"}
SMALL = (
    *("mesh={}", "devices={platform: cpu, emulate: 1}", "model.n_layers=2", "data.seq_len=64"),
    *("data.held_out=0.02", "sample.tokens=0", "log.tensorboard=false", "checkpoint.every=100000", "eval.every=null"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--out", type=Path, default=ROOT / "docs/benchmarks", help="where moments.md and .png go")
    args = parser.parse_args()
    rows, curves = [], {}
    with tempfile.TemporaryDirectory() as scratch:
        for moments in MOMENTS:
            sizes = [f"run.steps={args.steps}", f"optimizer.schedule.warmup_steps={args.steps // 10}"]
            changes = [*SMALL, *sizes, f"run.dir={scratch}/{moments}", f"optimizer.moments={moments}"]
            config = load_config(ROOT / "configs/quickstart.yaml", changes)
            abstract = build(config).abstract_state()
            state, weights = jax.tree.leaves(abstract.opt_state), jax.tree.leaves(abstract.params)
            Trainer.from_config(config).fit()
            logged = read(f"{scratch}/{moments}")
            curves[moments] = [row["loss"] for row in logged if "loss" in row]
            held_out = next(row["eval_loss"] for row in reversed(logged) if "eval_loss" in row)
            final = statistics.mean(curves[moments][-20:])
            size = sum(a.size * a.dtype.itemsize for a in state) / sum(a.size for a in weights)
            rows.append(f"| {moments} | {size:.3f} | {final:.4f} | {held_out:.4f} |")
            print(rows[-1], flush=True)
    args.out.mkdir(parents=True, exist_ok=True)
    draw(curves, args.out / "moments.png")
    command = "python benchmarks/moments.py" + (f" --steps {args.steps}" if args.steps != 200 else "")
    versions = f"JAX {jax.__version__}, Flax {flax.__version__}, Optax {optax.__version__}"
    text = f"""# Moments in fewer bits

{datetime.date.today()}, {versions}, Python {platform.python_version()}, CPU.

    {command}

{args.steps} steps of AdamW on the text of the quickstart (2 layers, d 128, vocab 2048, 16 x 64 tokens per step), with
the same initial weights and batches each time. `training loss` is the mean of the last 20 steps.

| optimizer.moments | bytes of optimizer state per weight | training loss | held-out loss |
|---|---|---|---|
{chr(10).join(rows)}

![loss curves](moments.png)
"""
    (args.out / "moments.md").write_text(text)


def draw(curves: dict[str, list[float]], path: Path) -> None:
    """Loss by step, and below it the difference to float32."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), dpi=120, layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
    for moments, losses in curves.items():
        above.plot(losses, color=MOMENTS[moments], linewidth=1.2, label=moments)
        if moments != "float32":
            difference = [a - b for a, b in zip(losses, curves["float32"], strict=True)]
            below.plot(difference, color=MOMENTS[moments], linewidth=1)
    above.set_ylabel("training loss, nats")
    below.set_ylabel("minus float32's")
    below.set_xlabel("step")
    above.legend(frameon=False)
    for ax in (above, below):
        ax.grid(color="#e6e6e6", linewidth=0.8)
        ax.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)


if __name__ == "__main__":
    sys.exit(main())
