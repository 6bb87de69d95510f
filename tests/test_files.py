"""Files that are whole or absent."""

import contextlib
import hashlib
import resource

import pytest

from shardtrain.checkpoint import RunLock
from shardtrain.errors import UserError
from shardtrain.host.files import atomic, read_json, require_writable, sha256, write_json, write_text
from shardtrain.metrics import MetricsLog


def test_a_write_that_fails_leaves_what_was_there_and_nothing_else(tmp_path):
    write_text(tmp_path / "a.txt", "before é")
    with pytest.raises(TypeError), atomic(tmp_path / "a.txt") as file:
        file.writelines([b"half", "no bytes"])  # type: ignore[list-item]
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]
    assert (tmp_path / "a.txt").read_text(encoding="utf-8") == "before é"
    assert sha256(tmp_path / "a.txt") == hashlib.sha256("before é".encode()).hexdigest()


def test_what_a_kill_left_is_written_over(tmp_path):
    (tmp_path / "a.json.tmp").write_text("half of a longer text")
    write_json(tmp_path / "a.json", {"a": [1, None]})
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
    assert read_json(tmp_path / "a.json") == {"a": [1, None]}


def test_a_directory_that_cannot_be_written_is_named(tmp_path):
    require_writable(tmp_path / "a" / "b", "checkpoints")
    assert list((tmp_path / "a" / "b").iterdir()) == []
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot write checkpoints in .*file/x: Not a directory; choose another"):
        require_writable(tmp_path / "file" / "x", "checkpoints")


@contextlib.contextmanager
def full_disk():
    """One that takes no byte: the kernel refuses them at a limit of the file size."""
    old = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old)


def test_a_write_to_a_full_disk_names_the_file(tmp_path):
    with full_disk(), pytest.raises(OSError, match=r"File too large: .*/sample\.txt'"):
        write_text(tmp_path / "sample.txt", "a text")
    with full_disk(), pytest.raises(OSError, match=r"File too large: .*/run/lock'"):
        RunLock(tmp_path / "run")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize("tensorboard", [False, True])
def test_metrics_that_a_full_disk_refuses_name_their_file(tmp_path, tensorboard):
    with MetricsLog(tmp_path, tensorboard=tensorboard) as log:
        with full_disk(), pytest.raises(OSError, match=r"File too large: .*/metrics\.jsonl'"):
            log.write(1, {"loss": 1.0})
        if tensorboard:
            log.write(2, {"loss": 1.0})
            log.write(3, {"loss": 1.0})  # whose event waits for up to a second
            with full_disk(), pytest.raises(OSError, match=r"File too large: .*/tensorboard'"):
                log.flush()
