"""Rows of one's own: sums to learn, such as `17+25=42`, of which only the result counts in the loss."""

import numpy as np

import shardtrain as st
from shardtrain.models.llama import Llama

SYMBOLS = "0123456789+=."


class Sums:
    """A source: a length, rows by number, a vocabulary, and a fingerprint of everything that the rows depend on."""

    vocab_size = len(SYMBOLS)

    def __init__(self, seq_len: int, digits: int = 2):
        self.seq_len, self.digits = seq_len, digits
        self.fingerprint = f"sums seq_len={seq_len} digits={digits}"

    def __len__(self) -> int:
        return 10_000

    def __getitem__(self, row: int) -> dict[str, np.ndarray]:
        a, b = np.random.default_rng(row).integers(0, 10**self.digits, 2)  # depends on the row's number alone
        question, answer = f"{a}+{b}=", f"{a + b}."
        ids = np.array([SYMBOLS.index(symbol) for symbol in question + answer])
        ids = np.pad(ids, (0, self.seq_len + 1 - len(ids)), constant_values=SYMBOLS.index("."))
        counts = np.zeros(self.seq_len, np.float32)
        counts[len(question) - 1 : len(question) + len(answer) - 1] = 1
        return {
            "tokens": ids[:-1].astype(np.int32),
            "targets": ids[1:].astype(np.int32),
            "loss_mask": counts,
            "positions": np.arange(self.seq_len, dtype=np.int32),
        }


def main(steps: int = 100) -> list[float]:
    devices = st.select_devices("cpu", emulate=8)
    place = st.Partitioner(st.MeshSpec(data=4, tensor=2).build(devices))
    sizes = {"n_layers": 2, "d_model": 64, "n_heads": 4, "d_ff": 128, "vocab_size": 16}
    model = st.ModelDef(lambda rngs: Llama(**sizes, rngs=rngs))
    tx = st.optimizer("adamw", model.weights, lr=3e-3)
    state, step = st.init_state(model, tx, place), st.make_train_step(model, tx, place)
    losses = []
    with st.Loader(Sums(seq_len=16), global_batch=32, seed=0, sharding=place.sharding(("batch", "seq"))) as batches:
        for _ in range(steps):
            state, metrics = step(state, next(batches))
            losses.append(float(metrics["loss"]))
    print(f"loss of the results {losses[0]:.3f} -> {losses[-1]:.3f}")
    return losses


if __name__ == "__main__":
    main()
