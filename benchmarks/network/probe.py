"""Measure one link with plain sockets: payload rate, and round trips of 64 bytes.

``probe.py OWN_ADDRESS PEER_ADDRESS SECONDS``, run by all workers at once, each with the
next as peer. Rates are measured where bytes arrive. The worker at the lowest address
then plays ping-pong, when the streams have ended.
"""

import json
import socket
import sys
import threading
import time

PORT, PORT_OF_PINGS = 29400, 29401
CHUNK, PINGS, SKIPPED_S = 1 << 16, 50, 0.4


def listen(address: str, port: int) -> socket.socket:
    server = socket.create_server((address, port))
    server.settimeout(30)
    return server


def connect(address: str, port: int) -> socket.socket:
    deadline = time.monotonic() + 30
    while True:
        try:
            link = socket.create_connection((address, port), timeout=30)
            link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            return link
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.02)


def receive(server: socket.socket, result: dict) -> None:
    """Count what arrives, without the first moments, in which buffers fill."""
    link, _ = server.accept()
    start = time.monotonic()
    counted, since, last = 0, start, start
    buffer = bytearray(CHUNK)
    while got := link.recv_into(buffer):
        last = time.monotonic()
        if last - start < SKIPPED_S:
            since = last
        else:
            counted += got
    result["throughput_mbit"] = counted * 8e-6 / max(last - since, 1e-9)


def echo(server: socket.socket) -> None:
    link, _ = server.accept()
    link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    while message := link.recv(64, socket.MSG_WAITALL):
        link.sendall(message)


def ping(peer: str) -> list[float]:
    link, trips = connect(peer, PORT_OF_PINGS), []
    for _ in range(PINGS):
        start = time.perf_counter()
        link.sendall(bytes(64))
        link.recv(64, socket.MSG_WAITALL)
        trips.append((time.perf_counter() - start) * 1e3)
    link.close()
    return trips


def main() -> None:
    own, peer, seconds = sys.argv[1], sys.argv[2], float(sys.argv[3])
    result: dict = {}
    stream, pings = listen(own, PORT), listen(own, PORT_OF_PINGS)
    receiver = threading.Thread(target=receive, args=(stream, result))
    receiver.start()
    echoes = threading.Thread(target=echo, args=(pings,), daemon=True)
    echoes.start()
    link, data = connect(peer, PORT), bytes(CHUNK)
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        link.sendall(data)
    link.close()
    receiver.join()
    if own.endswith(".1"):
        time.sleep(0.3)
        result["rtt_ms"] = ping(peer)
    elif own.endswith(".2"):
        echoes.join(30)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
