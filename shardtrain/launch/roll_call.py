"""A roll call before JAX connects the processes of a run: which ones are there, and what each of them has.

JAX would wait for a process that never joins, and then abort the others without naming it; and processes whose packages
differ may fail in JAX's own handshake. So they first meet at the same address through plain sockets. Process 0 listens
there, on that interface only, until all have joined; then it leaves the port to JAX and keeps the connections. Like
JAX's own traffic later on, this is neither encrypted nor authenticated.
"""

from __future__ import annotations

import contextlib
import json
import queue
import select
import socket
import threading
import time
from collections.abc import Iterable, Iterator
from typing import Any

from shardtrain.errors import UserError

_GREETING, _MOST_BYTES = "shardtrain 1", 2**28
_PAUSE_S, _GRACE_S = 0.2, 10.0
#: How long a process that has joined may take to read its config.
_TALK_S = 300.0


class Peer:
    """One connection, which carries a line of JSON at a time, from this process to another and back."""

    def __init__(self, connection: socket.socket) -> None:
        self._socket = connection
        self._file = connection.makefile("rb")
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)

    def send(self, message: Any) -> None:
        """Send a value that JSON can write; an OSError if the other process has gone."""
        self._socket.sendall(json.dumps(message).encode() + b"\n")

    def receive(self, seconds: float, most: int = _MOST_BYTES) -> Any:
        """Return a value of the other process; an OSError if that has gone or is late, a ValueError if not JSON."""
        self._socket.settimeout(max(seconds, 0.01))
        line = self._file.readline(most)
        if not line:
            raise ConnectionResetError("it hung up")
        try:
            return json.loads(line)
        except RecursionError as error:
            raise ValueError("not JSON") from error

    def has_gone(self) -> bool:
        """Whether the other has hung up while it had nothing to say."""
        try:
            return bool(select.select([self._socket], [], [], 0)[0]) and not self._socket.recv(1, socket.MSG_PEEK)
        except OSError:
            return True

    def close(self) -> None:
        """Hang up."""
        self._file.close()
        self._socket.close()


class RollCall:
    """The processes of a run, all present. Made by `gather`.

    Args:
      peers: on process 0 the others by their number; on the others only process 0.
      process: number of this process.
    """

    def __init__(self, peers: dict[int, Peer], process: int) -> None:
        self._peers, self._process = peers, process

    def exchange(self, text: str) -> list[str]:
        """Send a text and return that of every process, by its number.

        Raises:
          UserError: a process has gone, or is silent for minutes.
        """
        if self._process:
            with _heard(0):
                self._peers[0].send(text)
                answer = self._peers[0].receive(_TALK_S + _GRACE_S)
            if isinstance(answer, str):
                raise UserError(answer)
            texts, whose = answer
            return [texts[index] for index in whose]
        said, deadline = [text], time.monotonic() + _TALK_S
        try:
            for number, peer in sorted(self._peers.items()):
                with _heard(number):
                    said.append(str(peer.receive(deadline - time.monotonic())))
        except UserError as error:
            _tell(self._peers.values(), str(error))
            raise
        texts = list(dict.fromkeys(said))  # without this the traffic would grow with their square
        _tell(self._peers.values(), [texts, [texts.index(each) for each in said]])
        return said

    def close(self) -> None:
        """Hang up. By now JAX has its own connections."""
        for peer in self._peers.values():
            peer.close()


def gather(address: str, processes: int, process: int, patience: float) -> RollCall:
    """Meet the other processes of a run.

    Args:
      address: HOST:PORT where process 0 listens, the same for all.
      processes, process: their number, and the number of this one.
      patience: seconds to wait for processes that are late.

    Raises:
      UserError: a process did not join in time, the address cannot be used, or numbers of processes clash.
    """
    host, _, port = address.rpartition(":")
    if not (host and port.isdecimal() and 0 < int(port) < 2**16):
        raise UserError(f"--coordinator {address}: must be HOST:PORT, with a port from 1 to 65535")
    place = (host.removeprefix("[").removesuffix("]"), int(port))  # brackets around an IPv6 address
    if process:
        return RollCall({0: _answer(place, processes, process, patience)}, process)
    return RollCall(_call(place, processes, patience), 0)


