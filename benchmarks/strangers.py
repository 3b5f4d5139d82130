"""Pair gossip under attack: how many exchanges are left, and does a save ever fail?

Two workers of pair gossip run on this machine's loopback, each a process that may open
1,024 files. They exchange a small model as often as they can and save it again and
again. Another process, which does not know their secret (but for the kind ``silent``),
attacks the addresses of both; it needs the same cores, too:

- ``idle``: connections that say nothing, and are opened again when they are closed.
- ``half-open``: the same, and the client has closed its sending side.
- ``slow``: a right handshake, one byte a second.
- ``flood``: connections that are opened and closed as fast as possible.
- ``huge``: frames that claim to have 2^62 bytes, and frames that are just legal but
  never end.
- ``replayed``: the first messages of a peer's own handshake, recorded and sent again.
- ``wrong-key``: ZeroMQ clients with keys of their own.
- ``silent``: ZeroMQ clients that know the secret and say nothing.

``python -m benchmarks.strangers --before 2ad59cb`` measures the working tree and an
older commit in turn (Linux, some minutes), prints a table and writes
``benchmarks/results/strangers.json``. It ends with status 1 if a save failed, or if an
attack left less than half of the exchanges.
"""

import argparse
import asyncio
import contextlib
import io
import json
import os
import resource
import socket
import statistics
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).parents[1]
RESULTS = Path(__file__).parent / "results" / "strangers.json"
SECRET = bytes(range(32))
SIZE = 10_000  # parameters, in float32
FILES = 1024  # that a worker may open
LEAST = 0.5  # of the exchanges without an attack


# --- one worker -----------------------------------------------------------------------


def work(worker: int, addresses: list[str], files: int) -> NoReturn:
    """Exchange and save until killed; print what has been done by now."""
    resource.setrlimit(resource.RLIMIT_NOFILE, (files, files))
    import jax.numpy as jnp

    from bagua_jax.asynchrony import PairGossip, Replica

    try:
        from bagua_jax.experiments.runs.worker_checkpoint import save
    except ModuleNotFoundError:  # where the other commit had it
        from bagua_jax.experiments.saves import (  # pyright: ignore[reportMissingImports]
            save,
        )

    replica = Replica(jnp.full(SIZE, float(worker)))
    gossip = PairGossip(replica, worker=worker, addresses=addresses, secret=SECRET)
    saved = failed = 0
    with tempfile.TemporaryDirectory() as folder, gossip:
        while True:
            until = time.monotonic() + 0.2
            while time.monotonic() < until:
                replica.step(lambda x: (x, time.sleep(0.005)))
            try:
                save(Path(folder), worker, {"x": replica.params}, replica.steps)
                saved += 1
            except Exception as error:
                print(error, file=sys.stderr)
                failed += 1
            done = {"exchanges": gossip.exchanges, "saved": saved, "failed": failed}
            print(json.dumps(done), flush=True)


# --- attacks --------------------------------------------------------------------------

GREETING = (
    b"\xff\0\0\0\0\0\0\0\x01\x7f\x03\x01CURVE".ljust(64, b"\0")  # of ZMTP 3.1
)


def recorded(secret: bytes) -> bytes:
    """Record how a peer's handshake begins: its greeting and HELLO."""
    from bagua_jax.asynchrony.transport import Server

    heard = b""
    with socket.create_server(("127.0.0.1", 0)) as tap, _port() as own:
        server = Server(f"127.0.0.1:{own}", secret, 100)
        client = server.connect(f"127.0.0.1:{tap.getsockname()[1]}")
        peer, _ = tap.accept()
        with peer, client:
            peer.sendall(GREETING[:32] + b"\x01" + GREETING[33:])
            while len(heard) < 64 + 202:
                heard += peer.recv(64 + 202 - len(heard))
        server.close()
    return heard


