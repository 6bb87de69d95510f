"""Sizes that must be divisible: a dim by the mesh axes that split it, the rows of a device by the microbatches."""

from __future__ import annotations

import math
from collections.abc import Mapping

from shardtrain.errors import UserError
from shardtrain.sharding.mesh import divisors, times


def check_dim(key: str, size: int, logical: str, split: Mapping[str, int], *, use: str = "") -> None:
    """Refuse a dim of `size` that cannot be split over mesh axes.

    Args:
      key: the setting, or the tensor and its dim, for messages.
      size: of the dim.
      logical: the dim's logical axis.
      split: the mesh axes that split it, and their sizes.
      use: how the fix writes a size, before the number: `model.d_ff=`.

    Raises:
      UserError: names the sizes, the nearest ones that can be split, and the rule to change.
    """
    pieces = math.prod(split.values())
    if size % pieces == 0:
        return
    fix = f"use {use}{_multiples(size, pieces)}"
    if len(split) == 1:
        fix += f", a mesh.{next(iter(split))} among {[d for d in divisors(size) if d <= pieces]}"
    rule = f"the rules split {logical!r} over {product(split)}, which does not divide it"
    raise UserError(key, size, rule, f"{fix}, or rules.{logical}=null to keep such dims whole")


def check_microbatches(key: str, count: int, rows: int, split: Mapping[str, int] | None = None) -> None:
    """Refuse a number of microbatches that does not divide the rows of a device.

    Args:
      key: the setting that the number comes from.
      count: the number of microbatches.
      rows: of the global batch; without `split`, those to divide here.
      split: the mesh axes that split the batch, and their sizes.

    Raises:
      UserError: names the rows, and the numbers that divide them.
    """
    pieces = math.prod((split or {}).values())
    share = rows // pieces
    if rows % pieces or share % count == 0:  # `check_dim` refuses rows that cannot be split
        return
    of, other = f"{rows} rows", "another number of rows"
    if split is not None:
        of = f"{rows} / {pieces} ({product(split)}) = {share} rows per device" if split else f"{of} per device"
        other = f"data.global_batch={_multiples(rows, pieces * count)}"
    rule = f"{of} must be divisible by the number of microbatches"
    raise UserError(key, count, rule, f"use one of {divisors(share)[:8]}, or {other}")


def product(sizes: Mapping[str, int]) -> str:
    """Write sizes as `times` does, but a single one without its value: `tensor 4`."""
    return times(sizes) if len(sizes) > 1 else times(sizes).partition(" =")[0]


def _multiples(size: int, of: int) -> str:
    below = size // of * of
    return f"{below + of}" if below == 0 else f"{below} or {below + of}"
