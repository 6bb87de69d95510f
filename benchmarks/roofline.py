"""Where the time of a training step must go: FLOPs and bytes of each class of operation, and the speed of the device.

    python benchmarks/roofline.py --size 1b --seq 4096 --batch 8
    python benchmarks/roofline.py --tiny

The predicted time is the larger of two: FLOPs (counted by `work.py`; `--remat` adds recomputation) over the rate of a
large matrix product, and bytes over the bandwidth of a large triad. Both rates are measured here first. The isolated
time is that of the same operations of the library by themselves, forward and backward. The FLOPs are compared with
XLA's own count for the whole step.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

import jax

from cases import SHAPES, flops_per_token, value
from isolated import Bench
from work import AGAIN, counted, square


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--size", default="1b", choices=SHAPES)
    add("--seq", type=int, default=4096)
    add("--batch", type=int, default=4)
    add("--remat", default="full", choices=AGAIN)
    add("--attention", default="auto", choices=("auto", "einsum", "xla", "cudnn"))
    add("--loss-chunk", type=value, default="auto", help="as in the model: positions, none for all (default auto)")
    add("--compute", default="bfloat16", choices=("bfloat16", "float32"))
    add("--seconds", type=float, default=0.3, help="least length of a round of timing (default 0.3)")
    add("--out", type=Path, default=Path(os.environ.get("OUT", "gpu-results")))
    add("--tiny", action="store_true", help="a tiny model and tiny ceilings, to see that it runs")
    args = parser.parse_args(argv)
    if args.tiny:
        args.size, args.seq, args.batch, args.seconds = "tiny", 64, 2, 0.0
    bench = Bench(args)
    shape, tokens = bench.shape, args.batch * args.seq
    kind = jax.devices()[0].device_kind
    print(f"jax {jax.__version__} on {kind}; {args.size}, {args.batch} x {args.seq} tokens, ", end="")
    print(f"remat {args.remat}, attention {args.attention}, loss in chunks: {bench.chunks}, {args.compute}")
    rate, bandwidth = bench.matmul_rate(256 if args.tiny else None), bench.bandwidth(2**16 if args.tiny else None)
    print(f"ceilings: {rate / 1e12:.2f} TFLOP/s in {args.compute}, {bandwidth / 1e9:.1f} GB/s", flush=True)
    work = counted(shape, args.batch, args.seq, args.remat, bench.precision.compute.itemsize, bench.chunks)
    rows, measured = [], bench.isolated()
    for name, w in work.items():
        predicted = max(w.flops / rate, w.bytes / bandwidth)
        bound = "FLOPs" if w.flops / rate >= w.bytes / bandwidth else "bytes"
        rows.append({"class": name, "flops": w.flops, "bytes": w.bytes, "predicted_s": predicted, "bound": bound})
        rows[-1]["isolated_s"] = measured[name]
    total = {key: sum(row[key] for row in rows) for key in ("flops", "bytes", "predicted_s", "isolated_s")}
    rows.append({"class": "all classes", **total, "bound": ""})
    print("class                   GFLOP        GB  bound   predicted ms  isolated ms")
    for r in rows:
        print(
            f"{r['class']:20} {r['flops'] / 1e9:9.2f} {r['bytes'] / 1e9:9.3f}  {r['bound']:5} "
            f"{r['predicted_s'] * 1e3:14.3f} {r['isolated_s'] * 1e3:12.3f}",
            flush=True,
        )
    step_s = bench.step()
    model_flops = tokens * flops_per_token(shape, args.seq)
    print(
        f"the whole step: {step_s * 1e3:.3f} ms, {tokens / step_s:.0f} tokens/s; predicted / measured "
        f"{total['predicted_s'] / step_s:.2f}; model FLOPs at {model_flops / step_s / rate:.1%} of the ceiling "
        f"(at best {model_flops / rate / total['predicted_s']:.1%} by this roofline)"
    )
    flops, bytes = bench.by_xla()
    plain = sum(w.flops for w in square(shape, args.batch, args.seq, bench.precision.compute.itemsize).values())
    print(
        f"FLOPs by shapes / by XLA, no remat, all scores and logits at once: {plain / flops:.3f}; "
        f"bytes by shapes / by XLA: {total['bytes'] / bytes:.3f} (XLA: nothing fused)"
    )
    args.out.mkdir(parents=True, exist_ok=True)
    with (args.out / "roofline.jsonl").open("a") as file:
        found = {
            "matmul_rate": rate,
            "bandwidth": bandwidth,
            "step_s": step_s,
            "chunks": bench.chunks,
            "rows": rows,
            "flops_ratio": plain / flops,
        }
        file.write(json.dumps({**vars(args), "out": str(args.out), **found}) + "\n")


if __name__ == "__main__":
    main()