@contextlib.contextmanager
def _port() -> Iterator[int]:
    """Find a free port; it is free when the block begins."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        number = probe.getsockname()[1]
    yield number


Talk = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[Any]]


async def _idle(reader, writer):
    await reader.read()


async def _half_open(reader, writer):
    writer.write_eof()
    await reader.read()


async def _slow(reader, writer):
    for byte in GREETING * 100:
        writer.write(bytes([byte]))
        await writer.drain()
        await asyncio.sleep(1.0)


async def _huge(reader, writer):
    writer.write(GREETING)
    await reader.readexactly(64)
    writer.write(b"\x06" + (2**62).to_bytes(8, "big") + bytes(100))
    await reader.read()


async def _endless(reader, writer):
    writer.write(GREETING)
    await reader.readexactly(64)
    writer.write(b"\x06" + (4 * SIZE).to_bytes(8, "big"))
    while True:
        writer.write(bytes(1000))
        await writer.drain()
        await asyncio.sleep(0.5)


def _replayed(data: bytes) -> Talk:
    async def talk(reader, writer):
        writer.write(data)
        await reader.read()

    return talk


async def _keep(address: str, talk: Talk) -> NoReturn:
    """Open a connection, talk, and open it again when it was closed."""
    host, port = address.split(":")
    while True:
        try:
            reader, writer = await asyncio.open_connection(host, int(port))
        except OSError:
            await asyncio.sleep(0.1)
            continue
        with contextlib.suppress(OSError, asyncio.IncompleteReadError):
            await talk(reader, writer)
        writer.transport.abort()
        await asyncio.sleep(0.05)


def _flood(addresses: list[str]) -> NoReturn:
    while True:
        for address in addresses:
            host, port = address.split(":")
            with socket.socket() as one, contextlib.suppress(OSError):
                one.settimeout(0.1)
                one.connect((host, int(port)))


def _clients(addresses: list[str], count: int, secret: bytes | None) -> NoReturn:
    """Open many ZeroMQ connections that say nothing, with a secret or without."""
    import zmq

    from bagua_jax.asynchrony import transport

    context = zmq.Context()
    context.max_sockets = count + 10
    server, _ = transport._keys(secret or os.urandom(32))
    mine, private = transport._keys(secret) if secret else zmq.curve_keypair()
    for number in range(count):
        client = context.socket(zmq.DEALER)
        client.curve_serverkey = server
        client.curve_publickey, client.curve_secretkey = mine, private
        client.connect(f"tcp://{addresses[number % len(addresses)]}")
    threading.Event().wait()
    raise AssertionError


def attack(kind: str, addresses: list[str], count: int) -> None:
    """Attack until killed, with so many connections."""
    if kind == "flood":
        _flood(addresses)
    if kind in ("wrong-key", "silent"):
        _clients(addresses, count, SECRET if kind == "silent" else None)
    talks = {
        "idle": [_idle],
        "half-open": [_half_open],
        "slow": [_slow],
        "huge": [_huge, _endless],
        "replayed": [_replayed(recorded(SECRET))] if kind == "replayed" else [],
    }[kind]

    async def all_at_once():
        await asyncio.gather(
            *(
                _keep(addresses[i % len(addresses)], talks[i // 2 % len(talks)])
                for i in range(count)
            )
        )

    asyncio.run(all_at_once())


KINDS = (
    *("idle", "half-open", "slow", "flood"),
    *("huge", "replayed", "wrong-key", "silent"),
)


# --- measuring ------------------------------------------------------------------------


def start(tree: Path, *arguments: Any, **options: Any) -> subprocess.Popen:
    """Start this program in another role, with the package of a tree."""
    links = f"{tree}{os.pathsep}{ROOT}"
    own = os.environ | {"PYTHONPATH": links, "JAX_PLATFORMS": "cpu"}
    return subprocess.Popen(
        [sys.executable, str(Path(__file__)), *map(str, arguments)],
        env=own,
        cwd=tree,
        text=True,
        **options,
    )


class Workers:
    """Two workers with the package of a tree; on leaving they are killed."""

    def __init__(self, tree: Path):
        with _port() as first, _port() as second:
            self.addresses = [f"127.0.0.1:{first}", f"127.0.0.1:{second}"]
        self._newest: list[dict[str, int]] = [{}, {}]
        self._log = tempfile.TemporaryFile()  # noqa: SIM115
        self._started = [
            start(
                *(tree, "--worker", worker, "--addresses", *self.addresses),
                stdout=subprocess.PIPE,
                stderr=self._log,
            )
            for worker in (0, 1)
        ]

    def __enter__(self) -> "Workers":
        for worker, process in enumerate(self._started):
            args = worker, process.stdout
            threading.Thread(target=self._follow, args=args, daemon=True).start()
        until = time.monotonic() + 180
        while min(self.both("exchanges")) < 3:
            if time.monotonic() > until:
                self._log.seek(0)
                raise SystemExit(self._log.read().decode())
            time.sleep(0.1)
        return self

    def __exit__(self, *error: Any) -> None:
        for process in self._started:
            process.kill()
            process.wait()
        self._log.close()

    def _follow(self, worker: int, lines: Any) -> None:
        for line in lines:
            self._newest[worker] = json.loads(line)

    def both(self, name: str) -> list[int]:
        """What each worker has done by now."""
        return [own.get(name, 0) for own in self._newest]

    def rate(self, seconds: float) -> float:
        """Count exchanges for a while; return those per second."""
        before, begun = min(self.both("exchanges")), time.monotonic()
        time.sleep(seconds)
        return (min(self.both("exchanges")) - before) / (time.monotonic() - begun)


def measure(tree: Path, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Attack the same two workers in each way, with calm before each attack."""
    rows = []
    with Workers(tree) as workers:
        for kind in arguments.kinds:
            calm = workers.rate(arguments.seconds)
            saved, failed = sum(workers.both("saved")), sum(workers.both("failed"))
            given = "--attack", kind, "--addresses", *workers.addresses
            # By today's code in both cases: only the workers are under test.
            attacker = start(
                ROOT, *given, "--count", arguments.count, stderr=subprocess.DEVNULL
            )
            try:
                time.sleep(arguments.settle)
                attacked = workers.rate(arguments.seconds)
                assert attacker.poll() is None, f"the attack {kind} has ended"
            finally:
                attacker.kill()
                attacker.wait()
            rows.append(
                {
                    "kind": kind,
                    "calm": calm,
                    "attacked": attacked,
                    "saves": sum(workers.both("saved")) - saved,
                    "failed_saves": sum(workers.both("failed")) - failed,
                }
            )
            time.sleep(1.0)
    return rows


