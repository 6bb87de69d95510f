"""The text of an optimized HLO module, as computations of instructions.

Names of computations, and of instructions, are unique in a module. Only the parts that this package needs are parsed:
each instruction's name, type and opcode, and the unparsed rest.
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
    """HLO text that this parser does not know yet; the message holds the line."""


@dataclass(frozen=True)
class Array:
    """One array on one device.

    Attributes:
      dtype: HLO's name of it, such as `f32`, `bf16` or `pred`.
      shape: per device.
    """

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
    """List the arrays of a possibly nested tuple type, in order."""
    return (type_,) if isinstance(type_, Array) else tuple(a for item in type_ for a in leaves(item))


@dataclass(frozen=True)
class Instruction:
    """One instruction.

    Attributes:
      name: unique in the module.
      type: of its result.
      opcode: HLO's name of the operation.
      rest: the text after the `(` of the operands, with quoted text emptied.
      line: the original line.
    """

    name: str
    type: Type
    opcode: str
    rest: str
    line: str

    def called(self) -> list[str]:
        """List the computations that it calls: bodies, branches, fusions, reductions."""
        found = re.findall(r"([\w-]+)=(%[^\s,{}]+|\{%[^{}]*\})", self.rest)
        return [name for key, value in found if key != "control-predecessors" for name in _names(value)]

    def operands(self) -> list[str]:
        """List the instructions that it reads. (Only for an instruction whose operands are plain names.)"""
        return _names(self.rest.partition(")")[0])

    def control_predecessors(self) -> list[str]:
        """List the instructions that must end before it."""
        found = re.search(r"control-predecessors=(\{[^}]*\})", self.rest)
        return _names(found[1]) if found else []

    def attributes(self) -> str:
        """Return the text after the operands."""
        return self.rest.partition(")")[2]


@dataclass(frozen=True)
class Module:
    """A parsed module.

    Attributes:
      computations: by name; each maps the names of its instructions to the instructions, in program order.
      entry: name of the entry computation.
      partitions: number of devices.
    """

    computations: dict[str, dict[str, Instruction]]
    entry: str
    partitions: int


def parse(text: str) -> Module:
    """Parse a compiled program.

    Args:
      text: its `as_text()`.

    Raises:
      UnknownHLOError: a line inside a computation is not an instruction that this parser knows, there is no entry, or
        the program is replicated (`pmap`), which gives the ids in groups another meaning.
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
    """Parse the type that begins at `at`, such as `f32[2,4]{1,0}` or `(a, (b, c))`; return it and its end."""
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
