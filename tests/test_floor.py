"""No overhead, by the compiler's own counts: the library's step beside a hand-written one (`benchmarks/floor.py`).

The same gates at the benchmark's shape are printed by `benchmarks/overhead.py`, with step times.
"""

import glob
import re

import jax
import jax.numpy as jnp
import optax
import pytest

import programs
import tiny
from shardtrain.errors import UserError
from shardtrain.hlo.text import parse
from shardtrain.models.llama import Llama
from shardtrain.nn import Precision
from shardtrain.optim import optimizer
from shardtrain.sharding import use
from shardtrain.train.gradients import Gradients
from shardtrain.train.model_def import ModelDef
from shardtrain.train.state import abstract_state, init_state
from shardtrain.train.step import make_train_step

QUICK = ("fsdp=4,tensor=2",)


@pytest.mark.parametrize(
    "mesh", [pytest.param(m, marks=() if m in QUICK else pytest.mark.full) for m in programs.MESHES]
)
def test_the_compiled_step_costs_no_more_than_a_hand_written_one(mesh):
    ours, theirs, batch = programs.pair(programs.TINY, mesh, 16, 32)
    ours_counts, theirs_counts = programs.counts(ours), programs.counts(theirs)
    assert not programs.failures(ours_counts, theirs_counts), (ours_counts, theirs_counts)
    # The state is updated in place, every leaf of it; XLA copies no moment to do so.
    memory = ours.program.memory_analysis()
    held = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(ours.state))
    assert memory.alias_size_in_bytes == held
    loss = float(ours.program(ours.state, batch)[1]["loss"])
    assert loss == pytest.approx(float(theirs.program(*theirs.state, batch)[2]), abs=1e-5)


def lowered(remat: str = "full", **mesh: int):
    """A step that computes in bfloat16, before it is compiled."""
    precision = Precision(jnp.float32, jnp.bfloat16, jnp.float32)
    place = tiny.partitioner(**mesh)
    model = ModelDef(lambda rngs: Llama(**tiny.SIZES, remat=remat, precision=precision, rngs=rngs))
    tx = optimizer("adamw", model.weights, lr=1e-3)
    return make_train_step(model, tx, place).lower(abstract_state(model, tx, place), tiny.batch(place))


def test_weights_and_activations_travel_in_the_compute_dtype(tmp_path):
    """Read off the program just after XLA partitioned it: the CPU backend itself widens bfloat16 later."""
    dump = {"xla_dump_to": str(tmp_path), "xla_dump_hlo_pass_re": "spmd-partitioning", "xla_dump_hlo_as_text": True}
    lowered(fsdp=4, tensor=2).compile(compiler_options=dump)
    (path,) = glob.glob(f"{tmp_path}/*after_spmd-partitioning*")
    with open(path) as file:
        sent = re.findall(r"= (\w+)\[([\d,]*)\]\S* (all-gather|all-reduce|reduce-scatter)\(", file.read())
    gathered = [dtype for dtype, _, kind in sent if kind == "all-gather"]
    # Per layer 7 weights forward and 7 backward, one gather for the backward pass and what it rematerialises; 2 beside.
    # The inputs of both blocks, these again in the backward pass, and the gradients of both outputs; 2 beside.
    assert gathered == ["bf16"] * ((2 * 7 + 2) + (2 + 2 + 2 + 2))
    rows = tiny.ROWS // 4
    whole = f"{rows},{tiny.LENGTH},{tiny.SIZES['d_model']}"
    activations = [dtype for dtype, shape, kind in sent if shape == whole and kind != "all-gather"]
    # The embedding; per layer two blocks forward, one of them again, and the gradient of both inputs; the head's input.
    assert activations == ["bf16"] * 7


@pytest.mark.parametrize("remat", ["full", pytest.param("none", marks=pytest.mark.full)])
def test_rotary_tables_are_made_once_per_step(remat):
    module = parse(lowered(remat).compile().as_text())
    looped: list[str] = []
    total = 0

    def walk(name: str, loops: int) -> None:
        nonlocal total
        for op in module.computations[name].values():
            if op.opcode in ("cosine", "sine"):
                total += 1
                looped.extend([op.line] * bool(loops))
            for callee in op.called():
                walk(callee, loops + (op.opcode == "while"))

    walk(module.entry, 0)
    assert total
    assert not looped


def gradients(rules: dict[str, list[str]], **mesh: int):
    place = tiny.partitioner(rules, **mesh)
    model = tiny.llama(n_kv_heads=4)
    state = init_state(model, optax.sgd(0.1), place)

    @jax.jit
    def run(state, batch):
        with use(place):
            return Gradients(model, place)(state, batch, jax.random.key(0))[0]

    program = run.lower(state, tiny.batch(place)).compile()
    return jax.device_get(program(state, tiny.batch(place))), program.memory_analysis().temp_size_in_bytes


def test_residuals_split_over_tensor_are_smaller_and_change_nothing():
    want, whole = gradients({"seq_residual": "context"}, tensor=4, fsdp=2)
    got, split = gradients({}, tensor=4, fsdp=2)
    assert tiny.relative_error(got, want) < 1e-5
    assert split < 0.9 * whole


def test_residuals_that_do_not_divide_are_refused():
    with pytest.raises(UserError, match=r"'seq_residual'\) has size 16, which mesh axis tensor 3 does not divide"):
        gradients({"seq_residual": "tensor", "heads": None, "kv_heads": None, "mlp": None, "vocab": None}, tensor=3)
