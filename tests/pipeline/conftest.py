"""Fixtures of the layers' tests."""

from helpers import x64  # noqa: F401
