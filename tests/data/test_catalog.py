"""Sources opened by name."""

import re

import numpy as np
import pytest

from commands import CONFIG, compiled_once, fit, losses  # noqa: F401
from shardtrain import load_config
from shardtrain.config import ConfigError
from shardtrain.data import formats, open_source, write_tokens
from shardtrain.errors import UserError
from shardtrain.run.data import open_data


def opened(directory, type, **changes):
    arguments = {"seq_len": 8, "vocab_size": 300, "directory": directory} | changes
    return open_source(type, **arguments)


def test_tokens_and_synthetic_have_no_tokenizer(tmp_path):
    write_tokens(tmp_path / "t.bin", [np.arange(33)], vocab_size=40)
    source, tokenizer = opened(None, "tokens", path=tmp_path / "t.bin")
    assert tokenizer is None
    assert (len(source), source.vocab_size) == (4, 40)
    source, tokenizer = opened(None, "synthetic", seed=5)
    assert tokenizer is None
    assert source.vocab_size == 300
    assert source.fingerprint != opened(None, "synthetic", seed=6)[0].fingerprint


def configured(type, *overrides):
    data = f"data={{type: '{type}', seq_len: 16, global_batch: 8, held_out: 0.1}}"
    return load_config(CONFIG, [data, *overrides])


FORMAT = """
from shardtrain.data import SyntheticTokens

source = SyntheticTokens(seq_len=16, vocab_size=64, seed=7)

def open_rows(request):
    return source, None
"""


def test_a_new_type_is_one_file(monkeypatch, tmp_path):
    """In the folder of formats, and a config names it."""
    (tmp_path / "dropped_in.py").write_text(FORMAT)
    monkeypatch.setattr(formats, "__path__", [*formats.__path__, str(tmp_path)])
    source = opened(None, "dropped_in", seq_len=16)[0]
    assert source.seed == 7
    rows, held_out, tokenizer = open_data(configured("dropped_in"), tmp_path)
    assert (rows.source, held_out.source, tokenizer) == (source, source, None)
    with pytest.raises(UserError, match="did you mean dropped_in"):
        opened(None, "droped_in")


def test_a_broken_format_breaks_no_other_type(monkeypatch, tmp_path):
    (tmp_path / "broken_format.py").write_text("raise RuntimeError('half written')")
    monkeypatch.setattr(formats, "__path__", [*formats.__path__, str(tmp_path)])
    assert opened(None, "synthetic")[0].vocab_size == 300
    with pytest.raises(ConfigError) as found:
        configured("broken_format")
    (problem,) = found.value.problems
    assert (problem.path, problem.value) == ("data.type", "broken_format")
    assert "fails: RuntimeError('half written')" in problem.rule


