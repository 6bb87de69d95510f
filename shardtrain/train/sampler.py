"""Several texts continued at once, token by token."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from shardtrain.errors import UserError
from shardtrain.launch.cpu_collectives import ordered
from shardtrain.sharding import Partitioner
from shardtrain.train.jitted_step import refuse_donated
from shardtrain.train.model_def import ModelDef
from shardtrain.train.next_token import LogitsFunction, NextToken
from shardtrain.train.sampling import Sampling, draw
from shardtrain.train.state import TrainState, check_parts

_log = logging.getLogger(__name__)

Texts = Sequence[Sequence[int]]
#: Texts and caches have the length of a power of two, at least this one, so that few programs are compiled.
_SHORTEST = 16


class Sampler:
    """Continues texts by the weights of a model; programs are compiled once, however often it is used.

    Keys and values of the tokens are kept, if this gives the logits of the whole text; that is measured once. It does
    where the blocks see other tokens only through `nn.Attention`, or through layers that call `ctx.cache.extend` as it
    does. With any other model, each token is a pass over the whole text before it, and so is each token beyond the
    window.

    Args:
      model: a definition whose module follows `nn.Model` and has `logits(x)`, or any other with `logits`. It must be
        causal: no token may depend on those after it.
      partitioner: the mesh and its rules.
      window: context length in tokens, at most that of the training rows. The next token is predicted from the last
        `window` tokens of a text.
      logits: `(module, batch, ctx) -> logits [B, S, V]`, for a module that does not follow `nn.Model`.

    Attributes:
      uncached: why nothing is kept; `None` where something is, or as long as that is not known.

    Raises:
      UserError: a model without `logits` or for another mesh, or a window that the mesh cannot split.
    """

    def __init__(self, model: ModelDef, partitioner: Partitioner, *, window: int, logits: LogitsFunction | None = None):
        check_parts(model, partitioner)
        name = type(outline := model.outline({})).__name__
        if logits is None and not (hasattr(outline, "logits") and hasattr(outline, "blocks")):
            raise UserError(
                f"{name} has no method logits(x), which generation needs; add one, or for a module that does not "
                "follow nn.Model pass logits, a function (module, batch, ctx) -> logits [B, S, V]"
            )
        if window < 1:
            raise UserError("window", window, "no token would see another", "use the length of the training rows")
        for axis in ("seq", "seq_residual"):
            partitioner.sharding((None, axis), (1, window), "the window of generation")
        self.uncached: str | None = None if logits is None else "it does not follow nn.Model"
        self._name, self._place, self._window = name, partitioner, window
        self._vocabulary: int | None = None
        self._compared = False
        self._programs = NextToken(model, partitioner, logits)
        self._draw = jax.jit(
            draw,
            static_argnames="top_k",
            out_shardings=partitioner.sharding(()),
            compiler_options=ordered(partitioner.devices),
        )

    def stream(
        self,
        state: TrainState,
        prompts: Texts,
        *,
        tokens: int,
        sampling: Sampling | None = None,
        seed: int = 0,
        numbers: Sequence[int] | None = None,
    ) -> Iterator[np.ndarray]:
        """Yield the next token of each text, int32 `[texts]`, `tokens` times.

        Args:
          state: the state of a training run, or the weights of one.
          prompts: token ids of each text, at least one. They need not be of one length.
          tokens: how many to generate.
          sampling: how they are drawn; default `Sampling()`.
          seed: of the draws.
          numbers: of the texts. A text's draws depend on the seed and its number alone. Default: 0, 1, ...

        Raises:
          UserError: an empty prompt, ids beyond the vocabulary, or a state that was donated.
        """
        if not prompts or not all(map(len, prompts)):
            raise UserError("generation needs a prompt of at least one token; give sample.prompt some text")
        refuse_donated(state)
        count, texts = len(prompts), [list(map(int, prompt)) for prompt in prompts]
        texts += [texts[0][:] for _ in range(-count % self._place.shards("batch"))]  # rows that nobody reads
        rows = np.zeros(len(texts), np.uint32)
        rows[:count] = np.arange(count) if numbers is None else numbers
        weights, key = (state.params, state.model_state), jax.random.key(seed)
        options, longest = dataclasses.asdict(sampling or Sampling()), max(map(len, texts))
        slots = self._size(longest + tokens - 1)  # the last token is not read any more
        self._check(weights, texts, slots)
        if longest < self._window:  # a longer text has no use for a cache
            self._compare(weights, len(texts), self._size(longest), slots)
        chosen = cache = None
        for index in range(tokens):
            length = longest + index
            if cache is not None and length <= self._window:
                positions = np.array([len(text) - 1 for text in texts], np.int32)
                logits, cache = self._programs.step(*weights, cache, chosen, positions)
            elif index == 0 and self.uncached is None and length < self._window:
                logits, cache = self._read(weights, texts, self._size(length), slots)
            else:
                cache = None
                logits, _ = self._programs.read(*weights, *self._padded(texts, slots), keep=False)
            chosen = self._draw(logits, key, rows, index, **options)
            found = np.asarray(jax.block_until_ready(chosen))  # waits for all devices; reading waits for one only
            for text, token in zip(texts, found.tolist(), strict=True):
                text.append(token)
            yield found[:count]

    def _size(self, tokens: int) -> int:
        """The length of an array for that many tokens, of which all but the last `window` are dropped."""
        parts = math.lcm(self._place.shards("seq"), self._place.shards("seq_residual"))
        length = max(_SHORTEST, 1 << (tokens - 1).bit_length())
        return min(math.ceil(length / parts) * parts, self._window)

    def _padded(self, texts: Texts, length: int) -> tuple[np.ndarray, np.ndarray]:
        """The last `window` tokens of each text, `[B, length]`, and how many these are."""
        padded, lengths = np.zeros((len(texts), length), np.int32), np.zeros(len(texts), np.int32)
        for row, text in enumerate(texts):
            known = text[-self._window :]
            padded[row, : len(known)], lengths[row] = known, len(known)
        return padded, lengths

    def _read(self, weights: Any, texts: Texts, length: int, slots: int) -> tuple[jax.Array, Any]:
        """Logits after texts of at most `length` tokens, and a cache of them."""
        logits, cache = self._programs.read(*weights, *self._padded(texts, length), keep=True)
        return logits, cache if slots == length else self._programs.grow(cache, slots=slots)

    def _check(self, weights: Any, texts: Texts, slots: int) -> None:
        """Check the prompts; the first time, find out whether the model keeps anything."""
        if self._vocabulary is None:
            shapes = (jax.ShapeDtypeStruct((len(texts), *dims), jnp.int32) for dims in ((slots,), ()))
            logits, cache = jax.eval_shape(partial(self._programs.read, keep=True), *weights, *shapes)
            self._vocabulary = logits.shape[1]
            if self.uncached is None and not cache:
                self.uncached = "its blocks keep nothing by ctx.cache.extend, as nn.Attention does"
        if wrong := [token for text in texts for token in text if not 0 <= token < self._vocabulary]:
            fix = f"the model's ids are 0 to {self._vocabulary - 1}"
            raise UserError("the prompt", wrong[0], "there is no such token", fix)

    def _compare(self, weights: Any, rows: int, length: int, slots: int) -> None:
        """The first time, find out whether a cache gives the logits of the whole text."""
        if self._compared:
            return
        level = logging.INFO  # of a model without attention nobody expects a cache
        if self.uncached is None and (apart := self._apart(weights, rows, length, slots)):
            self.uncached = (
                "its blocks see other tokens in other ways than by what they keep with ctx.cache.extend "
                f"(its logits differ by {apart:.0e})"
            )
            level = logging.WARNING
        self._compared = True
        if self.uncached is not None:
            say = "%s samples without a cache, each token by a pass over all tokens before it: %s"
            _log.log(level, say, self._name, self.uncached)

    def _apart(self, weights: Any, rows: int, length: int, slots: int) -> float:
        """How far a random text's last logits with a cache are from those without, relative; 0 if only by rounding."""
        texts = np.random.default_rng(0).integers(0, self._vocabulary, (rows, length)).tolist()
        whole, cache = self._read(weights, texts, length, slots)
        want, rounding = np.asarray(jax.block_until_ready(whole)), jnp.finfo(jax.tree.leaves(cache)[0].dtype).eps
        last = np.array([text[-1] for text in texts], np.int32)
        drawn = jax.device_put(last, self._place.sharding(()))  # where `_draw` puts them, or it is compiled twice
        got, _ = self._programs.step(*weights, cache, drawn, np.full(rows, length - 1, np.int32))
        error = float(np.abs(np.asarray(jax.block_until_ready(got)) - want).max() / (np.ptp(want) or 1))
        return error if error > math.sqrt(rounding) else 0.0
