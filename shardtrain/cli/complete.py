"""What the shell offers when a user presses Tab. `shardtrain --install-completion` switches it on."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path


def run_names(incomplete: str) -> list[str]:
    """Names of the runs below `runs`, and paths of folders."""
    from shardtrain.metrics.find import HOME, runs_below

    names = [str(run.relative_to(HOME)) for run in runs_below(HOME)]
    return [name for name in names if name.startswith(incomplete)] + _paths(incomplete)


def config_files(incomplete: str) -> list[str]:
    """YAML files and folders."""
    return _paths(incomplete, (".yaml", ".yml"))


def overrides(incomplete: str) -> list[str]:
    """Keys of a config, each with the `=` that follows; after that, the values of those that have a fixed choice."""
    from shardtrain.config import RunConfig

    return [word for word in _overrides(RunConfig, "") if word.startswith(incomplete) and word != incomplete]


def _overrides(section: type, prefix: str) -> Iterator[str]:
    from typing import Literal, get_args, get_origin

    for name, field in section.model_fields.items():  # type: ignore[attr-defined]
        key, kind = f"{prefix}{name}", field.annotation
        if hasattr(kind, "model_fields"):
            yield from _overrides(kind, f"{key}.")
            continue
        yield f"{key}="
        for choice in (kind, *get_args(kind)):
            if get_origin(choice) is Literal:
                yield from (f"{key}={value}" for value in get_args(choice) if isinstance(value, str))
            elif choice is bool:
                yield from (f"{key}=true", f"{key}=false")


def _paths(incomplete: str, suffixes: tuple[str, ...] = ()) -> list[str]:
    folder, start = os.path.split(incomplete)
    try:
        found = sorted(Path(folder or ".").iterdir())
    except OSError:
        return []
    near = [path for path in found if path.name.startswith(start) and (start or not path.name.startswith("."))]
    folders = [f"{os.path.join(folder, path.name)}/" for path in near if path.is_dir()]
    return folders + [os.path.join(folder, path.name) for path in near if path.suffix in suffixes]
