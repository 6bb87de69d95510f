"""Processes that meet before JAX, over real sockets; here each is a thread."""

import contextlib
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from commands import free_address
from shardtrain.errors import UserError
from shardtrain.launch.roll_call import gather


def attend(address, *numbers, processes=3, patience=20.0, words=()):
    """What the given processes get of the meeting, or of what they then say: answers or the error's text."""

    def one(number):
        try:
            with contextlib.closing(gather(address, processes, number, patience)) as others:
                return [others.exchange(f"{word} of {number}") for word in words]
        except UserError as error:
            return str(error)

    with ThreadPoolExecutor(len(numbers)) as pool:
        return list(pool.map(one, numbers))


def test_all_hear_what_all_say_and_the_port_is_free_again():
    address = free_address()
    wanted = [[f"{word} of {number}" for number in range(3)] for word in ("version", "config")]
    assert attend(address, 2, 0, 1, words=("version", "config")) == [wanted] * 3
    host, _, port = address.partition(":")
    socket.create_server((host, int(port))).close()


@pytest.mark.parametrize(
    "garbage", [b"", b"GET / HTTP/1.1\r\n\r\n", b"[" * 5000 + b"\n", b'["shardtrain 1", 7, 3]\n', b"\xff\n"]
)
def test_whoever_else_connects_is_hung_up_on(garbage):
    address = free_address()
    host, _, port = address.partition(":")

    def intrude():
        while True:
            with contextlib.suppress(OSError), socket.create_connection((host, int(port))) as intruder:
                intruder.sendall(garbage)
                return
            time.sleep(0.01)

    intruder = threading.Thread(target=intrude)
    intruder.start()
    late = threading.Timer(0.3, lambda: attend(address, 1, processes=2, words=("a",)))
    late.start()
    assert attend(address, 0, processes=2, words=("a",)) == [[["a of 0", "a of 1"]]]
    intruder.join()
    late.join()


def test_all_that_came_say_who_did_not():
    begun = time.monotonic()
    answers = attend(free_address(), 0, 2, processes=4, patience=1.0)
    assert time.monotonic() - begun < 5
    assert set(answers) == {
        "processes 1, 3 of 4 did not come within 1 s; start each with the same --coordinator, or give them more time "
        "with --join-timeout"
    }


def test_without_process_0_nobody_waits_for_ever():
    address = free_address()
    for answer in attend(address, 1, 2, patience=1.0):
        assert answer.startswith(f"process 0 did not answer at {address} within 1 s")


def test_numbers_and_their_count_must_fit():
    answers = attend(free_address(), 0, 1, 1)
    assert answers[0] == "two processes have --process 1; number them from 0 to 2"
    address = free_address()
    with ThreadPoolExecutor() as pool:
        first = pool.submit(attend, address, 0, processes=2)
        second = pool.submit(attend, address, 1, processes=3)
    message = "process 1 has --processes 3, and process 0 has 2; give all the same"
    assert (first.result(), second.result()) == ([message], [message])


def test_a_process_that_is_started_again_while_others_are_awaited_is_met_once():
    """Whether it comes back before the last one, or after."""
    for back in (0.3, 1.2):
        address = free_address()
        host, _, port = address.partition(":")
        with ThreadPoolExecutor() as pool:
            stay = pool.submit(attend, address, 0, words=("a",))
            time.sleep(0.1)
            with socket.create_connection((host, int(port))) as first:
                first.sendall(b'["shardtrain 1", 1, 3]\n')
                time.sleep(0.1)
            again = threading.Timer(back, lambda at=address: attend(at, 1, words=("a",)))
            again.start()
            time.sleep(0.6)
            last = pool.submit(attend, address, 2, words=("a",))
            assert stay.result() == last.result() == [[["a of 0", "a of 1", "a of 2"]]]
            again.join()


def test_a_process_that_leaves_ends_the_others():
    address = free_address()
    with ThreadPoolExecutor() as pool:
        stay = [pool.submit(attend, address, number, words=("a",)) for number in (0, 1)]
        assert attend(address, 2) == [[]]
    for answer in (each.result()[0] for each in stay):
        assert answer == "process 2 came, and ended before the run began; see its output"


@pytest.mark.parametrize("address", ["localhost", "127.0.0.1:", "127.0.0.1:http", ":80", "127.0.0.1:70000"])
def test_an_address_is_a_host_and_a_port(address):
    with pytest.raises(UserError, match="must be HOST:PORT"):
        gather(address, 2, 0, 1.0)


@pytest.mark.parametrize("host", ["192.0.2.1", "no.such.invalid", "a..b"])
def test_process_0_listens_on_its_own_machine(host):
    with pytest.raises(UserError, match=f"coordinator {host}:4000: process 0 cannot listen there"):
        gather(f"{host}:4000", 2, 0, 1.0)
