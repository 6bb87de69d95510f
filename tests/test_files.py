"""Files that are whole or absent."""

import hashlib

import pytest

from shardtrain.errors import UserError
from shardtrain.files import atomic, read_json, require_writable, sha256, write_json, write_text


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
