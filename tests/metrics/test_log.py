"""The metrics log keeps every bit, survives being killed, and can be cut back to a step."""

import json
import math
import os
import signal
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event, SessionLog
from tensorboardX.record_writer import RecordWriter

from shardtrain.errors import UserError
from shardtrain.metrics import MetricsLog, read
from shardtrain.metrics.log import tail


def steps(directory):
    return [row["step"] for row in read(directory)]


def test_floats_come_back_bit_for_bit(tmp_path):
    values = [0.1, 1 / 3, 5e-324, 1.7976931348623157e308, -0.0, float(np.float32(2.7182817)), 1e22]
    with MetricsLog(tmp_path, tensorboard=False) as log:
        for step, value in enumerate(values):
            log.write(step, {"loss": value})
    assert [np.float64(r["loss"]).tobytes() for r in read(tmp_path)] == [np.float64(v).tobytes() for v in values]


def test_what_is_not_finite_is_valid_json_and_comes_back(tmp_path):
    with MetricsLog(tmp_path) as log:
        log.write(1, {"loss": math.nan, "grad_norm": math.inf, "lr": -math.inf})

    def refuse(constant):
        raise AssertionError(constant)

    json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=refuse)
    (row,) = read(tmp_path)
    assert math.isnan(row["loss"])
    assert (row["grad_norm"], row["lr"]) == (math.inf, -math.inf)


def test_arrays_of_jax_and_numpy_are_scalars(tmp_path):
    with MetricsLog(tmp_path, tensorboard=False) as log:
        log.write(1, {"loss": jnp.float32(0.1), "tokens": np.int64(2**53 + 1), "skipped": jnp.int32(3)})
    (row,) = read(tmp_path)
    assert row == {"step": 1, "loss": float(np.float32(0.1)), "tokens": 2**53 + 1, "skipped": 3}
    assert isinstance(row["skipped"], int)


def test_truncate_drops_later_steps_and_goes_on(tmp_path):
    with MetricsLog(tmp_path) as log:
        for step in range(1, 8):
            log.write(step, {"loss": step / 10})
    before = (tmp_path / "metrics.jsonl").read_bytes()
    with MetricsLog(tmp_path) as log:
        log.truncate(4)
        assert before.startswith((tmp_path / "metrics.jsonl").read_bytes())
        assert steps(tmp_path) == [1, 2, 3, 4]
        for step in range(5, 8):
            log.write(step, {"loss": step / 10})
    assert (tmp_path / "metrics.jsonl").read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["metrics.jsonl", "tensorboard"]


def test_truncate_to_the_start(tmp_path):
    with MetricsLog(tmp_path, tensorboard=False) as log:
        log.write(1, {"loss": 1.0})
        log.truncate(0)
        assert steps(tmp_path) == []
        log.write(1, {"loss": 2.0})
    assert read(tmp_path) == [{"step": 1, "loss": 2.0}]


def test_any_torn_last_line_is_dropped(tmp_path):
    with MetricsLog(tmp_path, tensorboard=False) as log:
        log.write(1, {"loss": 1.5})
        log.write(2, {"loss": 2.5})
    path = tmp_path / "metrics.jsonl"
    whole = path.read_bytes()
    first = whole.index(b"\n") + 1
    for end in range(first, len(whole)):
        path.write_bytes(whole[:end])
        assert steps(tmp_path) == [1]
        with MetricsLog(tmp_path, tensorboard=False) as log:
            log.write(2, {"loss": 2.5})
        assert path.read_bytes() == whole


