"""The same Llama in PyTorch, as its users write it for speed.

Shapes: B batch, S sequence, D model dim, H query heads, G key/value heads, K head dim, V vocabulary.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from cases import Shape


class RMSNorm(nn.Module):
    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(dim)), eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), self.weight.shape, self.weight, self.eps).to(x.dtype)


def rotate(x_BSHK: Tensor, cos_SK: Tensor, sin_SK: Tensor) -> Tensor:
    a, b = x_BSHK.float().chunk(2, -1)
    cos, sin = cos_SK[:, None], sin_SK[:, None]
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1).to(x_BSHK.dtype)


class Block(nn.Module):
    def __init__(self, shape: Shape):
        super().__init__()
        D, H, G, K = shape.d_model, shape.n_heads, shape.n_kv_heads, shape.head_dim
        self.head_dim, self.grouped = K, H != G
        self.attention_norm, self.mlp_norm = RMSNorm(D, shape.norm_eps), RMSNorm(D, shape.norm_eps)
        self.query, self.out = nn.Linear(D, H * K, bias=False), nn.Linear(H * K, D, bias=False)
        self.key, self.value = nn.Linear(D, G * K, bias=False), nn.Linear(D, G * K, bias=False)
        self.gate, self.up = nn.Linear(D, shape.d_ff, bias=False), nn.Linear(D, shape.d_ff, bias=False)
        self.down = nn.Linear(shape.d_ff, D, bias=False)

    def forward(self, x: Tensor, cos_SK: Tensor, sin_SK: Tensor) -> Tensor:
        h = self.attention_norm(x)
        q, k, v = (proj(h).unflatten(-1, (-1, self.head_dim)) for proj in (self.query, self.key, self.value))
        q, k = rotate(q, cos_SK, sin_SK), rotate(k, cos_SK, sin_SK)
        q, k, v = (a.transpose(1, 2) for a in (q, k, v))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.grouped)
        x = x + self.out(y.transpose(1, 2).flatten(2))
        h = self.mlp_norm(x)
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


class Llama(nn.Module):
    """Decoder with a tied head; `forward` gives the mean next-token cross entropy."""

    def __init__(self, shape: Shape, seq: int, *, remat: bool = False):
        super().__init__()
        self.remat = remat
        self.embedding = nn.Embedding(shape.vocab_size, shape.d_model)
        self.blocks = nn.ModuleList(Block(shape) for _ in range(shape.n_layers))
        self.norm = RMSNorm(shape.d_model, shape.norm_eps)
        pairs = torch.arange(0, shape.head_dim, 2, dtype=torch.float64)
        angle = torch.arange(seq)[:, None] * shape.rope_theta ** (-pairs / shape.head_dim)
        self.register_buffer("cos", angle.cos().float(), persistent=False)
        self.register_buffer("sin", angle.sin().float(), persistent=False)
        nn.init.normal_(self.embedding.weight, std=shape.d_model**-0.5)

    def forward(self, tokens: Tensor, targets: Tensor) -> Tensor:
        x = self.embedding(tokens)
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))  # residuals in bfloat16, as the library has them
        for block in self.blocks:
            x = (
                checkpoint(block, x, self.cos, self.sin, use_reentrant=False)
                if self.remat
                else block(x, self.cos, self.sin)
            )
        return self.loss(x, targets)

    def loss(self, x: Tensor, targets: Tensor) -> Tensor:
        logits = F.linear(self.norm(x), self.embedding.weight)
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())

    def load_jax(self, weights: dict[str, np.ndarray]) -> None:
        """Take the library's parameters, by their dotted paths."""
        layers = {k.removeprefix("blocks.layer."): v for k, v in weights.items() if k.startswith("blocks.layer.")}
        state = {"embedding.weight": weights["embedding.weight"], "norm.weight": weights["norm.scale"]}
        for name, stack in layers.items():
            owner, *_, leaf = name.split(".")
            for i, w in enumerate(stack):
                if leaf == "scale":
                    state[f"blocks.{i}.{owner}.weight"] = w
                else:  # [in..., out...] there, [out, in] here
                    module = name.split(".")[1]
                    rows = w.shape[0] * w.shape[1] if module == "out" else w.shape[0]
                    state[f"blocks.{i}.{module}.weight"] = w.reshape(rows, -1).T
        self.load_state_dict({k: torch.from_numpy(np.ascontiguousarray(v)) for k, v in state.items()})
