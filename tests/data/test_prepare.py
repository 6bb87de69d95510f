"""What a run keeps of its text."""

import json
import re
import threading

import numpy as np
import pytest

from shardtrain.data import (
    Document,
    TokenWindows,
    load_tokenizer,
    open_source,
    prepare,
)
from shardtrain.data.formats import corpus
from shardtrain.errors import UserError

TEXT = "the cat sat on the mat.\n" * 30


def opened(directory, type="text", **changes):
    arguments = {"seq_len": 8, "vocab_size": 300, "directory": directory} | changes
    return open_source(type, **arguments)


def rows(source):
    return np.stack([row["tokens"] for row in source])


@pytest.fixture
def texts(tmp_path):
    folder = tmp_path / "texts"
    folder.mkdir()
    (folder / "a.txt").write_text(TEXT)
    (folder / "b.txt").write_text("zebra " * 20)
    return folder


@pytest.fixture
def kept(tmp_path):
    return tmp_path / "run" / "data"


@pytest.mark.parametrize("tokenizer", ["byte", "bpe"])
def test_text_becomes_tokens_once_and_is_kept(texts, kept, tokenizer):
    source, text_tokenizer = opened(kept, path=texts, tokenizer=tokenizer)
    stream = np.append(rows(source), source[len(source) - 1]["targets"][-1])
    whole = "".join(path.read_text() for path in sorted(texts.iterdir()))
    assert whole.startswith(text_tokenizer.decode(stream))
    assert len(text_tokenizer.decode(stream)) > len(whole) * 0.9
    assert text_tokenizer.separator in stream
    names = {path.name: path.stat().st_mtime_ns for path in kept.iterdir()}
    assert set(names) == {"tokens.bin", "tokens.bin.json", "source.json"} | (
        {"tokenizer.json"} if tokenizer == "bpe" else set()
    )

    again, same_tokenizer = opened(kept, path=texts, tokenizer=tokenizer)
    assert again.fingerprint == source.fingerprint
    assert same_tokenizer.fingerprint == text_tokenizer.fingerprint == load_tokenizer(kept).fingerprint
    np.testing.assert_array_equal(rows(again), rows(source))
    assert {path.name: path.stat().st_mtime_ns for path in kept.iterdir()} == names, "nothing is written again"


def test_another_python_cannot_change_a_run_on_the_corpus(kept, monkeypatch):
    text = {"now": "import this\n" * 50}
    monkeypatch.setattr(corpus, "corpus_documents", lambda: [Document("a.py", text["now"])])
    first, _ = opened(kept, "corpus")
    text["now"] = "import that\n" * 50
    resumed, _ = opened(kept, "corpus")
    other, _ = opened(kept.parent / "other", "corpus")
    assert resumed.fingerprint == first.fingerprint
    np.testing.assert_array_equal(rows(resumed), rows(first))
    assert other.fingerprint != first.fingerprint


def test_text_files_may_move_or_go_but_not_change(texts, kept):
    first, _ = opened(kept, path=texts)
    (texts / "b.txt").rename(texts / "c.txt")
    assert opened(kept, path=texts)[0].fingerprint == first.fingerprint
    (texts / "c.txt").unlink()
    assert opened(kept, path=texts)[0].fingerprint == first.fingerprint
    (texts / "d.txt").write_text("new")
    with pytest.raises(UserError, match=rf"data.path {texts}/d.txt: this file is new since .* \(another run.name\)"):
        opened(kept, path=texts)
    (texts / "d.txt").unlink()
    (texts / "a.txt").write_text(TEXT + "!")
    with pytest.raises(UserError, match=rf"data.path {texts}/a.txt: this file has changed since .* restore the file"):
        opened(kept, path=texts)
    (texts / "a.txt").unlink()
    assert opened(kept, path=texts)[0].fingerprint == first.fingerprint
    texts.rmdir()
    assert opened(kept, path=texts)[0].fingerprint == first.fingerprint


