"""What is on the disk after damage and crashes, and which step is trusted then."""

import logging
import shutil

import numpy as np
import pytest

from shardtrain.checkpoint import Checkpointer, load_weights, manifest
from shardtrain.errors import UserError
from shardtrain.host.files import sha256


@pytest.fixture
def run(tmp_path, make_state):
    """A directory with the verified steps 1, 2 and 3."""
    directory = tmp_path / "run"
    with Checkpointer(directory) as checkpointer:
        for step in (1, 2, 3):
            checkpointer.save(step, make_state(step), {"step": step})
    return directory


def listing(directory):
    return sorted(path.name for path in directory.iterdir())


def files_of(directory, step):
    inside = [path for path in (directory / str(step)).rglob("*") if path.is_file()]
    return sorted(path.relative_to(directory) for path in [*inside, directory / f"{step}.manifest.json"])


def test_any_damage_to_any_file_falls_back_to_the_exact_step_before(
    run, tmp_path, make_state, make_abstract, bits, damage, caplog
):
    rng, before, abstract = np.random.default_rng(0), bits(make_state(2)), make_abstract()
    assert len(files_of(run, 3)) > 10
    for number, name in enumerate(files_of(run, 3)):
        for how in ("flip", "truncate", "delete", "append"):
            deletes_manifest = how == "delete" and name.name == "3.manifest.json"  # that is "unverified", below
            if deletes_manifest or (how in ("flip", "truncate") and (run / name).stat().st_size == 0):
                continue
            copy = tmp_path / f"{number}-{how}"
            shutil.copytree(run, copy)
            damage(copy / name, how, rng)
            caplog.clear()
            with Checkpointer(copy) as checkpointer:
                restored = checkpointer.restore(abstract)
            assert (restored.step, restored.extra) == (2, {"step": 2}), (name, how)
            assert bits(restored.state) == before, (name, how)
            # a damaged manifest may be called unreadable, or accuse the file whose hash was changed
            assert str(name) in caplog.text or name.name == "3.manifest.json"
            assert listing(copy)[-2:] == ["3.corrupt", "3.corrupt.manifest.json"]
            shutil.rmtree(copy)


@pytest.mark.full
def test_every_kind_of_damage_many_times(run, tmp_path, make_state, make_abstract, bits, damage):
    rng, before, abstract = np.random.default_rng(1), bits(make_state(2)), make_abstract()
    names = [name for name in files_of(run, 3) if (run / name).stat().st_size]
    for trial in range(300):
        copy = tmp_path / str(trial)
        shutil.copytree(run, copy)
        name = names[rng.integers(len(names))]
        damage(copy / name, ("flip", "truncate")[trial % 2], rng)
        with Checkpointer(copy) as checkpointer:
            restored = checkpointer.restore(abstract)
        assert restored.step == 2, (trial, name)
        assert bits(restored.state) == before
        shutil.rmtree(copy)


def test_when_all_are_corrupt_the_run_stops_and_stays_stopped(run, make_state, make_abstract, damage):
    for step in (1, 2, 3):
        damage(run / str(step) / "state" / "_METADATA", "flip", np.random.default_rng(step))
    for reason in ("3/state/_METADATA does not have", "set aside earlier"):
        with Checkpointer(run) as checkpointer:
            with pytest.raises(UserError, match=rf"no intact .*1\.corrupt, 2\.corrupt, 3\.corrupt \({reason}"):
                checkpointer.restore(make_abstract())
            with pytest.raises(UserError, match="no intact checkpoint"):
                checkpointer.latest()
    with pytest.raises(UserError, match="no intact checkpoint"):
        load_weights(run, make_abstract().params)


def test_a_corrupt_step_can_be_saved_again_and_corrupted_again(run, make_state, make_abstract, bits, damage):
    for expected in ("3.corrupt", "3.corrupt-2", "3.corrupt-3"):
        damage(run / "3" / "state" / "_METADATA", "truncate", np.random.default_rng(0))
        with Checkpointer(run) as checkpointer:
            assert checkpointer.latest() == 2
            assert {expected, f"{expected}.manifest.json"} < set(listing(run))
            checkpointer.save(3, make_state(3), {})
            assert bits(checkpointer.restore(make_abstract()).state) == bits(make_state(3))


def test_a_step_that_vanished_counts_as_corrupt(run, caplog):
    shutil.rmtree(run / "3")
    with Checkpointer(run) as checkpointer:
        assert checkpointer.latest() == 2
        assert "3/ is missing" in caplog.text
        shutil.rmtree(run / "2")
        shutil.rmtree(run / "1")
        with pytest.raises(UserError, match=r"no intact checkpoint is left in .*2\.corrupt, 3\.corrupt"):
            checkpointer.latest()


def test_a_step_without_manifest_is_set_aside_and_the_one_before_used(run, make_state, caplog):
    (run / "3.manifest.json").unlink()
    with Checkpointer(run) as checkpointer:
        assert checkpointer.latest() == 2
        assert "step 3" in caplog.text
        assert "set aside as 3.unverified" in caplog.text
        checkpointer.save(3, make_state(3), {})
        assert checkpointer.latest() == 3
    assert "3.unverified" in listing(run)


def test_when_the_very_first_save_was_interrupted_the_run_starts_afresh_each_time(tmp_path, make_state):
    for expected in ("1.unverified", "1.unverified-2"):
        with Checkpointer(tmp_path) as checkpointer:
            checkpointer.save(1, make_state(1), {})
            checkpointer.wait()
            (tmp_path / "1.manifest.json").unlink()
            assert checkpointer.latest() is None
            assert expected in listing(tmp_path)


