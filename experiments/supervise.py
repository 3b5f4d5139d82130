"""Several processes of one host: started, watched, stopped, started again.

Nothing here imports jax. The supervisor polls exit codes, and every process tells it
through a pipe what it is at, so that one that hangs is noticed as well. Processes are
stopped with SIGKILL, because jax.distributed keeps SIGTERM to itself, and because it is
safe: a run continues after it bit for bit.
"""

import contextlib
import ctypes
import faulthandler
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

__all__ = ["CRASHED", "Policy", "beat", "is_launched", "supervise", "tie"]

CRASHED = 3
"""Exit status of a process that failed for a reason that may be gone the next time."""

_PROCESS = "BAGUA_JAX_PROCESS"  # as in bagua_jax.processes, which imports jax
_BEAT = "BAGUA_JAX_BEAT"
_SUPERVISOR = "BAGUA_JAX_SUPERVISOR"
_POLL = 0.05
_QUICK = ("step", "evaluating", "saving")
_LONGEST = 60.0
"""Seconds that the back-off does not grow beyond."""


# --- in a process ---


def is_launched() -> bool:
    """Say whether ``bagua-jax launch`` started this process."""
    return _PROCESS in os.environ


def tie() -> None:
    """Make this process die with its supervisor, however that dies.

    On Linux the kernel sees to it. Elsewhere the process notices at its next step that
    nobody listens.
    """
    faulthandler.register(signal.SIGUSR1)  # asked for where it hangs
    if sys.platform.startswith("linux"):
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
    if os.getppid() != int(os.environ[_SUPERVISOR]):  # it was quicker
        os._exit(CRASHED)


def beat(phase: str, label: str = "", step: int = 0) -> None:
    """Tell the supervisor, if there is one, what this process goes on to do.

    Args:
        phase: such as ``"step"``.
        label: of the run.
        step: that is taken.
    """
    pipe = os.environ.get(_BEAT)
    if pipe is None:
        return
    try:
        os.write(int(pipe), f"{phase}\t{label}\t{step}\n".encode())
    except BlockingIOError:  # it is behind, and will read the next one
        pass
    except BrokenPipeError:  # it is gone: stop, as it would have us do
        os._exit(CRASHED)


# --- the supervisor ---


class Policy(NamedTuple):
    """What is done about a process that dies or hangs; see ``bagua-jax launch``."""

    restarts: int = 0
    fruitless: int = 1
    backoff: float = 1.0
    stuck_after: float = 60.0
    start_within: float = 600.0


@dataclass
class _Process:
    """One process, and what it last said."""

    index: int
    popen: subprocess.Popen
    pipe: int
    log: Path
    phase: str = "starting"
    label: str = ""
    step: int = 0
    since: float = field(default_factory=time.monotonic)
    rest: bytes = b""

    def listen(self) -> None:
        """Read what it has said since."""
        with contextlib.suppress(BlockingIOError):
            while heard := os.read(self.pipe, 65536):
                *lines, self.rest = (self.rest + heard).split(b"\n")
                if lines:
                    self.phase, self.label, step = lines[-1].decode().split("\t")
                    self.step, self.since = int(step), time.monotonic()


class _Failure(NamedTuple):
    process: _Process
    reason: str
    status: int


def supervise(
    command: Sequence[str],
    count: int,
    folder: Path,
    *,
    labels: Sequence[str],
    workers: int,
    policy: Policy,
) -> int:
    """Run a command in several processes until all have finished.

    Args:
        command: a program and its arguments, the same for every process.
        count: how many processes.
        folder: for their logs, ``0.log`` and so on; it exists.
        labels: of the runs that they do, in order.
        workers: of all processes together.
        policy: what is done about a process that dies or hangs.

    Returns:
        0, or the exit status of the first process that failed, 128 and the signal's
        number if one killed it, as shells have it.

    Raises:
        KeyboardInterrupt: on Ctrl-C; no process is left then, nor in any other case.
    """
    furthest, fruitless, restarts = (0, 0), 0, 0
    while True:
        with _started(command, count, folder, fresh=not restarts) as processes:
            failure = _watch(processes, policy)
        if failure is None:
            return 0
        _report(failure, processes, workers)
        if failure.status not in (CRASHED, *range(128, 256)):
            return failure.status  # it has said itself that it cannot go on
        reached = max(_progress(p, labels) for p in processes)
        fruitless = 0 if reached > furthest else fruitless + 1
        furthest = max(furthest, reached)
        if restarts == policy.restarts:
            if restarts:
                _say(f"gives up after {restarts} restarts.")
            return failure.status
        if fruitless and fruitless >= policy.fruitless:
            _say("gives up: no step was gained since the failure before.")
            return failure.status
        restarts += 1
        wait = min(policy.backoff * 2**fruitless, _LONGEST)
        _say(f"restart {restarts} of {policy.restarts} at most, in {wait:g} s")
        time.sleep(wait)


