"""Any valid schedule trains, not just those that somebody published: random tables on random placements."""

from functools import cache

import hypothesis
import jax
import numpy as np
import pytest
from hypothesis import strategies as st

import tiny
from shardtrain.models.llama import Llama
from shardtrain.optim import optimizer
from shardtrain.pipeline.schedules import Schedule
from shardtrain.pipeline.schedules.check import check
from shardtrain.pipeline.schedules.schedule import PHASES, Action, Pipeline, needs
from shardtrain.train.model_def import ModelDef
from shardtrain.train.state import init_state
from shardtrain.train.step import make_train_step

RANKS, LAYERS, STEPS = 2, 4, 20
#: That a schedule is seen is what counts; to make it smaller would compile a hundred more.
SETTINGS = hypothesis.settings(
    deadline=None,
    database=None,
    derandomize=True,
    phases=[hypothesis.Phase.generate],
    suppress_health_check=list(hypothesis.HealthCheck),
)


@st.composite
def schedules(draw: st.DrawFn) -> Schedule:
    """A valid table: in each tick each rank does some action that is ready, or idles although it need not."""
    chunks, microbatches = draw(st.integers(1, 2)), draw(st.sampled_from([2, 4]))
    homes = draw(st.permutations(sorted([*range(RANKS)] * chunks)))
    placement = tuple((rank, homes[:stage].count(rank)) for stage, rank in enumerate(homes))
    pipeline = Pipeline("random", RANKS, microbatches, chunks, draw(st.sampled_from(PHASES)), placement)
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    left = {
        (rank, Action(phase, chunk, m))
        for rank in range(RANKS)
        for phase in pipeline.phases
        for chunk in range(chunks)
        for m in range(microbatches)
    }
    done: dict[tuple[str, int, int], int] = {}
    rows = []
    while left:
        row = np.full((RANKS, len(pipeline.phases)), -1)
        for index, phase in enumerate(pipeline.phases):
            for rank in range(RANKS):
                stage_of = pipeline.stage_RC[rank]

                def ready(action: Action, rank: int = rank, own: np.ndarray = stage_of) -> bool:
                    """What another stage sends arrives a tick later; what the own stage made is there at once."""
                    return all(
                        done.get((needed, stage, m), len(rows)) + (stage != own[action.chunk]) <= len(rows)
                        and (needed, stage, m) in done
                        for needed, stage, m in needs(pipeline, rank, action)
                    )

                could = sorted(a for r, a in left if r == rank and a.phase == phase and ready(a))
                if could and rng.random() < 0.8:
                    action = could[rng.integers(len(could))]
                    left.remove((rank, action))
                    done[phase, int(stage_of[action.chunk]), action.microbatch] = len(rows)
                    row[rank, index] = action.chunk * microbatches + action.microbatch
        rows.append(row)
    schedule = Schedule("random", RANKS, microbatches, chunks, pipeline.phases, placement, np.stack(rows))
    check(schedule)
    return schedule


def losses(mesh: dict[str, int], schedule: Schedule | None) -> list[float]:
    """Those of some steps on changing batches."""
    place = tiny.partitioner(**mesh)
    sizes = {**tiny.SIZES, "n_layers": LAYERS}
    model = ModelDef(lambda rngs: Llama(**sizes, dropout=0.1, rngs=rngs), schedule=schedule)
    tx = optimizer("adamw", model.weights, lr=3e-3, clip_norm=1.0)
    state, step = init_state(model, tx, place, seed=1), make_train_step(model, tx, place, seed=5)
    found = []
    for i in range(STEPS):
        state, metrics = step(state, tiny.batch(place, seed=i % 3))
        found.append(float(jax.block_until_ready(metrics)["loss"]))
    return found


@cache
def single_device() -> list[float]:
    return losses({}, None)


@hypothesis.given(schedules())
@hypothesis.settings(SETTINGS, max_examples=100)
def test_the_generator_makes_valid_tables(schedule):
    assert schedule.ticks >= schedule.microbatches * schedule.chunks


@pytest.mark.full
@pytest.mark.parametrize("axis", ["fsdp", "tensor", "context"])
@hypothesis.given(schedule=schedules())
@hypothesis.settings(SETTINGS, max_examples=10)
def test_twenty_steps_of_a_random_schedule_follow_one_device(axis, schedule):
    np.testing.assert_allclose(losses({"pipe": RANKS, axis: 2}, schedule), single_device(), atol=2e-4)
