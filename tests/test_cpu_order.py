"""Every program on several CPU devices is compiled so that all start their collectives in one order."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from shardtrain import cpu_order

MEMORY = "xla_cpu_scheduler_type=CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"


def fresh(code: str, flags: str = "") -> list[str]:
    """What a new Python process prints, and logs, with these XLA flags."""
    env = {**os.environ, "XLA_FLAGS": flags}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, env=env)
    assert done.returncode == 0, done.stderr
    return [*done.stdout.splitlines(), *done.stderr.splitlines()]


def test_selecting_devices_orders_all_programs_of_the_process():
    code = "import os, shardtrain as st; st.select_devices(emulate=2); print(os.environ['XLA_FLAGS'])"
    assert fresh(code) == [f"--{MEMORY}"]
    assert fresh(code, "--xla_cpu_enable_fast_math=false") == [f"--xla_cpu_enable_fast_math=false --{MEMORY}"]


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
    assert warning.startswith("JAX started before shardtrain chose the order of collectives on its 2 CPU devices")
    assert f"XLA_FLAGS=--{MEMORY}" in warning


def test_one_device_and_a_process_that_is_in_order_need_no_options(monkeypatch):
    import jax

    assert cpu_order.ordered(jax.devices()) == {}  # this process selected its devices
    monkeypatch.setenv("XLA_FLAGS", "")
    assert cpu_order.ordered(jax.devices()[:1]) == {}
    assert cpu_order.ordered(jax.devices()) != {}


@pytest.mark.full
@pytest.mark.parametrize("case", [0, 9, 16])  # an MLP that hung in two starts of three, a pipeline, two processes
def test_no_start_hangs(case):
    soak = Path(__file__).parent.parent / "benchmarks" / "soak.py"
    done = subprocess.run(
        [sys.executable, soak, "--starts", "4", "--case", str(case)],
        capture_output=True,
        text=True,
        env={**os.environ, "XLA_FLAGS": ""},
        check=False,
    )
    assert done.returncode == 0, done.stdout
    assert "4 starts, 0 hung, 0 wrong" in done.stdout
