"""A moving average of the weights, kept beside them and evaluated in their place.

python examples/ema.py    # prints the held-out loss of the last weights and of their average
"""

import itertools

import shardtrain as st
from shardtrain.data import SyntheticTokens, split
from shardtrain.models.mlp import MLP


def main(steps: int = 60) -> list[float]:
    """Train for some steps, and return the loss of each."""
    devices = st.select_devices("cpu", emulate=8)
    place = st.Partitioner(st.MeshSpec(fsdp=4, tensor=2).build(devices))
    model = st.ModelDef(lambda rngs: MLP(n_layers=2, d_model=32, d_ff=64, vocab_size=64, rngs=rngs))
    tx = st.optimizer("adamw", model.weights, lr=0.02, clip_norm=1.0)

    state = st.start_ema(model, st.init_state(model, tx, place))  # the average is sharded like the weights
    train_step = st.make_train_step(model, tx, place, ema=0.9)
    eval_step = st.make_eval_step(model, place)

    rows, held_out = split(SyntheticTokens(seq_len=16, vocab_size=64, seed=0), 0.05)
    batches = {"global_batch": 16, "seed": 0, "sharding": place.sharding(("batch", "seq"))}
    losses = []
    with st.Loader(rows, **batches) as loader:
        for batch in itertools.islice(loader, steps):
            state, metrics = train_step(state, batch)
            losses.append(float(metrics["loss"]))

    for name, weights in {"last weights": state, "their average": st.averaged(model, state)}.items():
        with st.Loader(held_out, shuffle=False, epochs=1, **batches) as loader:
            loss = st.evaluate(eval_step, weights, itertools.islice(loader, 16))["loss"]
        print(f"{name:14} {loss:.4f}")
    return losses


if __name__ == "__main__":
    main()
