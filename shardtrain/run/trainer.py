"""A run: one job with one directory, started, resumed and finished."""

from __future__ import annotations

import contextlib
import importlib
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
from flax import nnx

from shardtrain.checkpoint import Checkpointer, RunLock
from shardtrain.config import RunConfig
from shardtrain.data import Loader, Source, Tokenizer
from shardtrain.errors import UserError
from shardtrain.host.agree import on_process_zero
from shardtrain.host.closing import close_all
from shardtrain.host.files import write_text
from shardtrain.host.typed import typed
from shardtrain.launch.compile_cache import cache_folder, use_cache
from shardtrain.metrics import Progress, plot_loss
from shardtrain.run.data import OpenedData, eval_batches, open_data, training_batches
from shardtrain.run.job import Job, build
from shardtrain.run.start import Start, newest_step, open_checkpoints, open_log
from shardtrain.train.callbacks import Callback, Values, check_callbacks
from shardtrain.train.generate import generate
from shardtrain.train.loop import Loop
from shardtrain.train.loss_sums import LossFunction, check_loss
from shardtrain.train.profile import Profiler
from shardtrain.train.state import TrainState

#: Modules that the loader and the log import; meanwhile the main thread is often in XLA.
_USED_LATER = ("grain", "shardtrain.metrics.loggers.tensorboard", "psutil")


