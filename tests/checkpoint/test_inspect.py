import numpy as np
import pytest

from shardtrain.checkpoint import Checkpointer, list_steps, parameter_table, read_extra, verify
from shardtrain.errors import UserError


@pytest.fixture
def run(tmp_path, make_state, damage):
    """Steps of every status below a run directory."""
    directory = tmp_path / "checkpoints"
    with Checkpointer(directory, keep=9) as checkpointer:
        for step in (1, 2, 3, 10):
            checkpointer.save(step, make_state(step), {"step": step})
    data = max((directory / "2").rglob("*"), key=lambda path: path.stat().st_size if path.is_file() else 0)
    damage(data, "flip", np.random.default_rng(0))
    (directory / "3.manifest.json").unlink()
    (directory / "10").rename(directory / "10.corrupt")
    (directory / "10.manifest.json").rename(directory / "10.corrupt.manifest.json")
    (directory / "11.orbax-checkpoint-tmp").mkdir()
    return tmp_path


def test_list_tells_every_status_and_changes_nothing(run):
    before = sorted(run.rglob("*"))
    records = list_steps(run)
    assert [(r.step, r.status) for r in records] == [
        (1, "verified"),
        (2, "corrupt"),
        (3, "unverified"),
        (10, "corrupt"),
        (11, "uncommitted"),
    ]
    assert records == list_steps(run / "checkpoints")
    assert records[1].detail.startswith("2/")
    inside = [path for path in (run / "checkpoints" / "1").rglob("*") if path.is_file()]
    assert records[0].bytes == sum(path.stat().st_size for path in inside)
    assert records[0].time == (run / "checkpoints" / "1").stat().st_mtime
    assert sorted(run.rglob("*")) == before


def test_a_list_without_hashes_does_not_claim_to_have_checked(run):
    assert [r.status for r in list_steps(run, hashes=False)][:3] == ["unchecked", "unchecked", "unverified"]


def test_verify_one_or_all(run):
    assert [(r.step, r.status) for r in verify(run)] == [(1, "verified"), (2, "corrupt"), (3, "unverified")]
    assert [r.status for r in verify(run, 2)] == ["corrupt"]
    with pytest.raises(UserError, match=r"step 5 does not exist .* \[1, 2, 3\]"):
        verify(run, 5)
    with pytest.raises(UserError, match="not a directory"):
        list_steps(run / "nowhere")


def test_the_parameter_table_comes_from_metadata(run):
    table = {parameter.path: parameter for parameter in parameter_table(run, 1)}
    w = table["params.blocks.w"]
    assert (w.shape, w.dtype, w.bytes) == ((16, 8), "bfloat16", 256)
    assert table["key"].dtype == "uint32"
    assert table["opt_state.0.count"].shape == ()
    assert list(table) == sorted(table)


def test_show_refuses_what_cannot_be_trusted(run, damage):
    damage(run / "checkpoints" / "1" / "_CHECKPOINT_METADATA", "flip", np.random.default_rng(0))
    for show in (read_extra, parameter_table):
        with pytest.raises(UserError, match="corrupt: 1/_CHECKPOINT_METADATA"):
            show(run, 1)
        with pytest.raises(UserError, match="has no manifest"):
            show(run, 3)


def test_a_foreign_folder_is_no_run_without_steps(tmp_path):
    """Other people number their files and folders, too, thousands of them."""
    for number in range(3000):
        (tmp_path / str(number)).touch()
    (tmp_path / "20240/photos").mkdir(parents=True)
    for look in (list_steps, verify):
        with pytest.raises(UserError, match="is not a run directory; name one that has a folder checkpoints/"):
            look(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    assert list_steps(tmp_path) == []


def test_a_folder_of_steps_is_known_whatever_its_name(run):
    other = (run / "checkpoints").rename(run / "steps")
    assert [record.step for record in list_steps(other)] == [1, 2, 3, 10, 11]
