"""A switch in user space that delays frames, for kernels without netem.

``switch.py DELAY_MS RATE_MBIT NAME...`` makes a TAP device of each name, writes
``ready``, and then carries frames between them until it is killed. The devices are
moved into the workers' namespaces, where each is a worker's ``eth0``. A frame leaves
its port a fixed delay after it came in, and not before the port has sent those before
it at its rate (0: unlimited). Up to 64 KB of a stream pass as one frame, with the
header that says how a card would cut it, so that Python keeps up.
"""

import collections
import fcntl
import os
import select
import struct
import sys
import time

TUNSETIFF, TUNSETOFFLOAD, TUNSETVNETHDRSZ = 0x400454CA, 0x400454D0, 0x400454D8
IFF_TAP, IFF_NO_PI, IFF_VNET_HDR = 0x0002, 0x1000, 0x4000
CHECKSUM, TSO4, TSO6 = 0x01, 0x02, 0x04  # the kernel may leave these to the receiver
HEADER = 10  # bytes of a virtio header before each frame
WAITING = 4 << 20  # bytes that a port holds back; more are dropped


class Port:
    """One TAP device, and the frames on their way to it."""

    def __init__(self, name: str) -> None:
        self.file = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
        flags = IFF_TAP | IFF_NO_PI | IFF_VNET_HDR
        fcntl.ioctl(self.file, TUNSETIFF, struct.pack("16sH22x", name.encode(), flags))
        fcntl.ioctl(self.file, TUNSETVNETHDRSZ, struct.pack("i", HEADER))
        fcntl.ioctl(self.file, TUNSETOFFLOAD, CHECKSUM | TSO4 | TSO6)
        self.queue: collections.deque = collections.deque()  # (due, frame)
        self.waiting, self.free_at = 0, 0.0

    def accept(self, frame: bytes, due: float, seconds_per_byte: float) -> None:
        """Line a frame up behind the others."""
        if self.waiting + len(frame) > WAITING:
            return
        self.free_at = max(due, self.free_at) + len(frame) * seconds_per_byte
        self.queue.append((self.free_at, frame))
        self.waiting += len(frame)

    def release(self, now: float) -> float | None:
        """Send what is due; give the time of the next frame."""
        while self.queue:
            due, frame = self.queue[0]
            if due > now:
                return due
            self.queue.popleft()
            self.waiting -= len(frame)
            try:
                os.write(self.file, frame)
            except OSError:  # the device is not up, or its queue is full: a drop
                pass
        return None


def main() -> None:
    delay, rate = float(sys.argv[1]) / 1e3, float(sys.argv[2])
    ports = [Port(name) for name in sys.argv[3:]]
    seconds_per_byte = 8e-6 / rate if rate else 0.0
    home: dict[bytes, Port] = {}  # who answers to an address, learned from senders
    by_file = {port.file: port for port in ports}
    print("ready", flush=True)
    timeout: float | None = None
    while True:
        readable, _, _ = select.select(list(by_file), [], [], timeout)
        now = time.monotonic()
        for file in readable:
            sender = by_file[file]
            for _ in range(16):
                try:
                    frame = os.read(file, 1 << 17)
                except OSError:
                    break
                target, source = frame[HEADER:][:6], frame[HEADER + 6 :][:6]
                home[source] = sender
                known = home.get(target)
                others = [port for port in ports if port is not sender]
                for port in [known] if known else others:
                    port.accept(frame, now + delay, seconds_per_byte)
        now = time.monotonic()
        due = [port.release(now) for port in ports]
        waits = [at - now for at in due if at is not None]
        timeout = max(0.0, min(waits)) if waits else None


if __name__ == "__main__":
    main()
