"""The door: strangers are few and leave soon, peers come in, files can be opened."""

import contextlib
import importlib
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from asynchrony.processes import free_ports

from bagua_jax.asynchrony import door

zmq = pytest.importorskip("zmq")
from bagua_jax.asynchrony.transport import Server  # noqa: E402

ROOT = Path(__file__).parents[2]
SECRET = bytes(range(32))
LARGEST = 1 << 20
GREETING = b"\xff\0\0\0\0\0\0\0\x01\x7f\x03\x01CURVE".ljust(64, b"\0")


class Echo:
    """A server that answers every message by itself."""

    def __init__(self, most: int = 16):
        (port,) = free_ports(1)
        self.address = ("127.0.0.1", port)
        self.server = Server(f"127.0.0.1:{port}", SECRET, LARGEST, most)
        self.closed = self.server.door.closed
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self):
        while not self._stop.is_set():
            if self.server.socket.poll(20, zmq.POLLIN):
                self.server.socket.send_multipart(self.server.socket.recv_multipart())

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self._stop.set()
        self._thread.join()
        self.server.close()


@contextlib.contextmanager
def peer(echo: Echo, secret: bytes = SECRET):
    """A client of its own worker; calling it returns the answer, or None."""
    (port,) = free_ports(1)
    server = Server(f"127.0.0.1:{port}", secret, LARGEST)
    client = server.connect(f"{echo.address[0]}:{echo.address[1]}")

    def ask(data: bytes = b"hello", wait_ms: int = 20_000) -> bytes | None:
        if not client.poll(wait_ms, zmq.POLLOUT):
            return None
        client.send(data)
        return client.recv() if client.poll(wait_ms, zmq.POLLIN) else None

    try:
        yield ask
    finally:
        server.close()


@pytest.fixture
def strangers():
    """Connect strangers, which are closed at the end."""
    with contextlib.ExitStack() as stack:

        def connect(echo: Echo, says: bytes = b"") -> socket.socket:
            made = stack.enter_context(socket.create_connection(echo.address))
            made.settimeout(30)
            made.sendall(says)
            return made

        yield connect


def wait_for(condition):
    until = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.01)


def is_closed(connection: socket.socket) -> bool:
    """Read to the end, which comes, or the test fails by its timeout."""
    try:
        while connection.recv(1000):
            pass
    except ConnectionError:
        pass
    return True


# --- what ZMTP's messages tell the door ---


def test_a_peer_is_recognized_and_is_no_stranger_any_more():
    with Echo() as echo, peer(echo) as ask:
        assert ask() == b"hello"
        assert len(echo.server.door._peers) == 1
        assert not echo.server.door._strangers and not echo.closed


