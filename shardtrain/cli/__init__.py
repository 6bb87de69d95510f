"""The command line, one file per verb."""

from shardtrain.cli.app import main

__all__ = ["main"]