class Trainer:
    """A training loop with a run directory around it; made by `from_config`.

    Attributes:
      job: mesh, model, optimizer and step.
      directory: the run directory.
      loop: trains.
      profiler: traces steps, when asked.
      tokenizer: of text data, else `None`.
      resumed_from: the step of the checkpoint from which the run was resumed, else `None`.
    """

    def __init__(
        self,
        job: Job,
        directory: Path,
        loop: Loop,
        data: OpenedData,
        profiler: Profiler,
        lock: RunLock | None,
        resumed_from: int | None,
    ):
        self.job, self.directory, self.loop, self.resumed_from = job, directory, loop, resumed_from
        self.profiler = profiler
        self.tokenizer: Tokenizer | None = data.tokenizer
        self._held_out, self._lock = data.held_out, lock

    @classmethod
    @typed
    def from_config(
        cls,
        config: RunConfig,
        *,
        source: Source | None = None,
        loss: LossFunction | None = None,
        model: Callable[[nnx.Rngs], nnx.Module] | None = None,
        callbacks: Sequence[Callback] = (),
        should_stop: Callable[[int], bool] = lambda step: False,
        interrupted: Callable[[], bool] = lambda: False,
        allow_changes: bool = False,
        processes: int = 1,
    ) -> Trainer:
        """Start the run that a config describes, or resume it where its directory holds checkpoints.

        Installs no signal handler and initialises no distributed runtime; those belong to the program around it.

        Args:
          config: describes the run.
          source: rows to train on and to hold out from, instead of those that `data.type` names. If rows are text, its
            attribute `tokenizer` follows `shardtrain.data.Tokenizer`.
          loss: `(module, batch, ctx) -> (loss_sum, weight_sum, metrics)`, for a plain Flax module that does not follow
            `nn.Model`; see `make_train_step`.
          model: builds the module, instead of the class that the config names.
          callbacks: see `Loop`.
          should_stop: see `Loop`.
          interrupted: polled while text is tokenised, on this process alone; True ends that with an error.
          allow_changes: go on in the directory of a run with another model, data, optimizer or seed.
          processes: number of processes of the run, where `jax.distributed` joins several.

        Raises:
          UserError: anything wrong with config, devices, data, directory or checkpoints.
        """
        directory = config.run.directory.absolute()
        threading.Thread(target=lambda: [*map(importlib.import_module, _USED_LATER)]).start()
        use_cache(cache_folder(config.run.compile_cache, directory))
        check_callbacks(callbacks)
        if loss is not None:
            check_loss(loss)
        job = build(config, processes=processes, loss=loss, model=model)
        with contextlib.ExitStack() as on_error:
            if (lock := on_process_zero(lambda: RunLock(directory))) is not None:
                on_error.callback(lock.release)
            checkpointer = open_checkpoints(config, directory)
            latest = newest_step(checkpointer, job, directory, allow_changes)
            data = open_data(config, directory, source=source, loss=loss, should_stop=interrupted)
            start = Start.of(config, job, checkpointer, latest)
            batches = training_batches(config, data.train, job.batch_sharding, start.position, allow_changes)
            profiler = Profiler(directory / "tensorboard", config.profile.steps)
            observers = (*callbacks, profiler)
            loop = _loop(job, directory, start, batches, data.held_out, checkpointer, observers, should_stop)
            profiler.follow(loop)
            on_error.pop_all()
        return cls(job, directory, loop, data, profiler, lock, latest)

    @property
    def state(self) -> TrainState:
        """The present state; the next step donates it."""
        return self.loop.state

    @property
    def step(self) -> int:
        """The number of steps that were sent to the devices, over the whole run."""
        return self.loop.step

    @property
    def stopped_early(self) -> bool:
        """Whether the run was asked to stop."""
        return self.loop.stopped_early

    def evaluate(self) -> Values:
        """Held-out means of the present state, as `eval_loss` and so on."""
        return self.loop.evaluate()

    def save(self) -> None:
        """Store the present state, unless it is stored already."""
        self.loop.save()

    def fit(self, display: Progress | None = None) -> TrainState:
        """Train to the end or until stopped, write `loss.png` and `sample.txt`, and release the run directory.

        For a finished run, only write the files that are missing because of a crash at its very end.

        Args:
          display: shows progress.

        Raises:
          UserError: see `Loop.fit`.
        """
        try:
            before = self.step
            state = self.loop.fit(display)
            if self.loop.log is not None:
                with contextlib.suppress(UserError):  # no finite loss was logged: there is nothing to draw
                    plot_loss(self.directory)
            if not self.stopped_early and (self.step > before or not (self.directory / "sample.txt").exists()):
                self._write_sample()
        except BaseException as error:
            close_all(self.close, after=error)
            raise
        self.close()
        return state

    def close(self) -> None:
        """End threads, wait for the save in progress, release the run directory; `fit` calls it."""
        close_all(self.profiler.close, self.loop.close, *([] if self._lock is None else [self._lock.release]))

    def sample(self, prompt: str | None = None) -> tuple[str, str] | None:
        """`(prompt, continuation)` by the present weights; `None` if the data is no text or the model has no `logits`.

        Args:
          prompt: text to continue; default: `sample.prompt` of the config, else the start of the held-out text.
        """
        config = self.job.config
        if self.tokenizer is None or config.sample.tokens == 0 or not hasattr(self.job.model.outline({}), "logits"):
            return None
        prompt = config.sample.prompt if prompt is None else prompt
        if prompt is not None:
            ids = self.tokenizer.encode(prompt).tolist() or [self.tokenizer.separator]
        elif self._held_out is not None:
            ids = self._held_out[0]["tokens"][:32].tolist()
        else:
            ids = [self.tokenizer.separator]
        samples = generate(
            self.job.model,
            self.job.evaluated(self.state),
            self.job.partitioner,
            ids,
            tokens=config.sample.tokens,
            window=config.data.seq_len,
            temperature=config.sample.temperature,
            seed=config.run.seed,
        )
        return self.tokenizer.decode(ids), self.tokenizer.decode(samples[0])

    def _write_sample(self) -> None:
        sample = self.sample()
        if sample is not None and jax.process_index() == 0:
            shown = "--- prompt\n{}\n--- continuation\n{}\n".format(*sample)
            write_text(self.directory / "sample.txt", shown)
            if self.loop.log is not None:
                self.loop.log.text("sample", shown, self.step)


def _loop(
    job: Job,
    directory: Path,
    start: Start,
    batches: Loader,
    held_out: Source | None,
    checkpointer: Checkpointer,
    callbacks: Sequence[Callback],
    should_stop: Callable[[int], bool],
) -> Loop:
    """The loop of a run, with everything that its config says."""
    config, sharding = job.config, job.batch_sharding
    log = on_process_zero(lambda: open_log(config, directory, int(start.state.step)))
    return Loop(
        start.state,
        job.train_step(),
        batches,
        steps=config.run.steps,
        speed=job.speed(),
        canonical=job.canonical,
        checkpointer=checkpointer,
        checkpoint_every=config.checkpoint.every,
        extra={"config": config.to_dict(), "mesh": dict(job.partitioner.mesh.shape)},
        eval_step=job.eval_step(),
        eval_batches=None if held_out is None else lambda: eval_batches(held_out, config, sharding),
        eval_every=config.eval.every,
        eval_weights=job.evaluated,
        log=log,
        log_every=config.log.every,
        norms_every=config.log.norms,
        callbacks=callbacks,
        max_skipped=config.run.max_skipped_steps,
        should_stop=should_stop,
        unevaluated=start.unevaluated_by(log),
    )