def _progress(process: _Process, labels: Sequence[str]) -> tuple[int, int]:
    if process.label not in labels:
        return 0, 0
    return labels.index(process.label), process.step


def _say(message: str) -> None:
    print(f"bagua-jax: launch: {message}", file=sys.stderr, flush=True)


@contextlib.contextmanager
def _started(
    command: Sequence[str], count: int, folder: Path, *, fresh: bool
) -> Iterator[list[_Process]]:
    """Start the processes; none is left at the end, however it comes."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    cache = folder / "compiled"
    shared = {
        "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
        "JAX_COMPILATION_CACHE_DIR": str(cache.absolute()),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        "OMP_NUM_THREADS": "1",
    }
    processes: list[_Process] = []
    before = signal.signal(signal.SIGTERM, _terminated)
    try:
        for index in range(count):
            read, write = os.pipe()
            os.set_blocking(read, False)
            os.set_blocking(write, False)
            own = {_PROCESS: f"{index}/{count}", _BEAT: str(write)}
            own[_SUPERVISOR] = str(os.getpid())
            path = folder / f"{index}.log"
            with open(path, "wb" if fresh else "ab") as log:
                popen = subprocess.Popen(
                    command,
                    env=shared | os.environ | own,
                    stdin=subprocess.DEVNULL,
                    stdout=None if index == 0 else log,
                    stderr=log,
                    pass_fds=(write,),
                    start_new_session=True,  # Ctrl-C is for the supervisor
                )
            os.close(write)
            processes.append(_Process(index, popen, read, path))
        yield processes
    finally:
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.popen.pid, signal.SIGKILL)  # and what it started
        for process in processes:
            process.popen.wait()
            process.listen()
            os.close(process.pipe)
        signal.signal(signal.SIGTERM, before)


def _terminated(number, frame) -> None:
    raise SystemExit(128 + number)


def _watch(processes: Sequence[_Process], policy: Policy) -> _Failure | None:
    """Wait until all have finished, or one fails."""
    said = open(processes[0].log, encoding="utf-8", errors="replace")  # noqa: SIM115
    with said:
        while True:
            time.sleep(_POLL)
            codes = [process.popen.poll() for process in processes]
            for process in processes:
                process.listen()
            for line in said:
                if line.startswith("bagua-jax: "):  # what it would tell its user
                    print(line, end="", file=sys.stderr, flush=True)
            if not any(code is None for code in codes) and not any(codes):
                return None
            # One that a signal killed comes first: it is why the others failed.
            for process, code in sorted(
                zip(processes, codes, strict=True), key=lambda pair: pair[1] or 0
            ):
                if code:
                    return _Failure(process, *_cause(code))
            if stuck := _stuck(processes, policy):
                return stuck


def _cause(code: int) -> tuple[str, int]:
    if code > 0:
        return f"ended with exit status {code}", code
    name = signal.Signals(-code).name
    return f"was killed by {name}", 128 - code


def _stuck(processes: Sequence[_Process], policy: Policy) -> _Failure | None:
    """Find the process that the others wait for, if nothing happens for too long."""
    living = [p for p in processes if p.popen.poll() is None]
    now = time.monotonic()
    for process in living:
        quick = process.phase in _QUICK
        limit = policy.stuck_after if quick else policy.start_within
        if now - process.since > limit:
            culprit = min(living, key=lambda p: p.since)
            for p in living:  # a stack in its log
                with contextlib.suppress(ProcessLookupError):
                    os.kill(p.popen.pid, signal.SIGUSR1)
            time.sleep(0.5)
            reason = f"has not moved for {now - culprit.since:.0f} s"
            return _Failure(culprit, reason, 128 + signal.SIGALRM)
    return None


def _report(failure: _Failure, processes: Sequence[_Process], workers: int) -> None:
    """Say which process failed, where it was, why, and what its log ends with."""
    process, own = failure.process, workers // len(processes)
    first = process.index * own
    whose = f"worker {first}" if own == 1 else f"workers {first} to {first + own - 1}"
    at = f"step {process.step}" if process.phase == "step" else process.phase
    at += f" of {process.label}" if process.label else ""
    _say(
        f"process {process.index} ({whose}, host {socket.gethostname()}) "
        f"{failure.reason} at {at}; all are stopped. Its log is {process.log}."
    )
    lines = process.log.read_text(encoding="utf-8", errors="replace").splitlines()
    lines = [x for x in lines if not x.startswith("[Gloo]")][-8:]
    for line in lines:
        if process.index or not line.startswith("bagua-jax: "):  # shown before
            print(f"    {line}", file=sys.stderr, flush=True)
