"""Collectives that layers and steps call themselves, in addition to those that the compiler inserts."""
