"""A run that was interrupted is the run that was not: bit for bit on its mesh, to rounding on another."""

import dataclasses
import shutil
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from commands import (
    CONFIG,
    PREPARED,
    assert_same_bits,
    compiled_once,  # noqa: F401
    fit,
    losses,
    metrics,
    saved,
    train,
)
from shardtrain import Callback, UserError, load_config
from shardtrain.checkpoint import read_extra
from shardtrain.run import Trainer

STEPS, ROWS = 12, 8


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """A run of 12 steps with checkpoints after 4, 8 and 12."""
    folder = tmp_path_factory.mktemp("undisturbed")
    run = fit(folder / "run")
    return SimpleNamespace(directory=run.directory, state=jax.device_get(run.state), losses=losses(run.directory))


def test_a_run_that_was_stopped_twice_goes_on_bit_for_bit(undisturbed, tmp_path):
    for stop in (3, 9, None):  # between checkpoints: stopping saves
        run = fit(tmp_path / "run", stop_after=stop)
        assert run.stopped_early == (stop is not None)
    assert run.resumed_from == 9
    assert_same_bits(jax.device_get(run.state), undisturbed.state)
    assert losses(run.directory) == undisturbed.losses
    assert saved(run.directory) == [3, 4, 8, 9, 12]
    data = read_extra(run.directory, STEPS)["data"]
    assert data == read_extra(undisturbed.directory, STEPS)["data"]
    assert data["next_row"] == STEPS * ROWS


def test_what_was_logged_after_the_last_checkpoint_is_logged_once(undisturbed, tmp_path):
    """As a crash leaves it: the checkpoints up to step 8, the metrics up to 12 and half a line."""
    shutil.copytree(undisturbed.directory, tmp_path / "run")
    shutil.rmtree(tmp_path / "run/checkpoints/12")
    (tmp_path / "run/checkpoints/12.manifest.json").unlink()
    with open(tmp_path / "run/metrics.jsonl", "a") as file:
        file.write('{"step": 13, "lo')
    run = fit(tmp_path / "run")
    assert run.resumed_from == 8
    assert losses(run.directory) == undisturbed.losses
    assert_same_bits(jax.device_get(run.state), undisturbed.state)


@pytest.mark.parametrize("asynchronous", ["true", "false"])
def test_no_checkpoint_is_ahead_of_the_log(undisturbed, tmp_path, asynchronous):
    """A run that dies just before it writes the line of step 4 must not find itself to be past it."""

    class Dies(Callback):
        def on_step(self, step, metrics):
            if step == 4:
                raise RuntimeError("died")
            return {}

    option = f"checkpoint.asynchronous={asynchronous}"
    with pytest.raises(RuntimeError, match="died"):
        fit(tmp_path / "run", option, callbacks=[Dies()])
    fit(tmp_path / "run", option, stop_after=6)
    assert losses(tmp_path / "run") == undisturbed.losses[:6]


LAYOUTS = {
    "data x fsdp on half the devices": ("devices.emulate=4", "mesh={data: 2, fsdp: 2}"),
    "tensor, accumulate": ("mesh={data: 2, tensor: 4}", "optimizer.accumulate=2"),
    "accumulate": ("optimizer.accumulate=2",),
    "one device": ("devices.emulate=1", "mesh={data: 1}"),
    "data x fsdp x tensor": ("mesh={data: 2, fsdp: 2, tensor: 2}",),
    "data, accumulate": ("mesh={data: 4, fsdp: 1, tensor: 2}", "optimizer.accumulate=2"),
}
BY_DEFAULT = ("data x fsdp on half the devices", "tensor, accumulate")


@pytest.mark.parametrize(
    "name", [name if name in BY_DEFAULT else pytest.param(name, marks=pytest.mark.full) for name in LAYOUTS]
)
def test_on_another_mesh_it_goes_on_with_the_same_losses(undisturbed, tmp_path, name):
    fit(tmp_path / "run", stop_after=5)
    run = fit(tmp_path / "run", *LAYOUTS[name])
    assert run.resumed_from == 5
    np.testing.assert_allclose(losses(run.directory), undisturbed.losses, rtol=1e-5)


def test_a_finished_run_says_so_and_changes_nothing(undisturbed, tmp_path):
    shutil.copytree(undisturbed.directory, tmp_path / "run")
    (tmp_path / "run/loss.png").unlink()  # as if it had died at the very end
    again = train(tmp_path / "run")
    assert again.code == 0
    assert PREPARED.fullmatch(again.err)
    assert "is finished: 12 of 12 steps" in again.out
    assert saved(tmp_path / "run") == [4, 8, 12]
    assert (tmp_path / "run/metrics.jsonl").read_bytes() == (undisturbed.directory / "metrics.jsonl").read_bytes()
    assert (tmp_path / "run/loss.png").exists()


