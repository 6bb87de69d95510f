"""What a pipeline keeps and sends, by the compiler's own account: nothing here runs."""

from functools import cache

import jax
import jax.numpy as jnp
import pytest

import roll
import tiny
from shardtrain.hlo import collectives
from shardtrain.hlo.text import leaves, parse
from shardtrain.models.llama import Llama
from shardtrain.nn import Precision
from shardtrain.optim import optimizer
from shardtrain.pipeline import schedules
from shardtrain.train.model_def import ModelDef
from shardtrain.train.state import abstract_state
from shardtrain.train.step import make_train_step

RANKS = 4
#: Stage inputs of 4 MiB beside weights of 10 MB a rank; and of 8 KiB beside weights of 8 MB.
ACTIVATIONS = {"n_layers": 4, "d_model": 2048, "d_ff": 256, "head_dim": 32, "rows": 4, "length": 128}
PARAMETERS = {"n_layers": 8, "d_model": 256, "d_ff": 1024, "rows": 1, "length": 8}
#: By schedule, in the shape of many parameters.
CHUNKS = {"1f1b": 1, "gpipe": 1, "interleaved": 2, "zb_h1": 1, "zb_v": 2}


@cache
def compiled(schedule: str, microbatches: int, many: str, chunks: int = 1, idle: str = "compute"):
    """A training step for microbatches of a fixed size; `roll` is the pipeline by vmap and roll."""
    sizes = {**tiny.SIZES, "remat": "none", **(ACTIVATIONS if many == "activations" else PARAMETERS)}
    shape = sizes.pop("rows") * microbatches, sizes.pop("length")
    table = schedules.make("1f1b" if schedule == "roll" else schedule, RANKS, microbatches, chunks)
    precision = Precision(*[jnp.float32] * 3)
    model = ModelDef(lambda rngs: Llama(**sizes, precision=precision, rngs=rngs), schedule=table, idle=idle)
    place, tx = tiny.partitioner(pipe=RANKS), optimizer("sgd", model.weights, lr=0.1)
    step = (roll.make_step if schedule == "roll" else make_train_step)(model, tx, place)
    layout = [place.sharding(("batch",)), place.sharding(("batch", "seq"))]
    batch = {
        name: jax.ShapeDtypeStruct(shape[: a.ndim], a.dtype, sharding=layout[a.ndim - 1])
        for name, a in tiny.batch().items()
    }
    return step.lower(abstract_state(model, tx, place), batch).compile()


def temporaries(*args, **options) -> int:
    """Bytes that the program allocates on each rank beside its arguments and results."""
    return compiled(*args, **options).memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("idle", [pytest.param("compute", marks=pytest.mark.full), "skip"])
def test_memory_of_1f1b_does_not_grow_with_the_microbatches(idle):
    few, many = (temporaries("1f1b", microbatches, "activations", idle=idle) for microbatches in (8, 64))
    assert abs(many - few) <= 0.01 * few


@pytest.mark.full
def test_a_vmap_and_roll_pipeline_needs_five_times_as_much():
    assert temporaries("roll", 64, "activations") >= 5 * temporaries("1f1b", 64, "activations")


@pytest.mark.full
@pytest.mark.parametrize("schedule", ["zb_h1", "gpipe", "interleaved", "zb_v"])
def test_where_weights_dominate_no_schedule_needs_much_more_than_1f1b(schedule):
    chunks = CHUNKS[schedule]
    assert temporaries(schedule, 8, "parameters", chunks) <= 1.5 * temporaries("1f1b", 8, "parameters", 1)


@pytest.mark.parametrize(
    ("schedule", "saved"),
    # Stage inputs that the published time and placement imply (see each schedule's file).
    [
        ("1f1b", 2 * RANKS - 1),
        ("gpipe", 8),
        pytest.param("interleaved", 3 * RANKS - 1, marks=pytest.mark.full),
        pytest.param("zb_h1", 2 * RANKS - 1, marks=pytest.mark.full),
    ],
)
def test_the_compiled_loops_carry_as_many_stage_inputs_as_simulated(schedule, saved):
    chunks = CHUNKS[schedule]
    program = parse(compiled(schedule, 8, "parameters", chunks).as_text())
    x = (PARAMETERS["rows"], PARAMETERS["length"], PARAMETERS["d_model"])
    loops = [op for op in program.computations[program.entry].values() if op.opcode == "while"]
    carried = {a.shape[0] for loop in loops for a in leaves(loop.type) if a.shape[1:] == x}
    simulated = schedules.simulate(schedules.make(schedule, RANKS, 8, chunks)).saved_inputs
    assert max(simulated) == saved
    assert max(carried) == saved + 1  # and one slot for what nobody reads


@pytest.mark.parametrize(
    "schedule", ["1f1b", *(pytest.param(s, marks=pytest.mark.full) for s in CHUNKS if s != "1f1b")]
)
def test_no_message_goes_round_in_a_circle(schedule):
    """Permutes with cycles have been miscompiled on GPUs (openxla/xla#45222)."""
    text = compiled(schedule, 8, "parameters", CHUNKS[schedule]).as_text()
    moves = [c for c in collectives(text, tiny.partitioner(pipe=RANKS).mesh) if c.kind == "collective-permute"]
    assert moves
    for move in moves:
        to = dict(move.groups)
        for rank in to:
            for _ in range(len(to) + 1):
                rank = to.get(rank)
            assert rank is None, move
    wraps = [move for move in moves if move.groups in (((RANKS - 1, 0),), ((0, RANKS - 1),))]
    assert bool(wraps) == (schedule == "interleaved")
