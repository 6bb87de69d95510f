"""Reports of a run: its log, its speed as a share of the hardware's, its memory, its display and its loss curve."""

from shardtrain.host.background import Background
from shardtrain.metrics.flops import mfu, peak_flops, transformer_flops_per_token
from shardtrain.metrics.log import MetricsLog, read
from shardtrain.metrics.memory import memory_bytes
from shardtrain.metrics.plot import plot_loss
from shardtrain.metrics.progress import Progress, progress

__all__ = [
    "Background",
    "MetricsLog",
    "Progress",
    "memory_bytes",
    "mfu",
    "peak_flops",
    "plot_loss",
    "progress",
    "read",
    "transformer_flops_per_token",
]