OWN = """
import numpy as np
from shardtrain.data import ByteTokenizer, window

class Counting:
    fingerprint = "counting"
    tokenizer = ByteTokenizer()

    def __init__(self, seq_len: int, *, vocab_size: int, path=None, directory=None):
        self.seq_len, self.vocab_size, self.path, self.directory = seq_len, vocab_size, path, directory

    def __len__(self): return 400
    def __getitem__(self, row): return window((row + np.arange(self.seq_len + 1)) % self.vocab_size)

def anything(**fields): return Counting(fields["seq_len"], vocab_size=fields["vocab_size"])
class Bare(Counting): tokenizer = None
def no_source(seq_len): return range(seq_len)
class Longer(Counting):
    def __init__(self, seq_len, vocab_size): super().__init__(2 * seq_len, vocab_size=vocab_size)
class Faulty:
    def __init__(self, seq_len): {}["shard"]
class Needy:
    def __init__(self, seq_len, shards): ...
class Plain:
    def __init__(self, seq_len): ...
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    (tmp_path / "own_data.py").write_text(OWN)
    monkeypatch.syspath_prepend(str(tmp_path))


def test_a_source_of_ones_own_is_named_by_its_import_path(own, tmp_path):
    config = configured("own_data:Counting", "data.path=anywhere", "sample.prompt=ab")
    rows, _, tokenizer = open_data(config, tmp_path)
    assert (rows.source.path, rows.source.directory, rows.source.vocab_size) == ("anywhere", tmp_path / "data", 64)
    assert tokenizer.encode("a").tolist() == [97]
    assert len(open_data(configured("own_data:anything"), tmp_path)[0]) == 360


def test_a_run_trains_on_it(own, tmp_path):
    run = fit(
        tmp_path / "run",
        "data={type: 'own_data:Counting', seq_len: 16, global_batch: 8, held_out: 0.1}",
        "model.vocab_size=258",
        "run.steps=2",
    )
    assert run.resumed_from is None
    assert len(losses(tmp_path / "run")) == 2


@pytest.mark.parametrize(
    ("type", "overrides", "message"),
    [
        ("no_such_data:Counting", [], "importing module 'no_such_data' fails"),
        ("own_data:Countin", [], "module own_data has no class 'Countin'; did you mean Counting?"),
        ("own_data:Needy", [], "needs 'shards', which a config does not give; it may take seq_len, vocab_size"),
        ("own_data:Plain", ["data.path=x"], "it has no parameter 'path', and data.path is 'x'; remove"),
        ("own_data:Plain", ["data.tokenizer=byte", "model.vocab_size=258"], "has no parameter 'tokenizer'"),
        ("mine", [], "there is no such type; use one of corpus, synthetic, text, tokens (package.module:Cl"),
    ],
)
def test_what_cannot_be_a_source_is_refused_in_the_config(own, type, overrides, message):
    with pytest.raises(ConfigError) as found:
        configured(type, *overrides)
    (problem,) = found.value.problems
    assert problem.path == "data.type"
    assert message in f"{problem.rule}; {problem.fix}"


def test_what_is_no_source_is_refused_when_it_opens(own, tmp_path):
    with pytest.raises(
        UserError, match=r"returned range\(0, 16\), which has no fingerprint, no vocab_size; it must follow"
    ):
        open_data(configured("own_data:no_source"), tmp_path)
    with pytest.raises(
        UserError, match=r"sample\.prompt = ab: text needs a tokenizer, and data\.type own_data:Bare has none"
    ):
        open_data(configured("own_data:Bare", "sample.prompt=ab"), tmp_path)


def test_rows_of_another_length_are_refused(own, tmp_path):
    with pytest.raises(
        UserError, match=r"data.seq_len = 16: .* own_data:Longer\) has rows of 32 tokens; set data.seq_len=32"
    ):
        open_data(configured("own_data:Longer"), tmp_path)


def test_an_error_of_a_source_of_ones_own_says_which_setting_names_it(own):
    with pytest.raises(KeyError) as raised:
        opened(None, "own_data:Faulty")
    assert raised.value.__notes__ == [
        "data.type = own_data:Faulty: this error comes from there; correct it, or name another"
    ]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"type": "corpsu"},
            "data.type = corpsu: there is no such type; did you mean corpus?",
        ),
        (
            {"type": "zzz"},
            "data.type = zzz: there is no such type; use one of corpus, synthetic, text, tokens",
        ),
        (
            {"type": "text"},
            "data.path: data.type text reads files and needs their path; set data.path to",
        ),
        ({"type": "tokens"}, "data.path: data.type tokens reads files"),
        ({"type": "tokens", "path": ["a", "b"]}, "data.path = ['a', 'b']: data.type tokens reads one file"),
        (
            {"type": "tokens", "path": "a", "tokenizer": "byte"},
            "data.tokenizer = byte: data.type tokens is not text",
        ),
        (
            {"type": "corpus", "path": "x"},
            "data.path = x: data.type corpus reads no files; set data.path=null",
        ),
        ({"type": "synthetic", "path": "x"}, "data.path = x: data.type synthetic reads no files"),
        (
            {"type": "corpus", "directory": None},
            "directory is missing: data.type corpus keeps its tokens in one",
        ),
        ({"type": "corpus", "tokenizer": "words"}, "data.tokenizer = words: must be bpe or byte"),
        (
            {"type": "corpus", "tokenizer": "byte", "tokenizer_vocab": 9},
            "data.vocab_size = 9: only a bpe tokenizer has a vocabulary to choose; set data.vocab_size=null",
        ),
        (
            {"type": "corpus", "vocab_size": 256},
            "model.vocab_size = 256: a byte-level BPE needs at least 257 ids",
        ),
        (
            {"type": "corpus", "tokenizer_vocab": 100},
            "data.vocab_size = 100: a byte-level BPE needs at least 257",
        ),
        (
            {"type": "corpus", "tokenizer_vocab": 301},
            "data.vocab_size = 301: each of the data's 301 token ids needs a row in the model, and model.vocab_size is "
            "300; set model.vocab_size=301",
        ),
        (
            {"type": "corpus", "tokenizer": "byte", "vocab_size": 256},
            "model.vocab_size = 256: the byte tokenizer has 257 ids",
        ),
    ],
)
def test_requests_that_make_no_sense(tmp_path, changes, message):
    kept = tmp_path / "data"
    with pytest.raises(UserError, match=re.escape(message)):
        opened(**{"directory": kept, **changes})
    assert not kept.exists(), "found out before any work was done"


def test_token_files_with_a_larger_vocabulary_than_the_model(tmp_path):
    write_tokens(tmp_path / "t.bin", [np.arange(33)], vocab_size=301)
    with pytest.raises(UserError, match=r"model.vocab_size = 300: .*type tokens\) has a vocabulary of 301"):
        opened(None, "tokens", path=tmp_path / "t.bin")
