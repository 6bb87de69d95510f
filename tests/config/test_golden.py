"""The resolved form of every file in configs/, so that no default changes unseen.

After a change that is meant, write the golden files anew and look at their diff:

    python tests/config/test_golden.py
"""

from pathlib import Path

import pytest

from shardtrain.config import load_config

CONFIGS = Path(__file__).parents[2] / "configs"
GOLDEN = Path(__file__).parent / "golden"
NAMES = sorted(path.name for path in CONFIGS.glob("*.yaml"))


@pytest.mark.parametrize("name", NAMES)
def test_resolved_form_is_the_golden_one(name):
    assert load_config(CONFIGS / name).to_yaml() == (GOLDEN / name).read_text()


def test_every_golden_file_has_its_config():
    assert sorted(path.name for path in GOLDEN.iterdir()) == NAMES


if __name__ == "__main__":
    for config in CONFIGS.glob("*.yaml"):
        (GOLDEN / config.name).write_text(load_config(config).to_yaml())
