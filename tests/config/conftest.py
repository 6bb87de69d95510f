"""A valid config, and what a broken one says."""

from collections.abc import Callable
from pathlib import Path

import pytest

from shardtrain.config import ConfigError, Problem, load_config

BASE = """\
run: {name: test, steps: 200}
devices: {emulate: 8}
mesh: {fsdp: 4, tensor: 2}
model: {type: llama, n_layers: 4, d_model: 128, n_heads: 4, n_kv_heads: 2, d_ff: 512, vocab_size: 2048}
data: {type: corpus, seq_len: 128, global_batch: 16}
optimizer: {lr: 1.0e-3, schedule: {warmup_steps: 20}}
"""


@pytest.fixture
def base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A config file without problems, in the current directory."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base.yaml").write_text(BASE)
    return Path("base.yaml")


@pytest.fixture
def problems(base: Path) -> Callable[..., dict[str, Problem]]:
    """The problems that overrides of the valid config cause, by path."""

    def find(*overrides: str) -> dict[str, Problem]:
        with pytest.raises(ConfigError) as caught:
            load_config(base, overrides)
        found = {problem.path: problem for problem in caught.value.problems}
        assert len(found) == len(caught.value.problems), "one problem per path"
        for problem in found.values():
            assert str(problem) in str(caught.value)
        return found

    return find


@pytest.fixture
def own_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], str]:
    """Write a module with a user's model class; returns its name."""
    monkeypatch.syspath_prepend(tmp_path)

    def write(source: str, name: str = f"own_{abs(hash(tmp_path))}") -> str:
        (tmp_path / f"{name}.py").write_text(source)
        return name

    return write
