"""Processes that were started with something else: found out before the first step, on each of them."""

import os
import re

import numpy as np
import pytest

from commands import CONFIG, compiled_once, pair, start  # noqa: F401
from shardtrain.data import write_tokens
from shardtrain.errors import UserError
from shardtrain.host import alike
from shardtrain.host.alike import asked, check_alike, software, together
from shardtrain.models.mlp import MLP

TOKENS = "data={type: tokens, path: tokens.bin, seq_len: 16, global_batch: 8}"
MODEL = """
from shardtrain.models.mlp import MLP


class Mine(MLP):
    number = {}
"""


def test_a_difference_names_key_values_and_processes():
    statements = [{"run.seed": 0, "jax": "1", "data": ["a"]}, {"run.seed": 3, "jax": "1"}, {"run.seed": 0, "jax": "1"}]
    with pytest.raises(UserError) as found:
        check_alike(statements)
    assert str(found.value).splitlines()[1:-1] == [
        "  run.seed: 0 on processes 0, 2; 3 on process 1",
        '  data: ["a"] on process 0; absent on processes 1, 2',
    ]
    check_alike(statements[:1] * 3)


def test_values_that_differ_at_their_end_do_not_look_alike():
    with pytest.raises(UserError) as found:
        check_alike([{"key": "a" * 500 + "b"}, {"key": "a" * 500 + "c"}])
    first, second = re.findall(r"a+\.\.\. \((\w{16})\)", str(found.value))
    assert first != second


def test_where_one_refuses_the_others_do():
    def refuse():
        raise UserError("no such file")

    said = []
    with pytest.raises(UserError, match="no such file"):
        together(refuse, lambda made: {}, lambda text: said.append(text) or [text, text])
    with pytest.raises(UserError, match=r"^processes 0, 1 refused to continue"):
        together(lambda: 1, lambda made: {}, lambda text: said * 2 + [text])


def test_the_software_has_versions():
    assert "absent" not in [value for key, value in software().items() if not key.startswith("variable")]


def test_the_source_of_shardtrain_is_that_of_all_rooms(tmp_path, monkeypatch):
    monkeypatch.setattr(alike, "__file__", str(tmp_path / "host" / "alike.py"))
    (tmp_path / "train").mkdir()
    digests = set()
    for text in ("a = 1", "a = 2"):
        (tmp_path / "train" / "step.py").write_text(text)
        digests.add(software()["source of shardtrain"])
    assert len(digests) == 2


def ends(first, second, folders):
    """The outputs of two processes, each in a folder of its own, which must end with a message and code 2."""
    with start(first, folder=folders[0]) as (zero,), start(second, folder=folders[1]) as (one,):
        assert [zero.end(90), one.end(90)] == [2, 2], (zero.output, one.output)
        outputs = zero.output, one.output
    for output in outputs:
        assert output.count("error: ") == 1
        assert "Traceback" not in output
    return outputs


@pytest.fixture
def folders(tmp_path):
    places = tmp_path / "a", tmp_path / "b"
    for number, place in enumerate(places):
        place.mkdir()
        (place / "mine.py").write_text(MODEL.format(number))
        write_tokens(place / "tokens.bin", [np.arange(9999) % (32 + number)], 64)
    return places


def test_other_settings_and_another_model_are_told_on_each_process(tmp_path, folders):
    first, second = pair(tmp_path / "run", "model.type=mine:Mine")
    other = {"run.seed": 3, "run.steps": 9, "checkpoint.every": 3, "eval.every": 2, "optimizer.lr": 0.5, "mesh.fsdp": 2}
    words = [f"{key}={value}" for key, value in other.items()]
    for output in ends(first, (*second, *words, "mesh.data=2", TOKENS), folders):
        for key, value in other.items():
            assert re.search(rf"^  {key}: \S+ on process 0; {value} on process 1$", output, re.MULTILINE)
        assert "data.path: null on process 0; tokens.bin on process 1" in output
        assert re.search(r"source of the model: \w{16} on process 0; \w{16} on process 1", output)
    assert not (tmp_path / "run").exists()


def test_another_release_is_told_on_each_process(tmp_path, folders, monkeypatch):
    first, second = pair(tmp_path / "run")
    fake = tmp_path / "site/optax-9.9.dist-info"
    fake.mkdir(parents=True)
    (fake / "METADATA").write_text("Metadata-Version: 2.1\nName: optax\nVersion: 9.9\n")
    with start(first, folder=folders[0]) as (zero,):
        monkeypatch.setenv("PYTHONPATH", str(fake.parent), prepend=os.pathsep)
        with start(second, folder=folders[1]) as (one,):
            assert [zero.end(60), one.end(60)] == [2, 2]
            for output in (zero.output, one.output):
                assert re.search(r"optax: [0-9.]+ on process 0; 9\.9 on process 1", output)


@pytest.mark.full
def test_other_data_under_the_same_name_is_told_on_each_process(tmp_path, folders):
    for output in ends(*pair(tmp_path / "run", TOKENS), folders):
        assert re.search(r"^  rows: \d+, .* on process 0; \d+, .* on process 1$", output, re.MULTILINE)


@pytest.mark.full
def test_where_one_process_finds_no_data_all_end(tmp_path, folders):
    (folders[1] / "tokens.bin").write_bytes(b"")
    zero, one = ends(*pair(tmp_path / "run", TOKENS), folders)
    assert "error: process 1 refused to continue" in zero
    assert "tokens.bin" in one


@pytest.mark.full
def test_where_one_process_has_a_mistake_in_its_command_all_end(tmp_path, folders):
    first, second = pair(tmp_path / "run")
    zero, one = ends(first, (*second, "run.steps=0"), folders)
    assert "error: process 1 refused to continue" in zero
    assert "run.steps = 0" in one


def test_a_process_that_never_comes_is_named(tmp_path):
    first, _ = pair(tmp_path / "run")
    with start((*first, "--join-timeout", 2), folder=tmp_path) as (process,):
        assert process.end(60) == 2
        assert process.output == (
            "error: process 1 of 2 did not come within 2 s; start each with the same --coordinator, or give them more "
            "time with --join-timeout\n"
        )


def test_text_with_a_colon_is_not_an_import_path():
    """`time` is loaded, and has no file."""
    keys = asked({"sample": {"prompt": "time: noon", "tokens": 3}}, MLP)
    assert {key for key in keys if key.startswith("source of")} == {"source of the model"}


def test_an_error_that_nobody_expects_is_told_too():
    """Else the others would wait for it."""

    def fail():
        raise KeyError("a user's own source")

    said = []
    with pytest.raises(KeyError):
        together(fail, lambda made: {}, lambda text: said.append(text) or [text, text])
    with pytest.raises(UserError, match=r"^process 0 refused to continue"):
        together(lambda: 1, lambda made: {}, lambda text: [*said, text])
