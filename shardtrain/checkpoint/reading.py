"""Reading a step that is known to be intact: compare first, then load directly into the requested shardings."""

from pathlib import Path
from typing import Any

import jax

from shardtrain.checkpoint import lifecycle, manifest, names, store, trust
from shardtrain.checkpoint.compare import ArrayInfo, differences, hint, summary
from shardtrain.errors import UserError

_METADATA_BYTES = 2**20  # larger files hold array data, not metadata


def read_state(path: Path, abstract: Any, *, cast: bool) -> tuple[Any, dict]:
    """Return the state and the extra record of an intact step.

    Args:
      path: the directory of the step.
      abstract: the tree to restore; leaves with shape, dtype and sharding.
      cast: allow a change of dtype.

    Raises:
      UserError: it was written by a newer shardtrain; or paths, shapes or dtypes differ (each is named).
    """
    wanted = {name: names.restorable(name, leaf) for name, leaf in names.flatten(abstract).items()}
    description = describe_intact(path)
    _require_fit(path, description.arrays, wanted, cast)
    loaded = store.load(path, wanted, partial=False)
    return names.unflatten(abstract, loaded), description.record["extra"]


def load_weights(directory: Path | str, abstract_params: Any, step: int | None = None, *, cast: bool = False) -> Any:
    """Load only the weights of another run: the leaves below `params.`. The directory of that run is not changed.

    Args:
      directory: a run directory or its `checkpoints`.
      abstract_params: the tree below `params`; leaves with shape, dtype and sharding.
      step: which step; None means the newest that verifies, with a warning for each newer one that does not.
      cast: allow a change of dtype.

    Raises:
      UserError: no intact step; or paths, shapes or dtypes differ (each is named).
    """
    path = intact_step(directory, step)
    return load_parts(path, {"params": abstract_params}, cast=cast)["params"]


def check_weights(directory: Path | str, abstract_params: Any, step: int | None = None, *, cast: bool = False) -> None:
    """Refuse what `load_weights` would, as far as small files and sizes tell; no array is read.

    Raises:
      UserError: see `load_weights`, which has the same arguments.
    """
    _require_parts(intact_step(directory, step, hash_up_to=_METADATA_BYTES), {"params": abstract_params}, cast)


def intact_step(directory: Path | str, step: int | None = None, *, hash_up_to: int | None = None) -> Path:
    """Verify a step of a run, and return its directory. The directory of the run is not changed.

    Args:
      directory: a run directory or its `checkpoints`.
      step: which step; None means the newest that verifies, with a warning for each newer one that does not.
      hash_up_to: hash only files of at most this many bytes. None hashes all.

    Raises:
      UserError: no intact step.
    """
    folder = locate(directory)
    if step is None:
        step = trust.newest_intact(folder, hash_up_to)
    else:
        trust.require_intact(folder, step, hash_up_to)
    return folder / str(step)


def parts_of(path: Path) -> set[str]:
    """The names of the parts of the state in an intact step, such as `params`; of those that have arrays.

    Raises:
      UserError: it was written by a newer shardtrain.
    """
    return {_part(name) for name in describe_intact(path).arrays}


def load_parts(path: Path, parts: dict[str, Any], *, cast: bool) -> dict[str, Any]:
    """Load some parts of the state in an intact step, such as `params` and `model_state`.

    Args:
      path: the directory of the step.
      parts: the name of each part to its tree; leaves with shape, dtype and sharding.
      cast: allow a change of dtype.

    Raises:
      UserError: paths, shapes or dtypes differ (each is named).
    """
    wanted = _require_parts(path, parts, cast)
    return names.unflatten(parts, store.load(path, wanted, partial=True))


def read_extra(directory: Path | str, step: int) -> dict:
    """Return the record saved with a step. Its small files are verified, its arrays are not read.

    Raises:
      UserError: no such step, a corrupt one, or one written by a newer shardtrain.
    """
    return describe(directory, step).record["extra"]


def intact_extra(path: Path) -> dict:
    """Return the record saved with a step that is known to be intact.

    Raises:
      UserError: it was written by a newer shardtrain.
    """
    return describe_intact(path).record["extra"]


def describe(directory: Path | str, step: int) -> store.Description:
    """Return the description of a step, after verifying its small files and the sizes of all files.

    Raises:
      UserError: no such step, a corrupt one, or one written by a newer shardtrain.
    """
    folder = locate(directory)
    lifecycle.require_manifest(folder, step)
    problem = manifest.problem(folder, step, hash_up_to=_METADATA_BYTES)
    lifecycle.require_no_problem(folder, step, problem)
    return describe_intact(folder / str(step))


def locate(directory: Path | str) -> Path:
    """Return the folder of the steps: the given one or, for a run directory, its `checkpoints`.

    Raises:
      UserError: it does not exist, cannot be read, or is a folder of something else.
    """
    given = Path(directory).absolute()
    try:
        if (given / "checkpoints").is_dir():
            return given / "checkpoints"
        if not given.is_dir():
            raise UserError(f"no checkpoints: {given} is not a directory")
        if given.name == "checkpoints" or _is_ours(given):
            return given
    except OSError as error:
        raise UserError(f"no checkpoints: {given} cannot be read: {error.strerror}") from error
    raise UserError(f"no checkpoints: {given} is not a run directory; name one that has a folder checkpoints/")


def _is_ours(folder: Path) -> bool:
    """Whether a folder contains a step of ours, complete or not, or a manifest. (Others number their folders, too.)"""
    steps = [folder / str(step) for step in lifecycle.committed(folder)]
    named = [*lifecycle.with_manifest(folder), *lifecycle.uncommitted(folder), *lifecycle.set_aside(folder)]
    return bool(named) or any((step / store.ITEM).is_dir() for step in steps)


def describe_intact(path: Path) -> store.Description:
    """Return the description of a step that is known to be intact.

    Raises:
      UserError: it was not written by shardtrain, or by a newer one.
    """
    description = store.describe(path)
    version = description.record.get("format_version")
    if not isinstance(version, int):
        raise UserError(f"{path} was not written by shardtrain: it has no format_version")
    if version > store.FORMAT_VERSION:
        raise UserError(
            f"{path} has format_version {version}, and this shardtrain reads up to {store.FORMAT_VERSION}; "
            "use the newer shardtrain that wrote it"
        )
    return description


def _require_parts(path: Path, parts: dict[str, Any], cast: bool) -> dict[str, jax.ShapeDtypeStruct]:
    """The leaves of some parts by their names, which fit those that are saved."""
    wanted = {name: names.restorable(name, leaf) for name, leaf in names.flatten(parts).items()}
    saved = {name: info for name, info in describe_intact(path).arrays.items() if _part(name) in parts}
    _require_fit(path, saved, wanted, cast)
    return wanted


def _part(name: str) -> str:
    return name.partition(".")[0]


def _require_fit(path: Path, saved: dict[str, ArrayInfo], wanted: dict[str, jax.ShapeDtypeStruct], cast: bool) -> None:
    model = {name: ArrayInfo.of(leaf) for name, leaf in wanted.items()}
    if lines := differences(saved, model, cast=cast):
        differing = summary(lines) + hint(saved, model)
        raise UserError(f"the checkpoint {path} does not fit this model (checkpoint != model):\n{differing}")
