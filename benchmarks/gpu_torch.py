"""PyTorch's side of `gpu.py`: a worker that finds its batch, compiles the model, and runs its step when told.

`torch.compile`, fused attention, fused AdamW, bfloat16 autocast over float32 weights. Needs torch and numpy only.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from cases import ADAMW, SHAPES
from torch_llama import Llama
from workers import largest_batch, serve

ENOUGH = 16_384  # tokens a step, as in gpu_jax.py
BACKENDS = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}


class TorchWorker:
    """One model at a time on the first GPU, or on the CPU."""

    def hello(self, share: float) -> dict[str, Any]:
        """Versions, the device, and the bytes that it lets this process have: `share` of the whole."""
        self.cuda, self.limit = torch.cuda.is_available(), None
        self.device = torch.device("cuda" if self.cuda else "cpu")
        name = "cpu"
        if self.cuda:
            torch.cuda.set_per_process_memory_fraction(share)
            name, self.limit = torch.cuda.get_device_name(), share * torch.cuda.mem_get_info()[1]
        return {"version": f"torch {torch.__version__}", "device": name, "limit": self.limit}

    def check(self, file: str) -> dict[str, Any]:
        """The float32 loss of the tiny model whose weights and batch the library left in `file`."""
        with np.load(file) as found:
            arrays = dict(found)
        batch = {k: torch.from_numpy(arrays[k]).long().to(self.device) for k in ("tokens", "targets")}
        model = Llama(SHAPES["tiny"], batch["tokens"].shape[1])
        model.load_jax(arrays)
        with torch.no_grad():
            return {"loss": float(model.to(self.device)(**batch))}

    def build(
        self,
        *,
        size: str,
        seq: int,
        compute: str,
        compile: str,
        attention: str,
        remat: str,
        max_tokens: int,
        batch: int | None,
    ) -> dict[str, Any]:
        """Make the model and its step at the largest batch that fits, measured at one and two rows and then tried.

        Args:
          compile: `model` as a whole, `block` by block (and the loss), or `none`.
          attention: `flash`, `cudnn`, or `auto` for the faster one here.
          remat: `none`, `full` (checkpointed blocks), or `auto`: full where too little fits otherwise.
        """
        self.shape, self.seq, self.compile, self.compute = SHAPES[size], seq, compile, compute
        self.attention = self._faster_attention() if attention == "auto" and self.cuda else attention
        if self.attention in BACKENDS:  # for good: what a backward pass computes again is outside of any `with`
            for name in ("flash", "cudnn", "mem_efficient", "math"):
                getattr(torch.backends.cuda, f"enable_{name}_sdp")(name == self.attention)
        rows = max(max_tokens // seq, 1)
        wanted = min(ENOUGH, rows * seq)
        start = time.perf_counter()
        for self.remat in (False, True) if remat == "auto" else (remat == "full",):
            fits = batch or self._fitting(rows)
            if fits * seq >= wanted or batch:
                break
        searched = time.perf_counter() - start
        while True:
            try:
                self._start(fits)
                start = time.perf_counter()
                self.steps(1)
                first = time.perf_counter() - start
                self.steps(1)
                step_s = self.steps(2)["seconds"] / 2
                break
            except torch.OutOfMemoryError:
                if fits == 1:
                    raise
                fits //= 2
        found = {"batch": fits, "remat": "full" if self.remat else "none", "attention": self.attention}
        times = {"compile_s": first - step_s, "search_s": searched, "step_s": step_s}
        return {**found, **times, "peak": self._peak(), "params": sum(p.numel() for p in self.model.parameters())}

    def steps(self, n: int) -> dict[str, Any]:
        """Run `n` steps; seconds for all of them, the last loss, and the peak of memory so far."""
        start = time.perf_counter()
        for _ in range(n):
            with self._autocast():
                loss = self.run(*self.batch)
            loss.backward()
            nn.utils.clip_grad_norm_(self.model.parameters(), ADAMW["clip_norm"], foreach=True)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        value = float(loss.detach())
        return {"seconds": time.perf_counter() - start, "loss": value, "peak": self._peak()}

    def forward(self, n: int) -> dict[str, Any]:
        """Run the forward pass and the loss alone `n` times."""
        with torch.no_grad(), self._autocast():
            float(self.run(*self.batch))  # compiled anew without gradients
            start = time.perf_counter()
            for _ in range(n):
                loss = self.run(*self.batch)
            float(loss)
        return {"seconds": time.perf_counter() - start}

    def _start(self, rows: int) -> None:
        self.model = self.optimizer = self.run = self.batch = None  # type: ignore[assignment]
        gc.collect()
        torch.compiler.reset()
        if self.cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        torch.manual_seed(0)
        with self.device:
            self.model = Llama(self.shape, self.seq, remat=self.remat)
        matrices = [p for p in self.model.parameters() if p.ndim > 1]
        vectors = [p for p in self.model.parameters() if p.ndim == 1]
        groups = [
            {"params": matrices, "weight_decay": ADAMW["weight_decay"]},
            {"params": vectors, "weight_decay": 0.0},
        ]
        betas = (ADAMW["b1"], ADAMW["b2"])
        self.optimizer = torch.optim.AdamW(groups, lr=ADAMW["lr"], betas=betas, eps=ADAMW["eps"], fused=True)
        self.run: Callable[..., Tensor] = self.model
        if self.compile == "model":
            self.run = torch.compile(self.model, dynamic=False)
        elif self.compile == "block":
            for block in self.model.blocks:
                block.compile(dynamic=False)
            self.model.loss = torch.compile(self.model.loss, dynamic=False)  # type: ignore[method-assign]
        tokens = torch.randint(self.shape.vocab_size, (2, rows, self.seq), device=self.device)
        self.batch = (tokens[0], tokens[1])

    def _fitting(self, rows: int) -> int:
        """Rows, a power of two, by the peaks of one and two rows: memory is a line over the rows."""
        if self.limit is None or rows == 1:
            return rows
        peaks = []
        for few in (1, 2):
            try:
                self._start(few)
                self.steps(2)
            except torch.OutOfMemoryError:
                return 1
            peaks.append(self._peak())
        one, two = peaks
        return largest_batch(2 * one - two, two - one, 0.95 * self.limit, rows)

    def _peak(self) -> int | None:
        return torch.cuda.max_memory_allocated() if self.cuda else None

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, getattr(torch, self.compute), enabled=self.compute != "float32")

    def _faster_attention(self) -> str:
        """The fused kernel that runs forward and backward sooner at this shape."""
        H, G, K = self.shape.n_heads, self.shape.n_kv_heads, self.shape.head_dim
        best, name = float("inf"), "auto"
        for backend, kernel in BACKENDS.items():
            q, k, v = (
                torch.randn(2, self.seq, heads, K, device="cuda", dtype=torch.bfloat16, requires_grad=True)
                for heads in (H, G, G)
            )
            try:
                for turn in range(6):
                    if turn == 2:
                        torch.cuda.synchronize()
                        start = time.perf_counter()
                    with sdpa_kernel(kernel):
                        y = F.scaled_dot_product_attention(
                            *(a.transpose(1, 2) for a in (q, k, v)), is_causal=True, enable_gqa=H != G
                        )
                    y.sum().backward()
                torch.cuda.synchronize()
            except RuntimeError:
                continue  # not for this shape here
            if (seconds := time.perf_counter() - start) < best:
                best, name = seconds, backend
        return name


if __name__ == "__main__":
    serve(TorchWorker())