def test_more_steps_need_the_decay_that_the_run_began_with(undisturbed, tmp_path):
    shutil.copytree(undisturbed.directory, tmp_path / "run")
    more = (tmp_path / "run", f"run.steps={STEPS + 2}")
    refused = train(*more, "optimizer.schedule={type: cosine, warmup_steps: 4}")
    assert refused.code == 2
    assert f"set optimizer.schedule.decay_steps={STEPS} to keep that plan" in refused.err
    result = train(*more)
    assert result.code == 0
    assert PREPARED.fullmatch(result.err)
    assert f"resumed from the checkpoint of step {STEPS}" in result.out
    assert losses(tmp_path / "run")[:STEPS] == undisturbed.losses
    lr = [row["lr"] for row in metrics(tmp_path / "run")]
    np.testing.assert_allclose(lr[STEPS:], [1e-3] * 2, rtol=1e-6)  # the decay has ended


def test_fewer_steps_than_the_run_has_made_are_refused_in_one_line(undisturbed, tmp_path):
    shutil.copytree(undisturbed.directory, tmp_path / "run")
    result = train(tmp_path / "run", "run.steps=11", "optimizer.schedule={type: cosine, warmup_steps: 4}")
    assert result.code == 2
    (line,) = [line for line in result.err.splitlines() if line.startswith("error: ")]
    assert f"run.steps = 11 is below step {STEPS}, which the run in {tmp_path / 'run'} has reached" in line
    assert result.err.splitlines()[-1] == line


def test_a_longer_decay_is_planned_anew_on_demand(undisturbed, tmp_path):
    """From where the old one had ended, to the end of the new one; the steps before are as they were."""
    shutil.copytree(undisturbed.directory, tmp_path / "run")
    more = (tmp_path / "run", "run.steps=16", "optimizer.schedule={type: cosine, warmup_steps: 4}")
    assert "it jumps from 0.001 to 0.00325 at step 12" in train(*more).err
    assert train(*more, "--allow-changes").code == 0
    lr = [row["lr"] for row in metrics(tmp_path / "run")]
    assert lr[STEPS] == pytest.approx(0.00325)
    assert losses(tmp_path / "run")[:STEPS] == undisturbed.losses


def test_a_constant_rate_goes_on_for_more_steps(tmp_path):
    constant = ("optimizer.schedule={type: constant, warmup_steps: 4}", "data.held_out=0")
    whole = fit(tmp_path / "whole", "run.steps=9", *constant)
    fit(tmp_path / "run", "run.steps=6", *constant)
    longer = fit(tmp_path / "run", "run.steps=9", *constant)
    assert longer.resumed_from == 6
    assert losses(longer.directory) == losses(whole.directory)


def test_a_run_that_goes_on_needs_no_init_from(undisturbed, tmp_path):
    shutil.copytree(undisturbed.directory, tmp_path / "other")
    begun = fit(tmp_path / "run", f"init_from={tmp_path / 'other'}", stop_after=2)
    shutil.rmtree(tmp_path / "other")
    assert fit(tmp_path / "run", f"init_from={tmp_path / 'other'}", stop_after=4).resumed_from == 2
    shutil.rmtree(begun.directory / "checkpoints")
    with pytest.raises(UserError, match=r"init_from = .*other\n.*no such directory"):
        fit(tmp_path / "run", f"init_from={tmp_path / 'other'}")


def test_another_seed_is_another_run(undisturbed, tmp_path):
    shutil.copytree(undisturbed.directory, tmp_path / "run")
    with pytest.raises(UserError, match=r"run\.seed = 1\n.*was started with 0"):
        fit(tmp_path / "run", "run.seed=1")
    overrides = [f"run.dir={tmp_path / 'run'}", "run.seed=1"]
    run = Trainer.from_config(load_config(CONFIG, overrides), allow_changes=True)
    run.close()
    assert run.resumed_from == STEPS
    assert run.loop.batches.state["next_row"] == 0  # synthetic tokens of another seed are other data


@pytest.mark.parametrize("step", [None, 8])
def test_init_from_takes_the_weights_and_nothing_else(undisturbed, tmp_path, step):
    source = undisturbed.directory if step is None else undisturbed.directory / f"checkpoints/{step}"
    trained = fit(tmp_path / "trained", stop_after=step).state.params
    overrides = [f"init_from={source}", f"run.dir={tmp_path / 'run'}", "run.seed=1"]
    run = Trainer.from_config(load_config(CONFIG, overrides))
    run.close()
    fresh = run.job.init_state()
    assert_same_bits(run.state.params, trained)
    assert_same_bits(run.state, dataclasses.replace(fresh, params=trained))
    assert (run.step, run.resumed_from, run.loop.batches.state["next_row"]) == (0, None, 0)
    assert saved(run.directory) == []
