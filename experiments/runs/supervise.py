"""Several processes of one host: started, watched, stopped, started again.

Nothing here imports jax. The supervisor polls exit codes, and every process tells it
through a pipe what it is at, so that one that hangs is noticed as well. Processes are
stopped with SIGKILL, because jax.distributed keeps SIGTERM to itself, and because it is
safe: a run continues after it bit for bit.

What is started again together is a team: all processes that ``jax.distributed`` joins
are one, and a worker of asynchronous pairs is one by itself.
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
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from bagua_jax.experiments.spec.config import ConfigError, require_ranges

__all__ = [
    "CRASHED",
    "Policy",
    "Program",
    "beat",
    "free_addresses",
    "is_launched",
    "supervise",
    "tie",
]

CRASHED = 3
"""Exit status of a process that failed for a reason that may be gone the next time."""

_PROCESS = "BAGUA_JAX_PROCESS"  # as in bagua_jax.processes, which imports jax
_BEAT = "BAGUA_JAX_BEAT"
_SUPERVISOR = "BAGUA_JAX_SUPERVISOR"
_POLL = 0.05
_QUICK = ("step", "evaluating", "saving")
_WAITING = "waiting"
"""Phase of a process that is done, and waits for others however long they take."""
_LONGEST = 60.0
"""Seconds that the back-off does not grow beyond."""


# --- in a process ---


def is_launched() -> bool:
    """Say whether a supervisor started this process."""
    return _PROCESS in os.environ


def tie() -> None:
    """Make this process die with its supervisor, however that dies.

    On Linux the kernel sees to it. Elsewhere the process notices at its next step that
    nobody listens.

    Raises:
        ConfigError: if the environment says so, and no supervisor is this process's
            parent.
    """
    faulthandler.register(signal.SIGUSR1)  # asked for where it hangs
    if sys.platform.startswith("linux"):
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
    if os.environ.get(_SUPERVISOR) != str(os.getppid()):  # or it was quicker
        raise ConfigError(
            f"{_PROCESS}={os.environ[_PROCESS]!r} is in the environment, and no "
            "supervisor has started this process. `bagua-jax launch` and `bagua-jax "
            f"async` set {_PROCESS}, {_SUPERVISOR} and {_BEAT} for the processes that "
            "they start: unset them."
        )


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


@dataclass(frozen=True)
class Policy:
    """What is done about a process that dies or hangs."""

    restarts: int = 0
    """How often at most what died or hung is started again."""
    give_up_after: int = 1
    """Consecutive restarts without a new step after which it is given up."""
    backoff: float = 1.0
    """Seconds before a restart; doubled after each one that gained no step."""
    stuck_after: float = 60.0
    """Seconds in which a process must finish a step, an evaluation or a checkpoint."""
    start_within: float = 600.0
    """Seconds in which a process must start, compile, or write the report."""

    def __post_init__(self):
        count, seconds = (0, 10**6), (0, 10**9)
        ranges = dict.fromkeys(("restarts", "give_up_after"), count)
        ranges |= dict.fromkeys(("backoff", "stuck_after", "start_within"), seconds)
        require_ranges(self, ranges)


class Program(NamedTuple):
    """What a process runs: words, and what is added to the environment."""

    words: Sequence[str]
    env: Mapping[str, str] = {}


@dataclass
class _Process:
    """One process, and what it last said."""

    index: int
    popen: subprocess.Popen
    pipe: int
    log: Path
    read: int  # so much of its log was read
    shown: bool  # its output is the supervisor's, and so is what it would tell its user
    phase: str = "starting"
    label: str = ""
    step: int = 0
    since: float = field(default_factory=time.monotonic)
    rest: bytes = b""

    def listen(self) -> None:
        """Read what it has said since; pass on what is meant for the user."""
        with contextlib.suppress(BlockingIOError):
            while heard := os.read(self.pipe, 65536):
                *lines, self.rest = (self.rest + heard).split(b"\n")
                if lines:
                    self.phase, self.label, step = lines[-1].decode().split("\t")
                    self.step, self.since = int(step), time.monotonic()
        if not self.shown:
            return
        with open(self.log, "rb") as file:
            file.seek(self.read)
            for line in file:
                if not line.endswith(b"\n"):
                    break
                self.read += len(line)
                if line.startswith(b"bagua-jax: "):
                    text = line.decode(errors="replace")
                    print(text, end="", file=sys.stderr, flush=True)


@dataclass
class _Team:
    """Processes that start and stop together, and how that went."""

    programs: Callable[[int], Sequence[Program]]
    first: int  # index of its first process
    processes: list[_Process] = field(default_factory=list)
    attempts: int = 0
    due: float = 0.0
    furthest: tuple[int, int] = (-1, -1)  # behind one that has done nothing
    in_vain: int = 0
    status: int | None = None  # how it ended

    def stop(self) -> None:
        """Leave no process."""
        for process in self.processes:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.popen.pid, signal.SIGKILL)  # and what it started
        while self.processes:
            process = self.processes.pop()
            process.popen.wait()
            process.listen()  # to its last words
            os.close(process.pipe)


class _Failure(NamedTuple):
    process: _Process
    reason: str
    status: int


def supervise(
    teams: Sequence[Callable[[int], Sequence[Program]]],
    count: int,
    folder: Path,
    *,
    name: str,
    labels: Sequence[str],
    workers: int,
    policy: Policy,
    log: str = "{}.log",
    shown: bool = True,
    fatal: Container[int] = (),
    look: Callable[[], None] = lambda: None,
) -> list[int]:
    """Run programs in several processes until all have finished, or are given up.

    Args:
        teams: for each team what its processes run, by how often it was started before.
            Teams are of one size.
        count: processes of all teams.
        folder: for their logs; it exists.
        name: of the command, in messages.
        labels: of the runs that they do, in order.
        workers: of all processes together.
        policy: what is done about a process that dies or hangs.
        log: file name of a process's log.
        shown: whether the first process's output is this one's, and not in its log.
        fatal: exit statuses that end all teams.
        look: called now and then.

    Returns:
        For each team 0, or the exit status of the process for which it was given up,
        128 and the signal's number if one killed it, as shells have it. Teams that
        were ended for another's have that one's.

    Raises:
        KeyboardInterrupt: on Ctrl-C; no process is left then, nor in any other case.
    """
    size = count // len(teams)
    groups = [_Team(programs, k * size) for k, programs in enumerate(teams)]
    restarts = 0

    def say(message: str) -> None:
        print(f"bagua-jax: {name}: {message}", file=sys.stderr, flush=True)

    def again(team: _Team, failure: _Failure, reached: tuple[int, int]) -> bool:
        """Decide whether a team is started once more."""
        nonlocal restarts
        if failure.status not in (CRASHED, *range(128, 256)):
            return False  # it has said itself that it cannot go on
        team.in_vain = 0 if reached > team.furthest else team.in_vain + 1
        team.furthest = max(team.furthest, reached)
        if restarts == policy.restarts:
            if restarts:
                say(f"gives up after {restarts} restarts.")
            return False
        if team.in_vain and team.in_vain >= policy.give_up_after:
            say("gives up: no step was gained since the failure before.")
            return False
        restarts += 1
        wait = min(policy.backoff * 2**team.in_vain, _LONGEST)
        say(f"restart {restarts} of {policy.restarts} at most, in {wait:g} s")
        team.due = time.monotonic() + wait
        return True

    before = signal.signal(signal.SIGTERM, _terminated)
    try:
        while any(team.status is None for team in groups):
            for team in groups:
                if team.status is not None:
                    continue
                if not team.processes:
                    if time.monotonic() >= team.due:
                        _start(team, count, folder, log, shown)
                    continue
                outcome = _watch(team, groups, policy)
                if outcome is None:
                    continue
                reached = max(_progress(p, labels) for p in team.processes)
                team.stop()
                if isinstance(outcome, int):
                    team.status = outcome
                    continue
                ends = len(groups) == 1 or outcome.status in fatal
                _report(outcome, workers // count, ends, say)
                if not again(team, outcome, reached):
                    team.status = outcome.status
                if outcome.status in fatal:
                    statuses = (each.status for each in groups)
                    return [outcome.status if s is None else s for s in statuses]
            look()
            time.sleep(_POLL)
    finally:
        for team in groups:
            team.stop()
        signal.signal(signal.SIGTERM, before)
    return [team.status or 0 for team in groups]


def free_addresses(count: int, host: str = "127.0.0.1") -> list[str]:
    """Find different ports that nobody has now; others may, before they are used."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket(family)) for _ in range(count)]
        for probe in probes:
            probe.bind((host, 0))
        ports = [probe.getsockname()[1] for probe in probes]
    return [f"[{host}]:{port}" if ":" in host else f"{host}:{port}" for port in ports]


