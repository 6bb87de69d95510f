"""Gradients to updates: optimizers, their schedules and moments, and which weights each rule is for."""

from shardtrain.optim.optimizers import OPTIMIZERS, Clipped, global_norm, optimizer, state_shardings, updates_made

__all__ = ["OPTIMIZERS", "Clipped", "global_norm", "optimizer", "state_shardings", "updates_made"]
