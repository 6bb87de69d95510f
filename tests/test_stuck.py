"""A hang is not silent: a line says what it is before XLA ends the process, and none is said of a run that works."""

import os
import subprocess
import sys
import threading
import time

import jax
import pytest

from shardtrain.launch import stuck

#: Two devices, one of which enters a collective that the other leaves out. XLA ends it after eight seconds.
HANG = """
import functools, sys, jax, jax.numpy as jnp
from jax.sharding import PartitionSpec as P
import shardtrain as st
from shardtrain.launch.stuck import explained

mesh = st.MeshSpec(data=2).build(st.select_devices(emulate=2))

@jax.jit
@functools.partial(jax.shard_map, mesh=mesh, in_specs=P("data"), out_specs=P("data"), check_vma=False)
def uneven(x):
    return jax.lax.cond(jax.lax.axis_index("data") == 0, lambda x: jax.lax.psum(x, "data"), lambda x: x, x)

with explained(lambda line: print(line, flush=True), after_s=2.0):
    jax.block_until_ready(uneven(jnp.ones(2)))
"""


def test_a_hang_is_explained_before_xla_ends_the_process():
    flags = (
        "--xla_cpu_collective_call_warn_stuck_timeout_seconds=2 --xla_cpu_collective_call_terminate_timeout_seconds=6"
    )
    done = subprocess.run(
        [sys.executable, "-c", HANG],
        capture_output=True,
        text=True,
        timeout=100,
        env={**os.environ, "XLA_FLAGS": flags},
        check=False,
    )
    assert done.returncode < 0, done.stderr  # ended by XLA
    assert done.stdout.startswith("nothing has moved for 2 s: the CPU devices wait for each other in a collective")
    assert "<string>:" in done.stdout  # where it was called
    assert "Start again with more threads: PJRT_NPROC=" in done.stdout


def test_what_works_or_waits_for_a_thread_is_no_hang():
    said: list[str] = []
    with stuck.explained(said.append, after_s=0.5):
        end = time.monotonic() + 1.0
        while time.monotonic() < end:  # busy, as emulated devices are
            jax.block_until_ready(jax.numpy.ones(4) + 1)
        threading.Event().wait(1.0)  # idle, but not in JAX
    assert said == []


@pytest.mark.parametrize(("set_to", "proposed"), [("48", 96), ("many", 64), ("", 64)])
def test_the_explanation_proposes_more_threads_whatever_the_environment_holds(monkeypatch, set_to, proposed):
    monkeypatch.setenv("PJRT_NPROC", set_to)
    assert f"PJRT_NPROC={proposed};" in stuck._explanation(30.0, "here")
