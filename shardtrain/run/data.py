"""The data of a run: opened as its config says, and fed to evaluations."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from jax.sharding import NamedSharding

from shardtrain.config import RunConfig
from shardtrain.data import Batch, Loader, Rows, Source, Tokenizer, open_source, split
from shardtrain.data.checks import check_prompt
from shardtrain.data.rows import check_last_batch
from shardtrain.host.agree import on_all, on_process_zero
from shardtrain.host.alike import asked, software


def open_data(
    config: RunConfig, directory: Path, *, should_stop: Callable[[], bool] | None = None
) -> tuple[Source, Source | None, Tokenizer | None]:
    """Training rows, held-out rows (or None) and tokenizer (or None); process 0 writes what has to be prepared.

    Several processes also compare what they were started with, whoever has started them: from here on they compute
    together, and a difference would train wrongly or never end.

    Args:
      should_stop: polled while text is tokenised; True ends that.

    Raises:
      UserError: the data is missing or unfit, or rows that fill up an evaluation's last batch would count; or on
        another process something else was asked for, opened or installed.
    """
    return on_all(lambda: _open(config, directory, should_stop), lambda opened: _told(config, opened))


Opened = tuple[Source, Source | None, Tokenizer | None]


def _told(config: RunConfig, opened: Opened) -> dict[str, Any]:
    source, held_out, tokenizer = opened
    return {
        **software(),
        **asked(config.to_dict(), config.model.load()),
        "rows": f"{len(source)}, {source.fingerprint}",
        "held-out rows": None if held_out is None else f"{len(held_out)}, {held_out.fingerprint}",
        "tokenizer": None if tokenizer is None else tokenizer.fingerprint,
    }


def _open(config: RunConfig, directory: Path, should_stop: Callable[[], bool] | None) -> Opened:
    data = config.data

    def open_it(write: bool) -> tuple[Source, Tokenizer | None]:
        return open_source(
            data.type,
            seq_len=data.seq_len,
            vocab_size=config.model.options["vocab_size"],
            seed=config.run.seed,
            path=data.path,
            tokenizer=data.tokenizer,
            tokenizer_vocab=data.vocab_size,
            directory=directory / "data",
            write=write,
            should_stop=should_stop,
        )

    source, tokenizer = on_process_zero(lambda: open_it(write=True)) or open_it(write=False)
    check_prompt(config.sample.prompt, data.type, has_tokenizer=tokenizer is not None)
    if data.held_out == 0:
        return source, None, tokenizer
    source, held_out = split(source, data.held_out)
    rows = _evaluated(held_out, config)
    check_last_batch(rows, rows[0], len(rows), data.global_batch)
    return source, held_out, tokenizer


def eval_batches(source: Source, config: RunConfig, sharding: NamedSharding) -> Iterator[Batch]:
    """The same at most `eval.batches` global batches each time; where that is all held-out rows, each counts once."""
    rows, size = _evaluated(source, config), config.data.global_batch
    with Loader(rows, global_batch=size, seed=0, sharding=sharding, shuffle=False, epochs=1) as loader:
        yield from loader


def _evaluated(held_out: Source, config: RunConfig) -> Source:
    """The rows that an evaluation reads."""
    return Rows(held_out, 0, min(len(held_out), config.eval.batches * config.data.global_batch))
