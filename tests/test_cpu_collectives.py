"""Programs on several CPU devices do not wait for each other for ever."""

import os
import socket
import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from test_parity import MESHES as PARITY

import tiny
from shardtrain.hlo import in_flight
from shardtrain.launch import cpu_collectives
from shardtrain.launch.cpu_collectives import THREADS
from shardtrain.models.llama import Llama
from shardtrain.optim import optimizer
from shardtrain.pipeline import schedules
from shardtrain.train.model_def import ModelDef
from shardtrain.train.next_token import NextToken
from shardtrain.train.state import abstract_state
from shardtrain.train.step import make_eval_step, make_train_step

MEMORY = "xla_cpu_scheduler_type=CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"


#: This process has chosen, for itself and its children.
UNCHOSEN = {name: value for name, value in os.environ.items() if "PJRT_NPROC" not in name} | {"XLA_FLAGS": ""}


def fresh(code: str, flags: str = "") -> list[str]:
    """What a new Python process prints, and logs, with these XLA flags."""
    env = {**UNCHOSEN, "XLA_FLAGS": flags}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, env=env)
    assert done.returncode == 0, done.stderr
    return [*done.stdout.splitlines(), *done.stderr.splitlines()]


def test_selecting_devices_orders_all_programs_of_the_process():
    code = "import os, shardtrain as st; st.select_devices(emulate=2); print(os.environ['XLA_FLAGS'])"
    assert fresh(code) == [f"--{MEMORY}"]
    assert fresh(code, "--xla_cpu_enable_fast_math=false") == [f"--xla_cpu_enable_fast_math=false --{MEMORY}"]


def threads(select: str, **env: str) -> int:
    """Threads of XLA's pool in a process that does so."""
    code = f"""
import glob, shardtrain as st, jax
{select}
jax.devices()
print(sum(open(name).read().strip().endswith("XLAEigen") for name in glob.glob("/proc/self/task/*/comm")))
"""
    return int(subprocess.check_output([sys.executable, "-c", code], env={**UNCHOSEN, **env}, timeout=60))


def test_the_pool_has_threads_for_all_that_the_devices_can_wait_for():
    assert threads("st.select_devices(emulate=8)") == 8 * THREADS
    assert threads("st.select_devices('cpu')", XLA_FLAGS="--xla_force_host_platform_device_count=3") == 3 * THREADS
    assert threads("st.select_devices(emulate=4)", PJRT_NPROC="5") == 5  # the user's choice
    assert threads("st.select_devices('cpu')") < THREADS  # a single device waits for nobody


def test_a_child_with_more_devices_has_threads_of_its_own():
    parent = """
import subprocess, sys, shardtrain as st
st.select_devices(emulate=2)
child = "import os, shardtrain as st; st.select_devices(emulate=8); print(os.environ['PJRT_NPROC'])"
subprocess.run([sys.executable, "-c", child], check=True)
"""
    assert fresh(parent) == [str(8 * THREADS)]


def test_a_process_of_several_has_them_with_one_device_too():
    join = "jax.distributed.initialize('127.0.0.1:{}', 1, 0); st.select_devices('cpu')"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    assert threads(join.format(port)) == max(os.cpu_count() or 1, THREADS)


QUICK = {"data x fsdp x tensor accumulate", "zb_h1 without tensor"}
MESHES = {name: mesh for name, mesh in PARITY.items() if mesh} | {
    "fsdp x context x tensor": {"fsdp": 2, "context": 2, "tensor": 2}
}
SCHEDULES = {"gpipe": 1, "1f1b": 1, "interleaved": 2, "zb_h1": 1, "zb_v": 2}


def cases():
    """Every mesh, plain and with accumulation; every schedule on meshes of its own."""
    for name, mesh in MESHES.items():
        yield name, mesh, {}
        yield f"{name} accumulate", mesh, {"accumulate": 2}
    for name, chunks in SCHEDULES.items():
        yield name, {"pipe": 2, "fsdp": 2, "tensor": 2}, {"schedule": (name, 2, 4, chunks)}
        yield f"{name} without tensor", {"pipe": 2, "fsdp": 2}, {"schedule": (name, 2, 4, chunks)}
        yield f"{name} on four ranks", {"pipe": 4, "data": 2}, {"schedule": (name, 4, 8, chunks)}
        yield f"{name} x context", {"pipe": 2, "context": 2, "tensor": 2}, {"schedule": (name, 2, 4, chunks)}
    for name in ("1f1b", "interleaved"):
        yield f"{name} save", {"pipe": 2, "fsdp": 2}, {"schedule": (name, 2, 4, SCHEDULES[name]), "backward": "save"}


