"""A run: one job with one directory, started, resumed and finished."""

from __future__ import annotations

import contextlib
import importlib
import logging
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax

from shardtrain.checkpoint import Checkpointer, RunLock
from shardtrain.config import RunConfig, check_same_run
from shardtrain.data import Loader, Source, Tokenizer
from shardtrain.errors import UserError
from shardtrain.host.agree import on_process_zero
from shardtrain.host.closing import close_all
from shardtrain.host.files import write_text
from shardtrain.launch.compile_cache import use_cache
from shardtrain.metrics import MetricsLog, plot_loss
from shardtrain.run.data import eval_batches, open_data
from shardtrain.run.job import Job, build
from shardtrain.run.start import Start
from shardtrain.train.generate import generate
from shardtrain.train.loop import Callback, Loop

_log = logging.getLogger(__name__)


class Trainer(Loop):
    """The training loop with a run directory around it; made by `from_config`.

    Attributes:
      job: mesh, model, optimizer and step.
      directory: the run directory.
      tokenizer: of text data, else `None`.
      resumed_from: the step of the checkpoint that the run went on from, else `None`.
    """

    job: Job
    directory: Path
    tokenizer: Tokenizer | None = None
    resumed_from: int | None = None

    @classmethod
    def from_config(
        cls,
        config: RunConfig,
        *,
        callbacks: Sequence[Callback] = (),
        should_stop: Callable[[int], bool] = lambda step: False,
        interrupted: Callable[[], bool] = lambda: False,
        allow_changes: bool = False,
        processes: int = 1,
    ) -> Trainer:
        """Start the run that a config describes, or resume it where its directory holds checkpoints.

        Installs no signal handler and initialises no distributed runtime; those belong to the program around it.

        Args:
          callbacks, should_stop: see `Loop`.
          interrupted: polled while text is tokenised, on this process alone; True ends that with an error.
          allow_changes: go on in the directory of a run with another model, data, optimizer or seed.
          processes: of the run, where `jax.distributed` joins several.

        Raises:
          UserError: anything wrong with config, devices, data, directory or checkpoints.
        """
        directory = Path(config.run.dir or f"runs/{config.run.name}").absolute()
        threading.Thread(target=importlib.import_module, args=("grain",)).start()  # the loader's, beside all of this
        use_cache(_cache_folder(config.run.compile_cache, directory))
        job = build(config, processes=processes)
        lock = on_process_zero(lambda: RunLock(directory))
        try:
            checkpointer = Checkpointer(
                directory / "checkpoints",
                keep=config.checkpoint.keep,
                keep_every=config.checkpoint.keep_every,
                asynchronous=config.checkpoint.asynchronous,
                compress=config.checkpoint.compress,
            )
            latest = checkpointer.latest()
            if latest is not None:
                _require_continues(config, directory, checkpointer, latest, allow_changes)
            source, held_out, tokenizer = open_data(config, directory, should_stop=interrupted)
            start = Start.of(config, job, checkpointer, latest)
            position = start.position
            if allow_changes and position is not None and position["fingerprint"] != source.fingerprint:
                _log.warning("the data is not what the run was trained on so far: it begins at its first row")
                position = None
            sharding = job.partitioner.sharding(("batch", "seq"))
            batches = Loader(
                source,
                global_batch=config.data.global_batch,
                seed=config.run.seed,
                sharding=sharding,
                state=position,
                shuffle=config.data.shuffle,
            )
            log = on_process_zero(lambda: _open_log(directory, config, int(start.state.step)))
            run = cls(
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
                log=log,
                log_every=config.log.every,
                callbacks=callbacks,
                max_skipped=config.run.max_skipped_steps,
                should_stop=should_stop,
                unevaluated=start.unevaluated_by(log),
            )
        except BaseException:
            if lock is not None:
                lock.release()
            raise
        run.job, run.directory, run.tokenizer, run.resumed_from = job, directory, tokenizer, latest
        run._lock, run._held_out = lock, held_out
        return run

    _lock: RunLock | None
    _held_out: Source | None

    def fit(self) -> Any:
        """Train to the end or until stopped, write `loss.png` and `sample.txt`, and give the directory free.

        Of a finished run, only write what a crash at its very end left out.
        """
        try:
            before = self.step
            state = super().fit()
            if self.log is not None:
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
        """End threads, wait for the save under way, give the run directory free; `fit` does so by itself."""
        assert self.checkpointer is not None
        closers: list[Callable[[], None]] = [self.batches.close, self.checkpointer.close]
        if self.log is not None:
            closers.append(self.log.close)
        if self._lock is not None:
            closers.append(self._lock.release)
        close_all(*closers)

    def sample(self, prompt: str | None = None) -> tuple[str, str] | None:
        """`(prompt, continuation)` by the present weights; `None` where the data or the model knows no text.

        Without a prompt the start of the held-out text is continued.
        """
        config = self.job.config
        if self.tokenizer is None or config.sample.tokens == 0 or not hasattr(config.model.load(), "logits"):
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
            self.state,
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
            prompt, text = sample
            write_text(self.directory / "sample.txt", f"--- prompt\n{prompt}\n--- continuation\n{text}\n")


def _cache_folder(chosen: str | None, directory: Path) -> Path | None:
    if chosen is None:
        return None
    return directory.parent / ".jax_cache" if chosen == "auto" else Path(chosen).expanduser().absolute()


def _require_continues(
    config: RunConfig, directory: Path, checkpointer: Checkpointer, step: int, allow_changes: bool
) -> None:
    """Refuse a config that cannot go on from a step of its run, before data and state are prepared."""
    if config.run.steps < step:
        raise UserError(
            f"run.steps = {config.run.steps} is below step {step}, which the run in {directory} has reached; set "
            f"run.steps to {step} or more, or another run.name to start anew"
        )
    if not allow_changes:
        check_same_run(checkpointer.extra(step)["config"], config, str(directory), step)


def _open_log(directory: Path, config: RunConfig, step: int) -> MetricsLog:
    """The metrics up to `step`, and the config beside them."""
    log = MetricsLog(directory, tensorboard=config.log.tensorboard)
    log.truncate(step)
    write_text(directory / "config.yaml", config.to_yaml())
    return log
