"""What each instruction of a compiled program is for: matmul, attention, a collective over some axes, or other."""

from __future__ import annotations

import re

from jax.sharding import Mesh

from shardtrain.hlo.collectives import collectives_of
from shardtrain.hlo.text import Instruction, Module, parse

MATMUL, ATTENTION, OTHER = "matmul", "attention", "other"
#: Instructions that only contain others, whose time is their own.
CONTROL = frozenset({"while", "conditional", "call", "async-start", "async-done"})
_LIBRARY = re.compile(r'custom_call_target="[^"]*(?:gemm|matmul|cublas|dot|conv)', re.IGNORECASE)
_ATTENTION = re.compile(r'op_name="[^"]*\battention\b|custom_call_target="[^"]*(?:fmha|flash|attention)', re.IGNORECASE)


def instruction_classes(text: str, mesh: Mesh) -> dict[str, str]:
    """The class of each instruction, by name; without those that only contain others.

    Whatever was computed in a `jax.named_scope("attention")` is attention, its matmuls included. A fusion that holds a
    matmul is one.

    Args:
      text: the compiled program's `as_text()`.
      mesh: the mesh that it was compiled for.

    Raises:
      UserError: the program and the mesh have different numbers of devices.
      UnknownHLOError: the parser does not know a line of it.
    """
    module = parse(text)
    sends = {each.name: f"{each.kind} over {' and '.join(sorted(each.axes))}" for each in collectives_of(module, mesh)}
    found: dict[str, str] = {}
    for body in module.computations.values():
        for op in body.values():
            if op.opcode in CONTROL:
                continue
            begun = op.operands() if op.opcode.endswith("-done") else [op.name]
            found[op.name] = next((sends[name] for name in begun if name in sends), None) or _computes(op, module)
    return found


def _computes(op: Instruction, module: Module) -> str:
    inner = [op, *(each for name in op.called() for each in module.computations.get(name, {}).values())]
    if any(_ATTENTION.search(each.line) for each in inner):
        return ATTENTION
    matmul = any(each.opcode in ("dot", "convolution") or _LIBRARY.search(each.line) for each in inner)
    return MATMUL if matmul else OTHER
