"""The GPU's benchmarks, which nothing but a GPU would otherwise run: at a tiny size, and what they count."""

import argparse
import gzip
import json
import math
import subprocess
import sys
from pathlib import Path

import jax
import pytest

import float8_curve
import gpu
import programs
import roofline
import top_operations
from cases import SHAPES, flops_per_token
from isolated import Bench
from shardtrain.config import load_config
from shardtrain.config.frozen import thaw
from shardtrain.models.llama import Llama
from shardtrain.optim import optimizer
from shardtrain.train.model_def import ModelDef
from shardtrain.train.state import abstract_state
from shardtrain.train.step import make_train_step
from shardtrain.weights.paths import flatten
from work import counted, square
from workers import Worker, WorkerError, largest_batch

BENCHMARKS = Path(gpu.__file__).parent

BARE = """
import importlib.metadata as metadata, re, sys

def needs(name, seen):
    name = re.sub("[-_.]+", "-", name).lower()
    if name not in seen:
        seen.add(name)
        for requirement in metadata.requires(name) or []:
            if "extra ==" not in requirement:
                try:
                    needs(re.match("[A-Za-z0-9._-]+", requirement)[0], seen)
                except metadata.PackageNotFoundError:
                    pass
    return seen

allowed = set().union(*(needs(name, set()) for name in ("jax", "flax", "optax", "numpy")))
blocked = {
    package for package, owners in metadata.packages_distributions().items()
    if not {re.sub("[-_.]+", "-", owner).lower() for owner in owners} & allowed
} - {"shardtrain"}
assert {"pydantic", "grain", "tensorboardX", "typer"} <= blocked, blocked

class Bare:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name.split(".")[0] in blocked:
            raise ImportError(f"{name} is not on a bare machine")

sys.meta_path = [Bare, *(f for f in sys.meta_path if "editable" not in repr(f))]
import gpu, gpu_jax, roofline, float8_curve, remat, shardtrain.models
from pathlib import Path
for module in (shardtrain, shardtrain.models):
    assert Path(module.__file__).is_relative_to(Path(gpu.__file__).parents[1]), module
"""


def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *argv: str) -> dict[str, list[dict]]:
    """What `gpu.py --tiny` wrote, by kind."""
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    gpu.main(["--tiny", "--out", str(tmp_path), *argv])
    found: dict[str, list[dict]] = {}
    for line in (tmp_path / "gpu.jsonl").read_text().splitlines():
        record = json.loads(line)
        found.setdefault(record["kind"], []).append(record)
    return found


def test_they_import_with_jax_flax_optax_and_numpy_only():
    bare = subprocess.run([sys.executable, "-c", BARE], cwd=BENCHMARKS, text=True, capture_output=True, check=False)
    assert bare.returncode == 0, bare.stderr[-2000:]


@pytest.mark.full
def test_a_tiny_run_finds_its_batch_and_survives_a_contestant_that_fails(tmp_path, monkeypatch, capsys):
    options = "--no-torch --attention einsum --remat full --loss-chunk 16 --turns 2 --profile --flags gpu-default"
    options += " --limit-gib 0.006 --max-tokens 4096"
    found = run(tmp_path, monkeypatch, *options.split(), "--flags", "")
    assert "gpu-default is for NVIDIA GPUs, and the devices are cpu" in found["failed"][0]["error"]
    [built], [result], [profile] = found["built"], found["result"], found["profile"]
    assert built["name"] == result["name"] == "shardtrain default"
    assert "remat full, loss chunk 16, compiled" in capsys.readouterr().out
    assert built["params"] == SHAPES["tiny"].params
    assert 1 < built["batch"] < 4096 / 64  # the limit decided
    assert built["planned"] < 0.006 * 2**30
    assert len(found["turn"]) == result["turns"] == 2
    assert 0 < result["fastest_s"] <= result["step_s"] <= result["slowest_s"]
    assert result["loss"] == pytest.approx(math.log(256), abs=0.2)
    per_token = flops_per_token(SHAPES["tiny"], 64)
    assert result["model_flops_per_s"] == pytest.approx(built["batch"] * 64 * per_token / result["step_s"])
    assert result["mfu"] is found["forward"][0]["mfu"] is None  # no peak is known of a CPU, and none is made up
    assert profile["operations"]
    assert Path(profile["file"]).exists()


def test_the_loss_is_that_of_pytorch(tmp_path, monkeypatch):
    pytest.importorskip("torch", reason="PyTorch is not installed, and the library does not need it")
    found = run(tmp_path, monkeypatch, "--torch-compile", "none", "--turns", "2")
    ours, theirs = found["check"]
    assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
    assert [r["name"] for r in found["result"]] == ["shardtrain", "torch"]
    assert found["built"][0]["params"] == found["built"][1]["params"]
    assert [r["name"] for r in found["turn"]] == ["shardtrain", "torch", "torch", "shardtrain"]
    speeds = [result["tokens_per_s"] for result in found["result"]]
    assert found["ratio"][0]["ratio"] == pytest.approx(speeds[0] / speeds[1])


