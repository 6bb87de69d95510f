"""Schedules named by an import path: in code, in a config and on the command line."""

import pytest

from commands import CONFIG, shardtrain
from shardtrain import UserError, build, load_config
from shardtrain.config import ConfigError
from shardtrain.pipeline.schedules import make, register, registered

MODULE = """
import numpy as np
from shardtrain.pipeline.schedules import Schedule, make, ring, tabulate

def mine(ranks, microbatches, chunks):
    r, c, m = np.ogrid[:ranks, :chunks, :microbatches]
    return tabulate("mine", ring(ranks, chunks), {"F": m + r + c, "B": m + 2 * (ranks - 1) - r + c})

def lists(ranks, microbatches, chunks):
    good = make("1f1b", ranks, microbatches)
    placement = list(map(list, good.placement))
    return Schedule("lists", ranks, microbatches, 1, list(good.phases), placement, good.table.tolist())

def table(ranks, microbatches, chunks): return mine(ranks, microbatches, chunks).table
def smaller(ranks, microbatches, chunks): return mine(ranks, microbatches - 1, chunks)
def early(ranks, microbatches, chunks):
    good = mine(ranks, microbatches, chunks)
    return Schedule("early", ranks, microbatches, chunks, good.phases, good.placement, good.table[::-1])
def at_once(ranks, microbatches, chunks):
    return tabulate("at_once", ring(ranks), {phase: np.zeros((ranks, 1, microbatches), int) for phase in "FB"})
def flat(ranks, microbatches, chunks): return tabulate("flat", ring(ranks), {"F": np.arange(4), "B": np.arange(4)})
def halves(ranks, microbatches, chunks):
    return tabulate("halves", ring(ranks), {phase: np.arange(4.0).reshape(2, 1, 2) / 2 for phase in "FB"})
def two(ranks, microbatches): return mine(ranks, microbatches, 1)
def faulty(ranks, microbatches, chunks): return {}[ranks]
"""


@pytest.fixture(autouse=True)
def module(tmp_path, monkeypatch):
    (tmp_path / "own_schedules.py").write_text(MODULE)
    monkeypatch.syspath_prepend(str(tmp_path))


@pytest.mark.parametrize("name", ["mine", "lists"])
def test_a_function_makes_the_schedule(name):
    assert (make(f"own_schedules:{name}", 2, 4).table == make("1f1b", 2, 4).table).all()
    assert not [each for each in registered if ":" in each]


def test_a_config_names_it():
    config = load_config(
        CONFIG, ["mesh={pipe: 2, fsdp: 4}", "pipeline={schedule: 'own_schedules:mine', microbatches: 2}"]
    )
    assert build(config).model.execution.program.schedule.name == "mine"


def test_the_command_line_draws_it():
    result = shardtrain("schedule", "own_schedules:mine", "--ranks", 2, "--microbatches", 4)
    assert result.code == 0
    assert "mine" in result.out
    compared = shardtrain("schedule", "own_schedules:mine", "--compare", "--ranks", 2, "--microbatches", 4)
    assert compared.code == 0
    assert "mine" in compared.out
    assert "1f1b" in compared.out


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("no_such_module:mine", "importing module 'no_such_module' fails"),
        ("own_schedules:mien", "module own_schedules has no function 'mien'; did you mean mine?"),
        (":mine", "'' is not the name of a module; write package.module:function"),
        ("own_schedules:two", r"cannot be called with \(ranks, microbatches, chunks\): too many positional arguments"),
        ("own_schedules:table", "returned ndarray .* it must return a Schedule"),
        ("own_schedules:smaller", "is for microbatches 1, not 2; ask for microbatches 1"),
        ("own_schedules:early", "schedule early"),
        ("own_schedules:at_once", "schedule at_once has two F on a rank in one tick"),
        ("own_schedules:flat", r"schedule flat has ticks of the shapes .*give each phase one of \[ranks, chunks"),
        ("own_schedules:halves", "ticks of F that are not integers"),
    ],
)
def test_what_is_no_schedule_is_refused_in_code_and_config(path, message):
    with pytest.raises(UserError, match=f"(?s){message}"):
        make(path, 2, 2)
    with pytest.raises(ConfigError, match=f"(?s)pipeline.schedule = {path}.*{message.replace('; ', '.*')}"):
        load_config(CONFIG, ["mesh={pipe: 2, data: 4}", f"pipeline={{schedule: '{path}', microbatches: 2}}"])


def test_an_error_of_ones_own_function_says_which_setting_names_it():
    with pytest.raises(KeyError) as raised:
        make("own_schedules:faulty", 2, 2)
    assert raised.value.__notes__[0].startswith("pipeline.schedule = own_schedules:faulty: this error comes from there")


def test_an_import_path_is_no_name_to_register():
    with pytest.raises(UserError, match="is taken, or that of a CSV file or an import path"):
        register("own_schedules:mine")
