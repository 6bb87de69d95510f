"""What a run starts from: nothing, the weights of another run, or a checkpoint of its own."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from shardtrain.checkpoint import Checkpointer, load_weights
from shardtrain.config import RunConfig
from shardtrain.host.agree import by_process_zero
from shardtrain.metrics import MetricsLog
from shardtrain.run.job import Job
from shardtrain.train.callbacks import Values
from shardtrain.train.state import TrainState


@dataclasses.dataclass(frozen=True)
class Start:
    """The state that a run starts with.

    Attributes:
      state: live, on the mesh of the run.
      position: of the data; `None` for its beginning.
      unevaluated: metrics of the step of `state`, if its evaluation was still to be made when it was saved.
    """

    state: TrainState
    position: dict[str, Any] | None = None
    unevaluated: Values | None = None

    @classmethod
    def of(cls, config: RunConfig, job: Job, checkpointer: Checkpointer, step: int | None) -> Start:
        """The start from a checkpoint, or where `step` is None a fresh one, the only one that reads `init_from`.

        Raises:
          UserError: a checkpoint that does not verify or does not fit the model.
        """
        cast = config.checkpoint.cast
        restored = None if step is None else checkpointer.restore(job.abstract_canonical(), step, cast=cast)
        if restored is None:
            state = job.init_state()
            return cls(state if config.init_from is None else _with_weights_of(config.init_from, state, job))
        return cls(job.live(restored.state), restored.extra["data"], restored.extra.get("unevaluated"))

    def unevaluated_by(self, log: MetricsLog | None) -> Values | None:
        """`unevaluated`, unless the log tells that the evaluation was made later; else its line is to be written anew.

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

        return None if by_process_zero(was_made) else self.unevaluated


def _with_weights_of(path: str, state: TrainState, job: Job) -> TrainState:
    place = Path(path)
    is_step = place.name.isdigit() and not (place / "checkpoints").is_dir()
    step = int(place.name) if is_step else None
    folder, cast = place.parent if is_step else place, job.config.checkpoint.cast
    params = load_weights(folder, job.abstract_canonical().params, step, cast=cast)
    return job.live(dataclasses.replace(job.canonical(state), params=params))
