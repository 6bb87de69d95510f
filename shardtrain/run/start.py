"""The start of a run: from nothing, from the weights of another run, or from a checkpoint of its own."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from shardtrain.checkpoint import Checkpointer, check_weights, load_weights
from shardtrain.config import RunConfig, check_same_run
from shardtrain.errors import UserError
from shardtrain.host.agree import decide_on_process_zero, on_process_zero
from shardtrain.host.files import write_text
from shardtrain.metrics import MetricsLog
from shardtrain.metrics.logger import LoggedRun, find_logger, open_logger
from shardtrain.run.job import Job
from shardtrain.train.averages import start_ema
from shardtrain.train.callbacks import Values
from shardtrain.train.state import TrainState

_log = logging.getLogger(__name__)


def open_checkpoints(config: RunConfig, directory: Path) -> Checkpointer:
    """The checkpoints of a run directory, with the options of a config."""
    return Checkpointer(
        directory / "checkpoints",
        keep=config.checkpoint.keep,
        keep_every=config.checkpoint.keep_every,
        asynchronous=config.checkpoint.asynchronous,
        compress=config.checkpoint.compress,
    )


def newest_step(checkpointer: Checkpointer, job: Job, directory: Path, allow_changes: bool) -> int | None:
    """The step to resume from; `None` for a fresh start.

    Raises:
      UserError: see `check_start`, which is called before data and state are prepared.
    """
    step = checkpointer.latest()
    check_start(job, directory, step, checkpointer.extra, allow_changes)
    return step


def check_start(
    job: Job, directory: Path, step: int | None, extra: Callable[[int], dict[str, Any]], allow_changes: bool
) -> None:
    """Refuse a job that cannot begin, or cannot go on, in a run directory.

    Args:
      job: with the config of the run.
      directory: of the run.
      step: of the checkpoint to resume from; `None` for a fresh start.
      extra: the record saved with a step.
      allow_changes: go on in the directory of a run with another model, data, optimizer or seed.

    Raises:
      UserError: the config does not continue that run, `init_from` has no weights that fit, or the package of a logger
        is not installed.
    """
    config = job.config
    on_process_zero(lambda: [find_logger(name) for name in config.log.also])
    if step is None:
        if config.init_from is not None:
            folder, source = _weights_of(config.init_from)
            check_weights(folder, job.abstract_canonical().params, source, cast=config.checkpoint.cast)
    elif config.run.steps < step:
        raise UserError(
            f"run.steps = {config.run.steps} is below step {step}, which the run in {directory} has reached; set "
            f"run.steps to {step} or more, or another run.name to start anew"
        )
    elif not allow_changes:
        check_same_run(extra(step)["config"], config, str(directory), step)


def open_log(config: RunConfig, directory: Path, step: int) -> MetricsLog:
    """The metrics up to `step`; also writes the config into the run directory."""
    run = LoggedRun(directory, config.run.name, config.to_dict())
    names = [name for name in dict.fromkeys(config.log.also) if name != "tensorboard" or not config.log.tensorboard]
    others = [open_logger(name, run) for name in names]
    log = MetricsLog(directory, tensorboard=config.log.tensorboard, others=others)
    log.truncate(step)
    write_text(directory / "config.yaml", config.to_yaml())
    log.text("config", config.to_yaml(), step)
    return log


@dataclasses.dataclass(frozen=True)
class Start:
    """The state and the data position that a run starts with.

    Attributes:
      state: live, on the mesh of the run.
      position: in the data; `None` for its beginning.
      unevaluated: metrics of the step of `state`, if its evaluation was not finished when it was saved.
    """

    state: TrainState
    position: dict[str, Any] | None = None
    unevaluated: Values | None = None

    @classmethod
    def of(cls, config: RunConfig, job: Job, checkpointer: Checkpointer, step: int | None) -> Start:
        """The start from a checkpoint; or where `step` is `None` a fresh one, which alone reads `init_from`.

        Raises:
          UserError: a checkpoint that does not verify or does not fit the model.
        """
        if step is None:
            state = job.init_state()
            return cls(state if config.init_from is None else _with_weights_of(config.init_from, state, job))
        ema = "ema" in checkpointer.parts(step)
        restored = checkpointer.restore(job.abstract_canonical(ema=ema), step, cast=config.checkpoint.cast)
        assert restored is not None, "a step was named"
        state = job.live(_with_ema(restored.state, job) if ema != job.keeps_ema else restored.state)
        return cls(state, restored.extra["data"], restored.extra.get("unevaluated"))

    def unevaluated_by(self, log: MetricsLog | None) -> Values | None:
        """`unevaluated`, unless the log shows that the evaluation was made later; if not, drops the step's line.

        Args:
          log: of process 0, which decides for all.
        """
        if self.unevaluated is None:
            return None
        step = int(self.state.step)

        def was_made() -> int:
            assert log is not None
            if log.last["step"] == step and "eval_loss" in log.last:
                return 1
            log.truncate(step - 1)
            return 0

        return None if decide_on_process_zero(was_made) else self.unevaluated


def _with_weights_of(path: str, state: TrainState, job: Job) -> TrainState:
    folder, step = _weights_of(path)
    params = load_weights(folder, job.abstract_canonical().params, step, cast=job.config.checkpoint.cast)
    loaded = dataclasses.replace(job.canonical(state), params=params)
    return job.live(start_ema(job.model, loaded) if job.keeps_ema else loaded)


def _weights_of(path: str) -> tuple[Path, int | None]:
    """The folder and the step that `init_from` names; `None` for the newest."""
    place = Path(path)
    is_step = place.name.isdigit() and not (place / "checkpoints").is_dir()
    return (place.parent, int(place.name)) if is_step else (place, None)


def _with_ema(state: TrainState, job: Job) -> TrainState:
    """A state, as checkpoints store it, with the average that the config wants and the checkpoint lacks, or without."""
    if job.keeps_ema:
        _log.warning("the checkpoint has no average of the weights (ema): it starts from the weights")
        return start_ema(job.model, state)
    _log.warning("the average of the weights (ema) is dropped, since ema.decay is null")
    return dataclasses.replace(state, ema={})
