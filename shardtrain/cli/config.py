"""The command `shardtrain config`: the resolved config, including defaults."""

from __future__ import annotations

from shardtrain.cli.options import Debug, File, Overrides


def config(file: File, overrides: Overrides = None, *, debug: Debug = False) -> None:
    """Print the resolved config as YAML; fed back, it gives the same result."""
    from shardtrain.config import load_config

    print(load_config(file, overrides or ()).to_yaml(), end="")