def _terminated(number, frame) -> None:
    raise SystemExit(128 + number)


def _start(team: _Team, count: int, folder: Path, log: str, shown: bool) -> None:
    """Start the processes of a team."""
    shared = {  # compiled by one process, read by others and by one that comes back
        "JAX_COMPILATION_CACHE_DIR": str((folder / "compiled").absolute()),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        "OMP_NUM_THREADS": "1",
    }
    programs = team.programs(team.attempts)
    for index, program in enumerate(programs, team.first):
        path = folder / log.format(index)
        read, write = os.pipe()
        try:
            os.set_blocking(read, False)
            os.set_blocking(write, False)
            own = {_PROCESS: f"{index}/{count}", _BEAT: str(write)}
            own[_SUPERVISOR] = str(os.getpid())
            with open(path, "ab" if team.attempts else "wb") as file:
                begins = file.tell()
                popen = subprocess.Popen(
                    program.words,
                    env={**shared, **os.environ, **program.env, **own},
                    stdin=subprocess.DEVNULL,
                    stdout=None if shown and not index else file,
                    stderr=file,
                    pass_fds=(write,),
                    start_new_session=True,  # Ctrl-C is for the supervisor
                )
        except BaseException:
            os.close(read)
            raise
        finally:
            os.close(write)
        process = _Process(index, popen, read, path, begins, shown and not index)
        team.processes.append(process)
    team.attempts += 1


