"""Two real processes of four devices each: who reads which rows, and what the global batch then holds."""

import json
import socket
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from shardtrain.data import Loader, SyntheticTokens

WORKER = Path(__file__).parent / "workers" / "load.py"
BATCHES, B = 3, 8


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    """What each of the two processes wrote down."""
    folder = tmp_path_factory.mktemp("two")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    outs = [folder / f"{process}.json" for process in range(2)]
    logs = [open(folder / f"{process}.log", "w+") for process in range(2)]  # noqa: SIM115
    workers = [
        subprocess.Popen([sys.executable, WORKER, address, "2", str(i), outs[i]], stdout=log, stderr=log)
        for i, log in enumerate(logs)
    ]
    try:
        for worker, log in zip(workers, logs, strict=True):
            assert worker.wait(60) == 0, Path(log.name).read_text()
    finally:
        for worker, log in zip(workers, logs, strict=True):
            worker.kill()
            worker.wait()
            log.close()
    return [json.loads(out.read_text()) for out in outs]


def batches_of_one_process(count, state=None):
    source = SyntheticTokens(seq_len=4, vocab_size=50, seed=1, rows=64)
    sharding = NamedSharding(jax.make_mesh((8,), ("data",), (AxisType.Auto,)), P("data"))
    with Loader(source, global_batch=B, seed=0, sharding=sharding, state=state) as loader:
        return [jax.tree.map(np.asarray, next(loader)) for _ in range(count)], loader.state


@pytest.mark.parametrize("mesh", ["pipe outermost", "data outermost"])
def test_every_shard_is_its_part_of_the_batch_of_one_process(reports, mesh):
    expected, _ = batches_of_one_process(BATCHES)
    for t, batch in enumerate(expected):
        for name, leaf in batch.items():
            held = np.zeros(B, int)
            for report in reports:
                for start, content in report[mesh]["shards"][t][name]:
                    np.testing.assert_array_equal(content, leaf[start : start + len(content)])
                    held[start : start + len(content)] += 1
            np.testing.assert_array_equal(held, 4 if mesh == "pipe outermost" else 2)
    assert [report[mesh]["total"] for report in reports] == [expected[-1]["tokens"].sum()] * 2


def test_processes_that_differ_only_in_pipe_read_the_same_rows(reports):
    first, second = (set(report["pipe outermost"]["read"]) for report in reports)
    assert first == second
    assert len(first) == BATCHES * B


def test_processes_that_differ_in_data_read_different_rows(reports):
    first, second = (set(report["data outermost"]["read"]) for report in reports)
    assert len(first) == len(second) == BATCHES * B // 2
    assert first.isdisjoint(second)


def test_the_state_is_the_same_for_any_number_of_processes(reports):
    _, state = batches_of_one_process(BATCHES)
    meshes = ["pipe outermost", "data outermost"]
    assert [report[mesh]["state"] for report in reports for mesh in meshes] == [state] * 4
    continued, _ = batches_of_one_process(1, state=reports[1]["pipe outermost"]["state"])
    whole, _ = batches_of_one_process(BATCHES + 1)
    np.testing.assert_array_equal(continued[0]["tokens"], whole[-1]["tokens"])


def test_the_last_batch_of_all_processes_holds_each_row_that_is_left_once(reports):
    """19 rows in batches of 8: of the last batch three count."""
    masks = [{}, {}]
    for process, report in enumerate(reports):
        for start, content in report["ends"]["shards"][-1]["loss_mask"]:
            masks[process] |= {start + row: sum(mask) for row, mask in enumerate(content)}
    assert {row: weight for mask in masks for row, weight in mask.items()} == {
        row: 4.0 if row < 3 else 0.0 for row in range(8)
    }
    read = [set(report["ends"]["read"]) for report in reports]
    assert read[0] | read[1] == set(range(19))
    assert [report["ends"]["state"]["next_row"] for report in reports] == [19, 19]
