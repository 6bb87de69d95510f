"""A trace of some steps, and a table of where their time went."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from pathlib import Path

import jax

from shardtrain.errors import UserError
from shardtrain.hlo import UnknownHLOError
from shardtrain.hlo.classes import instruction_classes
from shardtrain.metrics.trace import check_steps, read_events, shares
from shardtrain.train.callbacks import Callback
from shardtrain.train.loop import Loop
from shardtrain.train.state import TrainState

_log = logging.getLogger(__name__)

#: How many steps are traced when a running process is asked to.
ASKED_STEPS = 3


class Profiler(Callback):
    """Traces steps with `jax.profiler`, for TensorBoard and Perfetto.

    The loop waits for the step before the first one and for the last one, so that the trace holds whole steps.

    Args:
      directory: where the trace is written, as `plugins/profile/<time>`: the folder of TensorBoard's events.
      steps: the first and the last step to trace. The first step of a run cannot be among them.
      clock: returns seconds.
    """

    def __init__(
        self, directory: Path, steps: tuple[int, int] | None = None, clock: Callable[[], float] = time.perf_counter
    ):
        check_steps(steps)
        self._directory, self._steps, self._clock = directory, steps, clock
        self._asked = False
        self._loop: Loop | None = None
        self._first = self._last = 0
        self._begun: float | None = None

    def follow(self, loop: Loop) -> None:
        """Tell whose step it is, which gives the compiled program and shows the table."""
        self._loop = loop

    def ask(self) -> None:
        """Trace the next `ASKED_STEPS` steps. May be called on any thread."""
        self._asked = True

    def on_state(self, step: int, state: TrainState) -> Mapping[str, float | jax.Array]:
        """Begin or end a trace after a step."""
        if self._begun is not None:
            if step >= self._last:
                jax.block_until_ready(state)
                self._end(step)
        elif (last := self._wanted(step)) is not None:
            jax.block_until_ready(state)
            options = jax.profiler.ProfileOptions()
            options.python_tracer_level = 0  # which slows down the host, and fills the trace
            jax.profiler.start_trace(self._directory, profiler_options=options)
            self._first, self._last, self._begun = step + 1, last, self._clock()
        return {}

    def close(self) -> None:
        """End a trace that the end of the run has cut short."""
        if self._begun is not None and self._loop is not None:
            self._end(self._loop.step)

    def _wanted(self, step: int) -> int | None:
        """The last step of a trace that shall begin after this step."""
        if self._asked:
            self._asked = False
            return step + ASKED_STEPS
        if self._steps is not None and self._steps[0] - 1 <= step < self._steps[1]:
            last, self._steps = self._steps[1], None
            return last
        return None

    def _end(self, step: int) -> None:
        assert self._begun is not None
        count, seconds, self._begun = step - self._first + 1, self._clock() - self._begun, None
        jax.profiler.stop_trace()
        if count > 0 and jax.process_index() == 0:
            self._say(f"steps {self._first} to {step} took {seconds / count * 1e3:,.1f} ms each; trace in")
            self._say(f"  {self._directory}/plugins/profile")
            for line in self._table(count):
                self._say(line)

    def _table(self, count: int) -> list[str]:
        """Where the time of a step went, on the average device of this process."""
        assert self._loop is not None
        mesh = self._loop.compiled.mesh
        try:
            classes = instruction_classes(self._loop.compiled.as_text(), mesh)
        except (UnknownHLOError, UserError) as error:
            return [f"no table: the compiled step cannot be read ({error})"]
        found = shares(read_events(self._directory), classes, len(mesh.local_devices))
        whole = sum(found.values())
        return [f"  {name:<36} {ns / count / 1e6:>10.2f} ms {ns / whole:>6.1%}" for name, ns in found.items() if ns]

    def _say(self, line: str) -> None:
        if self._loop is None or not self._loop.message(line):
            _log.warning(line)
