"""The text of an optimized HLO module, as computations of instructions.

Names of computations, and of instructions, are unique in a module. Only what our questions need is parsed: of
each instruction its name, type, opcode, and the unparsed rest.
"""

import math
import re
from dataclasses import dataclass
from typing import TypeAlias

_QUOTED = re.compile(r'"(?:[^"\\]|\\.)*"')
_COMMENT = re.compile(r"/\*.*?\*/")
_ARRAY = re.compile(r"([a-z][a-z0-9]*)\[((?:(?:<=)?\d+(?:,(?!\])|(?=\])))*)\](?:\{[^{}]*\})?")
_DTYPE = re.compile(r"(?:bf|[sucf])(\d+)(?:e\w+)?")


class UnknownHLOError(ValueError):
    """HLO text that this parser does not understand; the message holds the line. The parser must learn it."""


@dataclass(frozen=True)
class Array:
    """One array on one device: HLO's name of the dtype (`f32`, `bf16`, `pred`) and the per-device shape."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """Size on one device; dtypes smaller than a byte count as packed."""
        if self.dtype in ("token", "opaque"):
            return 0
        m = _DTYPE.fullmatch(self.dtype)
        if m is None and self.dtype != "pred":
            raise UnknownHLOError(f"dtype {self.dtype!r}")
        return math.ceil(math.prod(self.shape) * (int(m[1]) if m else 8) / 8)


Type: TypeAlias = "Array | tuple[Type, ...]"


def leaves(type_: Type) -> tuple[Array, ...]:
    """The arrays of a possibly nested tuple type, in order."""
    return (type_,) if isinstance(type_, Array) else tuple(a for item in type_ for a in leaves(item))


@dataclass(frozen=True)
class Instruction:
    """One instruction. `rest` follows the operands' `(`, with quoted text emptied; `line` is the original."""

    name: str
    type: Type
    opcode: str
    rest: str
    line: str

    def called(self) -> list[str]:
        """Names of the computations that it calls: bodies, branches, fusions, reductions."""
        found = re.findall(r"([\w-]+)=(%[^\s,{}]+|\{%[^{}]*\})", self.rest)
        return [name for key, value in found if key != "control-predecessors" for name in _names(value)]

    def operands(self) -> list[str]:
        """Names of the instructions that it reads (of an instruction whose operands are plain names)."""
        return _names(self.rest.partition(")")[0])

    def control_predecessors(self) -> list[str]:
        """Names of the instructions that have to end before it."""
        found = re.search(r"control-predecessors=(\{[^}]*\})", self.rest)
        return _names(found[1]) if found else []

    def attributes(self) -> str:
        """The text after the operands."""
        return self.rest.partition(")")[2]


@dataclass(frozen=True)
class Module:
    """A parsed module: computation name -> instruction name -> instruction, in program order."""

    computations: dict[str, dict[str, Instruction]]
    entry: str
    partitions: int


def parse(text: str) -> Module:
    """Parse `compiled.as_text()`.

    Raises:
        UnknownHLOError: a line inside a computation is no instruction that this parser knows, there is no
            entry, or the program is replicated (`pmap`), which gives ids in groups another meaning.
    """
    header = re.match(r"HloModule .*", text)
    if header is None:
        raise UnknownHLOError(f"no HloModule line; is this compiled.as_text()? It begins {text[:80]!r}")
    if re.search(r"\breplica_count=(?!1\b)", header[0]):
        raise UnknownHLOError(f"a module with several replicas (pmap): {header[0]}")
    partitions = re.search(r"\bnum_partitions=(\d+)", header[0])

    computations: dict[str, dict[str, Instruction]] = {}
    entry, body = None, None
    for line in text.splitlines():
        if body is not None:
            if line.startswith("}"):
                body = None
            elif line.strip():
                instruction = _instruction(line)
                body[instruction.name] = instruction
        elif m := re.match(r"(ENTRY )?%([^\s(]+) \(.*\{\s*$", line):
            body = computations.setdefault(m[2], {})
            entry = m[2] if m[1] else entry
    if entry is None:
        raise UnknownHLOError("a module without an ENTRY computation")
    return Module(computations, entry, int(partitions[1]) if partitions else 1)


def _instruction(line: str) -> Instruction:
    clean = _COMMENT.sub("", _QUOTED.sub('""', line)).strip()  # quoted text may hold any syntax
    if name := re.match(r"(?:ROOT )?%(\S+) = ", clean):
        type_, end = _type(clean, name.end())
        if opcode := re.match(r" ([a-z][a-z0-9-]*)\(", clean[end:]):
            return Instruction(name[1], type_, opcode[1], clean[end + opcode.end() :], line.strip())
    raise UnknownHLOError(f"instruction: {line.strip()}")


def _type(text: str, at: int) -> tuple[Type, int]:
    """The type that begins at `at`, `f32[2,4]{1,0}` or `(a, (b, c))`, and where it ends."""
    if not text.startswith("(", at):
        m = _ARRAY.match(text, at)
        if m is None:
            raise UnknownHLOError(f"type at {text[at : at + 60]!r} in: {text}")
        return Array(m[1], tuple(int(d) for d in re.findall(r"\d+", m[2]))), m.end()
    items: list[Type] = []
    at += 1
    while not text.startswith(")", at):
        item, at = _type(text, at)
        items.append(item)
        at += 2 if text.startswith(", ", at) else 0
    return tuple(items), at + 1


def _names(text: str) -> list[str]:
    return re.findall(r"%([^\s,{}()]+)", text)
