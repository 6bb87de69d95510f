"""Texts that are large, or no ordinary text: memory, progress, and an end when one is asked for."""

import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from shardtrain.data import open_source, prepare
from shardtrain.data.watch import Watch
from shardtrain.errors import UserError

WORKER = Path(__file__).parent / "workers" / "tokenise.py"
MB = 1_000_000


def letters(count):
    """A text without spaces."""
    return bytes(random.Random(0).choices(b"abcdefghijklmnopqrstuvwxyz", k=count))


def start(folder, text):
    (folder / "text").write_bytes(text)
    return subprocess.Popen([sys.executable, WORKER, folder / "data", folder / "text"], stdout=subprocess.PIPE)


def memory(folder, text, timeout):
    """MB above what the imports take, of a process that tokenises a text."""
    with start(folder, text) as worker:
        try:
            out, _ = worker.communicate(timeout=timeout)
        finally:
            worker.kill()
    assert worker.returncode == 0
    return float(out.split()[1])


def test_text_without_spaces_is_soon_done_in_little_memory(tmp_path):
    assert memory(tmp_path, letters(MB // 2), timeout=60) < 500


@pytest.mark.full
@pytest.mark.parametrize("kind", ["2 MB of letters", "50 MB of letters", "Chinese", "white space"])
def test_any_text_takes_less_than_a_gigabyte(tmp_path, kind):
    rng = random.Random(0)
    text = {
        "2 MB of letters": lambda: letters(2 * MB),
        "50 MB of letters": lambda: letters(MB) * 20 + letters(30 * MB),
        "Chinese": lambda: "".join(map(chr, rng.choices(range(0x4E00, 0x5A00), k=4 * MB))).encode(),
        "white space": lambda: "".join(rng.choices(" \t\n\u3000", k=6 * MB)).encode(),
    }[kind]()
    assert memory(tmp_path, text, timeout=500) < 1000


def test_control_c_ends_it_within_a_second_or_two(tmp_path):
    with start(tmp_path, letters(4 * MB)) as worker:
        try:
            assert worker.stdout.readline() == b"started\n"
            time.sleep(1.5)  # now it learns, in a call that listens to nothing
            worker.send_signal(signal.SIGINT)
            assert worker.wait(3) == -signal.SIGINT
        finally:
            worker.kill()
    assert not (tmp_path / "data" / "source.json").exists()


@pytest.mark.parametrize("tokenizer", ["byte", "bpe"])
def test_it_ends_when_it_should_stop(tmp_path, tokenizer):
    path, asked, start = tmp_path / "text", [], time.monotonic()
    path.write_bytes(letters(MB // 2))

    def should_stop():
        asked.append(time.monotonic())
        return len(asked) > 7

    options = {"path": path, "tokenizer": tokenizer, "directory": tmp_path / "data"}
    with pytest.raises(UserError, match="stopped while preparing data; nothing was trained; the same command starts"):
        open_source("text", seq_len=8, vocab_size=300, should_stop=should_stop, **options)
    assert max(b - a for a, b in zip([start, *asked], asked, strict=False)) < 1
    assert not (tmp_path / "data" / "source.json").exists()
    open_source("text", seq_len=8, vocab_size=300, **{**options, "tokenizer": "byte"})


def test_a_process_that_waits_for_another_can_be_stopped(tmp_path):
    with pytest.raises(UserError, match="stopped while preparing data"):
        prepare(
            tmp_path, list, kind="text", tokenizer="byte", tokenizer_vocab=257, write=False, watch=Watch(lambda: True)
        )


def test_long_work_says_how_far_it_is(tmp_path, capsys):
    from shardtrain.data import Document

    documents = [Document("a", "word " * 200_000), Document("b", "more " * 200_000)]
    options = {"kind": "text", "tokenizer": "byte", "tokenizer_vocab": 257}
    prepare(tmp_path / "quick", lambda: documents, **options)
    assert capsys.readouterr().err == ""
    prepare(tmp_path / "slow", lambda: documents, **options, watch=Watch(every_s=0))
    lines = capsys.readouterr().err.splitlines()
    assert "tokenised 1 of 2 MB" in lines
    assert lines[-1].startswith("checked ")
