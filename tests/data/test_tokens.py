"""Token files: the layout on disk, windows, and one clear error for each way in which they can be wrong."""

import json
import os
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shardtrain.data import TokenWindows, open_tokens, tokens, write_tokens
from shardtrain.errors import UserError


@pytest.fixture
def path(tmp_path):
    return tmp_path / "t.bin"


def describe(path, **fields):
    full = {
        "format": "shardtrain-tokens",
        "format_version": 1,
        "dtype": "uint16",
        "count": 4,
        "vocab_size": 10,
    }
    path.with_name("t.bin.json").write_text(json.dumps(full | fields))


@pytest.mark.parametrize(("vocab_size", "dtype"), [(65536, "uint16"), (65537, "uint32")])
def test_layout_is_flat_little_endian_with_a_sidecar(path, vocab_size, dtype):
    ids = [0, 1, 258, vocab_size - 1]
    assert write_tokens(path, [np.array(ids[:1]), np.array(ids[1:])], vocab_size) == 4
    width = {"uint16": 2, "uint32": 4}[dtype]
    assert path.read_bytes() == b"".join(i.to_bytes(width, "little") for i in ids)
    assert json.loads(path.with_name("t.bin.json").read_text()) == {
        "format": "shardtrain-tokens",
        "format_version": 1,
        "dtype": dtype,
        "count": 4,
        "vocab_size": vocab_size,
    }
    file = open_tokens(path)
    np.testing.assert_array_equal(file.ids, ids)
    assert file.vocab_size == vocab_size
    assert sorted(os.listdir(path.parent)) == ["t.bin", "t.bin.json"]


def test_a_file_written_by_another_tool_opens(path):
    np.array([3, 1, 2, 9], "<u2").tofile(path)
    describe(path)
    np.testing.assert_array_equal(open_tokens(path).ids, [3, 1, 2, 9])


@settings(deadline=None)
@given(count=st.integers(2, 60), seq_len=st.integers(1, 20))
def test_windows_give_each_target_once(tmp_path_factory, count, seq_len):
    path = tmp_path_factory.mktemp("windows") / "t.bin"
    write_tokens(path, [np.arange(count)], vocab_size=60)
    if count <= seq_len:
        with pytest.raises(UserError, match=rf"{count} tokens, .* {seq_len} needs {seq_len + 1}: use"):
            TokenWindows(open_tokens(path), seq_len)
        return
    windows = TokenWindows(open_tokens(path), seq_len)
    assert len(windows) == (count - 1) // seq_len
    targets = np.concatenate([row["targets"] for row in windows])
    np.testing.assert_array_equal(targets, np.arange(1, len(windows) * seq_len + 1))
    for row in windows:
        np.testing.assert_array_equal(row["targets"], row["tokens"] + 1)


def test_fingerprint_follows_content_and_window(path):
    def fingerprint(ids, seq_len=2):
        write_tokens(path, [np.array(ids)], vocab_size=10)
        return TokenWindows(open_tokens(path), seq_len).fingerprint

    first = fingerprint([1, 2, 3, 4, 5])
    assert fingerprint([1, 2, 3, 4, 5]) == first
    assert len({first, fingerprint([1, 2, 3, 4, 6]), fingerprint([1, 2, 3, 4, 5], seq_len=3)}) == 3


@pytest.mark.parametrize("at", [0, 3, 4, 11])
@pytest.mark.parametrize("bad", [10, 11])
def test_an_id_at_or_above_the_vocabulary_is_named_with_its_offset(path, monkeypatch, at, bad):
    monkeypatch.setattr(tokens, "_SCAN_BYTES", 8)  # four ids in a part: the third part holds the last
    ids = np.full(12, 9, "<u2")
    ids[at:] = bad
    ids.tofile(path)
    describe(path, count=12)
    message = f"{path}: token id {bad} at token {at} (byte offset {2 * at}): ids must be in 0 .. 9 for vocab"
    with pytest.raises(UserError, match=re.escape(message)):
        open_tokens(path)


def test_writing_an_id_outside_of_the_vocabulary_leaves_no_file(path):
    for bad in (10, -1):
        with pytest.raises(UserError, match=rf"t.bin: token id {bad} at token 3 \(byte offset 6\)"):
            write_tokens(path, [np.array([1, 2]), np.array([3, bad])], vocab_size=10)
        assert os.listdir(path.parent) == []


def test_missing_files(path):
    with pytest.raises(UserError, match=re.escape(f"data.path {path}: there is no such token file")):
        open_tokens(path)
    path.write_bytes(b"12")
    with pytest.raises(UserError, match=r'sidecar t.bin.json is missing; .* one like {"format": "shardtrain-tok'):
        open_tokens(path)


def test_sizes_that_disagree(path):
    describe(path)
    path.write_bytes(b"")
    with pytest.raises(UserError, match=r"t.bin: empty \(0 bytes\): write at least one window"):
        open_tokens(path)
    path.write_bytes(b"1234567")
    with pytest.raises(UserError, match=r"ends at byte offset 7, but .* 4 tokens of 2 bytes, 8: the file is trunc"):
        open_tokens(path)
    path.write_bytes(b"1234567890")
    with pytest.raises(UserError, match=r"ends at byte offset 10, but .* bytes, 8: the file is too long, or t.bin"):
        open_tokens(path)


@pytest.mark.parametrize(
    ("field", "value", "rule"),
    [
        ("format", "other", "'shardtrain-tokens'"),
        ("format_version", 2, "1, which this version reads"),
        ("dtype", "int64", "'uint16' or 'uint32'"),
        ("dtype", ["uint16"], "'uint16' or 'uint32'"),
        ("count", -1, "the number of tokens"),
        ("count", True, "the number of tokens"),
        ("vocab_size", 0, "at least 1"),
    ],
)
def test_sidecar_fields(path, field, value, rule):
    path.write_bytes(b"\0" * 8)
    describe(path, **{field: value})
    with pytest.raises(UserError, match=re.escape(f"t.bin.json: {field} is {value!r}; it must be {rule}")):
        open_tokens(path)
    fields = json.loads(path.with_name("t.bin.json").read_text())
    del fields[field]
    path.with_name("t.bin.json").write_text(json.dumps(fields))
    with pytest.raises(UserError, match=re.escape(f"t.bin.json: '{field}' is missing; it must be {rule}")):
        open_tokens(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"format": }', "t.bin.json: not JSON at byte offset 11"),
        (b'{"\xff": 1}', "t.bin.json: not JSON: byte offset 2 is not UTF-8"),
        (b"[1]", "t.bin.json: a JSON object was expected, not list"),
    ],
)
def test_sidecar_that_is_no_json_object(path, content, message):
    path.write_bytes(b"\0" * 8)
    path.with_name("t.bin.json").write_bytes(content)
    with pytest.raises(UserError, match=message):
        open_tokens(path)


def test_seq_len_below_one(path):
    write_tokens(path, [np.arange(5)], vocab_size=10)
    with pytest.raises(UserError, match=r"data.seq_len 0: it must be at least 1"):
        TokenWindows(open_tokens(path), 0)