@pytest.mark.parametrize(
    ("mesh", "options"),
    [pytest.param(*case, id=name, marks=() if name in QUICK else pytest.mark.full) for name, *case in cases()],
)
def test_no_program_can_take_all_threads_of_the_pool(mesh, options):
    """Of training, evaluation and generation: by what the compiler made of them."""
    place = tiny.partitioner(**mesh)
    table = schedules.make(*options["schedule"]) if "schedule" in options else None
    sizes = {**tiny.SIZES, "n_layers": 8}
    model = ModelDef(lambda rngs: Llama(**sizes, rngs=rngs), schedule=table, backward=options.get("backward", "remat"))
    tx = optimizer("adamw", model.weights, lr=0.1, clip_norm=1.0)
    state, batch = abstract_state(model, tx, place), tiny.batch(place, rows=32)
    ids = [jax.ShapeDtypeStruct((place.shards("batch"), *dims), jnp.int32) for dims in ((), (16,))]
    weights, text = (state.params, state.model_state), NextToken(model, place)
    _, kept = jax.eval_shape(partial(text.read, keep=True), *weights, *ids[::-1])
    programs = {
        "read": text.read.lower(*weights, *ids[::-1], keep=True),
        "next token": text.step.lower(*weights, kept, ids[0], ids[0]),
        "train": make_train_step(model, tx, place, accumulate=options.get("accumulate", 1)).lower(state, batch),
        "evaluate": make_eval_step(model, place).lower(state, batch),
    }
    found = {name: in_flight(program.compile().as_text()) for name, program in programs.items()}
    assert 1 <= max(found.values()) <= THREADS, found


@pytest.mark.parametrize(
    "chosen",
    [
        "--xla_cpu_scheduler_type=CPU_SCHEDULER_TYPE_CONCURRENCY_OPTIMIZED",
        "--xla_cpu_enable_concurrency_optimized_scheduler=true",
    ],
)
def test_a_scheduler_that_the_user_chose_stays(chosen):
    code = "import os, shardtrain as st; st.select_devices(emulate=2); print(os.environ['XLA_FLAGS'])"
    assert fresh(code, chosen) == [chosen]


LATE = """
import jax
jax.config.update("jax_num_cpu_devices", 2)
jax.devices()
import shardtrain as st, optax
from shardtrain.models.mlp import MLP
model = st.ModelDef(lambda rngs: MLP(n_layers=1, d_model=8, d_ff=8, vocab_size=8, rngs=rngs))
place = st.Partitioner(st.MeshSpec(data=2).build())
st.MeshSpec(data=2).build()
tx = optax.sgd(0.1)
made = jax.jit
jax.jit = lambda f, **options: (print(f.__name__, options.get("compiler_options")), made(f, **options))[1]
st.init_state(model, tx, place)
st.make_train_step(model, tx, place)
st.make_eval_step(model, place)
"""


def test_where_jax_has_started_the_librarys_programs_are_ordered_and_the_user_is_told():
    name, value = MEMORY.split("=")
    *jitted, warning = fresh(LATE)
    assert jitted == [f"{step} {{'{name}': '{value}'}}" for step in ("init", "step", "step")]
    assert warning.startswith("JAX started before shardtrain could prepare it for the collectives of 2 CPU devices")
    assert f"PJRT_NPROC={2 * THREADS} XLA_FLAGS=--{MEMORY}" in warning


def test_one_device_and_a_process_that_is_in_order_need_no_options(monkeypatch):
    assert cpu_collectives.ordered(jax.devices()) == {}  # this process selected its devices
    monkeypatch.setenv("XLA_FLAGS", "")
    assert cpu_collectives.ordered(jax.devices()[:1]) == {}
    assert cpu_collectives.ordered(jax.devices()) != {}


@pytest.mark.full
@pytest.mark.parametrize(
    "case",
    [
        "data 2 fsdp 2, mlp",
        "pipe 2 fsdp 2 tensor 2, llama, 1f1b",
        "pipe 2 fsdp 2, llama, zb_v",
        "data 2 fsdp 2, mlp, 2 processes",
    ],
)
def test_no_start_hangs(case):
    soak = Path(__file__).parent.parent / "benchmarks" / "soak.py"
    done = subprocess.run(
        [sys.executable, soak, "--starts", "4", "--case", case],
        capture_output=True,
        text=True,
        env=UNCHOSEN,
        check=False,
    )
    assert done.returncode == 0, done.stdout
    assert "4 starts, 0 hung, 0 wrong" in done.stdout
