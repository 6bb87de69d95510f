"""A program that ends without waiting for its last save has saved, or has failed: in real processes."""

import subprocess
import sys

import pytest

from shardtrain.checkpoint import verify

PROGRAM = """
import os, sys
from pathlib import Path
import jax
from shardtrain.checkpoint import Checkpointer, store

jax.config.update("jax_platforms", "cpu")
how, directory = sys.argv[1], Path(sys.argv[2])
checkpointer = Checkpointer(directory)
if how == "disk":
    import resource
    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, resource.RLIM_INFINITY))
checkpointer.save(1, {"w": jax.numpy.ones((1024, 1024))}, {})
if how == "collected":
    del checkpointer
elif how == "fork" and os.fork() == 0:
    sys.exit(0)
elif how == "exit":
    sys.exit(3)
elif how == "error":
    raise RuntimeError("a mistake of mine")
"""


def end(how, directory):
    command = [sys.executable, "-W", "ignore", "-c", PROGRAM, how, str(directory)]
    return subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)


@pytest.mark.parametrize(
    ("how", "code"),
    [
        ("normal", 0),
        ("error", 1),
        pytest.param("exit", 3, marks=pytest.mark.full),
        pytest.param("collected", 0, marks=pytest.mark.full),
        pytest.param("fork", 0, marks=pytest.mark.full),
    ],
)
def test_the_end_of_a_program_waits_for_its_save(tmp_path, how, code):
    program = end(how, tmp_path)
    if sys.version_info[:2] == (3, 12) and "can't create new thread at interpreter shutdown" in program.stderr:
        assert program.returncode == 1, "its first releases cannot save, and must say so"
        assert "call Checkpointer.close first" in program.stderr
        return
    assert program.returncode == code, program.stderr
    assert [(record.step, record.status) for record in verify(tmp_path)] == [(1, "verified")]
    assert ("a mistake of mine" in program.stderr) == (how == "error")


def test_where_that_save_fails_the_program_does(tmp_path):
    program = end("disk", tmp_path)
    assert program.returncode == 1
    assert f"error: saving step 1 in {tmp_path} failed: " in program.stderr
    assert "call Checkpointer.close first" in program.stderr
    assert "Traceback" not in program.stderr
    assert verify(tmp_path) == []
