"""Strict YAML 1.2 (core schema): `1e-4` is a number; `1:30`, `yes`, `off` are text; no key appears twice."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any, ClassVar

import yaml
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from shardtrain.config.errors import ConfigError, Problem
from shardtrain.errors import shortened

INT = re.compile(r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+")
FLOAT = re.compile(
    r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)"
)
NULL = re.compile(r"null|Null|NULL|~|")
BOOL = re.compile(r"true|True|TRUE|false|False|FALSE")
#: In this order, so that text that is both an integer and a float is an integer.
SCALARS = {"null": NULL, "bool": BOOL, "int": INT, "float": FLOAT}
#: No config comes near these limits; longer or deeper text is not a config, and could take for ever to read.
MOST_LEVELS, MOST_CHARACTERS = 50, 2**20
_AROUND = 100  # characters of a long line that are shown on both sides of a mistake


class _Loader(yaml.SafeLoader):
    """PyYAML's safe loader with the scalars of YAML 1.2 and a record of keys that appear twice."""

    yaml_implicit_resolvers: ClassVar[dict[Any, Any]] = {}
    yaml_constructors: ClassVar[dict[Any, Any]] = {}

    def __init__(self, text: str, source: str) -> None:
        super().__init__(text)
        self.source = source
        self.duplicates: list[Problem] = []
        self._level = 0
        self._measured: dict[int, tuple[int, int]] = {}

    def compose_node(self, parent: Any, index: Any) -> Any:
        """Read the next node, and refuse one that is too large for a config once its aliases are expanded."""
        self._level += 1
        if self._level > MOST_LEVELS:
            raise _problem(f"nested deeper than {MOST_LEVELS} levels", self.peek_event().start_mark)
        node = super().compose_node(parent, index)
        self._level -= 1
        inner = [self._measured.get(id(part), (1, 1)) for part in _parts(node)]
        levels = 1 + max((levels for levels, _ in inner), default=0)
        size = 1 + sum(size for _, size in inner) + (len(node.value) if isinstance(node, ScalarNode) else 0)
        if levels > MOST_LEVELS or size > MOST_CHARACTERS:
            raise _problem("too large for a config once its aliases are expanded", node.start_mark)
        self._measured[id(node)] = levels, size
        return node

    def mapping(self, node: Node) -> dict[Any, Any]:
        assert isinstance(node, MappingNode)
        lines: dict[str, int] = {}
        result = {}
        for key_node, value_node in node.value:
            key = self.construct_object(key_node, deep=True)
            mark = key_node.start_mark
            if not isinstance(key, str):
                raise _problem(f"key {key!r} is not text; quote it", mark)
            if key in lines:
                where = f"{self.source}:{mark.line + 1}:{mark.column + 1}"
                rule = f"this key already appears on line {lines[key]}; a key may appear once"
                self.duplicates.append(Problem(where, key, rule, "keep one of the two lines"))
            lines[key] = mark.line + 1
            result[key] = self.construct_object(value_node, deep=True)
        return result

    def sequence(self, node: Node) -> list[Any]:
        assert isinstance(node, SequenceNode)
        return [self.construct_object(item, deep=True) for item in node.value]


def _parts(node: Node) -> list[Node]:
    if isinstance(node, MappingNode):
        return [part for pair in node.value for part in pair]
    return list(node.value) if isinstance(node, SequenceNode) else []


def _problem(message: str, mark: Any) -> yaml.MarkedYAMLError:
    return yaml.constructor.ConstructorError(None, None, message, mark)


def _int(text: str) -> int:
    base = {"0o": 8, "0x": 16}.get(text[:2], 10)
    if len(text) > 100 or abs(number := int(text, base)) >= 2**63:  # Python itself refuses thousands of digits
        raise ValueError("an integer of more than 64 bits")
    return number


def _str(text: str) -> str:
    if "\0" in text or (not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text)):
        raise ValueError("text with a NUL or half of a surrogate pair, which no path and no name can contain")
    return text


def _float(text: str) -> float:
    return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))


_READ: dict[str, Callable[[str], Any]] = {
    "null": lambda text: None,
    "bool": lambda text: text.lower() == "true",
    "int": _int,
    "float": _float,
    "str": _str,
}


