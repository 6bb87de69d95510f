"""Which operations took the time, from a `trace.json.gz` of `jax.profiler`; standard library only.

python benchmarks/top_operations.py FILE.trace.json.gz [STEPS]
"""

from __future__ import annotations

import collections
import gzip
import json
import re
import sys
from typing import Any

CLASSES = {
    "attention": r"fmha|flash|sdpa|cudnn.*(attn|attention)|cudnn_generated",
    "matmul": r"nvjet|gemm|cutlass|cublas|xmma|matmul|\bdot|_dot|ynn",
    "copy": r"memcpy|memset|copy|transpose",
}


def table(file: str, *, steps: int = 1, top: int = 15) -> dict[str, Any]:
    """Milliseconds per step of each operation (without those that it contains), and of each class of them."""
    with gzip.open(file, "rt") as f:
        events = json.load(f)["traceEvents"]
    names: dict[Any, str] = {}
    for e in events:
        if e.get("ph") == "M" and e["name"] in ("process_name", "thread_name"):
            names[e["pid"], e.get("tid") if e["name"] == "thread_name" else None] = e["args"]["name"]
    gpu = any(name.startswith("/device:GPU") for name in names.values())

    def counts(e: dict[str, Any]) -> bool:
        if e.get("ph") != "X":
            return False
        if gpu:  # other rows of the device repeat the same time, by module and by source line
            stream = names.get((e["pid"], e["tid"]), "").startswith("Stream")
            return stream and names.get((e["pid"], None), "").startswith("/device:GPU")
        return "hlo_op" in e.get("args", {})

    operations: collections.Counter[str] = collections.Counter()
    classes: collections.Counter[str] = collections.Counter()
    for e, own in _own_times([e for e in events if counts(e)]):
        operation = e.get("args", {}).get("hlo_op", e["name"])
        label = operation if operation == e["name"] else f"{operation}: {e['name'][:60]}"
        operations[label] += own
        classes[next((c for c, p in CLASSES.items() if re.search(p, label, re.I)), "other fusions")] += own
    scale = 1e-3 / steps
    return {
        "operations": [[label, micros * scale] for label, micros in operations.most_common(top)],
        "classes": {name: micros * scale for name, micros in classes.most_common()},
    }


def _own_times(events: list[dict[str, Any]]) -> list[tuple[dict[str, Any], float]]:
    """Each event with its duration (microseconds) less that of the events within it, thread by thread."""
    own = [float(e["dur"]) for e in events]
    order = sorted(range(len(events)), key=lambda i: (events[i]["pid"], events[i]["tid"], events[i]["ts"], -own[i]))
    open_: list[int] = []
    for i in order:
        e = events[i]
        while open_ and (
            (events[open_[-1]]["pid"], events[open_[-1]]["tid"]) != (e["pid"], e["tid"])
            or events[open_[-1]]["ts"] + events[open_[-1]]["dur"] <= e["ts"]
        ):
            open_.pop()
        if open_:
            own[open_[-1]] -= e["dur"]
        open_.append(i)
    return list(zip(events, own, strict=True))


def lines(found: dict[str, Any]) -> list[str]:
    """The table as text."""
    total = sum(found["classes"].values())
    rows = [f"  {ms:9.3f} ms {ms / total:6.1%}  {name}" for name, ms in found["operations"]]
    classes = ", ".join(f"{name} {ms:.2f} ms ({ms / total:.0%})" for name, ms in found["classes"].items())
    return [f"  {total:9.3f} ms a step in all: {classes}", *rows]


if __name__ == "__main__":
    print(*lines(table(sys.argv[1], steps=int(*sys.argv[2:3] or [1]))), sep="\n")