def test_lines_survive_kill_9(tmp_path):
    code = (
        "import sys\nfrom shardtrain.metrics import MetricsLog\nlog = MetricsLog(sys.argv[1])\n"
        "for step in range(1, 10**9):\n    log.write(step, {'loss': step / 7})\n    print(step, flush=True)\n"
    )
    with subprocess.Popen([sys.executable, "-c", code, tmp_path], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        seen = [int(process.stdout.readline()) for _ in range(20)][-1]
        os.kill(process.pid, signal.SIGKILL)
        seen = max([seen, *map(int, process.stdout.read().split()[:-1])])
    with MetricsLog(tmp_path) as log:
        rows = read(tmp_path)
        log.write(rows[-1]["step"] + 1, {"loss": 0.0})
    assert rows[-1]["step"] >= seen
    assert rows == [{"step": s, "loss": s / 7} for s in range(1, len(rows) + 1)]


def test_a_step_is_written_once(tmp_path):
    with MetricsLog(tmp_path, tensorboard=False) as log:
        log.write(5, {"loss": 1.0})
        with pytest.raises(ValueError, match=r"step 5 after step 5 .*truncate\(4\)"):
            log.write(5, {"loss": 1.0})
        with pytest.raises(ValueError, match="'step' is an argument"):
            log.write(6, {"step": 6})
    with MetricsLog(tmp_path, tensorboard=False) as log, pytest.raises(ValueError, match="after step 5"):
        log.write(3, {"loss": 1.0})


def test_a_damaged_line_is_an_error_that_names_it(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n{"st\x00ep": 2\n{"step": 3}\n')
    with pytest.raises(UserError, match=r"metrics.jsonl, line 2 is damaged"):
        read(tmp_path)
    with pytest.raises(UserError, match="line 2"):
        MetricsLog(tmp_path)


def test_no_log_is_an_error(tmp_path):
    with pytest.raises(UserError, match=r"no metrics.jsonl in"):
        read(tmp_path)


def test_the_tail_is_whole_lines(tmp_path):
    assert tail(tmp_path) == []
    with MetricsLog(tmp_path, tensorboard=False) as log:
        for step in range(1, 100):
            log.write(step, {"loss": math.inf if step == 99 else 1.0})
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 100, "lo')
    last = tail(tmp_path, 200)
    assert 0 < len(last) < 10
    assert last[-1] == {"step": 99, "loss": math.inf}
    assert tail(tmp_path, 20) == read(tmp_path)[-len(tail(tmp_path, 20)) :], "one line is longer than that"
    assert tail(tmp_path) == read(tmp_path)


def test_tensorboard_holds_the_same_numbers(tmp_path):
    with MetricsLog(tmp_path) as log:
        log.write(1, {"loss": 2.5, "lr": 0.125})
        log.write(2, {"loss": 1.5})
        log.truncate(1)
    with MetricsLog(tmp_path) as log:  # a second file at once, although names hold whole seconds
        log.write(2, {"loss": 1.25})
    found, files = [], sorted((tmp_path / "tensorboard").iterdir(), key=lambda p: p.stat().st_mtime_ns)
    for file in files:
        for event in events(file.read_bytes()):
            found += [(event.step, v.tag, v.simple_value) for v in event.summary.value]
            if event.session_log.status == SessionLog.START:
                found.append((event.step, "forget from here"))
    assert found == [
        (1, "train/loss", 2.5),
        (1, "train/lr", 0.125),
        (2, "train/loss", 1.5),
        (2, "forget from here"),
        (2, "train/loss", 1.25),
    ]
    assert len(files) == 2


def test_tensorboard_groups_metrics_and_shows_texts(tmp_path):
    with MetricsLog(tmp_path) as log:
        log.write(1, {"loss": 2.5, "eval_loss": 2.25, "mfu": 0.5, "mine/depth": 3.0})
        log.text("config", "run:\n  steps: 3", 1)
    (file,) = (tmp_path / "tensorboard").iterdir()
    values = [value for event in events(file.read_bytes()) for value in event.summary.value]
    assert [value.tag for value in values[:4]] == ["train/loss", "held_out/loss", "system/mfu", "mine/depth"]
    assert values[4].tag == "config/text_summary"
    assert values[4].tensor.string_val == [b"    run:\n      steps: 3"]


def events(data):
    """Unpack TFRecord framing: length (8 bytes), its checksum (4), data, its checksum (4)."""
    while data:
        length = int.from_bytes(data[:8], "little")
        yield Event.FromString(data[12 : 12 + length])
        data = data[16 + length :]


def test_records_are_framed_as_this_test_reads_them(tmp_path):
    writer = RecordWriter(str(tmp_path / "r"))
    writer.write(Event(step=7).SerializeToString())
    writer.close()
    assert [e.step for e in events((tmp_path / "r").read_bytes())] == [7]
