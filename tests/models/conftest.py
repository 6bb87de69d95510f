"""Fixtures of the models' tests."""

from helpers import strict, x64  # noqa: F401
