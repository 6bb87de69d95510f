"""Weights before any array exists: their declarations, names, dtypes and layouts."""
