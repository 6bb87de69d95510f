"""A trace of some steps by config or by a signal, and the table of where their time went."""

import re
import signal

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec

from commands import CONFIG, compiled_once, fit, metrics, start  # noqa: F401
from shardtrain import UserError, load_config
from shardtrain.hlo.classes import instruction_classes
from shardtrain.metrics.trace import HOST, IDLE, Event, check_steps, shares
from tiny import partitioner


def events(*rows):
    return [Event(thread, name, start, end) for thread, name, start, end in rows]


def test_every_moment_counts_once():
    found = shares(
        events(
            ("a", "while", 0, 60),  # only contains the others
            ("a", "dot", 0, 40),
            ("a", "all-reduce", 45, 60),
            ("b", "dot", 10, 30),
            ("b", "add", 80, 100),
        ),
        {"dot": "matmul", "all-reduce": "all-reduce over fsdp", "add": "other"},
        devices=2,
    )
    assert found == {"matmul": 30, "other": 10, "all-reduce over fsdp": 7.5, HOST: 20, IDLE: 32.5}
    assert sum(found.values()) == 100
    assert shares([], {}, 2) == {}


def test_the_program_says_what_an_instruction_is_for():
    place = partitioner(fsdp=4, tensor=2)

    def f(x, w):
        with jax.named_scope("attention"):
            scores = jax.nn.softmax(x @ x.T)
        return jnp.tanh(scores @ x @ w).sum()

    x = jax.ShapeDtypeStruct((16, 8), "f4", sharding=place.sharding(("batch", None)))
    w = jax.ShapeDtypeStruct(
        (8, 8), "f4", sharding=jax.sharding.NamedSharding(place.mesh, PartitionSpec(None, "tensor"))
    )
    text = jax.jit(f).lower(x, w).compile().as_text()
    found = set(instruction_classes(text, place.mesh).values())
    assert {"attention", "matmul", "other"} <= found
    assert any(re.fullmatch(r"all-(reduce|gather) over .*fsdp.*", each) for each in found)


def table(text):
    """The classes of a printed table, and their shares in percent."""
    return {name: float(share) for name, share in re.findall(r"^  (\S.*?) +[\d.]+ ms +([\d.]+)%$", text, re.MULTILINE)}


def test_a_config_traces_its_steps(tmp_path, caplog):
    directory = tmp_path / "run"
    fit(directory, "run.steps=6", "profile.steps=[3,4]")
    assert len(metrics(directory)) == 6
    (trace,) = directory.glob("tensorboard/plugins/profile/*/*.xplane.pb")
    assert list(trace.parent.glob("*.trace.json.gz")), "for Perfetto"
    assert "steps 3 to 4 took " in caplog.text
    found = table("\n".join(caplog.messages))
    assert {"matmul", "other", IDLE, HOST} <= set(found)
    assert any(name.endswith(" over fsdp") for name in found)
    assert sum(found.values()) == pytest.approx(100, abs=1)


def test_a_run_that_ends_first_leaves_what_it_has(tmp_path, caplog):
    fit(tmp_path / "run", "run.steps=6", "profile.steps=[3,99]", stop_after=4)
    assert "steps 3 to 4 took " in caplog.text


@pytest.mark.full
def test_a_signal_traces_the_next_steps(tmp_path):
    with start(("train", CONFIG, "run.dir=run", "run.steps=100000"), folder=tmp_path) as (process,):
        process.until(lambda: len(metrics(tmp_path / "run")) > 3)
        process.send(signal.SIGUSR1)
        process.until(lambda: table(process.output))
        process.send(signal.SIGTERM)
        assert process.end() == 0
    assert "SIGUSR1: tracing the next steps" in process.output
    first, last = map(int, re.search(r"steps (\d+) to (\d+) took ", process.output).groups())
    assert last - first == 2
    assert list((tmp_path / "run").glob("tensorboard/plugins/profile/*/*.xplane.pb"))


@pytest.mark.parametrize("steps", [(1, 3), (5, 4)])
def test_steps_that_cannot_be_traced(steps):
    with pytest.raises(UserError, match=r"profile\.steps"):
        check_steps(steps)
    with pytest.raises(UserError, match=r"profile\.steps=\[10,13\]"):
        load_config(CONFIG, [f"profile.steps={list(steps)}"])