def _watch(
    team: _Team, groups: Sequence[_Team], policy: Policy
) -> "_Failure | int | None":
    """Find out whether a team has finished (0), has failed, or goes on."""
    for process in team.processes:
        process.listen()
    codes = [process.popen.poll() for process in team.processes]
    if not any(code is None for code in codes) and not any(codes):
        return 0
    # One that a signal killed comes first: it is why the others failed.
    for process, code in sorted(
        zip(team.processes, codes, strict=True), key=lambda pair: pair[1] or 0
    ):
        if code:
            process.listen()
            return _Failure(process, *_cause(code))
    return _stuck(team, groups, policy)


def _cause(code: int) -> tuple[str, int]:
    if code > 0:
        return f"ended with exit status {code}", code
    name = signal.Signals(-code).name
    return f"was killed by {name}", 128 - code


def _stuck(team: _Team, groups: Sequence[_Team], policy: Policy) -> _Failure | None:
    """Find the process that the others wait for, if nothing happens for too long."""
    living = [p for p in team.processes if p.popen.poll() is None]
    for process in living:
        since, limit = process.since, policy.start_within
        if process.phase in _QUICK:
            limit = policy.stuck_after
        elif process.phase == _WAITING:  # as long as any other moves
            since = max(p.since for each in groups for p in each.processes)
        if time.monotonic() - since > limit:
            culprit = min(living, key=lambda p: p.since)
            for p in living:  # a stack in its log
                with contextlib.suppress(ProcessLookupError):
                    os.kill(p.popen.pid, signal.SIGUSR1)
            time.sleep(0.5)
            waited = time.monotonic() - culprit.since
            reason = f"has not moved for {waited:.0f} s"
            return _Failure(culprit, reason, 128 + signal.SIGALRM)
    return None


def _progress(process: _Process, labels: Sequence[str]) -> tuple[int, int]:
    if process.label not in labels:
        return -1, 0
    return labels.index(process.label), process.step


def _report(
    failure: _Failure, own: int, ends: bool, say: Callable[[str], None]
) -> None:
    """Say which process failed, where it was, why, and what its log ends with."""
    process, reason, _ = failure
    first = process.index * own
    whose = f"worker {first}" if own == 1 else f"workers {first} to {first + own - 1}"
    at = f"step {process.step}" if process.phase == "step" else process.phase
    at += f" of {process.label}" if process.label else ""
    fate = "all are stopped" if ends else "the others go on"
    say(
        f"process {process.index} ({whose}, host {socket.gethostname()}) "
        f"{reason} at {at}; {fate}. Its log is {process.log}."
    )
    lines = process.log.read_text(encoding="utf-8", errors="replace").splitlines()
    lines = [x for x in lines if x.strip() and not x.startswith("[Gloo]")][-8:]
    for line in lines:
        if not process.shown or not line.startswith("bagua-jax: "):  # shown before
            print(f"    {line:.1000}", file=sys.stderr, flush=True)
