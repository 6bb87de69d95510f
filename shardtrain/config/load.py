"""A checked `RunConfig` from a file and overrides, or all of its problems at once."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from shardtrain.config import layout_checks, value_checks
from shardtrain.config.errors import ConfigError, Problem
from shardtrain.config.files import read_file
from shardtrain.config.frozen import thaw
from shardtrain.config.overrides import apply_overrides
from shardtrain.config.resolve import resolve
from shardtrain.config.schema import RunConfig
from shardtrain.config.validate import validate_sections
from shardtrain.errors import UserError, mistakes

Check = Callable[..., Iterable[UserError] | None]

#: Sizes against the mesh, which are checked again once the devices are known.
LAYOUT: tuple[Check, ...] = (
    layout_checks.check_model_sizes,
    layout_checks.check_batch,
    layout_checks.check_accumulation,
    layout_checks.check_sequence,
    layout_checks.check_pipeline_schedule,
    layout_checks.check_gathering,
    layout_checks.check_layers,
    layout_checks.check_pipeline_rows,
)
VALUES: tuple[Check, ...] = (
    value_checks.check_devices_section,
    value_checks.check_xla,
    layout_checks.check_mesh,
    layout_checks.check_rules,
    value_checks.check_model_numbers,
    value_checks.check_model_remat,
    value_checks.check_heads,
    value_checks.check_data,
    value_checks.check_vocabulary,
    value_checks.check_optimizer,
    value_checks.check_schedule,
    value_checks.check_ema,
    value_checks.check_sample,
    value_checks.check_log,
    value_checks.check_profile,
)
DISK: tuple[Check, ...] = (
    value_checks.check_data_path,
    value_checks.check_init_from,
    value_checks.check_run_dir,
)


def load_config(path: str | os.PathLike[str], overrides: Sequence[str] = (), *, check_files: bool = True) -> RunConfig:
    """Read a YAML file and the files that it extends, apply overrides, fill in the defaults, and check the result.

    Args:
      path: the YAML file.
      overrides: `a.b=value` with values in YAML; a key that does not exist is an error.
      check_files: whether the data and the run directory must be usable here.

    Raises:
      ConfigError: every problem found, or the first syntax error.
    """
    raw = read_file(path)
    return _parse(raw, str(path), apply_overrides(raw, overrides), check_files)


def parse_config(
    raw: Mapping[str, Any], overrides: Sequence[str] = (), *, source: str = "config", check_files: bool = True
) -> RunConfig:
    """Check plain data, as `RunConfig.to_dict` returns it, in the same way.

    Args:
      raw: the sections.
      overrides: as for `load_config`.
      source: where they come from, for messages.
      check_files: as for `load_config`.

    Raises:
      ConfigError: every problem found.
    """
    sections = thaw(raw)
    return _parse(sections, source, apply_overrides(sections, overrides), check_files)


def check_devices(config: RunConfig, devices: int) -> None:
    """Check what depends on the number of devices: whether the mesh fits it, and the sizes against an axis of -1.

    Args:
      config: a checked config.
      devices: how many there are.

    Raises:
      ConfigError: every problem found.
    """
    problems = [*map(Problem.of, mistakes(layout_checks.check_product, config.mesh, devices, "found"))]
    sections = {name: getattr(config, name) for name in RunConfig.model_fields}
    problems += _run(LAYOUT, sections, devices)
    if problems:
        raise ConfigError(problems)


def _parse(raw: Mapping[str, Any], source: str, problems: list[Problem], check_files: bool) -> RunConfig:
    sections, invalid = validate_sections(raw)
    sections = resolve(sections)
    problems = problems + invalid
    emulate = sections["devices"].emulate if "devices" in sections else None
    problems += _run(VALUES, sections, None) + _run(LAYOUT, sections, emulate)
    if check_files:
        problems += _run(DISK, sections, None)
    if problems:
        raise ConfigError(problems, source)
    return RunConfig(**sections)


def _run(checks: Sequence[Check], sections: Mapping[str, Any], devices: int | None) -> list[Problem]:
    """Run each check whose sections, which its parameters name, are all there."""
    if "mesh" in sections:
        sections = {**sections, "mesh": layout_checks.filled(sections["mesh"], devices)}
    problems: list[Problem] = []
    for check in checks:
        arguments = [sections.get(name) for name in inspect.signature(check).parameters]
        if None not in arguments:
            problems += map(Problem.of, mistakes(check, *arguments))
    return problems
