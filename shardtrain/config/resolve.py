"""Defaults that depend on other settings, written out, so that a stored config is complete."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from shardtrain.data.checks import default_tokenizer
from shardtrain.optim.lr_schedules import STABLE_RATIO


def resolve(sections: Mapping[str, Any]) -> dict[str, Any]:
    """Fill those defaults in, where the sections that they depend on are there (one with problems is absent)."""
    done = dict(sections)
    run, model, data, optimizer = (sections.get(name) for name in ("run", "model", "data", "optimizer"))
    if run:
        done["run"] = run.model_copy(update={"dir": _expanded(str(run.directory))})
    if sections.get("init_from"):
        done["init_from"] = _expanded(sections["init_from"])
    if data:
        tokenizer = data.tokenizer or default_tokenizer(data.type)
        of_model = model.size("vocab") if model and tokenizer == "bpe" else None
        vocab = of_model if data.vocab_size is None else data.vocab_size
        path = tuple(map(_expanded, data.path)) if isinstance(data.path, tuple) else data.path and _expanded(data.path)
        done["data"] = data.model_copy(update={"tokenizer": tokenizer, "vocab_size": vocab, "path": path})
    if optimizer:
        schedule = optimizer.schedule
        update: dict[str, Any] = {}
        if run and schedule.decay_steps is None and schedule.type != "constant":
            update["decay_steps"] = run.steps
        if schedule.type == "wsd" and schedule.stable_ratio is None and schedule.decay_start is None:
            update["stable_ratio"] = STABLE_RATIO
        done["optimizer"] = optimizer.model_copy(update={"schedule": schedule.model_copy(update=update)})
    return done


def _expanded(path: str) -> str:
    """Write `~` out, where there is such a home."""
    return os.path.expanduser(path)