def test_manifests_lost_in_a_copy_are_no_reason_to_start_afresh(run):
    for path in run.glob("*.manifest.json"):
        path.unlink()
    before = listing(run)
    with (
        Checkpointer(run) as checkpointer,
        pytest.raises(UserError, match=r"\[1, 2, 3\] .* have no manifest"),
    ):
        checkpointer.latest()
    assert listing(run) == before


def test_interrupted_saves_and_deletions_leave_nothing(run, caplog):
    shutil.copytree(run / "3", run / "4.orbax-checkpoint-tmp")
    (run / "1").rename(run / "1.deleting")  # killed before its manifest went
    (run / "4.manifest.json.tmp").write_text("{")
    (run / "notes.txt").write_text("mine")
    caplog.set_level(logging.WARNING)
    with Checkpointer(run) as checkpointer:
        assert checkpointer.latest() == 3
    assert listing(run) == ["2", "2.manifest.json", "3", "3.manifest.json", "notes.txt"]
    assert "4.orbax-checkpoint-tmp: its save was interrupted" in caplog.text


def test_a_step_asked_for_by_number_is_never_replaced_by_another(run, make_state, make_abstract, bits, damage):
    damage(run / "3" / "state" / "_METADATA", "flip", np.random.default_rng(0))
    before = listing(run)
    with Checkpointer(run) as checkpointer:
        assert bits(checkpointer.restore(make_abstract(), 1).state) == bits(make_state(1))
        with pytest.raises(UserError, match=r"checkpoint 3 .* is corrupt: 3/state/_METADATA"):
            checkpointer.restore(make_abstract(), 3)
        with pytest.raises(UserError, match=r"step 7 .* does not exist; the verifiable steps are \[1, 2, 3\]"):
            checkpointer.restore(make_abstract(), 7)
        (run / "2.manifest.json").unlink()
        with pytest.raises(UserError, match=r"step 2 .* has no manifest"):
            checkpointer.restore(make_abstract(), 2)
    assert listing(run) == sorted(set(before) - {"2.manifest.json"})


def test_weights_fall_back_without_touching_the_other_run(run, make_state, make_abstract, bits, damage, caplog):
    damage(run / "3" / "state" / "_METADATA", "flip", np.random.default_rng(0))
    before = listing(run)
    assert bits(load_weights(run, make_abstract().params)) == bits(make_state(2).params)
    assert "checkpoint 3" in caplog.text
    assert listing(run) == before


def test_a_step_is_never_overwritten_or_saved_below_a_newer_one(run, make_state):
    with Checkpointer(run) as checkpointer:
        for step in (2, 3):
            with pytest.raises(UserError, match=rf"cannot save step {step} .*: step 3 already exists there"):
                checkpointer.save(step, make_state(step), {})
        checkpointer.save(4, make_state(4), {})


def test_retention_keeps_the_newest_and_every_kth(tmp_path, make_state):
    with Checkpointer(tmp_path, keep=2, keep_every=4) as checkpointer:
        for step in range(1, 10):
            checkpointer.save(step, make_state(step), {})
        checkpointer.wait()
    assert listing(tmp_path) == sorted(name for s in (4, 8, 9) for name in (f"{s}", f"{s}.manifest.json"))


def test_an_old_step_outlives_a_newer_one_that_does_not_read_back(run, make_state, monkeypatch, damage):
    from shardtrain.checkpoint import manifest

    write = manifest.write

    def write_on_a_failing_disk(directory, step):
        write(directory, step)
        damage(directory / str(step) / "state" / "_METADATA", "flip", np.random.default_rng(0))

    monkeypatch.setattr(manifest, "write", write_on_a_failing_disk)
    checkpointer = Checkpointer(run, keep=1)
    checkpointer.save(4, make_state(4), {})
    with pytest.raises(UserError, match=r"saving step 4 .* does not read back: 4/state/_METADATA .* step 3, is intact"):
        checkpointer.close()
    assert listing(run)[:2] == ["1", "1.manifest.json"]
    assert listing(run)[-2:] == ["4.corrupt", "4.corrupt.manifest.json"]


def test_of_the_copies_without_manifest_only_the_newest_stays(run, make_state, caplog):
    """Each interrupted save leaves one, as large as a step."""
    for step, kept in ((3, "3.unverified"), (3, "3.unverified-2"), (10, "10.unverified")):
        with Checkpointer(run) as checkpointer:
            if str(step) not in listing(run):
                checkpointer.save(step, make_state(step), {})
                checkpointer.wait()
            (run / f"{step}.manifest.json").unlink()
            assert checkpointer.latest() == 2
        assert [name for name in listing(run) if "unverified" in name] == [kept]
    assert "removing " in caplog.text
    assert "3.unverified-2" in caplog.text


@pytest.mark.parametrize("step", [None, 3])
def test_to_restore_the_newest_hashes_each_file_once(run, make_abstract, monkeypatch, step):
    hashed = []
    monkeypatch.setattr(manifest, "sha256", lambda path: hashed.append(path.name) or sha256(path))
    files = sorted(path.name for path in files_of(run, 3) if path.name != "3.manifest.json")
    with Checkpointer(run) as checkpointer:
        if step is not None:
            assert checkpointer.latest() == step
            assert checkpointer.extra(step) == {"step": step}
        assert checkpointer.restore(make_abstract(), step).extra == {"step": 3}
        assert sorted(hashed) == files
        checkpointer.restore(make_abstract(), 3)  # another time, long after
        assert sorted(hashed) == sorted(2 * files)
