"""XLA's flags: what is asked for reaches the compiler, and what would have no effect is refused."""

import subprocess
import sys
from types import SimpleNamespace

import jax
import pytest

import tiny
from commands import CONFIG
from shardtrain import UserError, build, load_config
from shardtrain.config import ConfigError
from shardtrain.launch.xla_flags import GPU_DEFAULT, _known, compiler_options, set_environment
from shardtrain.optim import optimizer
from shardtrain.train.state import abstract_state
from shardtrain.train.step import make_eval_step, make_train_step


def test_options_reach_the_compilation_of_both_steps(tmp_path):
    place, model = tiny.partitioner(), tiny.llama(n_layers=1)
    tx = optimizer("sgd", model.weights, lr=0.1)
    state, batch = abstract_state(model, tx, place), tiny.batch(place)
    for name, make in {
        "train": lambda **options: make_train_step(model, tx, place, **options),
        "eval": lambda **options: make_eval_step(model, place, **options),
    }.items():
        folder = tmp_path / name
        make(compiler_options={"xla_dump_to": str(folder)}).lower(state, batch).compile()
        assert list(folder.glob("*jit_step*")), name


def test_a_config_s_options_are_those_of_its_job():
    config = load_config(CONFIG, ["xla.preset=auto", "xla.options.xla_cpu_enable_fast_math=true"])
    assert build(config).compiler_options == {"xla_cpu_enable_fast_math": True}
    assert load_config(CONFIG, ["xla=null"]).xla == load_config(CONFIG).xla


def test_the_gpu_preset_is_for_nvidia_s():
    amd = SimpleNamespace(platform="gpu", compute_capability="gfx942")
    assert compiler_options("auto", device=amd) == {}
    with pytest.raises(UserError, match="gpu-default is for NVIDIA GPUs, and the devices are gpu"):
        compiler_options("gpu-default", device=amd)


def test_a_job_takes_the_devices_that_it_is_given():
    """Not those of the config, which this machine need not have: compile-only devices are of another platform."""
    config = load_config(CONFIG, ["devices={platform: cuda}", "mesh={fsdp: 2}", "xla.environment.no_such_flag=1"])
    job = build(config, devices=jax.devices()[5:7])
    assert list(job.partitioner.mesh.devices.flat) == jax.devices()[5:7]
    assert {leaf.sharding.mesh for leaf in jax.tree.leaves(job.abstract_state())} == {job.partitioner.mesh}
    with pytest.raises(ConfigError, match=r"number of devices, 3 \(found\)"):
        build(config, devices=jax.devices()[:3])


def test_this_xla_knows_every_line_of_the_gpu_preset():
    """XLA takes the options of every backend on each, so that this needs no GPU."""
    known = _known(GPU_DEFAULT, jax.devices()[0])
    assert len(known) == len(GPU_DEFAULT)
    assert {flag for flag, _ in known.items()} <= {flag for line in GPU_DEFAULT for flag, _ in line.spellings}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"xla_cpu_enable_fast_mth": True}, ["xla_cpu_enable_fast_mth", "no such flag", "xla_cpu_enable_fast_math?"]),
        ({"--xla_cpu_enable_fast_math": True}, ["no such flag", "did you mean xla_cpu_enable_fast_math?"]),
        ({"xla_cpu_enable_fast_math": "much"}, ["'much'", "not a valid bool"]),
        ({"xla_gpu_enable_triton_gemm": True}, ["is for GPUs", "do nothing on cpu"]),
        ({"xla_force_host_platform_device_count": 8}, ["only when JAX starts", "devices.emulate"]),
    ],
)
def test_an_option_without_effect_is_refused(options, words):
    with pytest.raises(UserError) as error:
        compiler_options(options=options)
    for word in ["xla.options.", *words]:
        assert word in str(error.value)


def test_the_gpu_preset_needs_a_gpu():
    with pytest.raises(
        UserError, match=r"gpu-default is for NVIDIA GPUs, and the devices are cpu; use xla.preset=auto"
    ):
        compiler_options("gpu-default")
    with pytest.raises(ConfigError, match=r"xla.preset = gpu-default"):
        load_config(CONFIG, ["xla.preset=gpu-default"])
    assert compiler_options("auto") == {}


def test_the_environment_is_read_only_when_jax_starts(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--xla_cpu_enable_fast_math=true")
    set_environment({"xla_cpu_enable_fast_math": True})  # as it was when JAX started
    with pytest.raises(UserError, match=r"too late: JAX has started.*XLA_FLAGS=\"--xla_dump_to=/x\""):
        set_environment({"xla_dump_to": "/x"})


ENVIRONMENT = """
import jax
from shardtrain import UserError
from shardtrain.launch.xla_flags import set_environment

set_environment({"xla_force_host_platform_device_count": 3})
try:
    set_environment({"xla_cpu_enable_fast_mth": True})
except UserError as error:
    print(error)
print(len(jax.devices()))
"""


def test_a_flag_of_the_environment_takes_effect_and_an_unknown_one_ends_no_process():
    code = [sys.executable, "-c", ENVIRONMENT]
    run = subprocess.run(code, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    refusal, devices = run.stdout.splitlines()
    assert refusal.endswith("did you mean xla_cpu_enable_fast_math?")
    assert devices == "3"
