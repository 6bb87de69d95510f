"""Checks of values against each other and of paths against the disk: functions over valid sections.

A check yields the mistakes that it finds, or raises one. Most of them are those of the room that owns the rule.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from shardtrain.checkpoint import lifecycle
from shardtrain.config.schema import Data, Devices, Ema, Log, Model, Optimizer, Profile, Run, Sample, Xla
from shardtrain.data.catalog import check_type
from shardtrain.data.checks import NOT_TEXT, READ_FILES, check_prompt, setting_problems, vocabulary_problems
from shardtrain.data.growth import growth_problems
from shardtrain.data.listing import check_path, each
from shardtrain.data.prepare import is_kept
from shardtrain.errors import UserError, described, mistakes
from shardtrain.launch.devices import check_emulate
from shardtrain.launch.xla_flags import check_preset
from shardtrain.metrics.logger import check_logger
from shardtrain.metrics.trace import check_steps
from shardtrain.nn.attention import head_problems
from shardtrain.nn.dropout import check_dropout
from shardtrain.nn.ranges import check_z_loss, positive_problems
from shardtrain.nn.remat import ACTIVATIONS, check_remat
from shardtrain.optim.ema import check_decay
from shardtrain.optim.lr_schedules import schedule_problems
from shardtrain.optim.optimizers import option_problems

#: Model options of these names are above 0, and so are sizes.
POSITIVE = ("sliding_window", "loss_chunk", "rope_theta", "norm_eps", "logit_soft_cap", "mup_base")


def check_devices_section(devices: Devices) -> None:
    """Emulated devices are CPU devices."""
    check_emulate(devices.platform, devices.emulate)


def check_xla(xla: Xla, devices: Devices) -> None:
    """The GPU preset needs a GPU. Which flags exist, only XLA knows, once it has started."""
    if devices.platform == "cpu" or devices.emulate is not None:
        check_preset(xla.preset, "cpu")


def check_model_numbers(model: Model) -> Iterator[UserError]:
    """Numbers that no model can have."""
    options = model.options
    for name in (*model.size_options().values(), *POSITIVE):
        if isinstance(value := options.get(name), int | float):
            yield from _of_model(positive_problems, {name: value})
    if isinstance(dropout := options.get("dropout"), int | float):
        yield from _of_model(check_dropout, dropout)
    if isinstance(z_loss := options.get("z_loss"), int | float):
        yield from _of_model(check_z_loss, z_loss)


def check_model_remat(model: Model) -> Iterator[UserError]:
    """What the backward pass keeps; a model of the user's own may name its own activations."""
    remat = model.options.get("remat", "none")
    if isinstance(remat, str | tuple | list):
        yield from _of_model(check_remat, remat, None if ":" in model.type else ACTIVATIONS)


def check_heads(model: Model) -> Iterator[UserError]:
    """Heads against the width of the model and the key-value heads."""
    names = model.size_options()
    dim, heads, groups = map(model.size, ("embed", "heads", "kv_heads"))
    if heads and min(heads, groups or heads) > 0:  # `check_model_numbers` reports others
        if dim is None or model.options.get(names["head_dim"], 1):
            dim = heads  # the width does not limit the heads
        own = {"model.n_heads": names["heads"], "model.n_kv_heads": names["kv_heads"]}
        for error in _of_model(head_problems, dim, heads, groups, None):
            yield UserError(f"model.{own[error.key]}", error.value, error.rule, error.fix)


def check_data(data: Data) -> Iterator[UserError]:
    """The type of the data, and the settings that it needs or does not use."""
    yield from mistakes(check_type, data.type, data.path, data.tokenizer, data.vocab_size)
    yield from setting_problems(data.type, data.path, data.tokenizer)
    yield from growth_problems(data.first_batch, data.global_batch, data.growth_rows)


def check_vocabulary(data: Data, model: Model) -> Iterator[UserError]:
    """The tokenizer's ids against the rows of the model's embedding."""
    option = model.size_options()["vocab"]
    rows = model.options.get(option)
    if option in model.options and not isinstance(rows, int):
        rule = f"must be a whole number, not {described(rows)}"
        yield UserError(f"model.{option}", rows, rule, "give the number of token ids")
    elif not isinstance(rows, int):
        rule = f"the data sources provide token ids, and model.type {model.type} has no option {option}"
        fix = f"give the class a keyword parameter {option}: int, or state another name in its size_options"
        yield UserError(f"model.{option}", rows, rule, fix)
    elif rows > 0:
        yield from vocabulary_problems(rows, data.tokenizer, data.vocab_size, f"model.{option}")


def check_optimizer(optimizer: Optimizer) -> Iterator[UserError]:
    """The optimizer's type and options. The factory of an import path judges its own, once it is imported."""
    if not set(".:") & set(optimizer.type):
        yield from option_problems(optimizer.type, optimizer.options)


def check_schedule(optimizer: Optimizer) -> Iterator[UserError]:
    """The order of warm-up, decay and end."""
    plan, key = optimizer.schedule, "optimizer.schedule.decay_steps"
    if plan.type == "constant" and plan.decay_steps is not None:
        yield UserError(key, plan.decay_steps, "a constant schedule does not decay", f"set {key}=null or another type")
    yield from schedule_problems(**dict(plan))


def check_ema(ema: Ema) -> None:
    """The decay of the average."""
    check_decay(ema.decay)


def check_sample(sample: Sample, data: Data) -> None:
    """A prompt needs a tokenizer. Whether a type of the user's own has one is known once it is open."""
    check_prompt(sample.prompt, f"data.type {data.type}", has_tokenizer=data.type not in NOT_TEXT)


def check_data_path(data: Data, run: Run) -> Iterator[UserError]:
    """Files exist: each path is a file, a folder that is not empty, or a pattern that matches something.

    A run that has kept the tokens of its text does not need it any more.
    """
    if data.type not in READ_FILES or (data.type == "text" and is_kept(run.directory / "data")):
        return
    with contextlib.suppress(UserError):  # `check_data` reports a path that is none
        for path in each(data.path or ()):
            yield from mistakes(check_path, path)


def check_log(log: Log) -> Iterator[UserError]:
    """Every logger exists."""
    for name in log.also:
        yield from mistakes(check_logger, name)


def check_profile(profile: Profile) -> None:
    """The steps to trace are in order, and not the first."""
    check_steps(profile.steps)


def check_init_from(init_from: str, run: Run) -> Iterator[UserError]:
    """The run to start from exists, unless this one already has checkpoints and continues from them."""
    own = run.directory / "checkpoints"
    if not os.path.isdir(init_from) and not (own.is_dir() and lifecycle.with_manifest(own)):
        fix = "name a run directory, or a step below its checkpoints/"
        yield UserError("init_from", init_from, "there is no such directory", fix)


def check_run_dir(run: Run) -> Iterator[UserError]:
    """The run directory, or the nearest one above it that exists, can be written. Leaves nothing behind."""
    where = run.directory.absolute()
    parent = next(path for path in (where, *where.parents) if os.path.lexists(path))
    try:
        with tempfile.TemporaryFile(dir=parent):
            pass
    except OSError as error:
        rule = f"the run directory cannot be written: {parent}: {error.strerror}"
        yield UserError("run.dir", run.dir, rule, "set run.dir to a directory that you may write")


def _of_model(check: Callable[..., Iterable[UserError] | None], *arguments: Any) -> Iterator[UserError]:
    """The mistakes that a check of a layer finds in its arguments, as those of the model's options."""
    for error in mistakes(check, *arguments):
        yield UserError(f"model.{error.key}", error.value, error.rule, error.fix)
