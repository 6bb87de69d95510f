"""A config file and those that it extends, merged into plain data."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Any

from shardtrain.config.errors import ConfigError, Problem
from shardtrain.config.strict_yaml import MOST_CHARACTERS, parse
from shardtrain.errors import nearest

_MOST_BYTES = 4 * (MOST_CHARACTERS + 2)  # as UTF-8; a longer file is refused


def read_file(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Read a file over the one that it `extends`: mappings are merged, any other value replaces the one below.

    Raises:
      ConfigError: a file is missing, cannot be read, is not a YAML mapping, or extends itself.
    """
    return _read(Path(path), ())


def _read(path: Path, above: tuple[Path, ...]) -> dict[str, Any]:
    source = str(path)
    if path.resolve() in [file.resolve() for file in above]:
        chain = " -> ".join(map(str, (*above, path)))
        rule = f"the files extend each other in a circle: {chain}"
        raise ConfigError([Problem("extends", source, rule, "drop one `extends`")], str(above[0]))
    content = parse(_text(path, above), source)
    if content is None:
        content = {}
    if not isinstance(content, dict):
        rule = f"a config is a mapping of sections, not a {type(content).__name__}"
        raise ConfigError([Problem(source, content, rule, "start with `run:`, `model:`, ...")], source)
    base = content.pop("extends", None)
    if base is None:
        return content
    if not isinstance(base, str) or not base:
        rule = "must be the path of one file, relative to this one"
        raise ConfigError([Problem("extends", base, rule, "write extends: base.yaml")], source)
    return _merge(_read(path.parent / base, (*above, path)), content)


def _text(path: Path, above: tuple[Path, ...]) -> str:
    key, source = ("extends", str(above[-1])) if above else ("file", str(path))
    try:
        kind = path.stat()
        if not (stat.S_ISREG(kind.st_mode) or stat.S_ISDIR(kind.st_mode)):  # reading a pipe could wait for ever
            raise OSError(None, "it is a pipe or a device")
        with path.open("rb") as file:
            return file.read(_MOST_BYTES).decode("utf-8-sig")
    except FileNotFoundError:
        folder = path.parent
        files = sorted(file.name for file in folder.glob("*.y*ml")) if folder.is_dir() else []
        near = nearest(path.name, files)
        fix = (
            f"did you mean {folder / near}?"
            if near
            else "check the path; it is relative to "
            + (f"the folder of {source}" if above else f"the current directory, {Path.cwd()}")
        )
        raise ConfigError([Problem(key, str(path), "there is no such file", fix)], source) from None
    except UnicodeDecodeError as error:
        rule = f"a config is UTF-8 text, and the byte at offset {error.start} is not"
        raise ConfigError([Problem(key, str(path), rule, "save the file as UTF-8")], source) from None
    except OSError as error:
        rule = f"the file cannot be read: {error.strerror}"
        raise ConfigError([Problem(key, str(path), rule, "name a readable YAML file")], source) from None


def _merge(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        below = base.get(key)
        merged[key] = _merge(below, value) if isinstance(below, dict) and isinstance(value, dict) else value
    return merged
