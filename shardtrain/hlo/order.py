"""The number of collectives of a program in which one device can take part at once.

A collective starts when the previous one in the program has ended. But XLA's CPU backend does not wait for a loop, or a
branch: once it has started, the next collective may start while those of the loop are still to come, unless it needs
data from the loop.
"""

from typing import NamedTuple

from shardtrain.hlo.collectives import is_collective
from shardtrain.hlo.text import Module, parse


def in_flight(text: str) -> int:
    """Return the most threads per device that wait for other devices while a program runs on CPU.

    Args:
      text: the compiled program's `as_text()`.

    Raises:
      UnknownHLOError: the parser does not know a line or an opcode.
    """
    module = parse(text)
    return _most(module, module.entry, {})


def _most(module: Module, computation: str, known: dict[str, int]) -> int:
    """Return the same for one computation."""
    if computation not in known:
        loops: list[_Loop] = []
        waits: dict[str, int] = {}  # the loops for which each instruction waits, as bits
        most = 0
        for op in module.computations[computation].values():
            waits_for = 0
            for operand in (*op.operands(), *op.control_predecessors()):
                waits_for |= waits.get(operand, 0)
            alone = is_collective(op)
            if own := 1 if alone else max((_most(module, callee, known) for callee in op.called()), default=0):
                running = [loop for loop in loops if not waits_for & loop.bit]
                most = max(most, own + _at_once(running))
                if not alone:
                    loops.append(_Loop(1 << len(loops), waits_for, own))
                    waits_for |= loops[-1].bit
            waits[op.name] = waits_for
        known[computation] = most
    return known[computation]


class _Loop(NamedTuple):
    """A loop or branch with collectives: its bit, the bits of the loops it waits for, and the most in flight."""

    bit: int
    waits_for: int
    most: int


def _at_once(loops: list[_Loop]) -> int:
    """Return a bound on the collectives in flight; of loops that wait for each other only one runs at a time."""
    chains: list[list[_Loop]] = []
    for loop in loops:
        chain = next((chain for chain in chains if loop.waits_for & chain[-1].bit), None)
        if chain is None:
            chains.append([loop])
        else:
            chain.append(loop)
    return sum(max(loop.most for loop in chain) for chain in chains)
