"""The command `shardtrain init`: a project to start from."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Annotated

import typer

from shardtrain.cli.options import Debug
from shardtrain.errors import UserError


def init(
    directory: Annotated[Path, typer.Argument(help="Created if it is missing.", metavar="DIR", show_default=False)],
    debug: Debug = False,
) -> None:
    """Write a project to start from: a config, a model, data and a test. It trains at once."""
    project = resources.files("shardtrain.cli").joinpath("project")
    files = {file.name: file.read_text() for file in project.iterdir() if file.is_file()}
    if taken := sorted(name for name in files if (directory / name).exists()):
        raise UserError(f"{directory} has {', '.join(taken)} already; name another directory")
    directory.mkdir(parents=True, exist_ok=True)
    for name, text in sorted(files.items()):
        (directory / name).write_text(text)
        print(f"{directory / name}: {_about(text)}")
    print(f"\nto train:\n  cd {directory}\n  shardtrain train config.yaml")


def _about(text: str) -> str:
    """What a file says of itself in its first sentence."""
    return "the config" if text.startswith("#") else text.partition(". ")[0].strip('"').lower()