def test_large_messages_pass_both_ways_unchanged():
    data = bytes(range(256)) * (LARGEST // 256)
    with Echo() as echo, peer(echo) as ask:
        assert ask(data) == data


# --- strangers ---


@pytest.mark.parametrize("says", [b"", GREETING, GREETING[:10]])
def test_one_stranger_too_many_closes_the_oldest(strangers, says):
    """A peer that was there stays, and a new one comes in."""
    with Echo() as echo, peer(echo) as old:
        assert old() == b"hello"
        held = [strangers(echo, says) for _ in range(door.MOST_STRANGERS + 20)]
        wait_for(lambda: echo.closed["too many strangers"] == 20)
        assert all(map(is_closed, held[:20]))
        assert old() == b"hello"
        with peer(echo) as new:
            assert new() == b"hello"
        assert echo.closed == {"too many strangers": 21}
        assert len(echo.server.door._strangers) == door.MOST_STRANGERS - 1


@pytest.mark.parametrize("says", [b"", GREETING[:7], GREETING])
def test_a_stranger_that_takes_too_long_is_closed(strangers, monkeypatch, says):
    monkeypatch.setattr(door, "PROOF_S", 0.2)
    with Echo() as echo:
        assert is_closed(strangers(echo, says))
        wait_for(lambda: echo.closed == {"no proof within 0.2 s": 1})


def test_a_byte_now_and_then_buys_no_time(strangers, monkeypatch):
    monkeypatch.setattr(door, "PROOF_S", 0.5)
    with Echo() as echo:
        slow = strangers(echo)
        with pytest.raises(ConnectionError):
            for byte in GREETING * 100:
                slow.sendall(bytes([byte]))
                time.sleep(0.02)
        wait_for(lambda: echo.closed == {"no proof within 0.5 s": 1})


def test_a_peer_has_all_the_time_it_wants(monkeypatch):
    monkeypatch.setattr(door, "PROOF_S", 1.0)
    with Echo() as echo, peer(echo) as ask:
        assert ask() == b"hello"
        time.sleep(1.5)
        assert ask() == b"hello"
        assert not echo.closed


def test_a_client_that_has_closed_its_side_is_closed(strangers):
    with Echo() as echo:
        for says in (b"", GREETING):
            half = strangers(echo, says)
            half.shutdown(socket.SHUT_WR)
            assert is_closed(half)
        wait_for(lambda: echo.closed == {"left": 2})


@pytest.mark.parametrize(
    "says", [b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01" + bytes(99)]
)
def test_another_protocol_is_closed_at_once(strangers, says):
    with Echo() as echo:
        assert is_closed(strangers(echo, says))
        wait_for(lambda: echo.closed == {"another protocol": 1})


@pytest.mark.parametrize("size", [2**63 - 1, 2**62, LARGEST + 10_000])
def test_a_frame_that_claims_to_be_huge_is_closed(strangers, size):
    with Echo() as echo:
        huge = strangers(echo, GREETING)
        huge.sendall(b"\x06" + size.to_bytes(8, "big") + bytes(100))
        assert is_closed(huge)
        wait_for(lambda: echo.closed == {"another secret, or none": 1})


def test_a_stranger_cannot_fill_the_memory_with_a_legal_frame(strangers):
    """A model's size is legal only for who has proved the secret."""
    with Echo() as echo:
        endless = strangers(echo, GREETING)
        endless.sendall(b"\x06" + LARGEST.to_bytes(8, "big") + bytes(5000))
        assert is_closed(endless)
        wait_for(lambda: echo.closed == {"sent too much": 1})


def test_another_secret_is_counted_as_such():
    with Echo() as echo, peer(echo, b"another secret than theirs") as ask:
        assert ask(wait_ms=300) is None
        wait_for(lambda: echo.closed["another secret, or none"] > 0)
        assert not echo.server.door._peers


def test_a_recorded_handshake_opens_nothing(strangers, monkeypatch):
    """All that a peer said is said again: its greeting, HELLO, INITIATE, a message."""
    monkeypatch.setattr(door, "PROOF_S", 1.0)
    heard = []

    def between(listener, echo):
        client, _ = listener.accept()
        with client, socket.create_connection(echo.address) as server:
            answers = threading.Thread(target=pass_on, args=(server, client, []))
            answers.start()
            pass_on(client, server, heard)
            server.shutdown(socket.SHUT_RDWR)
            answers.join()

    def pass_on(source, sink, record):
        with contextlib.suppress(OSError):
            while data := source.recv(1000):
                record.append(data)
                sink.sendall(data)

    with Echo() as echo, socket.create_server(("127.0.0.1", 0)) as tap:
        tapping = threading.Thread(target=between, args=(tap, echo))
        tapping.start()
        (port,) = free_ports(1)
        honest = Server(f"127.0.0.1:{port}", SECRET, LARGEST)
        client = honest.connect(f"127.0.0.1:{tap.getsockname()[1]}")
        assert client.poll(20_000, zmq.POLLOUT)
        client.send(b"hello")
        assert client.poll(20_000, zmq.POLLIN)
        honest.close()
        tapping.join()
        said = b"".join(heard)
        assert b"HELLO" in said and b"INITIATE" in said
        assert is_closed(strangers(echo, said))
        assert is_closed(strangers(echo, said[: 64 + 202]))  # waits for a WELCOME
        wait_for(lambda: sum(echo.closed.values()) == 2)
        assert not echo.server.door._peers


def test_a_flood_of_connections_leaves_room_for_a_peer():
    with Echo() as echo, peer(echo) as old:
        assert old() == b"hello"
        stop = threading.Event()

        def flood():
            while not stop.is_set():
                with contextlib.suppress(OSError), socket.socket() as one:
                    one.settimeout(0.1)
                    one.connect(echo.address)

        flooding = threading.Thread(target=flood)
        flooding.start()
        try:
            wait_for(lambda: echo.closed["left"] > 100)
            for _ in range(20):
                assert old() == b"hello"
        finally:
            stop.set()
            flooding.join()
        with peer(echo) as new:
            assert new() == b"hello"


def test_silent_peers_do_not_push_out_one_that_speaks():
    """Those that know the secret are bounded, too: the longest silent one is closed."""
    with Echo(most=3) as echo, peer(echo) as speaking, contextlib.ExitStack() as stack:
        assert speaking() == b"hello"
        for _ in range(6):
            silent = stack.enter_context(peer(echo))
            silent(b"", wait_ms=20)  # it need not come in
            assert speaking() == b"hello"
            assert len(echo.server.door._peers) <= 3
        wait_for(lambda: echo.closed["too many of peers"] >= 10)  # they come again
        assert speaking() == b"hello"


# --- descriptors ---

STARVED = """
import resource, sys, tempfile, time
from bagua_jax.asynchrony.transport import Server
resource.setrlimit(resource.RLIMIT_NOFILE, (160, 160))
server = Server(sys.argv[1], bytes(range(32)), 1000)
print("listens", flush=True)
until = time.monotonic() + 30
while server.door.closed["no descriptor left"] < 50 and time.monotonic() < until:
    files = [tempfile.TemporaryFile() for _ in range(30)]
    for file in files:
        file.close()
print(dict(server.door.closed), flush=True)
server.close()
"""


def test_connections_never_take_the_descriptors_of_files():
    """With so few descriptors, they run out before strangers are too many."""
    (port,) = free_ports(1)
    command = [sys.executable, "-c", STARVED, f"127.0.0.1:{port}"]
    with (
        subprocess.Popen(
            command, stdout=subprocess.PIPE, cwd=ROOT, text=True
        ) as server,
        contextlib.ExitStack() as stack,
    ):
        stack.callback(server.kill)
        held = []
        assert server.stdout.readline() == "listens\n"
        for _ in range(200):
            with contextlib.suppress(OSError):
                one = socket.create_connection(("127.0.0.1", port), timeout=10)
                held.append(stack.enter_context(one))
            if len(held) % 20 == 0:  # all ask for more descriptors at the same time
                for one in held[-20:]:
                    with contextlib.suppress(OSError):
                        one.sendall(GREETING[:10])
        said = server.stdout.readline()
        assert "no descriptor left" in said and server.wait(60) == 0


def test_no_limit_of_descriptors_is_enough(monkeypatch):
    limit = door.resource.RLIM_INFINITY
    monkeypatch.setattr(door.resource, "getrlimit", lambda which: (limit, limit))
    assert door._spare() > 10**6


# --- the benchmark ---


def test_the_benchmark_knows_how_a_handshake_begins(monkeypatch):
    monkeypatch.syspath_prepend(ROOT)
    strangers = importlib.import_module("benchmarks.strangers")
    data = strangers.recorded(SECRET)
    assert data[:64] == GREETING and data[66:72] == b"\x05HELLO"
