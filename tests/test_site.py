"""What the site takes from the code is there, and pictures are those of today's code."""

import ast
import importlib
import re
from pathlib import Path

import pytest

import hooks
import quickstart
import sharding
import shardtrain
from shardtrain.config.reference import keys

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"


def test_the_tables_and_the_picture_of_sharding_are_those_of_the_rules():
    old = sharding.PAGE.read_text()
    assert sharding.page(old) == old, "run: python docs/site/sharding.py"
    assert sharding.picture() == sharding.PICTURE.read_text(), "run: python docs/site/sharding.py"


def test_the_pictures_of_the_quickstart_were_made_by_the_files_of_today():
    recorded = quickstart.json.loads(quickstart.RECORD.read_text())
    assert recorded == quickstart.hashes(), "run: python docs/site/quickstart.py"
    for name in ("loss.png", "terminal.svg"):
        assert (quickstart.FOLDER / name).stat().st_size < 200_000


def test_a_terminal_keeps_what_is_not_written_over():
    assert quickstart.screen("a\nstep 1\r\x1b[2K\x1b[1A\x1b[2Kb\nstep 2\nend") == ["b", "step 2", "end"]


def test_the_reference_holds_every_key_and_command():
    page = hooks.keys()
    assert [key.path for key in keys() if not key.is_section and f"`{'.'.join(key.path)}`" not in page] == []
    commands = hooks.commands()
    for verb in ("train", "config", "schedule", "checkpoint verify"):
        assert f"## shardtrain {verb}\n" in commands
    assert "`--reference`" in commands


def test_the_list_of_messages_is_that_of_the_code():
    messages = hooks.errors()
    assert len(re.findall("^- ", messages, re.M)) > 250
    assert "there is no such mesh axis" in messages


def test_the_api_pages_name_every_public_name():
    pages = "\n".join(hooks.on_page_markdown(page.read_text()) for page in (DOCS / "reference/api").glob("*.md"))
    names = set(re.findall(r"^::: (\S+)", pages, re.M))
    assert {f"shardtrain.{name}" for name in shardtrain.__all__ if name != "__version__"} <= names
    for name in names:
        module, _, last = re.sub(r"^models\b", "shardtrain.models", name).rpartition(".")
        assert hasattr(importlib.import_module(module), last), name


def said() -> str:
    """All texts in the code, without the values that are filled in."""
    texts = []
    for file in (ROOT / "shardtrain").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.JoinedStr):
                texts.append("".join(v.value if isinstance(v, ast.Constant) else "..." for v in node.values))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(node.value)
    return "\n".join(texts)


def test_messages_that_troubleshooting_quotes_exist():
    page, texts = (DOCS / "troubleshooting.md").read_text(), said()
    rows = [line.split(" | ")[0] for line in page.splitlines() if line.startswith("| `")]
    quoted = [part.strip(" ;,") for row in rows for text in re.findall(r"`([^`]+)`", row) for part in text.split("...")]
    assert len(quoted) > 25
    assert [part for part in quoted if part not in texts] == []


@pytest.mark.full
def test_the_site_builds_and_every_link_leads_somewhere(tmp_path):
    mkdocs = pytest.importorskip("mkdocs.commands.build")
    config = importlib.import_module("mkdocs.config")
    loaded = config.load_config(str(DOCS / "site/mkdocs.yml"), strict=True, site_dir=str(tmp_path / "site"))
    mkdocs.build(loaded)
    assert (tmp_path / "site/index.html").exists()
