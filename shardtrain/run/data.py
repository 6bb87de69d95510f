"""The data of a run: opened as its config says, and fed to training and to evaluations."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from jax.sharding import NamedSharding

from shardtrain.config import RunConfig
from shardtrain.config.schema import Data
from shardtrain.data import Batch, BatchGrowth, Loader, Rows, Source, Tokenizer, open_source, split
from shardtrain.data.arguments import check_source
from shardtrain.data.checks import check_prompt, check_row_length, check_source_vocabulary, check_tokenizer
from shardtrain.data.rows import check_last_batch
from shardtrain.host.agree import on_all, on_process_zero
from shardtrain.host.alike import asked, software
from shardtrain.host.import_path import import_path
from shardtrain.train.loss_sums import LossFunction

_log = logging.getLogger(__name__)


class OpenedData(NamedTuple):
    """The data of a run.

    Attributes:
      train: rows to train on.
      held_out: rows to evaluate on, if any.
      tokenizer: of text.
    """

    train: Source
    held_out: Source | None
    tokenizer: Tokenizer | None


def open_data(
    config: RunConfig,
    directory: Path,
    *,
    source: Source | None = None,
    loss: LossFunction | None = None,
    should_stop: Callable[[], bool] | None = None,
) -> OpenedData:
    """Open the data that a config names; process 0 writes the files that have to be prepared.

    Several processes also compare what they were started with, whoever has started them: from here on they compute
    together, and a difference would train wrongly or never end.

    Args:
      config: names the data.
      directory: the run directory.
      source: rows to use instead of those that `data.type` names.
      loss: the user's own loss function, whose name has to be the same on all processes.
      should_stop: polled while text is tokenised; True ends that.

    Raises:
      UserError: the data is missing or unfit, or rows that fill up an evaluation's last batch would count; or another
        process was asked for something else, or has opened or installed something else.
    """
    return on_all(lambda: _open(config, directory, source, should_stop), lambda data: _facts(config, data, loss))


def _facts(config: RunConfig, data: OpenedData, loss: LossFunction | None) -> dict[str, Any]:
    """Everything that has to be the same on all processes."""
    train, held_out, tokenizer = data
    return {
        **software(),
        **asked(config.to_dict(), config.model.load()),
        "rows": f"{len(train)}, {train.fingerprint}",
        "held-out rows": None if held_out is None else f"{len(held_out)}, {held_out.fingerprint}",
        "loss": None if loss is None else import_path(loss),
        "tokenizer": None if tokenizer is None else tokenizer.fingerprint,
    }


def _open(
    config: RunConfig, directory: Path, source: Source | None, should_stop: Callable[[], bool] | None
) -> OpenedData:
    if source is not None:
        check_source(source)
        check_source_vocabulary(source, vocab_size(config), "the source")
        check_row_length(source, config.data.seq_len, "the source")
        rows, tokenizer = source, getattr(source, "tokenizer", None)
        check_tokenizer(tokenizer)
    else:
        rows, tokenizer = _open_named(config, directory, should_stop)
    name = f"data.type {config.data.type}" if source is None else "the source"
    check_prompt(config.sample.prompt, name, has_tokenizer=tokenizer is not None)
    if config.data.held_out == 0:
        return OpenedData(rows, None, tokenizer)
    train, held_out = split(rows, config.data.held_out)
    evaluated = _evaluated(held_out, config)
    check_last_batch(evaluated, evaluated[0], len(evaluated), config.data.global_batch)
    return OpenedData(train, held_out, tokenizer)


def _open_named(
    config: RunConfig, directory: Path, should_stop: Callable[[], bool] | None
) -> tuple[Source, Tokenizer | None]:
    """The rows that `data.type` names; process 0 opens them first, since it may have to write them."""
    opened = functools.partial(open_rows, config, directory, should_stop=should_stop)
    return on_process_zero(lambda: opened(write=True)) or opened(write=False)


def open_rows(
    config: RunConfig, directory: Path, *, write: bool, should_stop: Callable[[], bool] | None = None
) -> tuple[Source, Tokenizer | None]:
    """The rows that `data.type` names, and the tokenizer of text.

    Args:
      config: names the data.
      directory: the run directory.
      write: whether this process may write what has to be prepared; else it waits for the one that does.
      should_stop: as for `open_data`.

    Raises:
      UserError: the data is missing or unfit.
    """
    data = config.data
    return open_source(
        data.type,
        seq_len=data.seq_len,
        vocab_size=vocab_size(config),
        seed=config.run.seed,
        path=data.path,
        tokenizer=data.tokenizer,
        tokenizer_vocab=data.vocab_size,
        directory=directory / "data",
        write=write,
        should_stop=should_stop,
    )


def vocab_size(config: RunConfig) -> int:
    """The size of the vocabulary of a model that a config names."""
    found = config.model.size("vocab")
    assert found is not None, "the config has been checked"
    return found


def training_batches(
    config: RunConfig,
    source: Source,
    sharding: NamedSharding,
    position: Mapping[str, Any] | None,
    allow_changes: bool,
) -> Loader:
    """Endless batches of the training rows, from a position on.

    Args:
      config: gives batch size, seed and shuffling.
      source: the training rows.
      sharding: of a batch `[B, S]`.
      position: of a checkpoint; `None` for the first row.
      allow_changes: begin at the first row if the position is in other data.

    Raises:
      UserError: a position in other data, or rows that do not fit the mesh.
    """
    if allow_changes and position is not None and position["fingerprint"] != source.fingerprint:
        _log.warning("the data is not that of the run so far: training begins at its first row")
        position = None
    return Loader(
        source,
        global_batch=config.data.global_batch,
        seed=config.run.seed,
        sharding=sharding,
        state=position,
        shuffle=config.data.shuffle,
        growth=_growth(config.data),
    )


def rows_of(data: Data, steps: int) -> int:
    """The number of rows that the first steps of a run train on."""
    rows, growth = 0, _growth(data)
    while growth is not None and steps and rows < growth.rows:
        rows += growth.size(rows)
        steps -= 1
    return rows + steps * data.global_batch


def _growth(data: Data) -> BatchGrowth | None:
    if data.first_batch is None or data.growth_rows is None:
        return None
    return BatchGrowth(data.first_batch, data.global_batch, data.growth_rows)


def eval_batches(source: Source, config: RunConfig, sharding: NamedSharding) -> Iterator[Batch]:
    """At most `eval.batches` global batches, the same each time; if they hold all held-out rows, each counts once."""
    rows, size = _evaluated(source, config), config.data.global_batch
    with Loader(rows, global_batch=size, seed=0, sharding=sharding, shuffle=False, epochs=1) as loader:
        yield from loader


def _evaluated(held_out: Source, config: RunConfig) -> Source:
    """The held-out rows that an evaluation reads."""
    return Rows(held_out, 0, min(len(held_out), config.eval.batches * config.data.global_batch))
