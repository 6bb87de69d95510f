"""Checks of values against each other and of paths against the disk: functions over valid sections."""

from __future__ import annotations

import glob
import inspect
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

from shardtrain.checkpoint import lifecycle
from shardtrain.config.errors import Problem
from shardtrain.config.schema import Data, Devices, Model, Optimizer, Run, Sample, Xla
from shardtrain.data.catalog import check_type
from shardtrain.data.listing import each
from shardtrain.data.prepare import is_kept
from shardtrain.errors import UserError, did_you_mean
from shardtrain.nn.remat import ACTIVATIONS, check_names, remat_names
from shardtrain.optim import OPTIMIZERS
from shardtrain.sharding.mesh import divisors

#: Ids of the byte tokenizer: 256 bytes and the separator. A byte-level BPE has these and its merges.
BYTE_VOCAB = 257
#: Model options of these names are above 0, and so are sizes.
POSITIVE = ("sliding_window", "loss_chunk", "rope_theta", "norm_eps", "logit_soft_cap")
#: Types without a tokenizer. (Whether one of the user's own has one, is known once it is open.)
TOKEN_TYPES = ("tokens", "synthetic")


def check_devices_section(devices: Devices) -> Iterator[Problem]:
    """Emulated devices are CPU devices."""
    if devices.platform == "cuda" and devices.emulate is not None:
        rule = "emulated devices are CPU devices, and devices.platform is cuda"
        yield Problem("devices.emulate", devices.emulate, rule, "set devices.emulate=null or devices.platform=cpu")


def check_xla(xla: Xla, devices: Devices) -> Iterator[Problem]:
    """The GPU preset needs a GPU. Which flags there are, only XLA knows, once it has started."""
    if xla.preset == "gpu-default" and (devices.platform == "cpu" or devices.emulate is not None):
        rule = "gpu-default is for NVIDIA GPUs, and the devices are CPU devices"
        yield Problem("xla.preset", xla.preset, rule, "use auto, which takes it on GPUs only, or none")


def check_model_numbers(model: Model) -> Iterator[Problem]:
    """Numbers that no model can have."""
    options = model.options
    for name in (*model.size_options().values(), *POSITIVE):
        if isinstance(value := options.get(name), int | float) and not value > 0:
            yield Problem(f"model.{name}", value, "must be greater than 0", f"give model.{name} a positive value")
    if isinstance(dropout := options.get("dropout"), int | float) and not 0 <= dropout < 1:
        yield Problem("model.dropout", dropout, "a probability from 0 to below 1", "for example model.dropout=0.1")
    if isinstance(z_loss := options.get("z_loss"), int | float) and not 0 <= z_loss <= 1:
        yield Problem("model.z_loss", z_loss, "must be from 0 to 1", "0 for none, or for example model.z_loss=1e-4")


def check_remat(model: Model) -> Iterator[Problem]:
    """What the backward pass keeps; a model of the user's own may name its own activations."""
    remat = model.options.get("remat", "none")
    if not isinstance(remat, str | tuple | list):
        return
    try:
        names = remat_names(remat)
        if ":" not in model.type:
            check_names(names, ACTIVATIONS)
    except UserError as error:
        rule, _, fix = str(error).partition("; ")
        yield Problem("model.remat", remat, rule, fix)


def check_heads(model: Model) -> Iterator[Problem]:
    """Heads against the model dim and the key-value heads."""
    names = model.size_options()
    width, heads, groups, head_dim = map(model.size, ("embed", "heads", "kv_heads", "head_dim"))
    if not (isinstance(heads, int) and heads > 0):
        return
    if isinstance(width, int) and names["head_dim"] in model.options and not head_dim and width % heads:
        quotient = f"{names['embed']} / {names['heads']} = {width} / {heads}"
        rule = f"without model.{names['head_dim']} a head has {quotient} dims: no whole number"
        fix = f"choose {names['heads']} that divides {names['embed']}, or set model.{names['head_dim']}"
        yield Problem(f"model.{names['heads']}", heads, rule, fix)
    if isinstance(groups, int) and groups > 0 and heads % groups:
        fix = f"use one of {divisors(heads)}"
        rule = f"must divide model.{names['heads']} = {heads}"
        yield Problem(f"model.{names['kv_heads']}", groups, rule, fix)


