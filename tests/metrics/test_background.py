"""What runs beside the training loop: in order, on one other thread, and no error is lost."""

import logging
import threading

import pytest

from shardtrain.metrics import Background


def test_calls_are_made_in_order_on_another_thread():
    seen = []
    with Background("report", limit=3) as background:
        for number in range(50):
            background.submit(lambda n: seen.append((n, threading.current_thread())), number)
        background.flush()
        assert [number for number, _ in seen] == list(range(50))
    (thread,) = {thread for _, thread in seen}
    assert thread is not threading.current_thread()
    assert not thread.is_alive()


def test_submit_waits_only_for_a_full_queue():
    gate, seen = threading.Event(), []
    with Background("report", limit=3) as background:
        background.submit(gate.wait)
        for number in (1, 2, 3):
            background.submit(seen.append, number)  # returns, although the first call has not
        assert seen == []
        threading.Timer(0.05, gate.set).start()
        background.submit(seen.append, 4)  # the fifth waits for the first
        assert gate.is_set()
    assert seen == [1, 2, 3, 4]


def test_a_call_is_made_although_none_follows():
    called = threading.Event()
    with Background("report") as background:
        background.submit(called.set)
        assert called.wait(60)


def fail():
    raise OSError(28, "No space left on device")


def use(where, seen):
    with Background("report", limit=2) as background:
        background.submit(seen.append, 1)
        background.submit(fail)
        if where == "flush":
            background.flush()
        for number in range(2, 6 if where == "submit" else 2):
            background.submit(seen.append, number)
        if where == "beside another":
            raise ValueError("the cause")
        assert where == "exit", "the error came too late"


@pytest.mark.parametrize("where", ["submit", "flush", "exit"])
def test_an_error_is_raised_once_and_stops_what_follows(where):
    seen = []
    with pytest.raises(OSError, match="No space left"):
        use(where, seen)
    assert seen == [1]


def test_the_first_cause_is_what_is_raised(caplog):
    with pytest.raises(ValueError, match="the cause"):
        use("beside another", [])
    assert [(record.levelno, record.getMessage()) for record in caplog.records] == [
        (logging.ERROR, "[Errno 28] No space left on device")
    ]
