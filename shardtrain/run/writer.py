"""Text from the weights of a run."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from shardtrain.config.schema import Sample
from shardtrain.data import Tokenizer, load_tokenizer
from shardtrain.data.prepare import is_kept
from shardtrain.data.text_stream import TextStream
from shardtrain.errors import UserError
from shardtrain.metrics.find import find_step
from shardtrain.run.data import open_rows
from shardtrain.run.trained import Trained
from shardtrain.train.sampler import Sampler
from shardtrain.train.sampling import Sampling
from shardtrain.train.state import TrainState

_DEFAULT = Sample()
#: Why a text ends: a stop string, the end of a document, or as many tokens as were asked for.
Finish = Literal["stop", "end", "length"]


@dataclasses.dataclass(frozen=True)
class Piece:
    """A piece of a text that is being written.

    Attributes:
      row: the number of its prompt.
      text: what is new, whole characters only.
      finish: why the text ends here; `None` if it goes on.
    """

    row: int
    text: str
    finish: Finish | None = None


class Writer:
    """Continues texts by the weights of a run; programs are compiled once, however often it is used.

    Args:
      sampler: continues token ids.
      state: the weights.
      tokenizer: of text.
      tokens: how many tokens to write, unless another number is asked for.
      temperature: the same of the temperature.
      prompt: the same of the prompt; `None` for the start of a document.
    """

    def __init__(
        self,
        sampler: Sampler,
        state: TrainState,
        tokenizer: Tokenizer,
        *,
        tokens: int = _DEFAULT.tokens,
        temperature: float = _DEFAULT.temperature,
        prompt: str | None = None,
    ):
        self.sampler, self.state, self.tokenizer = sampler, state, tokenizer
        self.tokens, self.temperature, self.prompt = tokens, temperature, prompt or ""

    @classmethod
    def open(cls, run: str | Path, overrides: Sequence[str] = ()) -> Writer:
        """Load the newest weights of a run, or those of a checkpoint, onto the devices here.

        Args:
          run: a run directory, the name of a run below `runs`, or one of these with a step: `runs/a/checkpoints/100`.
          overrides: of the run's config, such as `mesh.tensor=2`.

        Raises:
          UserError: there is no such run or step, it does not fit the devices here, or its data is no text.
        """
        directory, step = find_step(str(run))
        trained = Trained.open(directory.absolute(), step, overrides)
        tokenizer, config = _tokenizer(trained), trained.job.config
        sampler = Sampler(trained.job.model, trained.job.partitioner, window=config.data.seq_len)
        return cls(
            sampler,
            trained.state,
            tokenizer,
            tokens=config.sample.tokens or _DEFAULT.tokens,
            temperature=config.sample.temperature,
            prompt=config.sample.prompt,
        )

    def stream(
        self,
        prompts: str | Sequence[str],
        *,
        tokens: int | None = None,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        stop: str | Sequence[str] = (),
        seed: int = 0,
        numbers: Sequence[int] | None = None,
    ) -> Iterator[Piece]:
        """Yield pieces of the texts that follow the prompts, each as soon as it is known, until all have ended.

        Args:
          prompts: a text, or several, not necessarily different ones. An empty one is the start of a document.
          tokens: most tokens of each text.
          temperature: see `Sampling`, as for the next three.
          top_k: see there.
          top_p: see there.
          min_p: see there.
          stop: a text ends before this string, or the first of these.
          seed: of the sampling.
          numbers: see `Sampler.stream`.

        Raises:
          UserError: an option out of range, or an empty stop string.
        """
        sampling = Sampling(self.temperature if temperature is None else temperature, top_k, top_p, min_p)
        stop = [stop] if isinstance(stop, str) else stop
        if "" in stop:
            raise UserError("stop", "", "an empty string would end every text at once", "leave it out")
        prompts = [prompts] if isinstance(prompts, str) else prompts
        count = self.tokens if tokens is None else tokens
        if count < 1:
            raise UserError("tokens", count, "there would be nothing to write", "use 1 or more")
        ids = [self.tokenizer.encode(prompt).tolist() or [self.tokenizer.separator] for prompt in prompts]
        texts: dict[int, TextStream] = {row: TextStream(self.tokenizer, stop) for row in range(len(prompts))}
        found = self.sampler.stream(self.state, ids, tokens=count, sampling=sampling, seed=seed, numbers=numbers)
        for index, tokens_B in enumerate(found):
            for row, text in [*texts.items()]:
                piece = self._piece(row, text, int(tokens_B[row]), last=index + 1 == count)
                if piece.finish is not None:
                    del texts[row]
                yield piece
            if not texts:
                return

    def write(self, prompts: str | Sequence[str], **options: Any) -> list[tuple[str, Finish]]:
        """The texts that follow the prompts, and why each ends; options and errors as for `stream`."""
        prompts = [prompts] if isinstance(prompts, str) else prompts
        texts: list[list[str]] = [[] for _ in prompts]
        ends: list[Finish] = ["length"] * len(prompts)
        for piece in self.stream(prompts, **options):
            texts[piece.row].append(piece.text)
            ends[piece.row] = piece.finish or "length"
        return [("".join(pieces), finish) for pieces, finish in zip(texts, ends, strict=True)]

    def _piece(self, row: int, text: TextStream, token: int, *, last: bool) -> Piece:
        finish: Finish | None = "length" if last else None
        if token == self.tokenizer.separator:
            piece, finish = text.end(), "end"
        else:
            piece = text.push(token) + (text.end() if last else "")
        return Piece(row, piece, "stop" if text.stopped else finish)


def sample(run: str | Path, prompts: str | Sequence[str], *, overrides: Sequence[str] = (), **options: Any) -> Any:
    """Continue a text, or several at once, by the weights of a run.

    To see text as it comes, or to go on without loading again, use a `Writer`.

    Args:
      run: as for `Writer.open`.
      prompts: a text, or several.
      overrides: of the run's config, such as `mesh.tensor=2`.
      **options: `tokens`, `temperature`, `top_k`, `top_p`, `min_p`, `stop` and `seed`, see `Writer.stream`.

    Returns:
      What follows: a text for a text, a list for several.

    Raises:
      UserError: as `Writer.open` and `Writer.stream`.
    """
    texts = [text for text, _ in Writer.open(run, overrides).write(prompts, **options)]
    return texts[0] if isinstance(prompts, str) else texts


def _tokenizer(trained: Trained) -> Tokenizer:
    """The tokenizer that a run keeps, or that its source brings."""
    config, kept = trained.config, trained.directory / "data"
    if is_kept(kept):
        return load_tokenizer(kept)
    found = open_rows(config, trained.directory, write=False)[1] if ":" in config.data.type else None
    if found is None:
        rule = f"the run in {trained.directory} keeps no tokenizer, which text needs"
        fix = "train on text, or continue token ids with shardtrain.generate"
        raise UserError("data.type", config.data.type, rule, fix)
    return found
