"""The README and docs/ claim nothing that is not so."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def test_the_research_example_is_short_and_learns(tmp_path):
    (example,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len(example.splitlines()) <= 25
    run = subprocess.run([sys.executable, "-c", example], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    losses = [float(line.split()[1]) for line in run.stdout.splitlines()]
    assert len(losses) == 20
    assert losses[-1] < losses[0] - 0.5


def test_the_config_shown_is_the_quickstart(tmp_path):
    from shardtrain.config import load_config

    (shown,) = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs/tutorials/first-run.md").read_text(), re.DOTALL)
    quickstart = ROOT / "configs" / "quickstart.yaml"
    (tmp_path / "shown.yaml").write_text(shown)
    from_page, whole = load_config(tmp_path / "shown.yaml").to_dict(), load_config(quickstart).to_dict()
    for section in ("run", "devices", "mesh", "model", "data", "checkpoint"):
        assert from_page[section] == whole[section]
    assert from_page["optimizer"] == whole["optimizer"]


def test_every_file_that_the_readme_names_exists():
    ours = re.sub(r"https://\S+", "", README)
    for name in re.findall(r"(?:tests|configs|benchmarks|models|docs|examples)/[\w/-]+(?:\.\w+)?", ours):
        assert (ROOT / name).exists(), name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_leads_somewhere(page):
    for link in re.findall(r"\]\((?!http)([^)]+)\)|src=\"(.*?)\"", page.read_text()):
        link = "".join(link)
        path, _, heading = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        if heading:
            headings = re.findall(r"^#+ (.*)$", target.read_text(), re.MULTILINE)
            assert heading in {re.sub(r"[^\w -]", "", each).lower().replace(" ", "-") for each in headings}, link


def test_every_option_that_a_page_names_exists():
    from shardtrain.config import RunConfig
    from shardtrain.config.model_type import ModelType

    known = {"model": set(ModelType.find("llama").names) | {"type"}}
    for section, field in RunConfig.model_fields.items():
        known.setdefault(section, set(getattr(field.annotation, "model_fields", ())))
    sections = "|".join(section for section, keys in known.items() if keys)
    named = [key for page in PAGES for key in re.findall(rf"`({sections})\.(?!py`|txt`)(\w+)[`:=]", page.read_text())]
    assert len(named) > 20
    assert [key for key in named if key[1] not in known[key[0]]] == []


@pytest.mark.full
def test_every_pytest_command_of_the_table_selects_tests():
    claims = (ROOT / "docs/claims.md").read_text()
    commands = re.findall(r"`(pytest [^`]+)`", README + claims)
    assert len(commands) > 20
    words = {word for command in commands for word in shlex.split(command)[1:] if word.startswith("tests")}
    collect = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-m", "full or not full", *sorted(words)]
    run = subprocess.run(collect, cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stdout
    for word in words:
        assert word in run.stdout, word
