"""Checks of sizes against the mesh: what is split must divide. Each is a function over valid sections."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import TypeGuard

from shardtrain.config.errors import Problem
from shardtrain.config.schema import Data, Devices, MeshSizes, Model, Optimizer, Pipeline
from shardtrain.errors import UserError, did_you_mean, nearest
from shardtrain.pipeline import schedules
from shardtrain.pipeline.phases import check_backward
from shardtrain.sharding import DEFAULT_RULES
from shardtrain.sharding.mesh import AXES, MeshSpec, divisors

RuleTable = Mapping[str, tuple[str, ...]]


def check_mesh(mesh: MeshSizes, devices: Devices) -> Iterator[Problem]:
    """Axis sizes, and their product against `devices.emulate` where that is given."""
    sizes = axis_sizes(mesh)
    for axis, size in sizes.items():
        if size == 0:
            yield Problem(f"mesh.{axis}", size, "an axis size is 1 or more, or -1 for what is left", "use 1")
    free = [axis for axis, size in sizes.items() if size == -1]
    if len(free) > 1:
        rule = f"{' and '.join(f'mesh.{axis}' for axis in free)} are all -1; at most one may take what is left"
        yield Problem("mesh", dict.fromkeys(free, -1), rule, f"give mesh.{free[0]} a size")
    for axis, factor in mesh.slow.items():
        if axis not in AXES:
            yield Problem(f"mesh.slow.{axis}", factor, "there is no such mesh axis", did_you_mean(axis, AXES))
        elif sizes[axis] > 0 and sizes[axis] % factor:
            rule = f"the part of an axis across the slow network divides it, and mesh.{axis} is {sizes[axis]}"
            yield Problem(f"mesh.slow.{axis}", factor, rule, f"use one of {divisors(sizes[axis])}")
    if devices.emulate is not None:
        yield from check_product(mesh, devices.emulate, "devices.emulate")


def check_product(mesh: MeshSizes, devices: int, source: str) -> Iterator[Problem]:
    """The product of the sizes against a number of devices; a mesh with other problems is not looked at."""
    if (spec := mesh_spec(mesh)) is None:
        return
    sizes = {axis: size for axis, size in spec.sizes.items() if size != 1}
    product = math.prod(size for size in sizes.values() if size != -1)
    free = next((axis for axis, size in sizes.items() if size == -1), None)
    if product == devices if free is None else devices % product == 0:
        return
    if free is None:
        rule = f"the product, {spec.arithmetic()}, must be the number of devices, {devices} ({source})"
    else:
        fixed = " x ".join(f"{axis} {size}" for axis, size in sizes.items() if size != -1)
        rule = f"{fixed} = {product} must divide the devices, {devices} ({source}); {free} takes the rest"
    fix = f"the nearest mesh that fits is {spec.nearest(devices)}"
    if source == "devices.emulate":
        fix += f"; or devices.emulate={product}"
    yield Problem("mesh", sizes or {"data": 1}, rule, fix)


def check_rules(rules: RuleTable, model: Model) -> Iterator[Problem]:
    """Names in the rules. A model of the user's own may bring new logical axes."""
    for logical, axes in rules.items():
        own_name = ":" in model.type and nearest(logical, DEFAULT_RULES, cutoff=0.75) is None
        if logical not in DEFAULT_RULES and not own_name:
            yield Problem(
                f"rules.{logical}",
                axes,
                "there is no such logical axis",
                did_you_mean(logical, DEFAULT_RULES),
            )
        for axis in axes:
            if axis not in AXES:
                yield Problem(f"rules.{logical}", axis, "there is no such mesh axis", did_you_mean(axis, AXES))


def check_model_sizes(model: Model, mesh: MeshSizes, rules: RuleTable) -> Iterator[Problem]:
    """The sizes that the model states against the mesh axes that the rules give them."""
    for logical, option in model.size_options().items():
        if _is_count(size := model.options.get(option)):
            yield from _divides(f"model.{option}", size, logical, mesh, rules)


def check_batch(data: Data, mesh: MeshSizes, rules: RuleTable) -> Iterator[Problem]:
    """Rows of the global batch against the devices that share it."""
    yield from _divides("data.global_batch", data.global_batch, "batch", mesh, rules)


def check_accumulate(data: Data, mesh: MeshSizes, rules: RuleTable, optimizer: Optimizer) -> Iterator[Problem]:
    """Each device's rows against the microbatches."""
    yield from _divides_rows("optimizer.accumulate", optimizer.accumulate, "accumulate", data, mesh, rules)


def check_sequence(data: Data, mesh: MeshSizes, rules: RuleTable) -> Iterator[Problem]:
    """Positions of a sequence against the devices that share it."""
    found = [*_divides("data.seq_len", data.seq_len, "seq", mesh, rules)]
    yield from found or _divides("data.seq_len", data.seq_len, "seq_residual", mesh, rules)


