"""Who gets in to a worker of pair gossip: few strangers, and none of them for long.

ZeroMQ accepts every connection and keeps it during its handshake, without a bound. A
few hundred that never finish theirs take all descriptors of the process, so that peers
cannot connect and files cannot be opened. Therefore the worker's address is listened on
here, and bytes are passed on to ZeroMQ over a local socket. A connection is a stranger
until ZeroMQ has accepted its key. Strangers are few, have little time, and may send
little.
"""

import asyncio
import collections
import functools
import math
import os
import resource
import socket
import threading

__all__ = ["MOST_STRANGERS", "PROOF_S", "RESERVE", "Door"]

MOST_STRANGERS = 64
"""Connections that have not proved the secret; one more closes the oldest of them."""
PROOF_S = 5.0
"""Seconds that a connection has to prove that it knows the secret."""
RESERVE = 64
"""File descriptors that connections leave free, or a quarter of the process's limit."""

_PAUSE_S = 0.01  # between two connections: a flood costs this process little
_BACKLOG = 128  # connections that wait in the kernel, where they take no descriptor
# A connection of ZMTP 3.1 begins with 10 bytes, of which the first and the last are
# fixed. Anybody is told a greeting (64 bytes) and WELCOME (170); then comes READY, if
# the client has shown the right key. Until then a client sends about 600 bytes.
_SIGNATURE = 10
_READY = slice(236, 242)
_MOST_HEARD = 4096
_CHUNK = 1 << 18


class Door:
    """Listen in a thread, and connect to ZeroMQ who may come in.

    Args:
        listener: a bound TCP socket; the door closes it.
        inner: path of the Unix socket on which ZeroMQ listens.
        most: connections of peers that have proved the secret; one more closes the
            one that has been silent for longest.

    Attributes:
        closed: how many connections were closed before they proved the secret, by
            reason.
    """

    def __init__(self, listener: socket.socket, inner: str, most: int):
        self.closed = collections.Counter[str]()
        self._listener, self._inner, self._most = listener, inner, most
        # When each last said something since its proof, 0 for never; the oldest first.
        self._strangers: dict[asyncio.Task, float] = {}
        self._peers: dict[asyncio.Task, float] = {}
        self._linger_s = 0.0
        listener.setblocking(False)
        listener.listen(_BACKLOG)
        self._loop = asyncio.new_event_loop()
        self._closing = asyncio.Event()
        self._thread = threading.Thread(target=self._run, name="door", daemon=True)
        self._thread.start()

    def close(self, linger_s: float) -> None:
        """Close every connection, once ZeroMQ has closed its end or the time is up."""
        self._linger_s = linger_s
        self._loop.call_soon_threadsafe(self._closing.set)
        self._thread.join()

    def _run(self) -> None:
        with self._listener, asyncio.Runner(loop_factory=lambda: self._loop) as runner:
            runner.run(self._stay_open())

    async def _stay_open(self) -> None:
        accepting = self._loop.create_task(self._accept())
        await self._closing.wait()
        accepting.cancel()
        if self._peers:
            await asyncio.wait(self._peers, timeout=self._linger_s)

    async def _accept(self) -> None:
        while True:
            try:
                visitor, _ = await self._loop.sock_accept(self._listener)
            except OSError:  # it has left, or there is no descriptor at all
                self._close_one(self._strangers, "no descriptor left")
                await asyncio.sleep(_PAUSE_S)
                continue
            task = self._loop.create_task(self._serve(visitor))
            # Not in the task itself: one that is cancelled at once never begins.
            task.add_done_callback(functools.partial(self._forget, visitor))
            self._strangers[task] = 0.0
            # Each stranger may need two more: a local socket, and ZeroMQ's end of it.
            if _spare() < 2 * len(self._strangers):
                self._close_one(self._strangers, "no descriptor left")
            elif len(self._strangers) > MOST_STRANGERS:
                self._close_one(self._strangers, "too many strangers")
            await asyncio.sleep(_PAUSE_S)

    def _close_one(self, among: dict[asyncio.Task, float], reason: str) -> None:
        """Close the one that has been silent for longest, the oldest of several."""
        if among:
            task = min(among, key=among.__getitem__)
            del among[task]
            task.cancel()
            self.closed[reason] += 1

    def _forget(self, visitor: socket.socket, task: asyncio.Task) -> None:
        visitor.close()
        self._strangers.pop(task, None)
        self._peers.pop(task, None)

    async def _serve(self, visitor: socket.socket) -> None:
        """Pass on what a connection says and is told, until one side ends it."""
        reason = "left"
        try:
            async with asyncio.timeout(PROOF_S) as proof:
                reason = await self._introduce(visitor, proof)
        except OSError:  # reset by either side; or, as TimeoutError, too slow
            if proof.expired():
                reason = f"no proof within {PROOF_S:g} s"
        if asyncio.current_task() in self._strangers:
            self.closed[reason] += 1

    async def _introduce(self, visitor: socket.socket, proof: asyncio.Timeout) -> str:
        """Connect a visitor to ZeroMQ; return why it ended."""
        visitor.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        first = b""
        while len(first) < _SIGNATURE:
            more = await self._loop.sock_recv(visitor, _SIGNATURE - len(first))
            if not more:
                return "left"
            first += more
        if (first[0], first[-1]) != (0xFF, 0x7F):
            return "another protocol"
        task = asyncio.current_task()
        assert task is not None
        with socket.socket(socket.AF_UNIX) as inner:
            inner.setblocking(False)
            await self._loop.sock_connect(inner, self._inner)
            await self._loop.sock_sendall(inner, first)
            ways = [
                self._loop.create_task(self._hear(task, visitor, inner)),
                self._loop.create_task(self._tell(task, visitor, inner, proof)),
            ]
            try:
                ended, _ = await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
                return ended.pop().result()
            finally:
                for way in ways:
                    way.cancel()
                await asyncio.gather(*ways, return_exceptions=True)

    async def _hear(
        self, task: asyncio.Task, visitor: socket.socket, inner: socket.socket
    ) -> str:
        buffer, heard = memoryview(bytearray(_CHUNK)), _SIGNATURE
        while count := await self._loop.sock_recv_into(visitor, buffer):
            heard += count
            if task in self._peers:
                self._peers[task] = self._loop.time()
            elif heard > _MOST_HEARD:
                return "sent too much"
            await self._loop.sock_sendall(inner, buffer[:count])
        return "left"

    async def _tell(
        self,
        task: asyncio.Task,
        visitor: socket.socket,
        inner: socket.socket,
        proof: asyncio.Timeout,
    ) -> str:
        buffer, told = memoryview(bytearray(_CHUNK)), b""
        while count := await self._loop.sock_recv_into(inner, buffer):
            if task in self._strangers:
                told += buffer[:count]
                if told[_READY] == b"\x05READY":
                    proof.reschedule(None)
                    self._peers[task] = self._strangers.pop(task)
                    if len(self._peers) > self._most:
                        self._close_one(self._peers, "too many of peers")
            await self._loop.sock_sendall(visitor, buffer[:count])
        return "another secret, or none"


def _spare() -> float:
    """Count the descriptors that are free, beyond the reserve."""
    limit, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    if limit == resource.RLIM_INFINITY:
        return math.inf
    try:
        used = len(os.listdir("/dev/fd"))
    except OSError:  # none is left to look with
        used = limit
    return limit - used - min(RESERVE, limit // 4)
