"""`shardtrain train --dry-run`: everything that happens before the first step, and what it will need."""

from __future__ import annotations

import functools
import math
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shardtrain.cli.summary import summary
from shardtrain.cli.table import print_table, shape, size
from shardtrain.errors import UserError, shortened

if TYPE_CHECKING:
    from shardtrain.config import RunConfig
    from shardtrain.data import Batch, Tokenizer
    from shardtrain.run import Job

_WIDTH = 100  # characters of a row's text


def dry_run(config: RunConfig, allow_changes: bool = False, processes: int = 1) -> None:
    """Check a config, open its data, compile its step, and print what a run would be; make no step.

    Text that is not tokenised yet is, and stays in the run directory; so does the compiled step in the cache. Nothing
    else is written.

    Args:
      config: of the run.
      allow_changes: as for a run.
      processes: number of processes of the run; process 0 prints.

    Raises:
      UserError: whatever would keep the run from starting.
    """
    import jax

    from shardtrain.checkpoint import RunLock, read_extra
    from shardtrain.host.agree import on_process_zero
    from shardtrain.launch.compile_cache import cache_folder, use_cache
    from shardtrain.run import build
    from shardtrain.run.data import open_data, rows_of, training_batches
    from shardtrain.run.start import check_start

    directory = config.run.directory.absolute()
    use_cache(cache_folder(config.run.compile_cache, directory))
    job = build(config, processes=processes)
    resumes = _would_resume(directory)
    check_start(job, directory, resumes, functools.partial(read_extra, directory), allow_changes)
    lock = on_process_zero(lambda: RunLock(directory))
    try:
        data = open_data(config, directory)
        with training_batches(config, data.train, job.batch_sharding, None, False) as batches:
            batch = next(batches)
        compiled = job.train_step().lower(job.abstract_state(), _largest(batch, config)).compile()
    finally:
        if lock is not None:
            lock.release()
    if jax.process_index() != 0:
        return
    print("\n".join(summary(job, directory, None)))
    if resumes is not None:
        print(f"it would resume from the checkpoint of step {resumes}, if that verifies")
    held_out = "none held out" if data.held_out is None else f"{len(data.held_out):,} held out"
    epochs = rows_of(config.data, config.run.steps) / len(data.train)
    print(f"data: {len(data.train):,} rows to train on, {held_out}; {config.run.steps:,} steps are {epochs:.3g} epochs")
    _weights(job)
    _batch(batch, data.tokenizer)
    _memory(compiled, job)
    _collectives(compiled, job)
    print("dry run: all is well, and no step was made")


def _would_resume(directory: Path) -> int | None:
    """The step that a run would try first. Its checkpoint is neither verified nor touched."""
    from shardtrain.checkpoint import list_steps

    if not (directory / "checkpoints").is_dir():
        return None
    steps = [record.step for record in list_steps(directory, hashes=False) if record.status == "unchecked"]
    return steps[-1] if steps else None


def _largest(batch: Batch, config: RunConfig) -> Any:
    """The shapes of the last size of a batch that grows."""
    import jax

    rows = config.data.global_batch
    return {
        name: jax.ShapeDtypeStruct((rows, *leaf.shape[1:]), leaf.dtype, sharding=leaf.sharding)
        for name, leaf in batch.items()
    }


def _weights(job: Job) -> None:
    rows = [
        (
            row.path,
            shape(row.weight.shape),
            ", ".join(axis or "-" for axis in row.weight.axes),
            _spec(row.spec),
            size(row.weight.nbytes // row.pieces),
        )
        for row in job.report.rows
    ]
    print_table(("weight", "shape", "logical axes", "split over", "on a device"), rows, numbers=("on a device",))


def _batch(batch: Batch, tokenizer: Tokenizer | None) -> None:
    import numpy as np

    def row(name: str, leaf: Any) -> tuple[str, ...]:
        local = shape(leaf.sharding.shard_shape(leaf.shape))
        return name, shape(leaf.shape), str(leaf.dtype), _spec(leaf.sharding.spec), local

    rows = [row(name, leaf) for name, leaf in batch.items()]
    print_table(("batch", "shape", "dtype", "split over", "on a device"), rows)
    first = {name: np.asarray(leaf.addressable_shards[0].data)[0] for name, leaf in batch.items()}
    for name in ("tokens", "targets"):
        if name in first and first[name].ndim == 1:
            text = None if tokenizer is None else tokenizer.decode(first[name][first[name] >= 0])
            shown = " ".join(map(str, first[name][:16])) + " ..." if text is None else repr(shortened(text, _WIDTH))
            print(f"{name:<8} of row 0: {shown}")
    if "loss_mask" in first:
        print(f"{np.mean(first['loss_mask'] > 0):.0%} of its targets count")
    if "segment_ids" in first:
        print(f"it holds {len(np.unique(first['segment_ids']))} documents")


def _memory(compiled: Any, job: Job) -> None:
    """The memory of a step on one device, as the compiler plans it."""
    import jax

    found = compiled.memory_analysis()
    state = sum(_local_bytes(leaf) for leaf in jax.tree.leaves(job.abstract_state()))
    whole = found.argument_size_in_bytes + found.output_size_in_bytes - found.alias_size_in_bytes
    total = whole + found.temp_size_in_bytes
    print(
        f"\nmemory of a step on each device: {size(total)}: {size(state)} of weights and optimizer, "
        f"{size(whole - state)} of batch and metrics, {size(found.temp_size_in_bytes)} of activations, gradients and "
        "buffers"
    )
    device = job.partitioner.mesh.devices.flat[0]
    limit = (device.memory_stats() or {}).get("bytes_limit")
    if limit is not None:
        print(f"{total / limit:.0%} of the {size(limit)} that {device.device_kind} gives")


def _collectives(compiled: Any, job: Job) -> None:
    """What the devices send in a step."""
    from shardtrain.hlo import UnknownHLOError, collectives

    try:
        found = collectives(compiled.as_text(), job.partitioner.mesh)
    except (UnknownHLOError, UserError) as error:
        print(f"collectives: not known, since the compiled program cannot be read ({shortened(str(error))})")
        return
    count: Counter[tuple[str, str]] = Counter()
    sent: Counter[tuple[str, str]] = Counter()
    for each in found:
        key = (" and ".join(sorted(each.axes)) or "no axis", each.kind)
        count[key] += each.times or 1
        sent[key] += (each.times or 1) * each.bytes
    rows = [(axes, kind, f"{count[axes, kind]:,}", size(sent[axes, kind])) for axes, kind in sorted(count)]
    if rows:
        print_table(("over", "collective", "times", "bytes"), rows, numbers=("times", "bytes"))


def _local_bytes(leaf: Any) -> int:
    return math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize


def _spec(spec: Any) -> str:
    parts = [" and ".join(part) if isinstance(part, tuple) else part or "-" for part in spec]
    return ", ".join(parts) or "-"
