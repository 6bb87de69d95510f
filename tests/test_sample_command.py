"""`shardtrain sample`, and text from a run as a function."""

import json
import shutil
from pathlib import Path

import pytest

import shardtrain as st
from commands import (
    CONFIG,
    compiled_once,  # noqa: F401
    flip_a_byte,
    shardtrain,
)
from shardtrain.run.writer import Piece

#: Each byte follows one other byte, so that a tiny model soon knows the text by heart.
TEXT = "abcdefghijklmnöpq語. "
CYCLE = len(TEXT.encode())
GREEDY = ("--temperature", 0)


def following(prompt, tokens):
    """What a model that knows the text writes after a part of it."""
    start = TEXT.encode().index(prompt.encode()) + len(prompt.encode())
    return (TEXT * 9).encode()[start : start + tokens].decode(errors="replace")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of a Llama on text, by bytes; it learns the text by heart."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "a.txt").write_text(TEXT * 200)
    directory = folder / "runs/words"
    result = shardtrain(
        "train",
        CONFIG,
        f"run={{name: words, dir: {directory}, steps: 40}}",
        "devices.emulate=4",
        "mesh={fsdp: 2, tensor: 2}",
        "model={type: llama, n_layers: 2, d_model: 32, n_heads: 4, n_kv_heads: 2, d_ff: 64, vocab_size: 258}",
        f"data={{type: text, path: {folder / 'a.txt'}, tokenizer: byte, seq_len: 64, global_batch: 16}}",
        "optimizer={lr: 2.0e-2, schedule: {type: cosine, warmup_steps: 4, decay_steps: 40}}",
        "checkpoint={every: 20, keep: 9}",
        "eval.every=null",
        "sample={prompt: 'abc', tokens: 0}",
    )
    assert result.code == 0, result.err
    return directory


@pytest.fixture(scope="module")
def writer(run):
    return st.Writer.open(run)


def sampled(run, *words):
    result = shardtrain("sample", run, *words)
    assert (result.code, result.err) == (0, "")
    return result.out


def test_it_continues_a_text(run):
    assert sampled(run, "efg", "--tokens", CYCLE, *GREEDY) == f"efg{following('efg', CYCLE)}\n"
    assert sampled(run, "--tokens", 4, *GREEDY) == "abcdefg\n"  # the run's own prompt
    assert sampled(run, "efg", "--tokens", 5, "--top-k", 1) == "efghijkl\n"
    hot = [sampled(run, "efg", "--tokens", 20, "--temperature", 9, "--seed", seed) for seed in (1, 1, 2)]
    assert hot[0] == hot[1] != hot[2]


def test_a_stop_string_ends_the_text_before_it(run):
    assert sampled(run, "efg", *GREEDY, "--stop", "語. a", "--stop", "zzz") == "efghijklmnöpq\n"


def test_several_at_once_are_different_ones(run):
    out = sampled(run, "efg", "--count", 3, "--tokens", 12, "--temperature", 9)
    heads = [line for line in out.splitlines() if line.startswith("--- ")]
    assert sorted(heads) == ["--- 1", "--- 2", "--- 3"]
    texts = [part.partition("\n")[2] for part in ("\n" + out).split("\n--- ")[1:]]
    assert len({*texts}) == 3
    assert all(text.startswith("efg") for text in texts)


def test_a_file_of_prompts_becomes_a_file_of_completions(run, tmp_path):
    prompts = ["a", "bcdefghijklm", "ö", "pq語. "] * 5  # more than are continued at once
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(json.dumps({"prompt": prompt, "id": i}) for i, prompt in enumerate(prompts)) + "\n\n")
    out = sampled(run, "--batch", path, *GREEDY, "--tokens", 9, "--stop", "語", "devices.emulate=1")
    assert [json.loads(line) for line in out.splitlines()] == [
        {"prompt": prompt, "id": i, "completion": text, "finish": "stop" if whole != text else "length"}
        for i, prompt in enumerate(prompts)
        for whole in [following(prompt, 9)]
        for text in [whole.partition("語")[0]]
    ]