def _answer(place: tuple[str, int], processes: int, process: int, patience: float) -> Peer:
    """Greet process 0, and wait until it says that all are there."""
    deadline = time.monotonic() + patience
    while True:
        try:
            return _greet(place, [_GREETING, process, processes], patience)
        except UserError:
            raise
        except (OSError, ValueError) as error:  # process 0 is not there yet, or another program answered
            if time.monotonic() > deadline:
                raise UserError(
                    f"process 0 did not answer at {place[0]}:{place[1]} within {patience:g} s ({error}); start it with "
                    "the same --coordinator, an address of its machine, or give it more time with --join-timeout"
                ) from None
            time.sleep(_PAUSE_S)


def _greet(place: tuple[str, int], greeting: list[Any], patience: float) -> Peer:
    peer = Peer(socket.create_connection(place, timeout=patience))
    try:
        peer.send(greeting)
        refusal = peer.receive(patience + _GRACE_S)
        if refusal is not None:
            raise UserError(str(refusal))
    except BaseException:
        peer.close()
        raise
    return peer


def _call(place: tuple[str, int], processes: int, patience: float) -> dict[int, Peer]:
    """Listen, as process 0, until all others have joined, and tell them so."""
    try:
        family = socket.getaddrinfo(*place, type=socket.SOCK_STREAM)[0][0]
        listener = socket.create_server(place, family=family)
    except (OSError, UnicodeError) as error:
        raise UserError(
            f"--coordinator {place[0]}:{place[1]}: process 0 cannot listen there ({error}); name an address of the "
            "machine that runs process 0, and a port that is free"
        ) from None
    came: queue.Queue[tuple[Peer, int, int]] = queue.Queue()
    threading.Thread(target=_listen, args=(listener, came, patience), daemon=True).start()
    peers: dict[int, Peer] = {}
    try:
        _collect(came, peers, processes, patience)
    except UserError as error:
        _tell(peers.values(), str(error), last=True)
        raise
    finally:
        with contextlib.suppress(OSError):  # not every system supports this for a listening socket
            listener.shutdown(socket.SHUT_RDWR)  # wakes up the accepting thread; only then is the port free for JAX
        listener.close()
    _tell(peers.values(), None)
    return peers


def _collect(came: queue.Queue[tuple[Peer, int, int]], peers: dict[int, Peer], processes: int, patience: float) -> None:
    deadline = time.monotonic() + patience
    while True:
        _forget_those_who_left(peers)
        if len(peers) == processes - 1:
            return
        try:
            peer, number, expected = came.get(timeout=max(deadline - time.monotonic(), 0))
        except queue.Empty:
            missing = [str(number) for number in range(1, processes) if number not in peers]
            raise UserError(
                f"process{'es' * (len(missing) > 1)} {', '.join(missing)} of {processes} did not come within "
                f"{patience:g} s; start each with the same --coordinator, or give them more time with --join-timeout"
            ) from None
        _forget_those_who_left(peers)
        problem = None
        if expected != processes:
            problem = f"process {number} has --processes {expected}, and process 0 has {processes}; give all the same"
        elif number in peers:
            problem = f"two processes have --process {number}; number them from 0 to {processes - 1}"
        if problem:
            _tell([peer], problem, last=True)
            raise UserError(problem)
        peers[number] = peer


def _forget_those_who_left(peers: dict[int, Peer]) -> None:
    """They may be started again."""
    for number in [number for number, peer in peers.items() if peer.has_gone()]:
        peers.pop(number).close()


def _listen(listener: socket.socket, came: queue.Queue[tuple[Peer, int, int]], patience: float) -> None:
    """Pass on each process that greets. Hang up on others that connect, such as a port scanner."""

    def greet(connection: socket.socket) -> None:
        try:
            peer = Peer(connection)
            greeting, number, expected = peer.receive(patience, most=100)
            if greeting != _GREETING or not 0 < number < expected:
                raise ValueError
            came.put((peer, number, expected))
        except (OSError, ValueError, TypeError):
            connection.close()

    with contextlib.suppress(OSError):  # closed, because all have joined or time is up
        while True:
            connection, _ = listener.accept()
            threading.Thread(target=greet, args=(connection,), daemon=True).start()


def _tell(peers: Iterable[Peer], message: Any, last: bool = False) -> None:
    for peer in peers:
        with contextlib.suppress(OSError):  # a process that has gone is noticed at the next exchange
            peer.send(message)
        if last:
            peer.close()


@contextlib.contextmanager
def _heard(number: int) -> Iterator[None]:
    try:
        yield
    except TimeoutError:
        raise UserError(f"process {number} came, and said nothing for {_TALK_S:g} s; see its output") from None
    except (OSError, ValueError):
        raise UserError(f"process {number} came, and ended before the run began; see its output") from None
