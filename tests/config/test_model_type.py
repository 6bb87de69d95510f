"""From `model.type` to a class and the options that it takes."""

import inspect
import subprocess
import sys

import pytest

from shardtrain.config import load_config
from shardtrain.models.llama import Llama
from shardtrain.models.mlp import MLP

OWN = """
from __future__ import annotations
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Literal

class Unusual: ...

class Own:
    def __init__(
        self, *, vocab_size: int, copy: str = "a", sizes: tuple[int, ...] = (1, 2), ratio: float = 0.5,
        where: Path = Path("x"), table: Mapping[str, int] | None = None, mode: Literal["fast", "slow"] = "fast",
        act: Callable = print, unusual: Unusual | None = None, free=3, rngs: object, precision: object = None,
    ):
        self.given = dict(vocab_size=vocab_size, copy=copy, sizes=sizes, ratio=ratio, where=where, table=table,
                          mode=mode, act=act, unusual=unusual, free=free)

class Positional:
    def __init__(self, size: int, /, *, rngs): ...

class Keywords:
    def __init__(self, *, rngs, **kwargs): ...
"""


def test_the_librarys_models_by_name(base):
    assert load_config(base).model.load() is Llama
    mlp = "model={type: mlp, n_layers: 2, d_model: 32, d_ff: 64, vocab_size: 512}"
    assert load_config(base, [mlp]).model.load() is MLP


def test_every_option_of_the_class_is_in_the_resolved_config(base):
    options = set(inspect.signature(Llama.__init__).parameters) - {"self", "rngs", "precision"}
    assert set(load_config(base).model.options) == options
    assert set(load_config(base).model.arguments()) == options


def test_a_class_of_ones_own(base, own_model):
    name = own_model(OWN)
    overrides = [f"model={{type: '{name}:Own', vocab_size: 512, ratio: 1, sizes: [3], where: a/b, table: {{k: 1}}}}"]
    model = load_config(base, overrides).model
    made = model.load()(**model.arguments(), rngs=None)
    # The types are those of the signature; what YAML cannot write keeps the class's own default.
    assert repr({k: v for k, v in made.given.items() if k != "where"}) == repr(
        {"vocab_size": 512, "copy": "a", "sizes": (3,), "ratio": 1.0, "table": {"k": 1}, "mode": "fast", "act": print}
        | {"unusual": None, "free": 3}
    )
    assert (str(made.given["where"]), type(made.given["where"]).__module__.split(".")[0]) == ("a/b", "pathlib")
    assert "act" not in model.options


def test_options_are_judged_by_the_signature(problems, own_model):
    name = own_model(OWN)
    found = problems(f"model={{type: '{name}:Own', size: [1], mode: fats, copy: 3, rngs: 1}}")
    assert {"model.size", "model.mode", "model.copy", "model.rngs", "model.vocab_size"} == set(found)
    assert "did you mean sizes?" in found["model.size"].fix
    assert "did you mean fast?" in found["model.mode"].fix
    assert "required" in found["model.vocab_size"].rule


@pytest.mark.parametrize(
    ("type_", "rule", "fix"),
    [
        ("lama", "no model of shardtrain.models", "did you mean llama?"),
        ("no_such_package.x:Y", "no_such_package", "PYTHONPATH"),
        (":Own", "not the name of a module", "package.module:Class"),
        ("{own}:Onw", "no class 'Onw'", "did you mean Own?"),
        ("{own}:Positional", "by position only", "keyword"),
        ("{own}:Keywords", "has only **kwargs", "name them in its signature"),
    ],
)
def test_a_type_that_leads_nowhere(problems, own_model, type_, rule, fix):
    found = problems(f"model.type='{type_.format(own=own_model(OWN))}'")
    assert set(found) == {"model.type"}
    assert rule in found["model.type"].rule
    assert fix in found["model.type"].fix


def test_data_needs_a_vocabulary(problems, own_model):
    name = own_model("class Own:\n    def __init__(self, *, width: int = 3, rngs): ...\n")
    assert "no option vocab_size" in problems(f"model={{type: '{name}:Own'}}")["model.vocab_size"].rule


def test_a_vocabulary_without_an_annotation_is_a_whole_number(problems, own_model):
    name = own_model("class Own:\n    def __init__(self, *, vocab_size, rngs): ...\n")
    problem = problems(f"model={{type: '{name}:Own', vocab_size: many}}")["model.vocab_size"]
    assert problem.rule == "must be a whole number, not 'many'"


def test_wrong_size_options_are_one_problem_of_the_type(problems, own_model):
    name = own_model(
        "class Own:\n    size_options = {'embed': 'widht'}\n    def __init__(self, *, width: int, rngs): ...\n"
    )
    found = problems(f"model={{type: '{name}:Own', width: 8}}")
    assert set(found) == {"model.type"}
    assert "names 'widht' as the size of 'embed'" in found["model.type"].rule
    assert found["model.type"].fix == "did you mean width?"


def test_a_class_without_options_and_a_module_without_classes(problems, own_model):
    name = own_model("class Own:\n    def __init__(self, *, rngs): ...\n")
    found = problems(f"model={{type: '{name}:Own', width: 512}}")
    assert found["model.width"].fix == "there is none to choose from"
    name = own_model("", "own_empty_module")
    assert problems(f"model.type='{name}:Own'")["model.type"].fix == "there is none to choose from"


def test_loading_a_config_does_not_start_jax(base):
    # JAX refuses to change the number of CPU devices once its backend runs.
    program = (
        "import sys, jax; from shardtrain import load_config; load_config(sys.argv[1]).model.load();"
        "jax.config.update('jax_num_cpu_devices', 3); jax.config.update('jax_platforms', 'cpu');"
        "assert len(jax.devices()) == 3"
    )
    done = subprocess.run([sys.executable, "-c", program, str(base)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
