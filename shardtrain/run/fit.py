"""Training in three lines: a model, rows, a directory."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
from flax import nnx

from shardtrain.config import given, parse_config
from shardtrain.data import Source, as_source
from shardtrain.errors import UserError
from shardtrain.host.typed import typed
from shardtrain.metrics import progress
from shardtrain.run.trainer import Trainer
from shardtrain.train.callbacks import Callback
from shardtrain.train.loss_sums import LossFunction
from shardtrain.train.model_def import ModelDef
from shardtrain.weights.paths import flatten


@typed
def fit(
    model: Callable[[nnx.Rngs], nnx.Module],
    source: Any,
    loss: LossFunction | None = None,
    *,
    directory: str | Path,
    steps: int,
    global_batch: int,
    lr: float = 1e-3,
    held_out: float = 0.0,
    callbacks: Sequence[Callback] = (),
    show: bool = True,
    **sections: Mapping[str, Any],
) -> Trainer:
    """Train a model on rows, or resume where the directory holds checkpoints.

    It makes the `Trainer` of a config, with a mesh that splits rows over all devices unless `mesh` says otherwise.

    Args:
      model: builds the module from `nnx.Rngs`. It chooses its own dtypes.
      source: the rows, see `shardtrain.data.as_source`.
      loss: `(module, batch, ctx) -> (loss_sum, weight_sum, metrics)`, for a module that does not follow `nn.Model`.
      directory: the run directory.
      steps: the step to train up to.
      global_batch: rows in a batch, over all devices.
      lr: the learning rate, before its schedule.
      held_out: the fraction of rows, at the end, for evaluation; in whole batches where rows have no `loss_mask`.
      callbacks: see `Callback`.
      show: whether to show progress.
      sections: any other section of a config, such as `mesh={"fsdp": 4}` or `checkpoint={"every": 20}`.

    Returns:
      The finished trainer; `state` has the weights, `job.model` the definition.

    Raises:
      UserError: see `Trainer.from_config`.
    """
    definition = ModelDef(model)
    rows = as_source(source, _vocab_size(definition))
    first = rows[0]
    if held_out > 0 and global_batch > 0 and "loss_mask" not in first:
        held_out = _in_whole_batches(held_out, rows, global_batch)
    basics = {
        "run": {"name": _name(directory), "dir": str(directory), "steps": steps},
        "mesh": {"data": -1},
        "model": _described(definition),
        "data": {
            "type": given.DATA,
            "seq_len": len(first["tokens"]) if "tokens" in first else 1,
            "global_batch": global_batch,
            "held_out": held_out,
        },
        "optimizer": {"lr": lr},
    }
    config = parse_config(_joined(basics, sections), source="fit")
    trainer = Trainer.from_config(config, model=model, source=rows, loss=loss, callbacks=callbacks)
    show = show and jax.process_index() == 0 and trainer.step < steps
    with progress(steps, trainer.step) if show else contextlib.nullcontext() as display:
        trainer.fit(display)
    return trainer


def _name(directory: Path | str) -> str:
    """The name of a run in this directory, in the letters that a name may have."""
    return re.sub(r"[^A-Za-z0-9_.-]+", "_", Path(directory).absolute().name).lstrip(".-") or "run"


def _in_whole_batches(held_out: float, rows: Source, global_batch: int) -> float:
    """The fraction of rows that is nearest to `held_out` among those of whole batches."""
    batches = max(1, round(len(rows) * held_out / global_batch))
    if held_out <= 0.5 and 2 * batches * global_batch > len(rows):
        rule = (
            f"whole batches of {global_batch}, which rows without a loss_mask need, are over half of {len(rows)} rows"
        )
        raise UserError("held_out", held_out, rule, "use a smaller global_batch, more rows, or give rows a loss_mask")
    return batches * global_batch / len(rows)


def _joined(basics: dict[str, Any], sections: Mapping[str, Any]) -> dict[str, Any]:
    """The sections, with the values of `fit`'s own arguments where they name no other. A mesh is one decision."""
    mappings = [(name, section) for name, section in sections.items() if isinstance(section, Mapping)]
    both = {name: {**basics.get(name, {}), **section} for name, section in mappings if name != "mesh"}
    return {**basics, **sections, **both}


def _described(model: ModelDef) -> dict[str, Any]:
    weights = flatten(model.canonical_weights).values()
    return {
        "type": given.MODEL,
        "name": type(model.outline({})).__name__,
        "parameters": sum(weight.size for weight in weights),
        "vocab_size": _vocab_size(model),
    }


def _vocab_size(model: ModelDef) -> int:
    """Rows of the embedding; 1 for a model of no tokens."""
    tables = [w for w in flatten(model.canonical_weights).values() if w.role == "embedding" and "vocab" in w.axes]
    return max((w.shape[w.axes.index("vocab")] for w in tables), default=1)
