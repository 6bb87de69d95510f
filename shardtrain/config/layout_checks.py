"""Checks of sizes against the mesh: functions over valid sections, which apply the rules of the rooms below."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from shardtrain.collectives.fsdp import check_gather
from shardtrain.config.schema import Data, Devices, MeshSizes, Model, Optimizer, Pipeline
from shardtrain.errors import UserError, did_you_mean, mistakes, nearest
from shardtrain.pipeline import schedules
from shardtrain.pipeline.layers import check_accumulate, layers_per_stage
from shardtrain.pipeline.phases import check_backward
from shardtrain.sharding import DEFAULT_RULES, make_rules
from shardtrain.sharding.divide import check_dim, check_microbatches
from shardtrain.sharding.mesh import AXES, mesh_problems
from shardtrain.sharding.rules import row_problems

RuleTable = Mapping[str, tuple[str, ...]]


def check_mesh(mesh: MeshSizes, devices: Devices) -> Iterator[UserError]:
    """Axis sizes, and their product against `devices.emulate` where that is given."""
    found = [*mesh_problems(mesh.sizes, mesh.slow)]
    yield from found
    if not found and devices.emulate is not None:
        yield from mistakes(check_product, mesh, devices.emulate, "devices.emulate")


def check_product(mesh: MeshSizes, devices: int, origin: str) -> None:
    """The product of the sizes against a number of devices."""
    mesh.spec().resolve(devices, origin)


def check_rules(rules: RuleTable, model: Model) -> Iterator[UserError]:
    """Names in the rules. A model of the user's own may bring new logical axes."""
    for logical, axes in rules.items():
        own_name = ":" in model.type and nearest(logical, DEFAULT_RULES, cutoff=0.75) is None
        if logical not in DEFAULT_RULES and not own_name:
            fix = did_you_mean(logical, DEFAULT_RULES)
            yield UserError(f"rules.{logical}", axes, "there is no such logical axis", fix)
        yield from row_problems(logical, axes)


def check_model_sizes(model: Model, mesh: MeshSizes, rules: RuleTable) -> Iterator[UserError]:
    """The sizes that the model states against the mesh axes that the rules give them."""
    for logical, option in model.size_options().items():
        if size := model.size(logical):
            yield from mistakes(_check_dim, f"model.{option}", size, logical, mesh, rules)


def check_batch(data: Data, mesh: MeshSizes, rules: RuleTable) -> None:
    """Rows of the smallest global batch against the devices that share it; its multiples follow."""
    _check_dim(*_smallest_batch(data), "batch", mesh, rules)


def check_accumulation(data: Data, mesh: MeshSizes, rules: RuleTable, optimizer: Optimizer) -> None:
    """Each device's rows against the microbatches."""
    _check_rows("optimizer.accumulate", optimizer.accumulate, data, mesh, rules)


def check_sequence(data: Data, mesh: MeshSizes, rules: RuleTable) -> None:
    """Positions of a sequence against the devices that share it."""
    for logical in ("seq", "seq_residual"):
        _check_dim("data.seq_len", data.seq_len, logical, mesh, rules)


def check_pipeline_schedule(mesh: MeshSizes, pipeline: Pipeline) -> None:
    """Whether there is such a schedule for these sizes, and whether it can go backward as asked."""
    if mesh.pipe <= 1:
        return
    schedule = schedules.make(pipeline.schedule, mesh.pipe, pipeline.microbatches, pipeline.chunks)
    check_backward(schedule, pipeline.backward)


def check_gathering(mesh: MeshSizes, pipeline: Pipeline) -> None:
    """Whether there is anything that a pipeline could gather once per step; the job knows whether it can."""
    if mesh.pipe > 1:
        check_gather(pipeline.gather, mesh.fsdp)


def check_layers(model: Model, mesh: MeshSizes, pipeline: Pipeline) -> None:
    """Layers against the stages of a pipeline."""
    if mesh.pipe > 1 and (layers := model.size("layers")):
        layers_per_stage(layers, mesh.pipe * pipeline.chunks, f"model.{model.size_options()['layers']}")


def check_pipeline_rows(
    data: Data, mesh: MeshSizes, rules: RuleTable, pipeline: Pipeline, optimizer: Optimizer
) -> Iterator[UserError]:
    """Each device's rows against the pipeline's microbatches, which are the only ones there."""
    if mesh.pipe > 1:
        yield from mistakes(check_accumulate, optimizer.accumulate)
        _check_rows("pipeline.microbatches", pipeline.microbatches, data, mesh, rules)


def filled(mesh: MeshSizes, devices: int | None) -> MeshSizes:
    """Replace -1, where the number of devices is known and allows it."""
    if devices is None:
        return mesh
    try:
        return mesh.model_copy(update=mesh.spec().resolve(devices).sizes)
    except UserError:
        return mesh


def _split(logical: str, mesh: MeshSizes, rules: RuleTable) -> dict[str, int]:
    """The mesh axes that split a dim, and their sizes.

    A size that is not known yet (-1) counts as 1: the others must divide the dim in any case.
    """
    known = make_rules({name: [axis for axis in axes if axis in AXES] for name, axes in rules.items()})
    return {axis: size for axis in known.get(logical, ()) if (size := getattr(mesh, axis)) > 1}


def _check_dim(key: str, size: int, logical: str, mesh: MeshSizes, rules: RuleTable) -> None:
    check_dim(key, size, logical, _split(logical, mesh, rules), use=f"{key}=")


def _check_rows(key: str, count: int, data: Data, mesh: MeshSizes, rules: RuleTable) -> None:
    """Each device's rows against a number of microbatches. (`check_batch` reports rows that cannot be shared.)"""
    check_microbatches(key, count, _smallest_batch(data)[1], _split("batch", mesh, rules))


def _smallest_batch(data: Data) -> tuple[str, int]:
    """The key and the size of the smallest global batch."""
    if data.first_batch is None:
        return "data.global_batch", data.global_batch
    return "data.first_batch", data.first_batch
