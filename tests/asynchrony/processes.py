"""Start the tests' worker programs, and never leave one behind."""

import os
import socket
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def free_ports(count: int) -> list[int]:
    probes = [socket.socket() for _ in range(count)]
    for probe in probes:
        probe.bind(("127.0.0.1", 0))
    found = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return found


class Workers:
    """Processes of one test; on leaving all are killed."""

    def __init__(self, program: str):
        self._command = [sys.executable, "-m", f"asynchrony.{program}"]
        self._all: list[subprocess.Popen] = []

    def start(self, *arguments) -> subprocess.Popen:
        path = f"{ROOT}{os.pathsep}{ROOT / 'tests'}"
        process = subprocess.Popen(
            [*self._command, *map(str, arguments)],
            env=os.environ | {"PYTHONPATH": path},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self._all.append(process)
        return process

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *error) -> None:
        for process in self._all:
            process.kill()  # jax.distributed traps SIGTERM
            process.communicate()
