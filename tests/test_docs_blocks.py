"""Every code block of the pages runs, in the order in which a reader meets them.

The blocks of a page share a folder, and those in Python their names, as the cells of a notebook do. A block with a
title is a file of that name. YAML without one is part of a config: laid over the quickstart, it must be valid (a mesh
replaces that of the quickstart).
A comment above a block may say `<!-- not run: REASON -->`; `<!-- run with: KEY=VALUE ... -->`, which shortens its
`shardtrain train`; or `<!-- fails: WHY -->`, whose error is the text of the next block. Other text is output.
"""

import dataclasses
import json
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from commands import compiled_once, shardtrain  # noqa: F401
from shardtrain.config import parse_config
from shardtrain.config.files import read_file

ROOT = Path(__file__).parent.parent
PAGES = [*sorted((ROOT / "docs").rglob("*.md")), *sorted((ROOT / "examples").glob("*.ipynb"))]
#: Pages whose blocks take more than a few seconds.
LONG = {
    "docs/howto/another-mesh.md",
    "docs/howto/curves.md",
    "docs/howto/data.md",
    "docs/howto/dry-run.md",
    "docs/howto/extend.md",
    "docs/howto/mesh.md",
    "docs/howto/metrics.md",
    "docs/howto/orbax.md",
    "docs/howto/profiling.md",
    "docs/howto/sample.md",
    "docs/howto/tokens.md",
    "docs/tutorials/first-model.md",
    "docs/tutorials/first-run.md",
    "docs/tutorials/gpus.md",
    "examples/shards.ipynb",
}
TOLD, TITLE = r"(?:<!-- (not run|run with|fails): ([^\n]*) -->\n)?", r"(?:title=\"([^\"\n]+)\")?"
FENCE = re.compile(rf"^{TOLD}```(\w*) *{TITLE}\n(.*?)^```", re.M | re.S)


@dataclasses.dataclass(frozen=True)
class Block:
    """A block of code: its language, its text, the file that it is, if any, and what the comment above it says."""

    language: str
    text: str
    file: str = ""
    told: str = ""
    words: str = ""


def blocks(page: Path) -> Iterator[Block]:
    if page.suffix == ".ipynb":
        for cell in json.loads(page.read_text())["cells"]:
            if cell["cell_type"] == "code":
                yield Block("python", "".join(cell["source"]))
        return
    for told, words, language, file, text in FENCE.findall(page.read_text()):
        yield Block(language, text, file, told, words)


def run(block: Block, names: dict, folder: Path, error: str = "") -> str:
    """Do what a reader would do with a block in `folder`, the present directory; returns the error, if it shall fail.

    Args:
      block: what to run.
      names: those that the Python of this page has defined.
      folder: where files are.
      error: that of the block before.
    """
    if block.told == "fails":
        result = shardtrain(*shlex.split(block.text)[1:])
        assert result.code == 2
        return result.err
    if block.file:
        (folder / block.file).write_text(block.text)
    elif block.language == "yaml":
        part, whole = yaml.safe_load(block.text), read_file(ROOT / "configs/quickstart.yaml")
        parse_config(merged(whole | ({"mesh": {}} if "mesh" in part else {}), part), check_files=False)
    elif block.language == "python":
        exec(compile(block.text, "<block>", "exec"), names)
    elif block.language == "bash":
        for command in block.text.replace("\\\n", " ").splitlines():
            program, *words = shlex.split(command)
            assert program == "shardtrain", f"{program}: say why it is not run"
            result = shardtrain(*words, *(block.words.split() if words[0] == "train" else []))
            assert result.code == 0, result.err
    else:
        assert block.language == "text", f"a block of {block.language or 'no language'}: name one that can be run"
        assert not error or block.text == error
    return ""


def merged(below: dict, above: dict) -> dict:
    both = {key: merged(below[key], above[key]) for key in below.keys() & above if isinstance(below[key], dict)}
    return {**below, **above, **both}


def parameters() -> Iterator[object]:
    for page in PAGES:
        name = str(page.relative_to(ROOT))
        if any(block.language != "text" and block.told != "not run" for block in blocks(page)):
            yield pytest.param(page, id=name, marks=[pytest.mark.full] if name in LONG else [])


@pytest.mark.parametrize("page", [*parameters()])
def test_every_block_runs(page, tmp_path, monkeypatch):
    for name in ("configs", "examples"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    before, names = {*sys.modules}, {"__name__": "__main__"}
    try:
        error = ""
        for block in blocks(page):
            if block.told != "not run":
                error = run(block, names, tmp_path, error)
    finally:
        for name in {*sys.modules} - before:
            if str(getattr(sys.modules[name], "__file__", None)).startswith(str(tmp_path)):
                del sys.modules[name]


def test_every_block_is_seen():
    """None is hidden by its form; the records of benchmarks show their commands as they were."""
    for page in PAGES:
        if page.suffix == ".md" and "benchmarks" not in page.parts:
            assert len(re.findall(r"^```", page.read_text(), re.M)) == 2 * len(list(blocks(page))), page
            outside = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S)
            assert not re.search(r"\n\n    \w", outside), page


def test_a_block_that_fails_is_seen(tmp_path):
    for block in (
        Block("python", "1 / 0"),
        Block("yaml", "mesh: {tensr: 4}"),
        Block("bash", "shardtrain config nowhere.yaml"),
        Block("bash", "python nowhere.py"),
        Block("", "a block without a language"),
    ):
        with pytest.raises((ZeroDivisionError, ValueError, AssertionError)):
            run(block, {}, tmp_path)
