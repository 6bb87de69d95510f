"""What an evaluation of a checkpoint says: loss, perplexity, bits per byte, accuracy, and the model's own metrics."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from shardtrain.data import (
    Loader,
    Rows,
    Source,
    Tokenizer,
    TokenWindows,
    encode_documents,
    load_tokenizer,
    open_source,
    open_tokens,
    split,
    text_documents,
    write_tokens,
)
from shardtrain.data.checks import TEXT
from shardtrain.data.prepare import is_kept
from shardtrain.data.rows import counted_targets
from shardtrain.errors import UserError
from shardtrain.run.data import open_rows, vocab_size
from shardtrain.run.trained import Trained
from shardtrain.train.accuracy import with_accuracy
from shardtrain.train.evaluation import total_sums

_TOGETHER = 4096  # rows whose text is decoded at once


@dataclasses.dataclass(frozen=True)
class Report:
    """The result of an evaluation.

    Attributes:
      rows: how many were evaluated.
      targets: sum of the weights of their targets.
      values: `loss` in nats per target; `perplexity`, `bits_per_byte` and `accuracy` where they apply; and the means of
        whatever else the model returns.
    """

    rows: int
    targets: float
    values: dict[str, float]


def report(trained: Trained, data: str | None = None, rows: int | None = None) -> Report:
    """Evaluate a checkpoint.

    Bits per byte are those of the text as UTF-8. The separators between documents cost bits and have no bytes.

    Args:
      trained: the checkpoint.
      data: a token file (`.bin`), or text: a file, a folder or a pattern. `None` for the rows that the run held out.
      rows: evaluate at most so many; by default all of `data`, and of the held-out rows those that the run evaluates.

    Raises:
      UserError: the data is missing or unfit.
    """
    job = trained.job
    with _opened(trained, data) as (source, tokenizer):
        if data is None and rows is None:
            rows = trained.config.eval.batches * trained.config.data.global_batch
        source = Rows(source, 0, len(source) if rows is None else min(rows, len(source)))
        step = with_accuracy(job.eval_step(), job.model, job.partitioner)
        size, sharding = job.config.data.global_batch, job.batch_sharding
        with Loader(source, global_batch=size, seed=0, sharding=sharding, shuffle=False, epochs=1) as batches:
            sums = total_sums(step, trained.state, batches)
        values = {name: float(total / weight) for name, (total, weight) in sums.items() if weight != 0}
        entropy = values.pop("cross_entropy", None)
        first = {"loss": values.pop("loss")}
        if entropy is not None:
            first["perplexity"] = math.exp(entropy) if entropy < 700 else math.inf
            if tokenizer is not None and (size := _bytes(source, tokenizer)):
                first["bits_per_byte"] = float(sums["cross_entropy"][0]) / math.log(2) / size
        return Report(len(source), float(sums["loss"][1]), first | values)


@contextlib.contextmanager
def _opened(trained: Trained, path: str | None) -> Iterator[tuple[Source, Tokenizer | None]]:
    """The rows to evaluate on, and the tokenizer of text."""
    kept, section = trained.directory / "data", trained.config.data
    has_tokenizer = section.type in TEXT and is_kept(kept)
    if path is None:
        yield _held_out(trained, kept)
    elif path.endswith(".bin"):
        source, _ = open_source("tokens", seq_len=section.seq_len, vocab_size=vocab_size(trained.config), path=path)
        yield source, load_tokenizer(kept) if has_tokenizer else None
    elif not has_tokenizer:
        rule = f"it is text, and the run in {trained.directory} has no tokenizer of its own (data.type {section.type})"
        raise UserError("--data", path, rule, "give a token file, NAME.bin")
    else:
        with tempfile.TemporaryDirectory() as folder:
            tokenizer, tokens = load_tokenizer(kept), Path(folder) / "tokens.bin"
            ids = encode_documents(tokenizer, (document.parts() for document in text_documents(path)))
            write_tokens(tokens, ids, tokenizer.vocab_size)
            yield TokenWindows(open_tokens(tokens), section.seq_len), tokenizer


def _held_out(trained: Trained, kept: Path) -> tuple[Source, Tokenizer | None]:
    config = trained.job.config
    if config.data.held_out == 0:
        fix = "give --data PATH, the text or the token file to evaluate on"
        raise UserError("data.held_out", 0, "the run held no rows out", fix)
    if config.data.type in TEXT and not is_kept(kept):
        raise UserError(f"{kept} is missing, where a run keeps its tokens and its tokenizer; copy it, too")
    source, tokenizer = open_rows(config, trained.directory, write=False)
    return split(source, config.data.held_out)[1], tokenizer


def _bytes(source: Source, tokenizer: Tokenizer) -> int:
    """Bytes of UTF-8 in the targets that count."""
    total = 0
    for start in range(0, len(source), _TOGETHER):
        counted = [counted_targets(source[row]) for row in range(start, min(start + _TOGETHER, len(source)))]
        total += len(tokenizer.decode(np.concatenate(counted)).encode())
    return total
