"""The command `shardtrain sample`: text from the weights of a run."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from shardtrain.cli.options import Debug, Overrides, Run
from shardtrain.errors import UserError, described

if TYPE_CHECKING:
    from shardtrain.run.writer import Writer

_TOGETHER = 16  # texts of a file that are continued at once
_ADDED = ("completion", "finish", "sample")  # keys of a completion; the last one where a prompt has several


def sample(
    run: Run,
    prompt: Annotated[
        str | None, typer.Argument(help="Text to continue.", show_default="the run's sample.prompt")
    ] = None,
    overrides: Overrides = None,
    *,
    tokens: Annotated[int | None, typer.Option(min=1, help="Most tokens.", show_default="as in the config")] = None,
    temperature: Annotated[
        float | None, typer.Option(help="0 takes the likeliest token.", show_default="as in the config")
    ] = None,
    top_k: Annotated[int | None, typer.Option(help="Only among so many of the likeliest tokens.")] = None,
    top_p: Annotated[
        float | None, typer.Option(help="Only among the likeliest ones of this total probability.")
    ] = None,
    min_p: Annotated[
        float | None, typer.Option(help="Only tokens of at least this fraction of the highest probability.")
    ] = None,
    stop: Annotated[list[str] | None, typer.Option(help="End before this text; may be given several times.")] = None,
    seed: Annotated[int, typer.Option(help="Of the sampling.")] = 0,
    count: Annotated[int, typer.Option(min=1, help="How many texts, at once.")] = 1,
    batch: Annotated[
        Path | None, typer.Option(metavar="FILE.jsonl", help='Continue each {"prompt": ...} of a file; prints JSONL.')
    ] = None,
    debug: Debug = False,
) -> None:
    """Continue a text by a run's weights, as it comes. RUN may be a checkpoint: runs/quickstart/checkpoints/100."""
    from shardtrain.run.writer import Writer
    from shardtrain.train.sampling import Sampling

    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    logging.getLogger("shardtrain.train.sampler").setLevel(logging.INFO)
    options: dict[str, Any] = {"top_k": top_k, "top_p": top_p, "min_p": min_p}
    Sampling(1.0 if temperature is None else temperature, **options)  # refuses them before anything is loaded
    records = None if batch is None else [*_records(batch, _ADDED if count > 1 else _ADDED[:2])]
    if records is not None and prompt is not None:  # they bring the prompts, so this is an override
        overrides = [prompt, *(overrides or ())]
    options |= {"tokens": tokens, "temperature": temperature, "stop": stop or (), "seed": seed}
    writer = Writer.open(run, overrides or ())
    if records is not None:
        _write_batch(writer, records, count, options)
    else:
        _write(writer, writer.prompt if prompt is None else prompt, count, options)


def _write(writer: Writer, prompt: str, count: int, options: dict[str, Any]) -> None:
    """Print one text as it comes; of several, each when it has ended."""
    if count == 1:
        for piece in writer.stream([prompt], **options):
            print(prompt + piece.text, end="", flush=True)
            prompt = ""
        print()
        return
    texts = [prompt] * count
    for piece in writer.stream(texts.copy(), **options):
        texts[piece.row] += piece.text
        if piece.finish is not None:
            print(f"--- {piece.row + 1}\n{texts[piece.row]}", flush=True)


def _write_batch(writer: Writer, records: Sequence[dict[str, Any]], count: int, options: dict[str, Any]) -> None:
    """Print each record with what follows its prompt, in the order of the file."""
    jobs = [(record, number) for record in records for number in range(count)]
    size = min(_TOGETHER, len(jobs))
    for start in range(0, len(jobs), size or 1):
        some = jobs[start : start + size]
        prompts = [record["prompt"] for record, _ in some]
        prompts += prompts[:1] * (size - len(some))  # so that no program is compiled for fewer texts
        texts = writer.write(prompts, numbers=range(start, start + size), **options)
        for (record, number), (text, finish) in zip(some, texts, strict=False):
            more = {"sample": number} if count > 1 else {}
            print(json.dumps({**record, **more, "completion": text, "finish": finish}, ensure_ascii=False), flush=True)


def _records(path: Path, added: Sequence[str]) -> Iterator[dict[str, Any]]:
    """The records of a file of JSON lines, each with its text under `prompt` and nothing under what will be added."""
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")  # JSON may have the other ends of lines in its strings
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8"
        raise UserError("--batch", str(path), f"it cannot be read: {reason}", "name a file of JSON lines") from error
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            raise _bad_line(path, number, f"it is not JSON: {error}") from error
        if not isinstance(record, dict) or not isinstance(record.get("prompt"), str):
            raise _bad_line(path, number, f"it is {described(record)}, without a text under prompt")
        if any("\ud800" <= sign <= "\udfff" for sign in record["prompt"]):
            raise _bad_line(path, number, "its prompt has half of a surrogate pair, which is no text")
        if taken := record.keys() & added:
            raise _bad_line(path, number, f"its key {min(taken)} would be replaced: rename it")
        yield record


def _bad_line(path: Path, number: int, rule: str) -> UserError:
    return UserError("--batch", f"{path}, line {number}", rule, 'write {"prompt": "..."} on each line')
