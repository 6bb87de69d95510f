"""The next token, drawn from the model's distribution over the vocabulary.

Shapes: B rows, V vocabulary, N likeliest tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import jax
import jax.numpy as jnp

from shardtrain.errors import UserError, refuse


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How tokens are drawn. The filters apply in this order, each to what the one before has left.

    Attributes:
      temperature: divides the logits; 0 takes the likeliest token.
      top_k: only among so many of the likeliest tokens.
      top_p: only among the fewest of the likeliest tokens that have this probability together (Holtzman et al. 2020).
      min_p: only among tokens with at least this fraction of the likeliest one's probability (Nguyen et al. 2024).

    Raises:
      UserError: a value out of range.
    """

    temperature: float = 0.8
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None

    def __post_init__(self) -> None:
        refuse(self._problems())

    def _problems(self) -> Iterator[UserError]:
        if not 0 <= self.temperature <= 100:
            fix = "use 0 for the likeliest token, or about 0.8"
            yield UserError("temperature", self.temperature, "must be between 0 and 100", fix)
        if self.top_k is not None and self.top_k < 1:
            yield UserError("top_k", self.top_k, "leaves no token to draw", "use 1 or more, such as 40")
        for name in ("top_p", "min_p"):
            value = getattr(self, name)
            if value is not None and not 0 < value <= 1:
                yield UserError(
                    name, value, "must be above 0 and at most 1", f"use {'0.95' if name == 'top_p' else '0.05'}"
                )

    def draw(self, logits_BV: jax.Array, key: jax.Array, rows_B: jax.Array, index: int | jax.Array) -> jax.Array:
        """Draw a token for each row, see `draw`."""
        return draw(logits_BV, key, rows_B, index, **dataclasses.asdict(self))


def draw(
    logits_BV: jax.Array,
    key: jax.Array,
    rows_B: jax.Array,
    index: int | jax.Array,
    *,
    temperature: float | jax.Array,
    top_k: int | None,
    top_p: float | jax.Array | None,
    min_p: float | jax.Array | None,
) -> jax.Array:
    """Draw a token for each row, int32 `[B]`; under jit, only `top_k` has to be static.

    The noise is multiplied by the temperature, which is the same as dividing the logits by it, and is right for 0, too.

    Args:
      logits_BV: of the next token.
      key: of the seed.
      rows_B: the number of each text. With `index` it determines the random bits, so that these do not depend on the
        texts that are sampled together, or on the mesh.
      index: of the token in the text.
      temperature: see `Sampling`, as for the next three.
      top_k: see there.
      top_p: see there.
      min_p: see there.
    """

    def noisy(logits_BN: jax.Array) -> jax.Array:
        def noise(row: jax.Array) -> jax.Array:
            bits = jax.random.fold_in(jax.random.fold_in(key, row), index)
            return jax.random.gumbel(bits, logits_BN.shape[1:], logits_BN.dtype)

        return logits_BN + temperature * jax.vmap(noise)(rows_B)

    if top_k is None and top_p is None and min_p is None:
        return noisy(logits_BV).argmax(-1).astype(jnp.int32)
    count = min(top_k or logits_BV.shape[1], logits_BV.shape[1])
    logits_BN, tokens_BN = jax.lax.top_k(logits_BV, count)
    if top_p is not None:
        p_BN = jax.nn.softmax(logits_BN / jnp.where(temperature > 0, temperature, 1), axis=-1)
        logits_BN = jnp.where(p_BN.cumsum(-1) - p_BN < top_p, logits_BN, -jnp.inf)
    if min_p is not None:
        logits_BN = jnp.where(logits_BN >= logits_BN[:, :1] + temperature * jnp.log(min_p), logits_BN, -jnp.inf)
    return jnp.take_along_axis(tokens_BN, noisy(logits_BN).argmax(-1)[:, None], axis=1)[:, 0].astype(jnp.int32)
