"""Places for metrics, by name: `tensorboard`, and those of `log.also` in a config."""

from __future__ import annotations

import dataclasses
import importlib
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol, cast

from shardtrain.errors import UserError, did_you_mean
from shardtrain.host.import_path import find, module_names
from shardtrain.metrics import loggers

_log = logging.getLogger(__name__)
_SYSTEM = ("step_time_s", "tokens_per_s", "mfu", "memory_bytes", "skipped", "skipped_in_row")


@dataclasses.dataclass(frozen=True)
class LoggedRun:
    """What a logger is told of a run.

    Attributes:
      directory: the run directory.
      name: of the run.
      config: its sections, as plain data.
    """

    directory: Path
    name: str
    config: Mapping[str, Any]


class Logger(Protocol):
    """A place for metrics. Names of metrics are grouped by slashes, as `grouped` gives them."""

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Add the metrics of a step."""

    def text(self, name: str, text: str, step: int) -> None:
        """Add a text, such as a sample."""

    def forget_from(self, step: int) -> None:
        """Drop a step and all later ones, which a resumed run makes again."""

    def flush(self) -> None:
        """Pass on everything so far."""

    def close(self) -> None:
        """End."""


class Guarded:
    """A logger whose failure (a server that is away, say) is a warning, once, and never ends the run.

    Args:
      name: for the warning.
      opens: opens the logger, which may fail, too.
    """

    def __init__(self, name: str, opens: Callable[[], Logger]):
        self._name = name
        self._logger = self._guarded(opens)

    def __getattr__(self, method: str) -> Any:
        return lambda *arguments: self._guarded(lambda: getattr(self._logger, method)(*arguments))

    def _guarded(self, call: Callable[[], Any]) -> Any:
        if not self._name:
            return None
        try:
            return call()
        except Exception as error:
            _log.warning("no more metrics to %s: %s: %s", self._name, type(error).__name__, error)
            self._name = ""


def open_logger(name: str, run: LoggedRun) -> Logger:
    """Open a place for metrics.

    Args:
      name: a module of `shardtrain.metrics.loggers`, or `package.module:function`.
      run: whose metrics these are.

    Raises:
      UserError: see `find_logger`.
    """
    opens = find_logger(name)
    return cast(Logger, Guarded(name, lambda: opens(run)))


def find_logger(name: str) -> Callable[[LoggedRun], Logger]:
    """The function that opens a place for metrics.

    Args:
      name: as for `open_logger`.

    Raises:
      UserError: there is none of that name, or its package is not installed.
    """
    check_logger(name)
    if ":" in name:
        return find(name, "function", "log.also")
    module = importlib.import_module(f"{loggers.__name__}.{name}")
    if hasattr(module, "PACKAGE"):
        required(module.PACKAGE)
    return module.open_logger


def check_logger(name: str) -> None:
    """Refuse a name that no logger has. Whether its package is installed is asked where a run starts, not here.

    Raises:
      UserError: names those that there are.
    """
    if ":" not in name and name not in (known := module_names(loggers)):
        fix = f"{did_you_mean(name, known)} (package.module:function for one of your own)"
        raise UserError("log.also", name, "there is no such logger", fix)


def required(package: str) -> Any:
    """Import the package of a logger, which is an extra of this one.

    Raises:
      UserError: it is not installed.
    """
    try:
        return importlib.import_module(package)
    except ImportError as error:
        fix = f"pip install 'shardtrain[{package}]', or take it out"
        raise UserError("log.also", package, f"the package {package} is not installed", fix) from error


def grouped(key: str) -> str:
    """The name of a metric in one of the groups `train`, `held_out` and `system`, or in the one that it names."""
    if "/" in key:
        return key
    if key.startswith("eval_"):
        return f"held_out/{key.removeprefix('eval_')}"
    return f"{'system' if key in _SYSTEM else 'train'}/{key}"