def check_data_type(data: Data) -> Iterator[Problem]:
    """There is such a type; one of the user's own takes the settings that are given."""
    try:
        check_type(data.type, path=data.path, tokenizer=data.tokenizer, tokenizer_vocab=data.vocab_size)
    except UserError as error:
        rule, _, fix = str(error).partition("; ")
        yield Problem("data.type", data.type, rule, fix)


def check_data(data: Data) -> Iterator[Problem]:
    """Settings that the data's type does not use, or needs."""
    if data.type in ("text", "tokens") and not data.path:
        rule = f"data.type {data.type} reads files and needs their path"
        yield Problem("data.path", data.path, rule, "set data.path to where they are")
    if data.type == "tokens" and isinstance(data.path, tuple):
        yield Problem("data.path", data.path, "data.type tokens reads one file", "join the files into one")
    if data.type in ("corpus", "synthetic") and data.path is not None:
        rule = f"data.type {data.type} reads no files"
        yield Problem("data.path", data.path, rule, "set data.path=null, or data.type to text or tokens")
    if data.type in TOKEN_TYPES and data.tokenizer is not None:
        rule = f"data.type {data.type} is no text, so there is nothing to tokenize"
        yield Problem("data.tokenizer", data.tokenizer, rule, "set data.tokenizer=null")


def check_vocabulary(data: Data, model: Model) -> Iterator[Problem]:
    """The tokenizer's ids against its least number and the rows of the model's embedding."""
    vocab, limit, option = data.vocab_size, model.size("vocab"), f"model.{model.size_options()['vocab']}"
    if not isinstance(limit, int):
        rule = f"the data sources speak token ids, and model.type {model.type} has no option vocab_size"
        fix = "give the class a keyword parameter vocab_size: int, or state another name in its size_options"
        yield Problem(option, limit, rule, fix)
        return
    if data.tokenizer == "byte" and limit < BYTE_VOCAB:
        rule = f"the byte tokenizer has {BYTE_VOCAB} ids: 256 bytes and a separator"
        yield Problem(option, limit, rule, f"use {option}={BYTE_VOCAB} or more")
    if data.tokenizer != "bpe" and vocab is not None:
        rule = "only a bpe tokenizer has a vocabulary to choose"
        yield Problem("data.vocab_size", vocab, rule, "set data.vocab_size=null")
    elif vocab is not None and vocab > limit > 0:
        rule = f"each of the data's {vocab} token ids needs a row in the model, and {option} is {limit}"
        fix = f"set {option}={vocab}, or a smaller data.vocab_size"
        yield Problem("data.vocab_size", vocab, rule, fix)
    elif vocab is not None and 0 < vocab < BYTE_VOCAB:
        path = option if vocab == limit else "data.vocab_size"
        rule = f"a byte-level BPE has at least {BYTE_VOCAB} ids: 256 bytes and a separator"
        yield Problem(path, vocab, rule, f"use {path}={BYTE_VOCAB} or more, for example 2048")


def check_optimizer(optimizer: Optimizer) -> Iterator[Problem]:
    """The optimizer's name and options, and its schedule."""
    factory = OPTIMIZERS.get(optimizer.type)
    if factory is None and not set(".:") & set(optimizer.type):
        fix = f"{did_you_mean(optimizer.type, OPTIMIZERS)} (or an import path: package.module:factory)"
        yield Problem("optimizer.type", optimizer.type, "there is no such optimizer", fix)
    if factory is not None:
        accepted = inspect.signature(factory).parameters
        for name in set(optimizer.options) - set(accepted):
            rule = f"{optimizer.type} has no such option"
            yield Problem(f"optimizer.options.{name}", optimizer.options[name], rule, did_you_mean(name, accepted))