def tree_of(commit: str, folder: Path) -> Path:
    """Write the files of a commit into a folder."""
    command = ["git", "-C", str(ROOT), "archive", commit]
    packed = subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout
    with tarfile.open(fileobj=io.BytesIO(packed)) as archive:
        archive.extractall(folder, filter="data")
    return folder


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--before", default="", help="a commit to compare with")
    parser.add_argument("--kinds", nargs="+", default=KINDS, choices=KINDS)
    parser.add_argument("--count", type=int, default=2200, help="connections")
    parser.add_argument("--settle", type=float, default=4.0, help="seconds")
    parser.add_argument("--seconds", type=float, default=5.0, help="that count")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--worker", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--attack", help=argparse.SUPPRESS)
    parser.add_argument("--addresses", nargs="+", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker is not None:
        work(arguments.worker, arguments.addresses, FILES)
    if arguments.attack is not None:
        attack(arguments.attack, arguments.addresses, arguments.count)
        return 0

    from rich.console import Console
    from rich.table import Table

    from benchmarks.network import machine

    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder:
        trees = {"now": ROOT}
        if arguments.before:
            trees = {"before": tree_of(arguments.before, Path(folder)), **trees}
        runs: list[dict[str, Any]] = [
            {"version": name} | row
            for _ in range(arguments.repeats)
            for name, tree in trees.items()
            for row in measure(tree, arguments)
        ]
    rows: list[dict[str, Any]] = []
    for kind in arguments.kinds:
        for name in trees:
            own = [r for r in runs if (r["kind"], r["version"]) == (kind, name)]
            row: dict[str, Any] = {"kind": kind, "version": name}
            for rate in ("calm", "attacked"):
                row[rate] = round(statistics.median(r[rate] for r in own), 2)
            for count in ("saves", "failed_saves"):
                row[count] = sum(r[count] for r in own)
            rows.append(row)
    titles = "attack", "version", "exchanges/s before it", "during it"
    table = Table(*titles, "saves", "failed saves")
    for row in rows:
        table.add_row(*map(str, row.values()))
    Console().print(table)
    facts = {
        "machine": machine.describe(),
        "load_average_before": round(load, 1),
        "commit_before": arguments.before,
        "connections": arguments.count,
        "files_of_a_worker": FILES,
        "seconds": arguments.seconds,
        "repeats": arguments.repeats,
        "rows": rows,
    }
    RESULTS.write_text(json.dumps(facts, indent=1) + "\n")
    now = [row for row in rows if row["version"] == "now"]
    slow = [r["kind"] for r in now if r["attacked"] < LEAST * r["calm"]]
    lost = [r["kind"] for r in now if r["failed_saves"]]
    for what, which in (("too few exchanges", slow), ("saves failed", lost)):
        if which:
            print(f"{what}: {', '.join(which)}")
    return 1 if slow or lost else 0


if __name__ == "__main__":
    raise SystemExit(main())
