"""From gradients to updates: optimizers, their schedules and moments, and the weights to which each rule applies."""

from shardtrain.optim.clipping import Clipped, global_norm
from shardtrain.optim.optimizers import OPTIMIZERS, optimizer, state_shardings, updates_made

__all__ = ["OPTIMIZERS", "Clipped", "global_norm", "optimizer", "state_shardings", "updates_made"]
