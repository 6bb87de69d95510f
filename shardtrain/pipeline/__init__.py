"""Parallelisms that own collectives. (Data, FSDP and tensor parallelism own none: they are rows in the rules.)"""