def test_what_a_run_has_kept_needs_no_text(texts, kept, caplog):
    first, _ = opened(kept, path=texts)
    gone = texts.parent / "gone"
    for path in (gone, f"{gone}/*.txt", [texts, gone]):
        caplog.clear()
        assert opened(kept, path=path)[0].fingerprint == first.fingerprint
        missing = gone if isinstance(path, list) else path
        warning = f"data.path {missing}: no file is left there; the run continues with its kept tokens"
        assert [record.getMessage() for record in caplog.records if record.levelname == "WARNING"] == [warning]
    assert opened(kept, path=None)[0].fingerprint == first.fingerprint
    caplog.clear()
    (texts / "b.txt").write_bytes("zebra".encode("utf-16"))
    assert opened(kept, path=texts)[0].fingerprint == first.fingerprint
    assert "b.txt: not UTF-8" in caplog.text
    with pytest.raises(UserError, match=r"data.path: .* needs their path"):
        opened(kept.parent / "other", path=None)


@pytest.mark.parametrize("name", ["tokens.bin", "tokenizer.json"])
def test_a_damaged_kept_file_is_named(texts, kept, name):
    opened(kept, path=texts)
    data = bytearray((kept / name).read_bytes())
    data[len(data) // 2] ^= 1
    (kept / name).write_bytes(data)
    with pytest.raises(UserError, match=rf"{name} is damaged: its digest differs .*; restore the file|token id"):
        opened(kept, path=texts)
    (kept / name).unlink()
    with pytest.raises(UserError, match=rf"{name}( is damaged|: there is no such token file)"):
        opened(kept, path=texts)


def test_other_settings_than_the_kept_ones_are_named(texts, kept):
    opened(kept, path=texts)
    message = "data.tokenizer: kept 'bpe', now 'byte'; data.vocab_size: kept 300, now 257): set these as they"
    with pytest.raises(UserError, match=re.escape(message)):
        opened(kept, path=texts, tokenizer="byte")
    with pytest.raises(UserError, match=r"data.type: kept 'text', now 'corpus'"):
        opened(kept, "corpus")
    assert opened(kept, path=texts, seq_len=4)[0].fingerprint != opened(kept, path=texts)[0].fingerprint


def test_an_interrupted_preparation_starts_over(texts, kept):
    def interrupted():
        yield Document("a", TEXT)
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        prepare(kept, interrupted, kind="text", tokenizer="byte", tokenizer_vocab=257)
    assert list(kept.iterdir()) == []
    assert len(opened(kept, path=texts, tokenizer="byte")[0]) == (len(TEXT) + 120 + 1) // 8


def test_a_process_that_does_not_write_waits_for_the_one_that_does(texts, kept):
    arguments = {"path": texts, "tokenizer": "byte"}
    writer = threading.Timer(0.2, opened, (kept,), arguments)
    writer.start()
    source, _ = opened(kept, write=False, **arguments)
    writer.join()
    assert source.fingerprint == opened(kept, **arguments)[0].fingerprint


def test_waiting_in_vain_is_an_error(kept):
    with pytest.raises(UserError, match=r"source.json did not appear in 0.01 s: process 0 writes it, and .* share"):
        prepare(kept, list, kind="text", tokenizer="byte", tokenizer_vocab=257, write=False, wait_s=0.01)
    assert not kept.exists()


def test_a_directory_that_cannot_be_written(texts, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot write its data in .*file/data: Not a directory; choose another"):
        opened(tmp_path / "file" / "data", path=texts)


def test_text_shorter_than_a_window(texts, kept):
    (texts / "a.txt").write_text("ab")
    (texts / "b.txt").unlink()
    with pytest.raises(UserError, match=r"tokens.bin: 3 tokens, but a window of .* 8 needs 9: use"):
        opened(kept, path=texts, tokenizer="byte")


def test_quickstart_corpus_has_windows_for_training_and_holding_out(kept):
    source, tokenizer = opened(kept, "corpus", seq_len=128, vocab_size=2048)
    assert isinstance(source, TokenWindows)
    assert source.vocab_size == tokenizer.vocab_size == 2048
    assert len(source) > 4000
    assert len(json.loads((kept / "source.json").read_text())["documents"]) > 100