def check_schedule(optimizer: Optimizer) -> Iterator[Problem]:
    """The order of warm-up, decay and end."""
    plan, path = optimizer.schedule, "optimizer.schedule"
    if plan.type == "constant" and plan.decay_steps is not None:
        rule = "a constant schedule does not decay"
        yield Problem(f"{path}.decay_steps", plan.decay_steps, rule, f"set {path}.decay_steps=null or another type")
    if plan.type != "wsd":
        for name in ("stable_ratio", "decay_start"):
            if (value := getattr(plan, name)) is not None:
                fix = f"set {path}.{name}=null or {path}.type=wsd"
                yield Problem(f"{path}.{name}", value, f"only wsd has it, and {path}.type is {plan.type}", fix)
    if plan.type == "wsd" and plan.stable_ratio is not None and plan.decay_start is not None:
        rule = "stable_ratio says the same; one of the two may be set"
        yield Problem(f"{path}.decay_start", plan.decay_start, rule, f"set {path}.stable_ratio=null")
    if plan.type == "constant" or plan.decay_steps is None:
        return
    if plan.warmup_steps >= plan.decay_steps:
        rule = f"the warm-up must end before decay_steps = {plan.decay_steps} (default: run.steps)"
        fix = f"use {path}.warmup_steps={plan.decay_steps // 10}, or more steps"
        yield Problem(f"{path}.warmup_steps", plan.warmup_steps, rule, fix)
    elif plan.decay_start is not None and not plan.warmup_steps <= plan.decay_start < plan.decay_steps:
        rule = f"must lie from warmup_steps = {plan.warmup_steps} to below decay_steps = {plan.decay_steps}"
        fix = f"use {path}.decay_start={max(plan.warmup_steps, plan.decay_steps * 4 // 5)}"
        yield Problem(f"{path}.decay_start", plan.decay_start, rule, fix)


def check_sample(sample: Sample, data: Data) -> Iterator[Problem]:
    """A prompt needs a tokenizer."""
    if sample.prompt is not None and data.type in TOKEN_TYPES:
        rule = f"text needs a tokenizer, and data.type {data.type} has none"
        yield Problem("sample.prompt", sample.prompt, rule, "set sample.prompt=null")


def check_data_path(data: Data, run: Run) -> Iterator[Problem]:
    """Files exist: each path is a file, a folder that is not empty, or a pattern that matches something.

    A run that has kept the tokens of its text does not need it any more.
    """
    if data.type not in ("text", "tokens") or not data.path:
        return  # `check_data` says that it is missing
    try:
        paths = each(data.path)
    except UserError as error:
        rule, _, fix = str(error).partition(": ")[2].partition("; ")
        yield Problem("data.path", data.path, rule, fix)
        return
    kept = data.type == "text" and is_kept(Path(run.dir or f"runs/{run.name}") / "data")
    for path in [] if kept else paths:
        where = os.path.expanduser(path)
        try:
            is_empty = os.path.isdir(where) and not os.listdir(where)
        except OSError as error:
            yield Problem("data.path", path, f"the folder cannot be read: {error.strerror}", "make it readable")
            continue
        if is_empty:
            yield Problem("data.path", path, "the folder is empty", "put files there, or name another folder")
        elif not os.path.exists(where) and not glob.glob(where, recursive=True):
            here = "" if os.path.isabs(where) else f"; it is relative to the current directory, {Path.cwd()}"
            yield Problem("data.path", path, "there is no such file or folder", f"check the path{here}")


def check_init_from(init_from: str, run: Run) -> Iterator[Problem]:
    """The run to start from exists, unless this one has checkpoints already and goes on from them."""
    own = Path(run.dir or f"runs/{run.name}") / "checkpoints"
    if not os.path.isdir(init_from) and not (own.is_dir() and lifecycle.sealed(own)):
        fix = "name a run directory, or a step below its checkpoints/"
        yield Problem("init_from", init_from, "there is no such directory", fix)


def check_run_dir(run: Run) -> Iterator[Problem]:
    """The run directory, or the nearest one above it that exists, can be written. Leaves nothing behind."""
    where = Path(run.dir or ".").absolute()
    parent = next(path for path in (where, *where.parents) if os.path.lexists(path))
    try:
        with tempfile.TemporaryFile(dir=parent):
            pass
    except OSError as error:
        rule = f"the run directory cannot be written: {parent}: {error.strerror}"
        yield Problem("run.dir", run.dir, rule, "set run.dir to a directory that you may write")
