"""A link between two workers that a test can stop, heal and cut."""

import contextlib
import random
import socket
import struct
import threading

RESET = struct.pack("ii", 1, 0)  # SO_LINGER: closing resets, and drops what is queued


class Link:
    """Pass on bytes from an address of its own to a worker's.

    Args:
        to: ``host:port`` of the worker.
        cut_after: every connection is cut after a random number of bytes of this range;
            never where ``None``.
        seed: of these numbers.
    """

    def __init__(self, to: str, cut_after: range | None = None, seed: int = 0):
        host, port = to.split(":")
        self._to, self._cut_after = (host, int(port)), cut_after
        self._random = random.Random(seed)
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self._flows = threading.Event()
        self._flows.set()
        self._open: list[socket.socket] = []
        self.cuts = 0
        threading.Thread(target=self._accept, daemon=True).start()

    def stop(self) -> None:
        """Pass on nothing more; connections stay open, and nobody is told."""
        self._flows.clear()

    def heal(self) -> None:
        """Pass on what has waited, and all that follows."""
        self._flows.set()

    def cut(self) -> None:
        """Reset every connection."""
        _reset(*self._open)
        self._open.clear()

    def close(self) -> None:
        """Cut everything, for good."""
        self._listener.close()
        self.heal()
        self.cut()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
                worker = socket.create_connection(self._to)
            except OSError:
                if self._listener.fileno() < 0:
                    return
                client.close()  # nobody is there
                continue
            self._open += [client, worker]
            budget = [self._random.choice(self._cut_after)] if self._cut_after else []
            for pair in ((client, worker), (worker, client)):
                threading.Thread(
                    target=self._pass_on, args=(*pair, budget), daemon=True
                ).start()

    def _pass_on(self, source: socket.socket, sink: socket.socket, budget: list[int]):
        with contextlib.suppress(OSError):
            while data := source.recv(1000):
                self._flows.wait()
                if budget and len(data) > budget[0]:
                    sink.sendall(data[: budget[0]])  # a message is torn apart
                    self.cuts += 1
                    break
                if budget:
                    budget[0] -= len(data)
                sink.sendall(data)
        _reset(source, sink)


def _reset(*connections: socket.socket) -> None:
    for one in connections:
        with contextlib.suppress(OSError):
            one.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
            one.shutdown(socket.SHUT_RDWR)  # wakes who waits for it
        one.close()
