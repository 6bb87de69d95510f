"""The house rules: who may import whom, and what is public."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import shardtrain

ROOT = Path(__file__).parent.parent
#: The floors, from the ground up, and their rooms. A file imports only from floors below, and from its own room.
FLOORS = [
    ["errors"],
    ["host", "hlo"],
    ["launch"],
    ["sharding"],
    ["weights", "data", "metrics", "checkpoint"],
    ["optim", "collectives"],
    ["nn"],
    ["pipeline"],
    ["train", "config"],
    ["run", "interop"],
    ["plan", "explain", "verify"],
    ["cli"],
    ["__main__"],
]
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}


def room(module: str) -> str | None:
    """The room that a module `shardtrain.<...>` lies in."""
    name = module.removeprefix("shardtrain").lstrip(".")
    first = name.partition(".")[0]
    return first if first in FLOOR else None


def imports(path: Path) -> list[str]:
    """All modules of ours that a file imports, also inside functions; public names with their rooms."""
    found, ours = [], set()
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
            ours |= {alias.asname or "shardtrain" for alias in node.names if alias.name.split(".")[0] == "shardtrain"}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            found += [f"{node.module}.{alias.name}" for alias in node.names]
    for node in ast.walk(tree):  # import shardtrain as st; st.Trainer
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in ours:
            found += [f"shardtrain.{node.attr}"] if node.attr in shardtrain._HOME else []
    return [_home(name) for name in found if name.split(".")[0] == "shardtrain"]


def _home(name: str) -> str:
    public = name.removeprefix("shardtrain.")
    return f"shardtrain.{shardtrain._HOME[public]}.{public}" if public in shardtrain._HOME else name


def violations(path: Path, own: str) -> list[str]:
    """What a file of a room imports and must not."""
    found = []
    for name in imports(path):
        if name in ("shardtrain", "shardtrain.__version__"):
            continue
        target = room(name)
        if target is None:
            found.append(f"{path} imports {name}, which lies in no room")
        elif target != own and FLOOR[target] >= FLOOR[own]:
            found.append(f"{path} in room {own} imports {name}")
        if name.startswith("shardtrain.models"):
            found.append(f"{path} names a model")
    return found


FILES = sorted((ROOT / "shardtrain").rglob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_a_file_imports_only_rooms_below_its_own(path):
    own = room(".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"))
    if own is None:
        assert path == ROOT / "shardtrain" / "__init__.py", f"{path} lies in no room: add it to FLOORS"
        return
    assert violations(path, own) == []


@pytest.mark.parametrize(
    ("line", "sees"),
    [
        ("from shardtrain import Trainer", "in room nn imports shardtrain.run.Trainer"),
        ("def f():\n    from shardtrain import Trainer as T", "in room nn imports shardtrain.run.Trainer"),
        ("import shardtrain as st\nst.build", "in room nn imports shardtrain.run.build"),
        ("import shardtrain\nshardtrain.load_config()", "in room nn imports shardtrain.config.load_config"),
        ("from shardtrain.train.loop import Loop", "in room nn imports shardtrain.train.loop.Loop"),
        ("import shardtrain.run", "in room nn imports shardtrain.run"),
        ("from shardtrain import nowhere", "which lies in no room"),
        ("from shardtrain import Partitioner, UserError, __version__", None),
    ],
)
def test_the_walk_sees_every_way_to_import(tmp_path, line, sees):
    (tmp_path / "planted.py").write_text(line)
    found = violations(tmp_path / "planted.py", "nn")
    assert len(found) == (sees is not None)
    assert sees is None or found[0].endswith(sees)


def test_models_are_written_with_the_public_parts_only():
    for path in (ROOT / "models").glob("*.py"):
        assert all(name.startswith("shardtrain.nn") for name in imports(path)), path


def test_files_and_functions_are_short():
    """The limits of docs/CONTRIBUTING.md, for the package and the models."""
    long = []
    for path in [*FILES, *(ROOT / "models").glob("*.py")]:
        text = path.read_text()
        if (lines := len(text.splitlines())) > 250:
            long.append(f"{path} has {lines} lines")
        functions = (node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.FunctionDef))
        long += [
            f"{path}: {node.name} has {lines} lines"
            for node in functions
            if (lines := node.end_lineno - node.lineno + 1) > 60
        ]
    assert not long


def test_no_private_jax():
    for path in [*FILES, *(ROOT / "models").glob("*.py"), *(ROOT / "benchmarks").glob("*.py")]:
        assert "jax._src" not in path.read_text(), path


PUBLIC = """
    Callback Checkpointer ConfigError Job Loader Loop MeshSpec ModelDef Partitioner Precision RunConfig Sampler
    Sampling TrainState Trainer UserError Writer __version__ abstract_state averaged build constrain evaluate fit
    generate init_state load_config make_eval_step make_rules make_train_step open_source optimizer parse_config
    sample select_devices sharding_report start_ema
"""


def test_the_public_surface_is_this_and_all_of_it_loads():
    assert sorted(shardtrain.__all__) == sorted(PUBLIC.split())
    for name in shardtrain.__all__:
        assert getattr(shardtrain, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'Trianer'"):
        _ = shardtrain.Trianer  # type: ignore[attr-defined]


def test_the_folder_models_is_no_package_of_its_own():
    run = subprocess.run([sys.executable, "-c", "import models"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert run.returncode != 0
    assert "import `shardtrain.models` instead" in run.stderr


def test_importing_starts_nothing_heavy():
    """No backend, no signal handler, none of the packages that only some rooms need."""
    code = (
        "import signal, sys; before = signal.getsignal(signal.SIGTERM); import shardtrain;"
        "assert signal.getsignal(signal.SIGTERM) is before;"
        "heavy = {'jax', 'orbax', 'grain', 'matplotlib', 'tensorboardX', 'tokenizers', 'pydantic', 'typer'};"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
