import os
import signal
import subprocess
import sys

import pytest

from shardtrain.checkpoint import Checkpointer, RunLock
from shardtrain.errors import UserError

HOLD = """
import sys, time
from shardtrain.host.lock import RunLock
lock = RunLock(sys.argv[1])
print("held", flush=True)
time.sleep(60)
"""


def test_a_second_process_is_refused_until_the_first_is_killed(tmp_path):
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(UserError, match=rf"{tmp_path} is being written by process {holder.pid} on"):
            RunLock(tmp_path)
        holder.send_signal(signal.SIGKILL)
        holder.wait()
        with RunLock(tmp_path):
            pass
    finally:
        holder.kill()
        holder.communicate()


def test_the_same_process_is_refused_too_and_release_is_idempotent(tmp_path):
    lock = RunLock(tmp_path / "run")
    with pytest.raises(UserError, match=f"process {os.getpid()} "):
        RunLock(tmp_path / "run")
    lock.release()
    lock.release()
    RunLock(tmp_path / "run").release()


@pytest.mark.parametrize("writer", [RunLock, Checkpointer])
def test_a_directory_below_a_file_is_refused(tmp_path, writer):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write .*Not a directory"):
        writer(tmp_path / "file" / "run")


@pytest.mark.parametrize("writer", [RunLock, Checkpointer])
def test_a_directory_without_permission_is_refused(writer, open_path):
    open_path.chmod(0o555)
    root = os.geteuid() == 0
    if root:  # root may write anywhere
        os.seteuid(65534)
    try:
        with pytest.raises(UserError, match=r"cannot write .*Permission denied.*run\.dir"):
            writer(open_path)
    finally:
        if root:
            os.seteuid(0)
