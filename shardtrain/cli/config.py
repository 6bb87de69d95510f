"""The command `shardtrain config`: the resolved config, including defaults, or what each key means."""

from __future__ import annotations

from typing import Annotated

import typer

from shardtrain.cli.options import Debug, Overrides
from shardtrain.errors import UserError


def config(
    file: Annotated[
        str | None, typer.Argument(help="Config file, such as configs/quickstart.yaml.", show_default=False)
    ] = None,
    overrides: Overrides = None,
    *,
    reference: Annotated[bool, typer.Option("--reference", help="Print every key with its meaning instead.")] = False,
    debug: Debug = False,
) -> None:
    """Print the resolved config as YAML; fed back, it gives the same result."""
    if reference:
        from shardtrain.config.reference import as_yaml

        print(as_yaml(), end="")
        return
    if file is None:
        raise UserError("name a config file, or say --reference to see every key with its meaning")
    from shardtrain.config import load_config

    print(load_config(file, overrides or ()).to_yaml(), end="")
