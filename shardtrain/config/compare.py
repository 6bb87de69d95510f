"""Whether a config continues a run or describes another one."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from shardtrain.config import replan
from shardtrain.config.errors import ConfigError, Problem
from shardtrain.config.resolve import resolve
from shardtrain.config.schema import RunConfig, Section
from shardtrain.config.validate import validate_sections

#: The keys that identify a run; a dotted prefix covers all keys below it.
IDENTITY = ("run.seed", "model", "data", "optimizer", "precision.params")
#: Of these, the keys that change how a step is computed, but not its result.
FREE = ("optimizer.accumulate",)
#: The same for the library's own models. Only the author of another class knows what its options mean.
FREE_OF_BUILTIN = ("model.attention", "model.loss_chunk", "model.remat", "model.scan")
_ABSENT = object()


def changes(old: RunConfig | Mapping[str, Any], new: RunConfig) -> list[str]:
    """List the dotted keys in which two configs describe different runs: seed, model, data, optimizer, params dtype.

    Mesh, rules, devices, pipeline, accumulation, number of steps, checkpoint and logging settings may differ. For the
    library's own models, so may the attention kernel, remat, scan and loss chunks.

    Args:
      old: the config that is stored with the run, as an object or as plain data; keys that it lacks (it may be from an
        older version) have their defaults.
      new: the config to compare with it.
    """
    return list(_differences(old, new))


def differences(configs: Sequence[RunConfig | Mapping[str, Any]]) -> dict[str, list[Any]]:
    """The dotted keys in which configs differ, each with its value in every one of them; `None` where one lacks it.

    Args:
      configs: as objects, or as plain data, whose missing keys have their defaults.
    """
    plain = [_completed(config) for config in configs]
    keys = dict.fromkeys(key for other in plain[1:] for key, _ in _compare(plain[0], other, ""))
    return {key: [_at(config, key) for config in plain] for key in keys}


def _at(config: Any, key: str) -> Any:
    for part in key.split("."):
        config = config.get(part) if isinstance(config, Mapping) else None
    return config


def check_same_run(old: RunConfig | Mapping[str, Any], new: RunConfig, source: str, step: int = 0) -> None:
    """Refuse to continue a run with the config of another one.

    Args:
      old: the config that is stored with the run, as for `changes`.
      new: the config to continue it with.
      source: the run, as messages name it.
      step: the step that the run has reached.

    Raises:
      ConfigError: names each differing key, both values, and the override that keeps the value of the run.
    """
    before, after = _completed(old).get("optimizer", {}), new.to_dict()["optimizer"]
    problems = [
        replan.problem(before, after, step)
        if key == replan.KEY and replan.applies(before, after)
        else _another_run(key, *pair)
        for key, pair in _differences(old, new).items()
    ]
    if problems:
        raise ConfigError(
            problems, f"another run than the one in {source} (--allow-changes goes on all the same): the config"
        )


def _another_run(key: str, before: Any, after: Any) -> Problem:
    started = "without it" if before is _ABSENT else f"with {json.dumps(before)}"
    keep = f"leave {key} out" if before is _ABSENT else f"pass {key}={json.dumps(before)}"
    return Problem(
        key,
        None if after is _ABSENT else after,
        f"the run was started {started}; another value makes another run",
        f"{keep} to continue, or another run.name to start anew, or --allow-changes to continue with the new value",
    )


def _differences(old: RunConfig | Mapping[str, Any], new: RunConfig) -> dict[str, tuple[Any, Any]]:
    free = FREE if ":" in new.model.type else FREE + FREE_OF_BUILTIN
    found = _compare(_completed(old), new.to_dict(), "")
    return {key: pair for key, pair in found if _under(key, IDENTITY) and not _under(key, free)}


def _compare(before: Any, after: Any, path: str) -> Iterator[tuple[str, tuple[Any, Any]]]:
    if isinstance(before, Mapping) and isinstance(after, Mapping):
        for key in {**after, **before}:
            inner = f"{path}.{key}" if path else key
            yield from _compare(before.get(key, _ABSENT), after.get(key, _ABSENT), inner)
    elif before != after:
        yield path, (before, after)


def _completed(old: RunConfig | Mapping[str, Any]) -> dict[str, Any]:
    """Add the present defaults to plain data; a section that is no longer valid stays as it is."""
    if isinstance(old, RunConfig):
        return old.to_dict()
    sections = resolve(validate_sections(old)[0])
    valid = {name: part.model_dump(mode="json") for name, part in sections.items() if isinstance(part, Section)}
    return {**old, **valid}


def _under(key: str, prefixes: tuple[str, ...]) -> bool:
    return any(key == prefix or key.startswith(f"{prefix}.") for prefix in prefixes)