def test_a_checkpoint_and_another_mesh_are_runs_too(run):
    words = ("efg", "--tokens", 12, "--temperature", 3)
    last = sampled(run, *words)
    assert sampled(run / "checkpoints/40", *words) == last
    assert sampled(run / "checkpoints/20", *words) != last
    assert sampled(run, *words, "devices.emulate=8", "mesh={pipe: 2, context: 2, tensor: 2}") == last
    assert sampled(run, *words, "devices.emulate=1") == last


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["{runs}/word"], "there is no run {runs}/word; did you mean {runs}/words?"),
        (["{run}/checkpoints/31"], "step 31 in {run}/checkpoints does not exist; the verifiable steps are [20, 40]"),
        (["{run}", "--top-p", "7"], "top_p = 7.0: must be above 0 and at most 1"),
        (["{run}", "--stop", ""], "stop = '': an empty string would end every text"),
        (["{run}", "--batch", "{runs}/none.jsonl"], "none.jsonl: it cannot be read: No such file"),
        (["{run}", "--batch", "{bad}"], "line 2: it is a dict, without a text under prompt; write"),
        (["{run}", "a", "mesh.tensor=5"], "mesh.tensor"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_mistakes_are_one_clear_error(run, tmp_path, words, message):
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"prompt": "a"}\n{"text": "a"}\n')
    names = {"run": run, "runs": run.parent, "bad": bad}
    result = shardtrain("sample", *(word.format(**names) for word in words))
    assert (result.code, result.out) == (2, "")
    assert message.format(**names) in result.err
    assert "Traceback" not in result.err


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"prompt": "a", "completion": "gold"}, "line 1: its key completion would be replaced: rename it"),
        ({"prompt": "\ud83d"}, "line 1: its prompt has half of a surrogate pair, which is no text"),
        ({"prompt": "a", "sample": "gold"}, None),
        ({"prompt": "a", "text": "b\u2028\x85c"}, None),
    ],
)
def test_a_line_of_prompts_is_kept_whole_or_refused(run, tmp_path, line, message):
    path = tmp_path / "prompts.jsonl"
    path.write_text("\ufeff" + json.dumps(line, ensure_ascii=message is not None) + "\n", encoding="utf-8")
    result = shardtrain("sample", run, "--batch", path, *GREEDY, "--tokens", 1, "devices.emulate=1")
    if message is None:
        assert result.code == 0, result.err
        assert json.loads(result.out) == {**line, "completion": "b", "finish": "length"}
    else:
        assert (result.code, result.out) == (2, "")
        assert message in result.err


def test_a_run_without_a_tokenizer_or_with_damage_is_refused(run, tmp_path):
    copy = Path(shutil.copytree(run, tmp_path / "run"))
    shutil.rmtree(copy / "data")
    result = shardtrain("sample", copy, "a")
    assert result.code == 2
    assert "keeps no tokenizer, which text needs; train on text, or continue token ids" in result.err
    flip_a_byte(copy, 40)
    assert "checkpoint 40" in shardtrain("sample", copy / "checkpoints/40", "a").err


def test_it_is_a_function_and_a_writer_that_streams(run, writer):
    options = {"tokens": CYCLE, "temperature": 0}
    assert st.sample(run, "efg", **options) == following("efg", CYCLE)
    prompts = ["efg", "n"]
    pieces = [*writer.stream(prompts, **options)]
    for row, prompt in enumerate(prompts):
        assert "".join(piece.text for piece in pieces if piece.row == row) == following(prompt, CYCLE)
    assert all(piece.text in TEXT for piece in pieces)  # whole characters, as they come
    assert [piece for piece in pieces if piece.finish] == [Piece(0, "g", "length"), Piece(1, "n", "length")]
    assert writer.write("n", **options) == [(following("n", CYCLE), "length")]


def test_the_end_of_a_document_ends_the_text(writer, monkeypatch):
    class Ending(type(writer.tokenizer)):
        separator = ord("p")

    monkeypatch.setattr(writer, "tokenizer", Ending())
    assert writer.write(["efg"], tokens=30, temperature=0) == [("hijklmnö", "end")]
