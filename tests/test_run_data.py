"""The held-out rows of a run: each counts once, if there are few of them; and preparing them can be stopped."""

import numpy as np
import pytest

from commands import CONFIG, compiled_once, fit, metrics  # noqa: F401
from shardtrain import UserError, build, load_config
from shardtrain.data import write_tokens
from shardtrain.run.data import eval_batches, open_data


@pytest.fixture
def overrides(tmp_path):
    """Of a run on 50 rows, of which 5 are held out, in batches of 8."""
    write_tokens(tmp_path / "tokens.bin", [np.random.default_rng(0).integers(0, 64, 50 * 16 + 1)], 64)
    data = f"type: tokens, path: {tmp_path}/tokens.bin, seq_len: 16, global_batch: 8, held_out: 0.1"
    return [f"data={{{data}}}"]


@pytest.mark.parametrize(("held_out", "most", "rows"), [(0.1, 5, [5]), (0.4, 5, [8, 8, 4]), (0.4, 2, [8, 8])])
def test_an_evaluation_reads_each_held_out_row_once_or_so_many_batches(tmp_path, overrides, held_out, most, rows):
    config = load_config(CONFIG, [*overrides, f"data.held_out={held_out}", f"eval.batches={most}"])
    _, source, _ = open_data(config, tmp_path)
    sharding = build(config).partitioner.sharding(("batch", "seq"))
    for _ in range(2):
        batches = [{name: np.asarray(leaf) for name, leaf in b.items()} for b in eval_batches(source, config, sharding)]
        counted = [batch["tokens"][batch["loss_mask"].any(1)] for batch in batches]
        assert [len(part) for part in counted] == rows
        expected = np.stack([source[row]["tokens"] for row in range(sum(rows))])
        np.testing.assert_array_equal(np.concatenate(counted), expected)


def test_a_run_may_hold_out_less_than_a_batch(tmp_path, overrides):
    run = fit(tmp_path / "run", *overrides, "run.steps=2", "eval.every=1")
    losses = [row["eval_loss"] for row in metrics(run.directory)]
    assert len(losses) == 2
    assert np.isfinite(losses).all()


def test_preparing_can_be_stopped(tmp_path):
    config = load_config(CONFIG, ["data.type=corpus", "model.vocab_size=300"])
    with pytest.raises(UserError, match="stopped while preparing data; nothing was trained; the same command starts"):
        open_data(config, tmp_path, should_stop=lambda: True)