@pytest.mark.full
def test_pytorch_compiles_its_blocks_and_checkpoints_them(tmp_path, monkeypatch):
    pytest.importorskip("torch", reason="PyTorch is not installed, and the library does not need it")
    found = run(tmp_path, monkeypatch, "--torch-remat", "full", "--torch-compile", "block", "--turns", "2")
    assert "failed" not in found
    ours, theirs = found["result"]
    assert found["built"][1]["remat"] == "full"
    assert theirs["loss"] == pytest.approx(ours["loss"], abs=0.3)  # near log(256) both, from weights of their own


@pytest.mark.full
def test_pytorch_recomputes_with_the_attention_that_was_chosen():
    torch = pytest.importorskip("torch", reason="PyTorch is not installed, and the library does not need it")
    from gpu_torch import TorchWorker

    worker = TorchWorker()
    worker.hello(0.5)
    options = {"size": "tiny", "seq": 64, "compute": "bfloat16", "remat": "full", "max_tokens": 128, "batch": None}
    kernels = ("flash", "cudnn", "mem_efficient", "math")
    before = {name: getattr(torch.backends.cuda, f"{name}_sdp_enabled")() for name in kernels}
    try:
        worker.build(**options, compile="none", attention="flash")
        with torch.profiler.profile() as profile:
            worker.steps(1)
        enabled = [name for name in kernels if getattr(torch.backends.cuda, f"{name}_sdp_enabled")()]
    finally:
        for name, was in before.items():
            getattr(torch.backends.cuda, f"enable_{name}_sdp")(was)
    assert enabled == ["flash"]
    counts = {event.key: event.count for event in profile.key_averages()}
    assert counts["aten::_scaled_dot_product_flash_attention_for_cpu"] == 2 * SHAPES["tiny"].n_layers


def test_what_no_time_is_left_for_is_named(tmp_path, monkeypatch, capsys):
    run(tmp_path, monkeypatch, "--no-torch", "--minutes", "0", "--case", "tiny/64", "--case", "tiny/128")
    assert "time is up: tiny/64, tiny/128 not run" in capsys.readouterr().out


def test_a_worker_that_hangs_or_dies_is_an_error_and_gone(tmp_path):
    for code, message in (("input()", "no answer to 'steps' within 1 s"), ("exit(3)", "ended with code 3")):
        worker = Worker([sys.executable, "-c", f"import sys; sys.stdin.readline(); {code}"], {}, tmp_path / "log")
        with pytest.raises(WorkerError, match=message):
            worker.ask("steps", 1.0 if code == "input()" else 60.0)
        with pytest.raises(WorkerError, match="ended with code"):
            worker.ask("steps", 60.0)
        worker.close()
        assert worker._process.poll() is not None


def test_the_largest_batch_that_fits_is_a_power_of_two_below_both_limits():
    for limit, rows, batch in ((100, 64, 8), (100, 4, 4), (5, 64, 1), (20 + 16 * 9, 64, 16), (19 + 16 * 9, 64, 8)):
        assert largest_batch(20, 9, limit, rows) == batch


def test_the_models_are_those_of_the_configs_and_of_the_library():
    for size in ("125m", "1b"):
        options = thaw(load_config(BENCHMARKS.parent / "configs" / f"llama_{size}.yaml").model.options)
        ours = vars(SHAPES[size])
        assert options["tie_embeddings"]
        assert {k: options.get(k) or ours[k] for k in ours} == ours
    for shape in SHAPES.values():
        model = ModelDef(lambda rngs, shape=shape: Llama(**vars(shape), tie_embeddings=True, rngs=rngs))
        assert sum(w.size for w in flatten(model.weights).values()) == shape.params


def test_the_work_counted_by_class_adds_up_to_the_models_flops():
    shape, batch, seq = SHAPES["1b"], 2, 4096
    work, tokens = counted(shape, batch, seq, "none"), 2 * 4096
    softmax = 12 * tokens * shape.vocab_size
    products = work["matmul"].flops + work["loss"].flops - softmax + work["attention"].flops * 6 / 7  # 7: scores again
    assert products == pytest.approx(tokens * flops_per_token(shape, seq))
    full = counted(shape, batch, seq, "full")
    assert full["matmul"].flops / work["matmul"].flops == pytest.approx(4 / 3)
    assert square(shape, batch, seq)["attention"].flops == pytest.approx(2 * 6 / 7 * work["attention"].flops, rel=1e-3)


def bench(size: str = "tiny", seq: int = 64, batch: int = 2, **options: object) -> Bench:
    options = {"remat": "none", "attention": "einsum", "compute": "bfloat16", "loss_chunk": "auto", **options}
    return Bench(argparse.Namespace(size=size, seq=seq, batch=batch, seconds=0.0, **options))


def test_the_flops_counted_are_xlas_too():
    by_xla, _ = bench(loss_chunk=16).by_xla()
    assert sum(work.flops for work in square(SHAPES["tiny"], 2, 64).values()) == pytest.approx(by_xla, rel=0.05)


