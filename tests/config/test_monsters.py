"""Configs that are no configs, too large, or nested without end: one clear error each, at once."""

import contextlib
import os
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from commands import CONFIG
from shardtrain.config import ConfigError, load_config, parse_config
from shardtrain.config.schema import RunConfig
from shardtrain.errors import shortened

GOOD = CONFIG.read_text()
LAUGHS = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 12)
)
CHAIN = "a0: &a0 [x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}]\n" for i in range(1, 3000))
MONSTERS = {
    "thousands of digits": (f"{GOOD}log: {{every: {'9' * 5000}}}", "an integer of more than 64 bits"),
    "hundreds of digits": (f"{GOOD}log: {{every: -{'9' * 400}}}", "an integer of more than 64 bits"),
    "thousands of hex digits": (f"{GOOD}log: {{every: 0x{'f' * 5000}}}", "an integer of more than 64 bits"),
    "thousands of brackets": (f"{GOOD}log: {'[' * 5000}{']' * 5000}", "nested deeper than 50 levels"),
    "thousands of open brackets": ("[" * 100_000, "nested deeper than 50 levels"),
    "thousands of dashes": ("- " * 5000, "nested deeper than 50 levels"),
    "thousands of braces": (f"{GOOD}xla: {{options: {'{a: ' * 1000}1{'}' * 1000}}}", "nested deeper than 50 levels"),
    "a billion laughs": (LAUGHS, "too large for a config once its aliases are expanded"),
    "a chain of aliases": (CHAIN, "too large for a config once its aliases are expanded"),
    "megabytes": (GOOD + "#" * 30_000_000, "a config has at most 1,048,576 characters"),
    "a long line": (f"{GOOD}log: {{every: {' ' * 9000}]}}", "expected the node content"),
    "a NUL in a name": (f'{GOOD}init_from: "a\\0b"', "text with a NUL"),
    "half a surrogate pair": (f'{GOOD}init_from: "\\ud800"', "half of a surrogate pair"),
    "bytes": (b"\x89PNG\r\n\x1a\n" + bytes(99), "the byte at offset 0 is not"),
    "NULs": (bytes(3000), "character #x0000 is not allowed in YAML"),
    "two thousand keys": (GOOD + "".join(f"k{i}: 1\n" for i in range(2000)), "... and 1,960 more"),
    "a long path": (f"{GOOD}init_from: {'a' * 5000}", "there is no such directory"),
}


@pytest.mark.parametrize("name", MONSTERS)
def test_a_monster_is_refused_in_a_few_lines_and_at_once(tmp_path, name):
    content, message = MONSTERS[name]
    file = tmp_path / "monster.yaml"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    begun = time.monotonic()
    with pytest.raises(ConfigError) as found:
        load_config(file, check_files="path" in name)
    assert time.monotonic() - begun < 10  # a fraction of a second; without a bound some take hours
    assert message in str(found.value)
    assert max(map(len, str(found.value).splitlines())) < 400
    assert "\0" not in str(found.value)


@pytest.mark.parametrize("override", ["devices.emulate", "mesh.fsdp", "mesh.pipe", "data.global_batch", "data.seq_len"])
def test_a_monstrous_number_is_judged_at_once(override):
    begun = time.monotonic()
    with pytest.raises(ConfigError):
        load_config(CONFIG, [f"{override}=9223372036854775807", "pipeline.microbatches=3"], check_files=False)
    assert time.monotonic() - begun < 10


def test_a_pipe_that_nobody_writes_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.yaml")
    with pytest.raises(ConfigError, match="cannot be read: it is a pipe or a device"):
        load_config(tmp_path / "pipe.yaml")
    with pytest.raises(ConfigError, match="cannot be read: Is a directory"):
        load_config(tmp_path)


@pytest.mark.parametrize("key", ["run.dir", "data.path", "init_from"])
def test_a_home_that_does_not_exist(tmp_path, key):
    overrides = [f"run.dir={tmp_path}", "data={type: text, seq_len: 8, global_batch: 8}", "model.vocab_size=300"]
    with pytest.raises(ConfigError, match=r"data\.path"):
        load_config(CONFIG, [*overrides, f"{key}=~no_such_user/x"])


@pytest.mark.parametrize("value", [np.int64(3), {1, 2}, Path("x"), 10**5000], ids=["NumPy", "set", "path", "digits"])
def test_plain_data_is_plain(value):
    raw = {**load_config(CONFIG).to_dict(), "log": {"every": value}}
    with pytest.raises(ConfigError, match="log\n    rule: must be plain data"):
        parse_config(raw)


def test_shortened_text_keeps_its_start():
    assert shortened("a" * 200) == "a" * 200
    assert shortened("a" * 201) == "a" * 197 + "..."


def keys():
    sections = {
        name: list(field.annotation.model_fields)
        for name, field in RunConfig.model_fields.items()
        if hasattr(field.annotation, "model_fields")
    }
    known = [f"{section}.{key}" for section, inner in sections.items() for key in inner]
    return st.sampled_from([*known, *sections, "rules.embed", "mesh.slow.data", "optimizer.schedule.type"]) | st.text(
        max_size=9
    )


VALUES = (
    st.integers()
    | st.floats()
    | st.sampled_from(
        [
            "",
            "null",
            "true",
            "[",
            "{a: 1}",
            "[1, a]",
            "-1",
            "0",
            "1e400",
            ".inf",
            "!!binary aa",
            "&a [*a]",
            "~",
            "~x",
            "a:b",
            ":",
            "*",
            "os:path",
            "../..",
            "1f1b",
            "wsd",
            "auto",
            "text",
        ]
    )
    | st.text(max_size=20)
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(overrides=st.lists(st.tuples(keys(), VALUES), min_size=1, max_size=3))
def test_whatever_overrides_say_only_config_errors_come(overrides):
    try:
        config = load_config(CONFIG, [f"{key}={value}" for key, value in overrides], check_files=False)
    except ConfigError:
        return
    assert parse_config(config.to_dict(), check_files=False) == config


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cut=st.integers(0, len(GOOD)), noise=st.binary(max_size=12), length=st.integers(0, 40))
def test_whatever_a_file_holds_only_config_errors_come(tmp_path, cut, noise, length):
    file = tmp_path / "fuzzed.yaml"
    file.write_bytes(GOOD.encode()[:cut] + noise + GOOD.encode()[cut + length :])
    with contextlib.suppress(ConfigError):
        load_config(file, check_files=False)
