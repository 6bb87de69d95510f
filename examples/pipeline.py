"""A pipeline computes the loss and the gradients of the same model without one, whatever the schedule."""

import jax
import numpy as np

import shardtrain as st
from shardtrain.models.mlp import MLP
from shardtrain.pipeline import schedules

SIZES = {"n_layers": 8, "d_model": 32, "d_ff": 64, "vocab_size": 64}
SCHEDULES = {"gpipe": 1, "1f1b": 1, "interleaved": 2, "zb_h1": 1, "zb_v": 2}  # and the chunks on each rank


def train(place: st.Partitioner, schedule: schedules.Schedule | None, steps: int) -> tuple[list[float], dict]:
    """Losses and final weights, in the layout of a checkpoint."""
    model = st.ModelDef(lambda rngs: MLP(**SIZES, rngs=rngs), schedule=schedule)
    tx = st.optimizer("sgd", model.weights, lr=0.1)
    state, step = st.init_state(model, tx, place), st.make_train_step(model, tx, place)
    source, _ = st.open_source("synthetic", seq_len=16, vocab_size=64)
    losses = []
    with st.Loader(source, global_batch=8, seed=0, sharding=place.sharding(("batch", "seq"))) as batches:
        for _ in range(steps):
            state, metrics = step(state, next(batches))
            losses.append(float(metrics["loss"]))
    return losses, jax.device_get(model.canonical(state.params))


def main(steps: int = 5, names: tuple[str, ...] = tuple(SCHEDULES)) -> list[float]:
    devices = st.select_devices("cpu", emulate=8)
    alone, weights = train(st.Partitioner(st.MeshSpec().build(devices[:1])), None, steps)
    place = st.Partitioner(st.MeshSpec(pipe=4, data=2).build(devices))
    print(f"{'one device':12} {alone[-1]:.6f}")
    for name in names:
        losses, piped = train(place, schedules.make(name, 4, 4, SCHEDULES[name]), steps)
        print(f"{name:12} {losses[-1]:.6f}")
        np.testing.assert_allclose(losses, alone, rtol=1e-5)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), piped, weights)
    return alone


if __name__ == "__main__":
    main()