def check_schedule(mesh: MeshSizes, pipeline: Pipeline) -> Iterator[Problem]:
    """Whether there is such a schedule for these sizes."""
    if mesh.pipe > 1:
        try:
            schedule = schedules.make(pipeline.schedule, mesh.pipe, pipeline.microbatches, pipeline.chunks)
        except UserError as error:
            fix = f"choose among {', '.join(schedules.registered)}, or other sizes"
            yield Problem("pipeline.schedule", pipeline.schedule, str(error), fix)
            return
        try:
            check_backward(schedule, pipeline.backward)
        except UserError as error:
            rule, _, fix = str(error).rpartition("; ")
            yield Problem("pipeline.backward", pipeline.backward, rule, fix)


def check_gather(mesh: MeshSizes, pipeline: Pipeline) -> Iterator[Problem]:
    """Whether there is anything that a pipeline could gather once per step; the job knows whether it can."""
    if mesh.pipe > 1 and pipeline.gather == "step" and mesh.fsdp == 1:
        rule = "it gathers the weights that mesh.fsdp splits, and mesh.fsdp is 1"
        yield Problem("pipeline.gather", pipeline.gather, rule, "drop pipeline.gather, or set mesh.fsdp=2 or more")


def check_layers(model: Model, mesh: MeshSizes, pipeline: Pipeline) -> Iterator[Problem]:
    """Layers against the stages of a pipeline."""
    layers, stages = model.size("layers"), mesh.pipe * pipeline.chunks
    if mesh.pipe > 1 and _is_count(layers) and layers < stages:
        rule = f"pipe {mesh.pipe} x chunks {pipeline.chunks} = {stages} stages need a layer each"
        path = f"model.{model.size_options()['layers']}"
        yield Problem(path, layers, rule, f"use {stages} layers or more, or fewer ranks or chunks")


def check_microbatches(
    data: Data, mesh: MeshSizes, rules: RuleTable, pipeline: Pipeline, optimizer: Optimizer
) -> Iterator[Problem]:
    """Each device's rows against the pipeline's microbatches, which are the only ones there."""
    if mesh.pipe <= 1:
        return
    if optimizer.accumulate > 1:
        rule = "under a pipeline the microbatches are the pipeline's"
        fix = "set optimizer.accumulate=1 and choose pipeline.microbatches"
        yield Problem("optimizer.accumulate", optimizer.accumulate, rule, fix)
    yield from _divides_rows("pipeline.microbatches", pipeline.microbatches, "the microbatches", data, mesh, rules)


def axis_sizes(mesh: MeshSizes) -> dict[str, int]:
    """Mesh axis to size as configured, -1 included."""
    return {axis: getattr(mesh, axis) for axis in AXES}


def mesh_spec(mesh: MeshSizes) -> MeshSpec | None:
    """The mesh as the mesh room takes it; `None` when that would refuse it."""
    try:
        return MeshSpec(**axis_sizes(mesh), slow=dict(mesh.slow))
    except UserError:
        return None


def filled(mesh: MeshSizes, devices: int | None) -> MeshSizes:
    """The mesh with -1 replaced, where the number of devices is known and allows it."""
    spec = mesh_spec(mesh)
    if devices is None or spec is None:
        return mesh
    try:
        return mesh.model_copy(update=spec.resolve(devices).sizes)
    except UserError:
        return mesh


def _split(logical: str, mesh: MeshSizes, rules: RuleTable) -> tuple[int, str]:
    """Into how many pieces the mesh cuts a dim, and how that number comes about.

    A size that is not known yet (-1) counts as 1: to divide by the others is necessary in any case.
    """
    row = rules.get(logical, DEFAULT_RULES.get(logical, ()))
    sizes = {axis: size for axis in row if axis in AXES and (size := getattr(mesh, axis)) > 1}
    named = " x ".join(f"{axis} {size}" for axis, size in sizes.items())
    return math.prod(sizes.values()), named if len(sizes) < 2 else f"{named} = {math.prod(sizes.values())}"


def _divides(path: str, size: int, logical: str, mesh: MeshSizes, rules: RuleTable) -> Iterator[Problem]:
    pieces, named = _split(logical, mesh, rules)
    if size % pieces == 0:
        return
    rule = f"the rules split {logical!r} over {named}, which must divide it"
    fix = f"use {_multiples(path, size, pieces)}"
    if "=" not in named:
        axis = named.split()[0]
        fix += f", a mesh.{axis} among {[d for d in divisors(size) if d <= pieces]}"
    if path.startswith("model."):
        fix += f", or rules.{logical}=null to keep such dims whole"
    yield Problem(path, size, rule, fix)


def _divides_rows(path: str, count: int, word: str, data: Data, mesh: MeshSizes, rules: RuleTable) -> Iterator[Problem]:
    """Each device's rows against a number of parts. (Where the batch does not divide by the mesh, that is told.)"""
    batch = data.global_batch
    pieces, named = _split("batch", mesh, rules)
    share = batch // pieces
    if batch % pieces == 0 and share % count:
        rows = f"{batch} / {pieces} ({named}) = {share}" if named else share
        rule = f"{rows} rows per device must divide by {word}"
        other = _multiples("data.global_batch", batch, pieces * count)
        yield Problem(path, count, rule, f"use one of {divisors(share)[:8]}, or {other}")


def _multiples(path: str, size: int, of: int) -> str:
    below = size // of * of
    return f"{path}={below + of}" if below == 0 else f"{path}={below} or {below + of}"


def _is_count(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0
