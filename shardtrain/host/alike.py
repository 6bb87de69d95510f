"""Whether all processes of a run do the same thing. Each states what it has, and each compares all statements.

A mesh over several processes is one program. If one of them has another seed, learning rate or release of JAX, the run
trains something that nobody asked for, or waits forever in a collective.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import os
import platform
import sys
from collections.abc import Callable, Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any, TypeVar

from shardtrain.errors import UserError

T = TypeVar("T")
#: Takes the text of this process and returns that of every process, by its number. All processes call it together.
Exchange = Callable[[str], list[str]]

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")
#: Variables that change what JAX computes.
VARIABLES = ("JAX_ENABLE_X64", "JAX_DEFAULT_MATMUL_PRECISION", "JAX_DEFAULT_PRNG_IMPL", "JAX_THREEFRY_PARTITIONABLE")
#: Config keys that may differ: a directory on each machine.
FREE = ("run.compile_cache",)
_ABSENT, _WIDTH = "absent", 200


def together(make: Callable[[], T], said: Callable[[T], Mapping[str, Any]], exchange: Exchange) -> T:
    """Call `make` on every process, and return its result once all processes describe it alike.

    Args:
      make: makes the object.
      said: describes it, as key to value in JSON. Nested mappings are compared key by key.
      exchange: passes texts between the processes.

    Raises:
      UserError: `make` raised it, here or on another process; or the processes differ.
    """
    made: Any = None
    refusal: Exception | None = None
    statement: dict[str, Any] = {}
    try:
        made = make()
        statement = dict(_flat(said(made)))
    except Exception as error:  # whatever it is, because the others wait for an answer of this process
        refusal = error
    answers = [json.loads(text) for text in exchange(json.dumps([refusal is not None, statement]))]
    if refusal is not None:
        raise refusal
    if refused := [process for process, (has_refused, _) in enumerate(answers) if has_refused]:
        raise UserError(f"{_named(refused)} refused to continue; see the message there")
    check_alike([statement for _, statement in answers])
    return made


def check_alike(statements: list[dict[str, Any]]) -> None:
    """Compare the statements of the processes, each of which is a flat dict.

    Raises:
      UserError: they differ. Names each key, its values, and the processes that have them.
    """
    lines = []
    for key in dict.fromkeys(key for statement in statements for key in statement):
        values: dict[str, list[int]] = {}
        for process, statement in enumerate(statements):
            values.setdefault(_written(statement.get(key, _ABSENT)), []).append(process)
        if len(values) > 1:
            lines.append(f"\n  {key}: " + "; ".join(f"{value} on {_named(who)}" for value, who in values.items()))
    if lines:
        raise UserError(
            f"the processes of a run must all do the same, but these differ in:{''.join(lines)}\n"
            "start the same command on each, with the same files, code and packages"
        )


def software() -> dict[str, str]:
    """Return the versions of Python, of the packages behind a step and of this one, and JAX's variables."""
    found = {"Python": platform.python_version(), **{package: _version(package) for package in PACKAGES}}
    found |= {f"variable {name}": os.environ.get(name, _ABSENT) for name in VARIABLES}
    package = Path(__file__).parents[1]
    files = sorted(package.rglob("*.py"))
    code = b"".join(str(path.relative_to(package)).encode() + b"\0" + path.read_bytes() for path in files)
    return found | {"source of shardtrain": _digest(code)}


def asked(config: Mapping[str, Any], model: Any) -> dict[str, Any]:
    """Return a resolved config as plain data, without keys that may differ, and the sources of what it names.

    Args:
      config: the resolved config.
      model: the class of the model.
    """
    keys = {key: value for key, value in _flat(config) if key not in FREE}
    paths = [value for value in keys.values() if isinstance(value, str) and ":" in value]
    modules = {path: sys.modules.get(path.partition(":")[0]) for path in paths}  # those of import paths
    named = {path: file for path, module in modules.items() if (file := getattr(module, "__file__", None))}
    files = {"the model": inspect.getsourcefile(model), **named}
    sources = {name: _ABSENT if file is None else _digest(Path(file).read_bytes()) for name, file in files.items()}
    return keys | {f"source of {name}": digest for name, digest in sources.items()}


def _flat(value: Mapping[str, Any], above: str = "") -> Iterator[tuple[str, Any]]:
    for key, item in value.items():
        if isinstance(item, Mapping) and item:
            yield from _flat(item, f"{above}{key}.")
        else:
            yield f"{above}{key}", item


def _written(value: Any) -> str:
    text = value if isinstance(value, str) and value.isprintable() else json.dumps(value)
    return text if len(text) <= _WIDTH else f"{text[:_WIDTH]}... ({_digest(text.encode())})"


def _named(processes: list[int]) -> str:
    return f"process{'es' * (len(processes) > 1)} {', '.join(map(str, processes))}"


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return _ABSENT


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]
