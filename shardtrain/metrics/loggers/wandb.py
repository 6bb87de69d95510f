"""`log.also: [wandb]`: Weights & Biases.

Offline, unless the variable `WANDB_MODE` says otherwise: `wandb sync` uploads the folder `wandb` of the run directory.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Mapping
from typing import Any

from shardtrain.host.files import write_text
from shardtrain.metrics.logger import LoggedRun, required

#: Without which a run with this logger does not start.
PACKAGE = "wandb"


class WandbLogger:
    """One run of Weights & Biases.

    Args:
      session: from `wandb.init`.
    """

    def __init__(self, session: Any):
        self._session = session
        session.define_metric("*", step_metric="step")  # its own step could never go back, as a resumed run does

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Add the metrics of a step."""
        self._session.log({"step": step, **values})

    def text(self, name: str, text: str, step: int) -> None:
        """Add a text to the summary of the run."""
        self._session.summary[name] = text

    def forget_from(self, step: int) -> None:
        """Do nothing: the later values of a step are shown."""

    def flush(self) -> None:
        """Do nothing: a thread of the package passes on everything."""

    def close(self) -> None:
        """End the session; a resumed run continues it."""
        self._session.finish()


def open_logger(run: LoggedRun) -> WandbLogger:
    """Start a session, or go on with that of the run."""
    wandb = required(PACKAGE)
    file = run.directory / "wandb.id"
    if not file.exists():
        write_text(file, uuid.uuid4().hex[:12])
    session = wandb.init(
        project="shardtrain",
        id=file.read_text(),
        name=run.name,
        dir=run.directory,
        config=dict(run.config),
        mode=os.environ.get("WANDB_MODE", "offline"),
        settings=wandb.Settings(silent=True, console="off"),
    )
    return WandbLogger(session)
