"""Pipelined runs from the outside: the same losses, and checkpoints that fit every layout."""

import numpy as np
import pytest

from commands import compiled_once, fit, losses, pair, saved, start  # noqa: F401
from shardtrain.cli.summary import summary

LAYERS = "model.n_layers=4"
#: Of one run, one after the other: none, four ranks, two ranks with two chunks each and weights gathered once a step.
LAYOUTS = [
    (4, ["mesh={fsdp: 4, tensor: 2}"]),
    (8, ["mesh={pipe: 4, data: 2}", "pipeline={schedule: 1f1b, microbatches: 4}"]),
    (
        12,
        [
            "mesh={pipe: 2, fsdp: 2, tensor: 2}",
            "pipeline={schedule: interleaved, microbatches: 2, chunks: 2, gather: step}",
        ],
    ),
]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    return losses(fit(tmp_path_factory.mktemp("unpipelined") / "run", LAYERS).directory)


def test_a_run_moves_between_pipeline_layouts(undisturbed, tmp_path):
    for steps, overrides in LAYOUTS:
        run = fit(tmp_path / "run", LAYERS, f"run.steps={steps}", *overrides)
    assert run.resumed_from == 8
    assert any(line.startswith("gather: step, for 0.") for line in summary(run.job, run.directory, run.resumed_from))
    np.testing.assert_allclose(losses(run.directory), undisturbed, rtol=1e-5)


def test_weights_of_an_unpipelined_run_start_a_pipelined_one(tmp_path):
    old = fit(tmp_path / "old", LAYERS, "run.steps=4")
    new = fit(tmp_path / "new", LAYERS, "run.steps=1", f"init_from={old.directory}", *LAYOUTS[1][1])
    assert losses(new.directory)[0] == pytest.approx(losses(fit_on(old.directory, tmp_path))[0], rel=1e-5)


def fit_on(directory, tmp_path):
    return fit(tmp_path / "plain", LAYERS, "run.steps=1", f"init_from={directory}").directory


@pytest.mark.full
@pytest.mark.parametrize("idle", ["compute", "skip"])
def test_two_processes_with_pipe_outermost_train_as_one(idle, undisturbed, tmp_path):
    """Each process holds two of four ranks; both load the same rows."""
    directory = tmp_path / "run"
    with start(*pair(directory, LAYERS, *LAYOUTS[1][1], f"pipeline.idle={idle}"), folder=tmp_path) as processes:
        assert [process.end() for process in processes] == [0, 0], [process.output for process in processes]
        assert "pipeline: 1f1b, 4 ranks" in processes[0].output
    np.testing.assert_allclose(losses(directory), undisturbed, rtol=1e-5)
    assert saved(directory) == [4, 8, 12]
