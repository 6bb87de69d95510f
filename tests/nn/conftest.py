"""Fixtures of the layers' tests."""

from helpers import strict, x64  # noqa: F401
