"""shardtrain's side of `gpu.py`: a worker that finds its batch, compiles the library's step, and runs it when told."""

from __future__ import annotations

import collections
import re
import shutil
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from cases import ADAMW, SHAPES, Shape, host_batch, use_checkout
from top_operations import table
from workers import largest_batch, serve

use_checkout()

from programs import random_batch
from shardtrain.launch.xla_flags import Preset, compiler_options
from shardtrain.models.llama import Llama
from shardtrain.nn import Precision
from shardtrain.optim import optimizer
from shardtrain.sharding import Partitioner
from shardtrain.sharding.mesh import MeshSpec
from shardtrain.train.model_def import ModelDef
from shardtrain.train.state import abstract_state, init_state
from shardtrain.train.step import make_eval_step, make_train_step
from shardtrain.weights.paths import flatten

#: A compilation that only asks for memory need not time kernels against each other.
PROBE = {"xla_gpu_autotune_level": 0}
ENOUGH = 16_384  # tokens per step: if this many fit, no policy that recomputes more is tried


class JaxWorker:
    """One model at a time on the first device."""

    def hello(self) -> dict[str, Any]:
        """Versions, the device, and the bytes that it lets this process have."""
        device = jax.devices()[0]
        self.place = Partitioner(MeshSpec(data=1).build([device]))
        version = f"jax {jax.__version__}"
        limit = (device.memory_stats() or {}).get("bytes_limit")
        return {"version": version, "device": device.device_kind, "platform": device.platform, "limit": limit}

    def check(self, file: str) -> dict[str, Any]:
        """The loss of a tiny model in float32, whose weights and batch are left in `file` (npz)."""
        model = self._model(SHAPES["tiny"], attention="einsum", compute="float32")
        rng = np.random.default_rng(0)
        noise = {
            name: (weight.role == "norm") + rng.normal(0, 0.15, weight.shape) for name, weight in flat(model).items()
        }
        batch = host_batch(2, 64, SHAPES["tiny"].vocab_size)
        np.savez(file, **{name: a.astype(np.float32) for name, a in noise.items()}, **batch)
        tx = optimizer("sgd", model.weights, lr=0.1)
        state = jax.tree.map(jnp.zeros_like, init_state(model, tx, self.place))
        params = jax.tree.unflatten(jax.tree.structure(state.params), [jnp.float32(noise[n]) for n in flat(model)])
        with jax.default_matmul_precision("highest"):
            sums = make_eval_step(model, self.place)(type(state)(**{**vars(state), "params": params}), batch)
        return {"loss": float(sums["loss"][0] / sums["loss"][1])}

    def build(
        self,
        *,
        size: str,
        seq: int,
        compute: str,
        attention: str,
        remat: list[str],
        loss_chunk: int | str | None,
        matmul: str,
        preset: Preset,
        flags: dict[str, Any],
        max_tokens: int,
        batch: int | None,
        limit: float | None,
        rivals: int,
    ) -> dict[str, Any]:
        """Compile the step at the largest batch that fits, by memory analysis and, where that erred, by trying.

        Args:
          remat: policies, the one that recomputes least first; taken in turn until `ENOUGH` tokens fit.
          preset, flags: XLA's compiler options, as a run takes them: of a preset, and others over it.
          max_tokens: upper limit of a batch. batch: rows, instead of a search.
          limit: bytes to stay under.
          rivals: how many policies to time; if several, at half of a searched batch too. The fastest stays.
        """
        shape, start = SHAPES[size], time.perf_counter()
        self.flags, self.shape, self.seq = compiler_options(preset, flags), shape, seq
        build = partial(self._model, shape, attention=attention, compute=compute, loss_chunk=loss_chunk, matmul=matmul)
        self.tx = optimizer("adamw", build(remat="full").weights, **ADAMW)
        plans, wanted = [], 1 if batch else min(ENOUGH, max_tokens // seq * seq)
        for policy in remat:
            plans.append((policy, self._fitting(build(remat=policy), batch, max_tokens, limit)))
            if len(good := [p for p in plans if p[1] * seq >= wanted]) == rivals:
                break
        searched = time.perf_counter() - start
        self.state = None
        parts = (1, 2) if rivals > 1 and not batch else (1,)
        chosen = good or [max(plans, key=lambda plan: plan[1])]
        sizes = [(policy, rows // part) for policy, rows in chosen for part in parts if rows >= part]
        tried = [self._try(build(remat=policy), policy, rows, limit) for policy, rows in sizes]
        best = min(tried, key=lambda plan: plan["step_s"] / plan["batch"])
        self.step, self.model = best.pop("program"), best.pop("model")
        self.batch = self._batch(best["batch"])
        return {**best, "search_s": searched, "plans": plans, "peak": peak(), "params": shape.params}

    def steps(self, n: int) -> dict[str, Any]:
        """Run `n` steps; seconds for all of them, the last loss, and the peak of memory so far."""
        start = time.perf_counter()
        for _ in range(n):
            self.state, metrics = self.step(self.state, self.batch)
        loss = float(metrics["loss"])
        return {"seconds": time.perf_counter() - start, "loss": loss, "peak": peak()}

    def forward(self, n: int) -> dict[str, Any]:
        """Run the forward pass and the loss alone `n` times."""
        evaluate = make_eval_step(self.model, self.place).lower(self.state, self.batch)
        program = evaluate.compile(self.flags)
        jax.block_until_ready(program(self.state, self.batch))
        start = time.perf_counter()
        for _ in range(n):
            sums = program(self.state, self.batch)
        jax.block_until_ready(sums)
        return {"seconds": time.perf_counter() - start}

    def profile(self, n: int, file: str) -> dict[str, Any]:
        """Trace `n` steps into `file` (trace.json.gz), and say which operations took the time."""
        with tempfile.TemporaryDirectory() as folder:
            with jax.profiler.trace(folder):
                self.steps(n)
            shutil.move(next(Path(folder).rglob("*.trace.json.gz")), file)
        return {"file": file, **table(file, steps=n)}

    def _model(self, shape: Shape, *, compute: str, matmul: str = "compute", **options: Any) -> ModelDef:
        precision = Precision(jnp.float32, jnp.dtype(compute), jnp.float32, matmul)
        return ModelDef(
            lambda rngs: Llama(**vars(shape), tie_embeddings=True, precision=precision, rngs=rngs, **options)
        )

    def _fitting(self, model: ModelDef, batch: int | None, max_tokens: int, limit: float | None) -> int:
        """Rows, a power of two, that the compiler says fit: its memory is a line over the rows."""
        limit = limit or (jax.devices()[0].memory_stats() or {}).get("bytes_limit")
        rows = max(max_tokens // self.seq, 1)
        if batch or limit is None or rows == 1:
            return batch or rows
        one, two = (planned(self._compile(model, b, {**self.flags, **PROBE})) for b in (1, 2))
        return largest_batch(2 * one - two, two - one, 0.95 * limit, rows)

    def _try(self, model: ModelDef, policy: str, rows: int, limit: float | None) -> dict[str, Any]:
        """Compile and run at `rows`, or at half of it while that is too much."""
        while True:
            start = time.perf_counter()
            try:
                program = self._compile(model, rows, self.flags)
                seconds, bytes = time.perf_counter() - start, planned(program)
                if rows > 1 and limit and bytes > limit:
                    raise MemoryError
                if self.state is None:
                    self.state = init_state(model, self.tx, self.place)
                self.step, self.batch = program, self._batch(rows)
                self.steps(2)
                step_s = self.steps(2)["seconds"] / 2
            except (MemoryError, jax.errors.JaxRuntimeError) as error:
                if rows == 1 or not re.search("RESOURCE_EXHAUSTED|^$", str(error)):
                    raise
                rows, self.state, self.step = rows // 2, None, None  # the donated state went down with it
                continue
            calls = collections.Counter(re.findall(r'custom_call_target="([^"]+)"', program.as_text()))
            found = {"remat": policy, "batch": rows, "compile_s": seconds, "planned": bytes, "step_s": step_s}
            return {**found, "calls": dict(calls), "program": program, "model": model}

    def _compile(self, model: ModelDef, rows: int, flags: dict[str, Any]) -> Any:
        shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding), self._batch(rows))
        step = make_train_step(model, self.tx, self.place)
        return step.lower(abstract_state(model, self.tx, self.place), shapes).compile(flags)

    def _batch(self, rows: int) -> dict[str, jax.Array]:
        return random_batch(self.place, rows, self.seq, self.shape.vocab_size)


def flat(model: ModelDef) -> dict[str, Any]:
    """The weights' descriptions by dotted path, in the order of the parameters' leaves."""
    return flatten(model.weights)


def planned(program: Any) -> int:
    """Bytes that a compiled step will hold at once, by the compiler's own count."""
    m = program.memory_analysis()
    held = m.argument_size_in_bytes + m.output_size_in_bytes - m.alias_size_in_bytes
    return held + m.temp_size_in_bytes + m.generated_code_size_in_bytes


def peak() -> int | None:
    return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")


if __name__ == "__main__":
    serve(JaxWorker())
