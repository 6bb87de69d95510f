"""The compilation cache: on by default, bounded, trusted only where others cannot write, and never in a run's way."""

import os
from collections import Counter

import jax
import jax.numpy as jnp
import pytest

from commands import CONFIG
from shardtrain import Trainer, load_config
from shardtrain.launch import compile_cache
from shardtrain.launch.compile_cache import use_cache


@pytest.fixture(autouse=True)
def events(monkeypatch):
    """JAX's own counts of cache hits and misses; no cache before or after."""
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    use_cache(None)
    assert jax.config.jax_compilation_cache_dir is None
    count = Counter()
    jax.monitoring.register_event_listener(lambda event, **_: count.update([event.rsplit("/")[-1]]))
    yield count
    use_cache(None)
    jax.monitoring.clear_event_listeners()


def compile_it(scale: int) -> None:
    jax.jit(lambda x: x * scale)(jnp.ones(3))


def test_what_was_compiled_once_is_loaded(tmp_path, events):
    assert use_cache(tmp_path / "cache")
    compile_it(7)
    assert list((tmp_path / "cache").glob("jit__lambda*"))
    assert (tmp_path / "cache").stat().st_mode & 0o777 == 0o700
    before = events["cache_hits"]
    jax.clear_caches()  # as another process
    compile_it(7)
    assert events["cache_hits"] > before


def test_a_run_keeps_its_cache_beside_its_directory_unless_told(tmp_path):
    run = Trainer.from_config(load_config(CONFIG, [f"run.dir={tmp_path / 'a/run'}"]))
    run.close()
    assert list((tmp_path / "a/.jax_cache").glob("jit_init*"))
    for chosen, place in (("null", None), (tmp_path / "mine", str(tmp_path / "mine"))):
        config = load_config(CONFIG, [f"run.dir={tmp_path / 'b/run'}", f"run.compile_cache={chosen}"])
        Trainer.from_config(config).close()
        assert jax.config.jax_compilation_cache_dir == place
    assert not (tmp_path / "b/.jax_cache").exists()


def test_a_cache_of_the_user_s_own_is_left_alone(tmp_path):
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "own"))
    try:
        assert not use_cache(tmp_path / "cache")
        assert jax.config.jax_compilation_cache_dir == str(tmp_path / "own")
        assert not (tmp_path / "cache").exists()
    finally:
        jax.config.update("jax_compilation_cache_dir", None)


def test_one_warning_where_it_cannot_be_written(tmp_path, caplog):
    (tmp_path / "file").touch()
    assert not use_cache(tmp_path / "file/cache")
    compile_it(8)
    (warning,) = caplog.messages
    assert f"no compilation cache: {tmp_path}/file/cache: Not a directory; set run.compile_cache" in warning


def test_what_others_may_write_is_not_executed(tmp_path, caplog):
    (tmp_path / "cache").mkdir()
    os.chmod(tmp_path / "cache", 0o777)
    assert not use_cache(tmp_path / "cache")
    assert "others may write there" in caplog.text


def test_the_oldest_programs_go_first(tmp_path, monkeypatch):
    monkeypatch.setattr(compile_cache, "_LIMIT", 250)
    for age in range(5):
        (tmp_path / f"{age}").write_bytes(bytes(100))
        os.utime(tmp_path / f"{age}", (1000 - age, 1000 - age))
    os.chmod(tmp_path, 0o700)
    use_cache(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0", "1"]


def test_a_torn_entry_costs_a_warning_and_a_compilation(tmp_path):
    use_cache(tmp_path / "cache")
    compile_it(9)
    for path in (tmp_path / "cache").iterdir():
        path.write_bytes(path.read_bytes()[:50])
    jax.clear_caches()
    with pytest.warns(UserWarning, match="Error reading persistent compilation cache"):
        compile_it(9)
