import os

import numpy as np
import pytest

from shardtrain.checkpoint import manifest
from shardtrain.errors import UserError
from shardtrain.host.files import sha256


@pytest.fixture
def step(tmp_path):
    root = tmp_path / "7"
    (root / "state" / "d").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name, size in (("meta", 30), ("state/index", 200), ("state/d/data", 5000), ("state/empty", 0)):
        (root / name).write_bytes(rng.bytes(size))
    manifest.write(tmp_path, 7)
    return tmp_path


def test_an_untouched_step_agrees(step):
    assert manifest.problem(step, 7) is None
    assert {path.name for path in step.iterdir()} == {"7", "7.manifest.json"}


@pytest.mark.parametrize("name", ["meta", "state/index", "state/d/data"])
@pytest.mark.parametrize("how", ["flip", "truncate", "delete", "append"])
def test_every_damage_is_found_and_the_file_named(step, damage, name, how):
    damage(step / "7" / name, how, np.random.default_rng(hash_of(name + how)))
    assert f"7/{name} " in manifest.problem(step, 7)


def hash_of(text):
    return int.from_bytes(text.encode(), "big") % 2**32


def test_every_flipped_bit_of_the_manifest_itself_is_found(step):
    path = manifest.path_of(step, 7)
    raw = path.read_bytes()
    missed = []
    for bit in range(0, 8 * len(raw), 3):
        damaged = bytearray(raw)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        if manifest.problem(step, 7) is None:
            missed.append(bit)
    path.write_bytes(raw)
    assert manifest.problem(step, 7) is None
    assert not missed


def test_a_file_more_or_no_step_at_all(step):
    (step / "7" / "zebra").write_text("")
    assert "7/zebra was not there" in manifest.problem(step, 7)
    (step / "7").rename(step / "8")
    assert manifest.problem(step, 7) == "7/ is missing"


def test_a_manifest_speaks_for_its_own_step_only(step):
    (step / "7").rename(step / "8")
    manifest.path_of(step, 7).rename(manifest.path_of(step, 8))
    assert "8.manifest.json is not a readable manifest" in manifest.problem(step, 8)


def test_hash_up_to_hashes_small_files_and_measures_the_others(step, damage):
    damage(step / "7" / "state/d/data", "flip", np.random.default_rng(0))
    assert manifest.problem(step, 7, hash_up_to=1000) is None
    damage(step / "7" / "meta", "flip", np.random.default_rng(0))
    assert "7/meta" in manifest.problem(step, 7, hash_up_to=1000)


def test_a_truncated_large_file_is_found_without_hashing(step, damage):
    damage(step / "7" / "state/d/data", "truncate", np.random.default_rng(0))
    assert "instead of 5000" in manifest.problem(step, 7, hash_up_to=0)


def test_a_file_that_may_not_be_read_is_not_called_corrupt(open_path):
    if os.geteuid() != 0:
        pytest.skip("needs root to become another user")
    (open_path / "1").mkdir()
    (open_path / "1" / "data").write_text("x")
    manifest.write(open_path, 1)
    (open_path / "1" / "data").chmod(0)
    os.seteuid(65534)
    try:
        with pytest.raises(UserError, match=r"cannot read .*/1/data: Permission denied"):
            manifest.problem(open_path, 1)
    finally:
        os.seteuid(0)


@pytest.mark.parametrize("count", [1, 2, 3, 9])
def test_shares_hash_each_file_once_together(step, monkeypatch, count):
    hashed = []
    monkeypatch.setattr(manifest, "sha256", lambda path: hashed.append(path.name) or sha256(path))
    for index in range(count):
        assert manifest.problem(step, 7, share=(index, count)) is None
    assert sorted(hashed) == ["data", "empty", "index", "meta"]


def test_a_share_finds_what_lies_in_it_and_what_is_missing_anywhere(step, damage):
    damage(step / "7/state/index", "flip", np.random.default_rng(0))  # the second largest
    assert manifest.problem(step, 7, share=(0, 2)) is None
    assert "7/state/index" in manifest.problem(step, 7, share=(1, 2))
    (step / "7/meta").unlink()
    assert "7/meta is missing" in manifest.problem(step, 7, share=(0, 2))
