"""FLOPs and bytes of a training step, class by class, counted from its shapes.

Every operand is read once and every result written once. Attention is counted as a fused causal kernel does it: half of
the square of scores, which never reach memory, and are made again in the backward pass.
"""

from __future__ import annotations

import dataclasses

from cases import Shape

#: Forward passes of a block's matmuls, attention and elementwise operations that a remat policy adds.
AGAIN = {"none": (0, 0, 0), "dots": (0, 1, 1), "full": (1, 1, 1)}


@dataclasses.dataclass(frozen=True)
class Work:
    """FLOPs and bytes through memory."""

    flops: float
    bytes: float

    def __add__(self, other: Work) -> Work:
        return Work(self.flops + other.flops, self.bytes + other.bytes)

    def __mul__(self, times: float) -> Work:
        return Work(self.flops * times, self.bytes * times)


def product(tokens: int, inputs: int, outputs: int, c: int) -> tuple[Work, Work]:
    """A weight's matmul, forward and backward, `c` bytes per activation; the float32 weight is cast at each use."""
    flops, ends, w = 2.0 * tokens * inputs * outputs, c * tokens * (inputs + outputs), inputs * outputs
    cast, read = (4 + c) * w, c * w
    return Work(flops, ends + read + cast), Work(2 * flops, 2 * ends + read + cast + 4 * w)


def counted(shape: Shape, batch: int, seq: int, remat: str, c: int = 2, chunks: int = 1) -> dict[str, Work]:
    """The work of one step, class by class; the loss in `chunks`, whose logits are made again in the backward pass."""
    T, D, F = batch * seq, shape.d_model, shape.d_ff
    Q, KV = shape.n_heads * shape.head_dim, shape.n_kv_heads * shape.head_dim
    matmuls, attentions, elementwise = AGAIN[remat]
    fwd = bwd = Work(0, 0)
    for inputs, outputs in ((D, Q), (D, KV), (D, KV), (Q, D), (D, F), (D, F), (F, D)):
        forward, backward = product(T, inputs, outputs, c)
        fwd, bwd = fwd + forward, bwd + backward
    pairs = T * (seq + 1) / 2
    attend_fwd = Work(4 * Q * pairs, c * T * 2 * (Q + KV))
    attend_bwd = Work(10 * Q * pairs, c * T * 4 * (Q + KV))  # the scores are made again: five products for two
    # Two norms, two additions, the rotation of q and k, silu(gate) * up; then the same backward.
    other_fwd = Work(T * (14 * D + 4 * (Q + KV) + 5 * F), c * T * (10 * D + 2 * (Q + KV) + 3 * F))
    other_bwd = Work(T * (26 * D + 4 * (Q + KV) + 10 * F), c * T * (12 * D + 2 * (Q + KV) + 5 * F))
    lookup = Work(T * D, c * T * 3 * D + 8 * T * D + 4 * shape.vocab_size * D)
    head_fwd, head_bwd = product(T, D, shape.vocab_size, c)
    table = D * shape.vocab_size
    again = Work(head_fwd.flops, c * (T * (D + shape.vocab_size) + table)) * (chunks > 1)
    # Each further chunk reads the weight three times, and adds to its float32 gradient.
    chunked = again + Work(table, (3 * c + 8) * table) * (chunks - 1)
    softmax = Work(12 * T * shape.vocab_size, c * T * shape.vocab_size * 3)  # read; read and written backward
    return {
        "matmul": (fwd * (1 + matmuls) + bwd) * shape.n_layers,
        "attention": (attend_fwd * (1 + attentions) + attend_bwd) * shape.n_layers,
        "norms, elementwise": (other_fwd * (1 + elementwise) + other_bwd) * shape.n_layers + lookup,
        "loss": head_fwd + head_bwd + chunked + softmax,
        "optimizer": Work(20.0 * shape.params, 32.0 * shape.params),  # the norm reads g; then g p m v in, p m v out
    }


def square(shape: Shape, batch: int, seq: int, c: int = 2) -> dict[str, Work]:
    """The same without remat or chunks, and with all scores of attention computed and kept, the masked ones too."""
    pairs = 4.0 * shape.n_heads * shape.head_dim * batch * seq * seq
    whole = Work(3 * pairs * shape.n_layers, 0)
    return {**counted(shape, batch, seq, "none", c), "attention": whole}
