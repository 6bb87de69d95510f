"""The pages name only what exists: files of this repository, names that import, rooms on their floors."""

import importlib
import re
from pathlib import Path

import pytest
from test_architecture import FLOOR

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "benchmarks" / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
SOURCES = [
    path
    for folder in ("shardtrain", "models", "benchmarks", "configs", "examples", "tests", "docs/site")
    for path in sorted((ROOT / folder).rglob("*"))
    if path.suffix in (".py", ".yaml")
]
FOLDERS = "shardtrain|models|tests|configs|benchmarks|docs|examples|deploy|[.]ci"

each_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def code(page: Path) -> list[str]:
    """All that a page shows in backticks: blocks, then spans."""
    text = page.read_text()
    blocks = re.findall(r"^```\w*\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    spans = re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE))
    indented = re.findall(r"^ {4}\S.*", text, re.MULTILINE)
    return [*blocks, *spans, *indented]


def paths(page: Path) -> list[str]:
    """Paths from the root of the repository, with `{a,b}` written out."""
    found = re.findall(rf"(?<![\w./-])(?:{FOLDERS})/[\w./{{}},*-]*", "\n".join(code(page)))
    return [each for path in found for each in expanded(path.rstrip(".,"))]


def expanded(path: str) -> list[str]:
    if not (group := re.search(r"\{([^}]*)\}", path)):
        return [path]
    return [path[: group.start()] + each + path[group.end() :] for each in group[1].split(",")]


@each_page
def test_every_path_exists(page):
    assert [path for path in paths(page) if not any(ROOT.glob(path))] == []


@each_page
def test_every_short_name_of_a_file_is_the_end_of_a_path(page):
    """`nn/linear.py` and `executor.py` are files somewhere below the root."""
    known = [f"/{path.relative_to(ROOT)}" for path in SOURCES]
    named = [span.removeprefix("../") for span in code(page) if re.fullmatch(r"[\w./-]+\.py", span)]
    assert [name for name in named if not any(path.endswith(f"/{name}") for path in known)] == []


@each_page
def test_every_dotted_name_imports(page):
    names = re.findall(r"\bshardtrain(?:\.[A-Za-z_]\w*)+", "\n".join(code(page)))
    assert [name for name in names if not imports(name)] == []


def imports(name: str) -> bool:
    parts = name.split(".")
    for end in range(len(parts), 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:end]))
        except ModuleNotFoundError:
            continue
        for part in parts[end:]:
            if not hasattr(found, part):
                return False
            found = getattr(found, part)
        return True
    return False


def test_the_checks_see_what_is_not_there():
    assert not imports("shardtrain.nn.NoSuchLayer")
    assert imports("shardtrain.models.llama.Llama")
    assert expanded("configs/llama_{125m,1b}.yaml") == ["configs/llama_125m.yaml", "configs/llama_1b.yaml"]


def test_comments_name_only_documents_that_exist():
    """A comment may refer to a page of this repository, and to none outside of it."""
    missing = []
    for path in SOURCES:
        if path.is_relative_to(ROOT / "tests"):  # which make files with such names
            continue
        for name in re.findall(r"[\w./-]+/[\w-]+\.md\b|\b[A-Z]{4,}\.md\b", path.read_text()):
            if not any((base / name).exists() for base in (ROOT, path.parent, ROOT / "docs")):
                missing.append(f"{path.relative_to(ROOT)}: {name}")
    assert missing == []


def test_the_design_names_every_room_with_its_floor():
    rows = re.findall(r"^\| (\d+) \| `(\w+)", (ROOT / "docs" / "explain" / "design.md").read_text(), re.MULTILINE)
    named = {room: int(floor) for floor, room in rows}
    rooms = {path.name for path in (ROOT / "shardtrain").iterdir() if (path / "__init__.py").exists()}
    assert named == {room: FLOOR[room] for room in rooms | {"errors"}}
