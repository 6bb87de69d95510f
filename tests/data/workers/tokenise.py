"""Tokenises one file, and prints how many MB of memory that took at most above what the imports took, and seconds."""

import resource
import sys
import time

from shardtrain.data import open_source

folder, path = sys.argv[1:]


def peak(who):
    """In MB."""
    return resource.getrusage(who).ru_maxrss / (1e6 if sys.platform == "darwin" else 1e3)  # bytes there, else KiB


before, start = peak(resource.RUSAGE_SELF), time.perf_counter()
print("started", flush=True)
open_source("text", seq_len=128, vocab_size=2048, path=path, directory=folder)
seconds = time.perf_counter() - start
print(peak(resource.RUSAGE_SELF) + peak(resource.RUSAGE_CHILDREN) - before, seconds)
