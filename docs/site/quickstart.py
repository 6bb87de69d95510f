"""The pictures of the quickstart, by running it in a terminal: python docs/site/quickstart.py

It writes loss.png and terminal.svg of docs/pictures, and beside them the hashes of the files that they depend on, which
a test compares with the files of today.
"""

from __future__ import annotations

import hashlib
import json
import os
import pty
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.text import Text

ROOT = Path(__file__).parent.parent.parent
FOLDER = ROOT / "docs/pictures"
RECORD = FOLDER / "quickstart.json"
INPUTS = (
    "configs/quickstart.yaml",
    "models/llama.py",
    "shardtrain/cli/summary.py",
    "shardtrain/metrics/plot.py",
    "shardtrain/metrics/progress.py",
)
COMMAND = "shardtrain train configs/quickstart.yaml"
COLUMNS = 100


def hashes() -> dict[str, str]:
    """The sha256 of each file that the pictures depend on."""
    return {name: hashlib.sha256((ROOT / name).read_bytes()).hexdigest() for name in INPUTS}


def run(folder: Path) -> str:
    """Run the quickstart in an empty folder, in a terminal of its own; returns all that it wrote there."""
    (folder / "configs").symlink_to(ROOT / "configs")
    ours, theirs = pty.openpty()
    command = [sys.executable, "-m", *COMMAND.split()]
    size = {"COLUMNS": str(COLUMNS), "LINES": "40", "TERM": "xterm-256color"}
    program = subprocess.Popen(command, cwd=folder, stdout=theirs, stderr=theirs, env={**os.environ, **size})
    os.close(theirs)
    written = b""
    while True:
        try:
            written += (part := os.read(ours, 1 << 16))
        except OSError:  # how Linux says that nobody has the other end open
            part = b""
        if not part:
            break
    assert program.wait() == 0, written.decode()
    return written.decode()


def screen(written: str) -> list[str]:
    """The lines that are left on a terminal, with their colours. Rich clears each line before it writes it again."""
    lines, row = [""], 0
    for part in re.split(r"(\r|\n|\x1b\[\d*A|\x1b\[2K|\x1b\[\?25[lh])", written):
        if part == "\n":
            row += 1
            lines += [""] * (row + 1 - len(lines))
        elif part.endswith("A") and part.startswith("\x1b["):
            row -= int(part[2:-1] or 1)
        elif part == "\x1b[2K":
            lines[row] = ""
        elif part and part != "\r" and "?25" not in part:
            lines[row] += part
    return lines


def terminal(lines: list[str]) -> str:
    """An SVG of the terminal, without fonts from elsewhere."""
    console = Console(record=True, width=COLUMNS, file=open(os.devnull, "w"), force_terminal=True)  # noqa: SIM115
    console.print(f"[bold green]$[/] {COMMAND}", highlight=False)
    for line in [*lines, ""]:
        console.print(Text.from_ansi(line.replace("\t", "    ")), soft_wrap=False, highlight=False)
    svg = console.export_svg(title="quickstart", unique_id="quickstart")
    return re.sub(r"@font-face \{.*?\}\s*", "", svg, flags=re.S)


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        lines = screen(run(Path(folder)))
        shown = [line.replace(folder + "/", "") for line in lines]
        shutil.copy(Path(folder) / "runs/quickstart/loss.png", FOLDER / "loss.png")
    while shown and not shown[-1].strip():
        shown.pop()
    (FOLDER / "terminal.svg").write_text(terminal(shown))
    RECORD.write_text(json.dumps(hashes(), indent=1) + "\n")


if __name__ == "__main__":
    main()
