import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shardtrain.config import ConfigError, dump
from shardtrain.config.strict_yaml import parse


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("3E5", 3e5),
        ("+.5", 0.5),
        ("1.", 1.0),
        ("010", 10),
        ("0x1F", 31),
        ("0o17", 15),
        ("-3", -3),
        ("-.inf", -math.inf),
        ("true", True),
        ("False", False),
        ("~", None),
        ("", None),
        ("1:30", "1:30"),
        ("yes", "yes"),
        ("off", "off"),
        ("n", "n"),
        ("1_000", "1_000"),
        ("2026-01-02", "2026-01-02"),
        ("<<", "<<"),
        ("'1e-4'", "1e-4"),
        ("[1, a, null]", [1, "a", None]),
    ],
)
def test_scalars_are_those_of_yaml_1_2(text, value):
    read = parse(text, "text")
    assert (read, type(read)) == (value, type(value))


def test_nan_is_a_number():
    assert math.isnan(parse(".nan", "text"))


text = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"))
plain = st.recursive(
    st.none() | st.booleans() | st.integers(1 - 2**63, 2**63 - 1) | st.floats(allow_nan=False) | text,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(text, inner, max_size=4),
    max_leaves=12,
)


@given(plain)
def test_what_is_dumped_is_read_back(value):
    assert parse(dump(value), "dump") == value


@given(st.floats(allow_nan=False))
def test_floats_keep_every_bit(value):
    assert math.copysign(1, parse(dump([value]), "dump")[0]) == math.copysign(1, value)
    assert parse(dump([value]), "dump")[0] == value


def problems(text):
    with pytest.raises(ConfigError) as caught:
        parse(text, "x.yaml")
    return caught.value.problems


def test_all_duplicate_keys_are_refused_with_their_lines():
    first, second = problems("run:\n  steps: 1\n  steps: 2\nmesh: {}\nrun: {}\n")
    assert (first.path, first.value) == ("x.yaml:3:3", "steps")
    assert "line 2" in first.rule
    assert (second.path, second.value) == ("x.yaml:5:1", "run")
    assert "line 1" in second.rule


@pytest.mark.parametrize(
    ("text", "where", "line"),
    [
        ("run: {steps: 1\nmesh: {fsdp: 2}\n", "x.yaml:2:5", "mesh: {fsdp: 2}"),
        ("run:\n\tsteps: 1\n", "x.yaml:2:1", "\tsteps: 1"),
        ("run: 'open\n", "x.yaml:1:11", "run: 'open"),
        ("a: 1\nb: !!python/object:os.system x\n", "x.yaml:2:4", "!!python/object"),
        ("a: 1\nb: bell \a\n", "x.yaml:2:9", "b: bell"),
        ("a: 1\n---\nb: 2\n", "x.yaml:2:1", "---"),
        ("1: a\n", "x.yaml:1:1", "1: a"),
        ("a: &x [*x]\n", "x.yaml:1:4", "a: &x [*x]"),
        ("a: !!int x\n", "x.yaml:1:4", "!!int x"),
    ],
)
def test_a_syntax_error_names_file_line_column_and_text(text, where, line):
    (problem,) = problems(text)
    assert problem.path == where
    assert line in problem.fix
    assert "^" in problem.fix
