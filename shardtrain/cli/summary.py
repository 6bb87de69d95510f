"""The lines that introduce a run at its start."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

    from shardtrain.run import Job


def summary(job: Job, directory: Path, resumed_from: int | None) -> list[str]:
    """Describe model, devices, memory, directory and pipeline of a run, in a few lines."""
    from shardtrain.weights.paths import flatten

    report = job.report
    mesh = ", ".join(f"{axis} {size}" for axis, size in job.partitioner.mesh.shape.items() if size > 1) or "one device"
    devices = job.partitioner.mesh.devices
    weights = flatten(job.model.canonical_weights).values()
    count, training = (sum(weight.size for weight in some) for some in (weights, [w for w in weights if w.trains]))
    lines = [
        f"{job.config.run.name}: {job.config.model.type}, {count:,} parameters on {devices.size} x "
        f"{devices.flat[0].device_kind} ({mesh})",
        f"parameters: {report.total_bytes / 2**20:,.1f} MiB, {report.device_bytes / 2**20:,.1f} MiB on each device, "
        f"{report.replicated_share:.1%} replicated",
        f"directory: {directory}",
    ]
    if training < count:
        lines.append(f"of these, {training:,} train ({training / count:.1%}); the others are frozen")
    if (peak := job.speed().peak_flops) is not None:
        lines.append(f"MFU is of {peak / devices.size / 1e12:,.0f} TFLOP/s per device, causal attention counted once")
    if (pipeline := job.model.execution.summary()) is not None:
        lines.append(pipeline)
    if job.whole is not None:
        held = job.whole
        lines.append(
            f"gather: step, for {held.weights / 2**20:,.1f} MiB of gathered weights and {held.gradients / 2**20:,.1f} "
            f"MiB of gradients on each device during a step"
        )
    if (xla := job.config.xla) != type(xla)():
        flags = ", ".join(f"{flag}={value}" for flag, value in {**xla.environment, **job.compiler_options}.items())
        lines.append(f"xla: preset {xla.preset}: {flags or 'no flags'}")
    if report.unannotated:
        lines.append(f"whole on every device, having no logical axes: {', '.join(report.unannotated)}")
    if resumed_from is not None:
        lines.append(f"resumed from the checkpoint of step {resumed_from}")
    return lines
