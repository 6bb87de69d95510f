"""What the site takes from the code: a comment such as `<!-- keys -->` in a page becomes what it names."""

from __future__ import annotations

import ast
import importlib
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent.parent


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Fill in the comments of a page."""
    makers = {"keys": keys, "commands": commands, "errors": errors}
    for name, make in makers.items():
        if f"<!-- {name} -->" in markdown:
            markdown = markdown.replace(f"<!-- {name} -->", make())
    return re.sub(r"<!-- api: (.*) -->", lambda found: api(found[1].split()), markdown)


def keys() -> str:
    """Every key of a config, a table for each section."""
    from shardtrain.config.reference import Key, keys

    head = ["| key | default | values | meaning |", "|---|---|---|---|"]

    def row(key: Key) -> str:
        value = "required" if key.required else f"`{key.shown}`"
        return f"| `{'.'.join(key.path)}` | {value} | {key.kind} | {_escaped(key.meaning)} |"

    known = list(keys())
    lines = ["## Without a section", "", *head, *(row(k) for k in known if len(k.path) == 1 and not k.is_section)]
    for section in (key for key in known if key.is_section):
        inside = [key for key in known if key.path[:-1] == section.path and not key.is_section]
        lines += ["", f"## {'.'.join(section.path)}", "", section.meaning, "", *head, *map(row, inside)]
    return "\n".join(lines)


def commands() -> str:
    """Every verb with its arguments and options."""
    import typer

    from shardtrain.cli.app import app

    return "\n".join(_command(typer.main.get_command(app), "shardtrain"))


def _command(command: Any, path: str) -> Iterator[str]:
    for name, inner in sorted(getattr(command, "commands", {}).items()):
        yield from _command(inner, f"{path} {name}")
    if hasattr(command, "commands"):
        return
    arguments = [each for each in command.params if each.param_type_name == "argument"]
    options = [each for each in command.params if each.param_type_name == "option"]
    usage = " ".join([path, *(f"[{each.name.upper()}]" for each in arguments), *(["[OPTIONS]"] if options else [])])
    yield f"## {path}\n\n{command.help}\n\n```text\n{usage}\n```\n\n| name | meaning |\n|---|---|"
    for each in (*arguments, *options):
        names = ", ".join(f"`{name}`" for name in ([each.name.upper()] if each in arguments else each.opts))
        default = "" if each.default in (None, False) or callable(each.default) else f" Default: `{each.default}`."
        yield f"| {names} | {each.help or ''}{default} |"
    yield ""


def errors() -> str:
    """Every message of a `UserError`, by the room that raises it."""
    lines = []
    for folder in sorted(path for path in (ROOT / "shardtrain").iterdir() if path.is_dir()):
        found = [message for file in sorted(folder.rglob("*.py")) for message in _messages(file)]
        if found:
            lines += [f"\n## {folder.name}\n", *(f"- {message}" for message in dict.fromkeys(found))]
    return "\n".join(lines)


def _messages(file: Path) -> Iterator[str]:
    tree = ast.parse(file.read_text())
    for function in ast.walk(tree):
        if not isinstance(function, ast.FunctionDef):
            continue
        said: dict[str, str] = {}  # what names such as `rule` and `fix` stand for
        for node in sorted(ast.walk(function), key=lambda each: getattr(each, "lineno", 0)):
            if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                said[node.targets[0].id] = _words(node.value, said)
            elif isinstance(node, ast.Call) and getattr(node.func, "id", "") == "UserError":
                key, *rest = (_words(argument, said) for argument in node.args)
                text = f"`{key}`: {_escaped('; '.join(rest[1:]))}" if len(rest) > 1 else _escaped(key)
                if len(text.replace("{...}", "")) > 20:
                    yield text


def _words(node: ast.expr, said: dict[str, str]) -> str:
    """A text as the code writes it, with `{...}` for values."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join(str(v.value) if isinstance(v, ast.Constant) else "{...}" for v in node.values)
    return said.get(node.id, "{...}") if isinstance(node, ast.Name) else "{...}"


def _escaped(text: str) -> str:
    return re.sub(r"([*_\[\]`])", r"\\\1", " ".join(text.split())).replace("<", "&lt;")


def api(names: list[str]) -> str:
    """Directives of mkdocstrings: for the public names of a room, or for the names themselves."""
    rooms = {name: importlib.import_module(name) for name in names if (ROOT / name.replace(".", "/")).is_dir()}
    public = [_path(module, name) for module in rooms.values() for name in module.__all__ if name[:2] != "__"]
    return "\n\n".join(f"::: {name}" for name in [*public, *(name for name in names if name not in rooms)])


def _path(room: Any, name: str) -> str:
    """The path of a public name; that of its definition, where a module of the same name hides it."""
    found, path = getattr(room, name), f"{room.__name__}.{name}"
    return f"{found.__module__}.{name}" if path in sys.modules else path