def _scalar_constructor(kind: str) -> Any:
    def construct(loader: _Loader, node: ScalarNode) -> Any:
        text = loader.construct_scalar(node)
        if kind in SCALARS and not SCALARS[kind].fullmatch(text):
            raise _problem(f"{text!r} is not of type {kind}", node.start_mark)
        try:
            return _READ[kind](text)
        except ValueError as error:
            raise _problem(str(error), node.start_mark) from error

    return construct


for _kind, _pattern in SCALARS.items():
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_kind}", re.compile(f"(?:{_pattern.pattern})$"), None)
for _kind in _READ:
    _Loader.add_constructor(f"tag:yaml.org,2002:{_kind}", _scalar_constructor(_kind))
_Loader.add_constructor("tag:yaml.org,2002:map", _Loader.mapping)
_Loader.add_constructor("tag:yaml.org,2002:seq", _Loader.sequence)
_Loader.add_constructor(None, yaml.SafeLoader.construct_undefined)


def parse(text: str, source: str) -> Any:
    """Read one YAML document made of mappings with text keys, lists, text, numbers, booleans and null.

    Args:
      text: the document.
      source: its name in errors: a file, or the override that it comes from.

    Raises:
      ConfigError: a syntax error, with line, column and the line's text; keys that appear twice; more levels or
        characters than a config can have.
    """
    if len(text) > MOST_CHARACTERS:
        rule = f"a config has at most {MOST_CHARACTERS:,} characters, and this has {len(text):,}"
        raise ConfigError([Problem(source, None, rule, "name a config, not a file of data")], source)
    try:
        loader = _Loader(text, source)
        value = loader.get_single_data()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        at = (mark.line, mark.column) if mark else (0, 0)
        raise ConfigError([_syntax_problem(text, source, at, error.problem or str(error))], source) from error
    except yaml.reader.ReaderError as error:
        before = text[: error.position].split("\n")
        problem = f"character #x{error.character:04x} is not allowed in YAML"
        raise ConfigError(
            [_syntax_problem(text, source, (len(before) - 1, len(before[-1])), problem)], source
        ) from error
    if loader.duplicates:
        raise ConfigError(loader.duplicates, source)
    return value


def _syntax_problem(text: str, source: str, at: tuple[int, int], message: str) -> Problem:
    line, column = at
    lines = text.splitlines()
    if line >= len(lines) and lines:  # The parser stopped at the end: show the last line.
        line, column = len(lines) - 1, len(lines[-1])
    shown, start = lines[line] if lines else "", max(0, column - _AROUND)
    shown, column = shown[start : column + _AROUND], column - start
    shown = "".join(character if character.isprintable() or character == "\t" else "?" for character in shown)
    return Problem(
        f"{source}:{line + 1}:{start + column + 1}",
        None,
        f"not YAML: {shortened(message)}",
        f"correct this line:\n      {shown}\n      {' ' * column}^",
    )


class _Dumper(yaml.SafeDumper):
    """A dumper that quotes text which some version of YAML reads as another type, and writes lists on one line."""

    # A copy: `add_implicit_resolver` on a class without its own table changes PyYAML's.
    yaml_implicit_resolvers: ClassVar[dict[Any, Any]] = {
        key: list(rows) for key, rows in yaml.SafeDumper.yaml_implicit_resolvers.items()
    }

    def ignore_aliases(self, data: Any) -> bool:
        return True

    def flow_list(self, data: Any) -> Node:
        return self.represent_sequence("tag:yaml.org,2002:seq", data, flow_style=True)

    def text(self, data: str) -> Node:
        # Line breaks other than \n are preserved only as escapes.
        return self.represent_scalar("tag:yaml.org,2002:str", data, style=None if data.isprintable() else '"')


for _kind, _pattern in SCALARS.items():
    _Dumper.add_implicit_resolver(f"tag:yaml.org,2002:{_kind}", re.compile(f"(?:{_pattern.pattern})$"), None)
_Dumper.add_representer(str, _Dumper.text)
_Dumper.add_representer(list, _Dumper.flow_list)
_Dumper.add_representer(tuple, _Dumper.flow_list)


def dump(value: Any) -> str:
    """Write plain data as YAML that `parse` reads back to the same data; keys keep their order."""
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=10_000)
