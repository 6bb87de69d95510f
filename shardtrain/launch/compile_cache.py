"""JAX's persistent compilation cache: a program is compiled once, and loaded by every later process."""

from __future__ import annotations

import contextlib
import logging
import os
import tempfile
from pathlib import Path
from typing import Any

import jax
from jax.experimental.compilation_cache import compilation_cache

_log = logging.getLogger(__name__)

_LIMIT = 4 * 2**30  # bytes
_mine: str | None = None


def use_cache(folder: Path | None) -> bool:
    """Store all compiled programs of this process in `folder` from now on; `None` for no cache.

    A cache that the program or its environment (`JAX_COMPILATION_CACHE_DIR`) has chosen is left alone. The content of a
    cache is executed, so the folder is created for its owner only, and one that others may write to is not used. If a
    cache cannot be used, a warning says so and the run continues without it. Beyond 4 GiB the oldest programs are
    deleted.

    Args:
      folder: created if it is missing.

    Returns:
      Whether `folder` is in use.
    """
    global _mine
    config: Any = jax.config
    if config.jax_compilation_cache_dir not in (None, _mine):
        return False
    obstacle = None if folder is None else _obstacle(folder)
    if obstacle is not None:
        _log.warning(
            "no compilation cache: %s: %s; set run.compile_cache to a directory of yours, or to null", folder, obstacle
        )
    _mine = None if folder is None or obstacle is not None else str(folder)
    options: dict[str, Any] = {"jax_compilation_cache_dir": _mine}
    if _mine is not None:
        options |= {"jax_persistent_cache_min_compile_time_secs": 0, "jax_persistent_cache_min_entry_size_bytes": -1}
        _trim(Path(_mine))
    for name, value in options.items():
        config.update(name, value)
    compilation_cache.reset_cache()  # JAX looks for a cache when it first compiles, which may have happened already
    return _mine is not None


def cache_folder(chosen: str | None, run: Path) -> Path | None:
    """The folder that `run.compile_cache` means: that path, or for `auto` one that all runs beside a run share."""
    if chosen is None:
        return None
    return run.parent / ".jax_cache" if chosen == "auto" else Path(chosen).expanduser().absolute()


def _obstacle(folder: Path) -> str | None:
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        status = folder.stat()
        if hasattr(os, "getuid") and (status.st_uid != os.getuid() or status.st_mode & 0o022):
            return "others may write there, and the content of a cache is executed"
        with tempfile.TemporaryFile(dir=folder):
            return None
    except OSError as error:
        return error.strerror or str(error)


def _trim(folder: Path) -> None:
    """Delete the oldest files beyond the limit.

    `jax_compilation_cache_max_size` is not used, because it needs another package and takes a lock for each program,
    and because JAX 0.10 never writes again once a process was killed between writing a program and its time stamp.
    """
    with contextlib.suppress(OSError):  # another process may delete them at the same time
        files = sorted((file.stat().st_mtime, file.stat().st_size, file) for file in folder.iterdir() if file.is_file())
        excess = sum(size for _, size, _ in files) - _LIMIT
        for _, size, file in files:
            if excess <= 0:
                break
            file.unlink(missing_ok=True)
            excess -= size
