"""A loss of one's own, with metrics, for a plain Flax module whose weights name their axes: a regression."""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import shardtrain as st
from shardtrain import nn


class Regressor(nnx.Module):
    """An MLP from 8 numbers to one; Flax's own annotations name the logical axes."""

    def __init__(self, hidden: int, rngs: nnx.Rngs):
        init = nnx.initializers.lecun_normal()
        into = nnx.with_partitioning(init, (None, "mlp"))
        out = nnx.with_partitioning(init, ("mlp", None))
        self.into = nnx.Linear(8, hidden, kernel_init=into, use_bias=False, rngs=rngs)
        self.out = nnx.Linear(hidden, 1, kernel_init=out, use_bias=False, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.out(nnx.gelu(self.into(x)))[:, 0]


class Points:
    """Points `x` with values `y`, of which some are missing."""

    fingerprint, vocab_size = "points 1", 1

    def __len__(self) -> int:
        return 2048

    def __getitem__(self, row: int) -> dict[str, np.ndarray]:
        rng = np.random.default_rng(row)
        x = rng.normal(size=8).astype(np.float32)
        return {"x": x, "y": np.float32(x[0] * x[1]), "known": np.float32(rng.random() < 0.8)}


def huber(module: nnx.Module, batch: nn.Batch, ctx: nn.Context) -> nn.Loss:
    """Sums, never means: the step divides once, by the weight of the global batch."""
    error = module(batch["x"]) - batch["y"]
    known, size = batch["known"], jnp.abs(error)
    each = jnp.where(size < 1, 0.5 * error**2, size - 0.5)
    metrics = {
        "mean_error": ((size * known).sum(), known.sum()),
        "share_known": (known.sum(), jnp.float32(len(known))),
    }
    return (each * known).sum(), known.sum(), metrics


def main(steps: int = 60) -> list[float]:
    devices = st.select_devices("cpu", emulate=8)
    place = st.Partitioner(st.MeshSpec(data=2, tensor=4).build(devices))
    model = st.ModelDef(lambda rngs: Regressor(64, rngs))
    tx = st.optimizer("adamw", model.weights, lr=1e-2)
    state = st.init_state(model, tx, place)
    step = st.make_train_step(model, tx, place, loss=huber, accumulate=2)
    losses = []
    with st.Loader(Points(), global_batch=64, seed=0, sharding=place.sharding(("batch",))) as batches:
        for _ in range(steps):
            state, metrics = step(state, next(batches))
            losses.append(float(metrics["loss"]))
    print({name: round(float(value), 4) for name, value in metrics.items()})
    return losses


if __name__ == "__main__":
    main()
