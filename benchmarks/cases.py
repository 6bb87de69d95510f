"""The models of the GPU benchmarks, and a way to reach the library on a machine where it is not installed."""

from __future__ import annotations

import dataclasses
import importlib.util
import sys
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent


@dataclasses.dataclass(frozen=True)
class Shape:
    """Sizes of a Llama; the output head is the embedding table (tied)."""

    n_layers: int
    d_model: int
    n_heads: int
    n_kv_heads: int
    d_ff: int
    vocab_size: int
    rope_theta: float = 500_000.0
    norm_eps: float = 1e-5

    @property
    def head_dim(self) -> int:
        return self.d_model // self.n_heads

    @property
    def layer_matmul(self) -> int:
        """Weights of one layer that are in matrix products."""
        attention = self.d_model * self.head_dim * 2 * (self.n_heads + self.n_kv_heads)
        return attention + 3 * self.d_model * self.d_ff

    @property
    def matmul(self) -> int:
        """Weights that a token meets in matrix products, the output head among them."""
        return self.n_layers * self.layer_matmul + self.d_model * self.vocab_size

    @property
    def params(self) -> int:
        return self.matmul + (2 * self.n_layers + 1) * self.d_model


SHAPES = {
    "125m": Shape(12, 768, 12, 12, 2048, 50304, 10_000.0),  # configs/llama_125m.yaml
    "1b": Shape(16, 2048, 32, 8, 8192, 128256),  # Llama 3.2 1B; configs/llama_1b.yaml
    "3b": Shape(28, 3072, 24, 8, 8192, 128256),  # Llama 3.2 3B
    "tiny": Shape(2, 64, 4, 2, 128, 256, 10_000.0),
}
#: In order of value, so that the least important ones are cut off when the time is up.
CASES = ("1b/4096", "125m/4096", "3b/4096", "1b/8192", "125m/8192", "3b/8192")
#: Both sides train with these.
ADAMW: dict[str, Any] = {"lr": 3e-4, "b1": 0.9, "b2": 0.95, "eps": 1e-8, "weight_decay": 0.1, "clip_norm": 1.0}


def use_checkout() -> None:
    """Make `shardtrain` and `shardtrain.models` those of this checkout, installed or not."""
    sys.path.insert(0, str(ROOT))
    import shardtrain

    shardtrain.__path__.append(str(ROOT))  # models/ is next to shardtrain/ in a checkout


def host_batch(rows: int, seq: int, vocab: int) -> dict[str, np.ndarray]:
    """A random batch as the library takes it, `[rows, seq]` each, without `segment_ids`, as in a run."""
    rng = np.random.default_rng(1)
    return {
        "tokens": rng.integers(0, vocab, (rows, seq), dtype=np.int32),
        "targets": rng.integers(0, vocab, (rows, seq), dtype=np.int32),
        "loss_mask": np.ones((rows, seq), np.float32),
        "positions": np.tile(np.arange(seq, dtype=np.int32), (rows, 1)),
        "row": np.arange(rows, dtype=np.int32),
    }


def value(word: str) -> Any:
    """Interpret a word of the command line: as a number, a truth value, nothing, or the word itself."""
    meanings = {"true": True, "false": False, "none": None}
    return meanings.get(word, int(word) if word.lstrip("-").isdecimal() else word)


def flops_module() -> Any:
    """Import only `shardtrain.metrics.flops`: the rest of its room needs packages that a bare machine lacks."""
    spec = importlib.util.spec_from_file_location("flops", ROOT / "shardtrain" / "metrics" / "flops.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def flops_per_token(shape: Shape, seq: int, *, forward_only: bool = False) -> float:
    """Model FLOPs of one token: no recomputation, causal attention counted once (half of the square)."""
    counted = flops_module().transformer_flops_per_token
    total = counted(shape.matmul, shape.n_layers, shape.n_heads, shape.head_dim, seq)
    return total / 3 if forward_only else total
