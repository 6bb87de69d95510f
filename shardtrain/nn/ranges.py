"""The ranges of the numbers that layers take: one rule for research code and for configs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from shardtrain.errors import UserError


def positive_problems(numbers: Mapping[str, float | None]) -> Iterator[UserError]:
    """Find the numbers that are not above 0; `None` stands for none."""
    for name, value in numbers.items():
        if value is not None and not value > 0:
            yield UserError(name, value, "must be greater than 0", f"give {name} a positive value")


def check_epsilon(eps: float) -> None:
    """Refuse a negative epsilon of a norm; 0 leaves only rows of zeros undefined."""
    if not eps >= 0:
        raise UserError("eps", eps, "must be 0 or more", "give eps a small positive value such as 1e-5")


def check_z_loss(z_loss: float) -> None:
    """Refuse a coefficient of the z-loss that is no fraction."""
    if not 0 <= z_loss <= 1:
        raise UserError("z_loss", z_loss, "must be from 0 to 1", "0 for none, or for example z_loss=1e-4")