@pytest.mark.full
def test_a_loss_in_chunks_makes_its_logits_twice():
    whole, chunked = bench(loss_chunk=None), bench(loss_chunk=16)
    assert (whole.chunks, chunked.chunks, bench("1b", 4096, 4).chunks) == (1, 4, 32)
    compiled, by_shapes = [], []
    for each in (whole, chunked):
        model, place = each.model(), each.place
        tx = optimizer("sgd", model.weights, lr=0.1)
        step = make_train_step(model, tx, place).lower(abstract_state(model, tx, place), each.batch)
        compiled.append(programs.matmul_flops(step.compile().as_text()))
        by_shapes.append(counted(SHAPES["tiny"], 2, 64, "none", chunks=each.chunks)["loss"])
    assert by_shapes[1].flops - by_shapes[0].flops == pytest.approx(compiled[1] - compiled[0], rel=0.02)
    assert by_shapes[1].bytes > by_shapes[0].bytes


@pytest.fixture
def constants_warned_of():
    bytes = jax.config.jax_captured_constants_warn_bytes
    jax.config.update("jax_captured_constants_warn_bytes", 256)  # and pytest makes a warning an error
    yield
    jax.config.update("jax_captured_constants_warn_bytes", bytes)


@pytest.mark.full
@pytest.mark.usefixtures("constants_warned_of")
def test_no_part_has_its_arrays_as_constants_of_the_program():
    assert min(bench().isolated().values()) > 0


@pytest.mark.full
def test_a_tiny_roofline_has_all_its_columns(tmp_path):
    roofline.main(["--tiny", "--out", str(tmp_path)])
    found = json.loads((tmp_path / "roofline.jsonl").read_text())
    *classes, total = found["rows"]
    assert [row["class"] for row in classes] == ["matmul", "attention", "norms, elementwise", "loss", "optimizer"]
    assert all(row["predicted_s"] > 0 and row["isolated_s"] > 0 for row in classes)
    assert total["flops"] == sum(row["flops"] for row in classes)
    assert found["step_s"] > 0


def test_a_trace_yields_its_operations_own_times(tmp_path):
    def span(tid: int, name: str, ts: float, dur: float, pid: int = 1, **args: str) -> dict:
        return {"ph": "X", "pid": pid, "tid": tid, "name": name, "ts": ts, "dur": dur, "args": args}

    def named(kind: str, name: str, **ids: int) -> dict:
        return {"ph": "M", "name": f"{kind}_name", "args": {"name": name}, **ids}

    device = [named("process", "/device:GPU:0", pid=1), named("thread", "Stream #7(Compute)", pid=1, tid=7)]
    noise = [named("thread", "XLA Ops", pid=1, tid=8), span(8, "dot.1", 0, 50), span(9, "python", 0, 900, pid=2)]
    kernels = [span(7, "nvjet_tst", 0, 40, hlo_op="dot.1"), span(7, "nvjet_tst", 60, 20, hlo_op="dot.1")]
    kernels += [span(7, "loop_add", 80, 10, hlo_op="fusion.2"), span(7, "cudnn_fmha", 90, 30, hlo_op="custom-call.3")]
    cpu = [
        span(1, "while.1", 0, 100, hlo_op="while.1"),
        span(1, "dot.2", 10, 60, hlo_op="dot.2"),
        span(1, "python", 0, 999),
    ]
    for events, expected in (
        (
            [*device, *noise, *kernels],
            {"dot.1: nvjet_tst": 0.03, "custom-call.3: cudnn_fmha": 0.015, "fusion.2: loop_add": 0.005},
        ),
        (cpu, {"dot.2": 0.03, "while.1": 0.02}),
    ):
        with gzip.open(tmp_path / "trace.json.gz", "wt") as file:
            json.dump({"traceEvents": events}, file)
        found = top_operations.table(str(tmp_path / "trace.json.gz"), steps=2)
        assert dict(found["operations"]) == pytest.approx(expected)
        assert sum(found["classes"].values()) == pytest.approx(sum(expected.values()))
    assert found["classes"]["matmul"] == pytest.approx(0.03)


def test_the_corpus_is_of_the_repositorys_folders(tmp_path):
    for name in ("models/a.py", "shardtrain/b.py", ".venv/lib/c.py", "outputs/d.md", "docs/e.md", "shardtrain/f.so"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(Path(name).stem)
    assert float8_curve.corpus(tmp_path).tobytes() == b"a\nb"


@pytest.mark.full
def test_the_curve_of_float8_stays_with_that_of_bfloat16(tmp_path):
    options = ["--size", "tiny", "--seq", "32", "--batch", "8", "--steps", "20", "--lr", "1e-3"]
    float8_curve.main([*options, "--out", str(tmp_path)])
    lines = [json.loads(line) for line in (tmp_path / "float8_curve.jsonl").read_text().splitlines()]
    assert len(lines) == 20
    assert abs(lines[-1]["float8"] - lines[-1]["bfloat16"]) < 0.05 < lines[0]["bfloat16"] - lines[-1]["bfloat16"]
