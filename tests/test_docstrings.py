"""One dialect for docstrings: a summary that is a sentence, Google sections in one order, single backticks."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
#: The sections that a docstring may have, in this order.
ORDER = {"Args": 0, "Attributes": 0, "Returns": 1, "Yields": 1, "Raises": 2, "Example": 3}
FILES = [*sorted((ROOT / "shardtrain").rglob("*.py")), *sorted((ROOT / "models").glob("*.py"))]


def public(tree: ast.Module) -> Iterator[tuple[str, ast.AST, str]]:
    """The name, node and docstring of a module and of each public class, function and method in it."""
    yield "the module", tree, ast.get_docstring(tree) or ""

    def walk(node: ast.AST, path: str) -> Iterator[tuple[str, ast.AST, str]]:
        for child in getattr(node, "body", []):
            if isinstance(child, (ast.FunctionDef, ast.ClassDef)) and not child.name.startswith("_"):
                yield path + child.name, child, ast.get_docstring(child) or ""
                if isinstance(child, ast.ClassDef):
                    yield from walk(child, f"{path}{child.name}.")

    yield from walk(tree, "")


def problems(text: str, node: ast.AST) -> Iterator[str]:
    """What a docstring does that the dialect does not."""
    summary, _, body = text.partition("\n\n")
    lines = summary.splitlines()
    if len(lines) > 1:
        yield "the summary is longer than a line"
    if text and not lines[-1].endswith((".", "?", "!", ".)")):
        yield "the summary is no sentence"
    if "``" in text:
        yield "double backticks; use single ones"
    heads: list[str] = re.findall(r"^([A-Z]\w+):$", body, re.M)
    if unknown := set(heads) - {*ORDER}:
        yield f"unknown sections {sorted(unknown)}; use {', '.join(ORDER)}"
    elif [ORDER[head] for head in heads] != sorted(ORDER[head] for head in heads):
        yield f"sections in the order {heads}"
    if prose := re.search(rf"^(?:{'|'.join(ORDER)}):? [^\n]*", body, re.M):
        yield f"a section in prose: {prose[0]!r}"
    for head, section in re.findall(rf"^({'|'.join(ORDER)}):\n((?:(?:  .*)?(?:\n|$))*)", body, re.M):
        if re.match(r" {3}", section):
            yield f"{head} is not indented by two spaces"
    yield from _arguments(body, node)


def _arguments(body: str, node: ast.AST) -> Iterator[str]:
    """Against the function's signature, or that of a class's `__init__`."""
    section = re.search(r"^Args:\n((?:(?:  .*)?(?:\n|$))*)", body, re.M)
    if isinstance(node, ast.ClassDef):
        node = next((f for f in node.body if isinstance(f, ast.FunctionDef) and f.name == "__init__"), node)
    if section is None or not isinstance(node, ast.FunctionDef):
        return
    names = re.findall(r"^  \*{0,2}(\w+(?:, \*{0,2}\w+)*):", section[1], re.M)
    named = [name.strip(" *") for entry in names for name in entry.split(",")]
    spec = node.args
    given = [*spec.posonlyargs, *spec.args, spec.vararg, *spec.kwonlyargs, spec.kwarg]
    takes = [a.arg for a in given if a is not None and a.arg != "self"]
    if unknown := [name for name in named if name not in takes]:
        yield f"Args names {unknown}, which are no arguments"
    elif missing := [name for name in takes if name not in (*named, "cls")]:
        yield f"Args does not name {missing}"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_docstrings_keep_the_dialect(path):
    found = [
        f"{path.relative_to(ROOT)}, {name}: {problem}"
        for name, node, text in public(ast.parse(path.read_text()))
        for problem in problems(text, node)
    ]
    assert not found, "\n".join(found)


GOOD = """Do it.

    Args:
      a: one.

    Returns:
      Two.

    Raises:
      UserError: always.
    """


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (GOOD, None),
        (GOOD.replace("Do it.", "Do it"), "no sentence"),
        (GOOD.replace("Do it.", "Do\n    it."), "longer than a line"),
        (GOOD.replace("one", "``one``"), "double backticks"),
        (GOOD.replace("Returns", "Result"), "unknown sections"),
        (GOOD.replace("Returns", "Raises").replace("Raises:\n      User", "Returns:\n      User"), "in the order"),
        (GOOD.replace("Raises:\n      UserError", "Raises UserError"), "in prose"),
        (GOOD.replace("      a: one", "        a: one"), "two spaces"),
        (GOOD.replace("a: one", "b: one"), "no arguments"),
        (GOOD.replace("a: one", "*: one"), "does not name"),
    ],
)
def test_the_check_sees_every_deviation(text, says):
    function = ast.parse(f'def f(a):\n    """{text}"""').body[0]
    found = list(problems(ast.get_docstring(function), function))
    assert (found == []) if says is None else any(says in problem for problem in found), found
