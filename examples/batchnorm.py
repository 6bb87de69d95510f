"""A plain Flax classifier of images with BatchNorm and Dropout, split over eight devices along the batch.

It names no logical axes: `replicate_unannotated` keeps its weights whole on every device. The statistics of BatchNorm
are those of the global batch; the step carries them along, and checkpoints store them.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

import shardtrain as st
from shardtrain import nn


class Classifier(nnx.Module):
    """Two convolutions and a linear layer."""

    replicate_unannotated = True

    def __init__(self, classes: int, rngs: nnx.Rngs):
        self.first = nnx.Conv(1, 8, (3, 3), use_bias=False, rngs=rngs)
        self.norm = nnx.BatchNorm(8, momentum=0.9, rngs=rngs)
        self.second = nnx.Conv(8, 16, (3, 3), strides=2, rngs=rngs)
        self.dropout = nnx.Dropout(0.1, rngs=rngs)
        self.out = nnx.Linear(16, classes, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        x = nnx.relu(self.norm(self.first(images)))
        x = nnx.relu(self.second(x)).mean((1, 2))
        return self.out(self.dropout(x))


class Stripes:
    """Images of stripes, horizontal (class 0) or vertical (class 1), under noise."""

    fingerprint, vocab_size = "stripes 1", 2

    def __len__(self) -> int:
        return 4096

    def __getitem__(self, row: int) -> dict[str, np.ndarray]:
        noise = np.random.default_rng(row).normal(0, 0.5, (8, 8, 1))
        label = row % 2
        stripes = np.indices((8, 8))[label] % 2
        return {"image": (stripes[..., None] + noise).astype(np.float32), "label": np.int32(label)}


def loss(module: nnx.Module, batch: nn.Batch, ctx: nn.Context) -> nn.Loss:
    """Sum of the cross entropies, number of images, and how many of them are right."""
    logits = module(batch["image"])
    each = -jnp.take_along_axis(jax.nn.log_softmax(logits), batch["label"][:, None], 1)
    images = jnp.float32(len(each))
    right = (logits.argmax(-1) == batch["label"]).sum(dtype=jnp.float32)
    return each.sum(), images, {"accuracy": (right, images)}


def main(steps: int = 40) -> list[float]:
    devices = st.select_devices("cpu", emulate=8)
    place = st.Partitioner(st.MeshSpec(data=8).build(devices))
    model = st.ModelDef(lambda rngs: Classifier(2, rngs))
    tx = st.optimizer("adamw", model.weights, lr=1e-2)
    state = st.init_state(model, tx, place)
    step = st.make_train_step(model, tx, place, loss=loss)
    eval_step = st.make_eval_step(model, place, loss=loss)
    losses = []
    with st.Loader(Stripes(), global_batch=64, seed=0, sharding=place.sharding(("batch",))) as batches:
        for _ in range(steps):
            state, metrics = step(state, next(batches))
            losses.append(float(metrics["loss"]))
        held_out = st.evaluate(eval_step, state, [next(batches)])  # by the statistics of training, without dropout
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}, held-out accuracy {held_out['accuracy']:.0%}")
    print("statistics of BatchNorm:", jax.tree.map(lambda a: a.shape, state.model_state["norm"]))
    return losses


if __name__ == "__main__":
    main()
