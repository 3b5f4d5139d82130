"""Disturb runs of several processes again and again, and show that nothing is lost.

One run after the other is started by its command: ``launch`` (synchronous, 2 to 4
processes), ``async`` in ``rounds`` (3 workers) and in ``pairs`` (5 workers). At random
moments it is disturbed, until it has finished all the same:

- a process is killed, the coordinator's among them; in pairs up to three at once;
- one is stopped for good, so that it hangs, or for a moment (``paused``);
- a connection between two processes is cut, or the network is down for a moment;
- the supervisor is killed, and the same command given again;
- the disk is full until the command has ended, and the same command given again;
- the supervisor is killed, a file of the run is damaged, and the same command given
  again. Where it refuses the file by its name, the file is restored.

Then the run is judged. ``launch``: metrics and checkpoints equal, bit for bit, those of
a run that nobody disturbed. ``async``: every worker has taken all of its steps, no
record is torn, no restart fell further behind than the last save (in pairs, where a
worker takes over from a live one: none began again), and the averaged model is trained.
No process may be left, and none may hang. Only what happened to a run that was judged
sound is counted; a run that was not is written down as a failure.

Run it from the repository's root, on Linux, as root or where unprivileged user
namespaces are allowed: ``python -m benchmarks.soak --mode pairs --minutes 30``. Network
and disk are namespaces of its own; nothing of the machine's is touched. Results of
several commands add up in ``benchmarks/results/soak.json``, whose table is printed;
``--show`` prints it alone.
"""

import argparse
import contextlib
import fcntl
import json
import os
import random
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from bagua_jax.experiments.runs import folders, integrity

ALGORITHMS = {
    "gradient_allreduce": {},
    "bytegrad": {"error_feedback": "both"},
    "low_precision_decentralized": {},
}
MEAN = [{"name": "async_model_average", "local_steps": 1, "label": "mean"}]
RESULTS = Path(__file__).parent / "results" / "soak.json"
SAVES = {"launch": 25, "rounds": 50, "pairs": 50}
"""Steps between checkpoints."""
PACE = 0.1
"""Seconds that a step of an asynchronous worker takes at least."""
IN_A_START = 0.25
"""Share of the restarts that are disturbed before a step is taken."""
STUCK_AFTER = 60.0
"""Seconds without a step after which a process hangs: the commands' default."""
LATE = 1200.0
"""Seconds without news after which a run, or what was done to it, counts as hung."""
DISK = 256 * 2**20
_INSIDE = "BAGUA_JAX_SOAK"
_NOTICED = re.compile(
    r"bagua-jax: (?:launch|async): process (\d+) \(.*?\) "
    r"(was killed by \w+|has not moved|ended with exit status)"
)
SHARES = {  # of the kinds of disturbance, in each mode
    "launch": {
        "killed": 26,
        "paused": 40,
        "hung": 4,
        "link cut": 9,
        "network down": 10,
        "supervisor killed": 7,
        "disk full": 4,
        "file damaged": 5,
    },
    "rounds": {
        "killed": 24,
        "paused": 36,
        "hung": 3,
        "link cut": 14,
        "network down": 12,
        "supervisor killed": 5,
        "disk full": 3,
        "file damaged": 3,
    },
    "pairs": {
        "killed": 16,
        "paused": 34,
        "hung": 2,
        "link cut": 36,
        "network down": 8,
        "supervisor killed": 2,
        "disk full": 1,
        "file damaged": 1,
    },
}


class Unsound(Exception):
    """A run lost something, hangs, or has left a process behind."""


class Plan(NamedTuple):
    """One run: its mode, its size, and its length."""

    mode: str
    algorithm: str
    processes: int
    workers: int
    steps: int


# --- namespaces -----------------------------------------------------------------------


def enter() -> None:
    """Run this program again with its own network and mounts; return only there."""
    if _INSIDE in os.environ:
        subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
        return
    os.environ[_INSIDE] = "1"
    command = ["unshare", "--net", "--mount", "--propagation", "private"]
    command += ["--map-root-user"] if os.geteuid() else []
    if subprocess.run([*command, "true"], capture_output=True).returncode:
        raise SystemExit("skipped: network and mount namespaces are not allowed here.")
    os.execvp(command[0], [*command, sys.executable, *sys.orig_argv[1:]])


@contextlib.contextmanager
def small_disk() -> Iterator[Path]:
    """Mount a disk that can be filled."""
    with tempfile.TemporaryDirectory() as scratch:
        options = f"size={DISK}"
        mount = ["mount", "-t", "tmpfs", "-o", options, "none", scratch]
        subprocess.run(mount, check=True)
        try:
            yield Path(scratch)
        finally:
            subprocess.run(["umount", "--lazy", scratch], check=False)


# --- a run's processes ----------------------------------------------------------------


def start(plan: Plan, output: Path) -> subprocess.Popen:
    """Start the run's command, for the first time or again."""
    shape = ["quadratic", "--workers", str(plan.workers), "--steps", str(plan.steps)]
    shape += ["--checkpoint-every", str(SAVES[plan.mode]), "--output", str(output)]
    patience = ["--restarts", "100000", "--give-up-after", "1000", "--backoff", "0.02"]
    patience += ["--stuck-after", str(STUCK_AFTER), "--start-within", "120"]
    words = [sys.executable, "-m", "bagua_jax.experiments"]
    if plan.mode == "launch":
        chosen = [{"name": plan.algorithm, **ALGORITHMS[plan.algorithm]}]
        shape += ["--algorithms", json.dumps(chosen), "--eval-every", "400"]
        words += ["launch", "-n", str(plan.processes), *patience, "--", "run", *shape]
    else:
        shape += ["--algorithms", json.dumps(MEAN), "--eval-every", "25"]
        shape += ["--sharding", "iid", "--optimizer.learning-rate", "0.01"]
        words += ["async", *shape, "--exchange", plan.mode, *patience]
        words += ["--timeout", "10", "--pace", *[str(PACE)] * plan.workers]
    with open(output.with_suffix(".log"), "ab") as log:
        return subprocess.Popen(words, stdout=log, stderr=log, start_new_session=True)


def alive(output: Path) -> set[int]:
    """Every process, whoever started it, that works on this output folder."""
    found = set()
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal() and int(entry.name) != os.getpid():
            try:
                words = (entry / "cmdline").read_bytes()
                state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
            except OSError:
                continue
            if str(output).encode() in words and state != "Z":
                found.add(int(entry.name))
    return found


def processes(launcher: subprocess.Popen) -> dict[int, int]:
    """Find what a supervisor has started, by their places."""
    found = {}
    with contextlib.suppress(OSError):
        path = Path(f"/proc/{launcher.pid}/task/{launcher.pid}/children")
        for pid in path.read_text().split():
            with contextlib.suppress(OSError):
                own = Path(f"/proc/{pid}/environ").read_bytes()
                place = re.search(rb"BAGUA_JAX_PROCESS=(\d+)/", own)
                state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2]
                if place and state.split()[0] not in "ZTt":
                    found[int(place[1])] = int(pid)
    return found


def gone(pids: set[int], output: Path) -> float:
    """Wait until processes are gone; the seconds it took."""
    begun = time.monotonic()
    while left := pids & alive(output):
        if time.monotonic() - begun > LATE:
            raise Unsound(f"orphans after {LATE:g} s: {left}")
        time.sleep(0.02)
    return time.monotonic() - begun


def records(output: Path) -> int:
    """Metrics, or steps, written so far, of all workers."""
    paths = [*output.glob("*/*/metrics.jsonl"), *output.glob("*/*/steps-*.jsonl")]
    sizes = 0
    for path in paths:
        with contextlib.suppress(OSError):
            sizes += path.stat().st_size
    return sizes


# --- what is done to it ---------------------------------------------------------------


class Soak:
    """One run, disturbed until it has finished.

    Attributes:
        events: what was done, in order: ``what``, and ``noticed_s``, the seconds until
            the supervisor said so, or until all had ended.
    """

    def __init__(self, plan: Plan, output: Path, rng: random.Random, until: float):
        self.plan, self.output, self.rng, self.until = plan, output, rng, until
        self.log = output.with_suffix(".log")
        self.events: list[dict[str, Any]] = []
        self.launcher = start(plan, output)
        self._waiting: list[tuple[int, float, dict]] = []  # to be noticed
        self._read = 0
        self._backup: tuple[Path, bytes] | None = None
        self._moved, self._size = time.monotonic(), 0
        self._hold = True  # let it first come further than this

    def run(self, span: float) -> None:
        """Disturb it about every so many seconds; let it finish.

        Raises:
            Unsound: if it fails or hangs.
        """
        due = time.monotonic() + self.rng.uniform(0, 2 * span)
        while True:
            time.sleep(0.02)
            self._listen()
            now = time.monotonic()
            status = self.launcher.poll()
            if status == 0:
                for _, _, event in self._waiting:  # it was over before
                    self.events.remove(event)
                return
            if status is not None:
                self._again(status)
            if (size := records(self.output)) != self._size:
                self._size, self._moved = size, now
                if self._hold:
                    self._hold, due = False, now + self.rng.uniform(0, 2 * span)
            late = [event for _, since, event in self._waiting if now > since + LATE]
            if late or now > self._moved + LATE:
                raise Unsound(f"hung: {late or 'no new record'}")
            places = processes(self.launcher)
            together = self.plan.mode != "pairs"
            if (
                self._hold
                or now < due
                or now > self.until
                or (together and self._waiting)
            ):
                continue
            if len(places) < (self.plan.processes if together else 1):
                continue
            kinds = SHARES[self.plan.mode]
            what = self.rng.choices(list(kinds), weights=list(kinds.values()))[0]
            self._strike(what, places)
            due = time.monotonic() + self.rng.uniform(0, 2 * span)

    def _note(self, what: str, **facts: Any) -> dict[str, Any]:
        event = {"what": what, **facts}
        self.events.append(event)
        return event

    def _strike(self, what: str, places: dict[int, int]) -> None:
        many = 1
        if self.plan.mode == "pairs" and what in ("killed", "paused"):
            many = min(len(places), self.rng.choice((1, 1, 2, 3)))
        struck = self.rng.sample(sorted(places), many)
        if what in ("killed", "hung"):
            for place in struck:
                number = signal.SIGKILL if what == "killed" else signal.SIGSTOP
                with contextlib.suppress(ProcessLookupError):
                    os.kill(places[place], number)
                    whose = what
                    if not place and self.plan.mode != "pairs":
                        whose = f"coordinator {what}"
                    event = self._note(whose)
                    self._waiting.append((place, time.monotonic(), event))
        elif what == "paused":
            for place in struck:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(places[place], signal.SIGSTOP)
                    self._note(what)
            time.sleep(self.rng.uniform(0.1, 1.5))
            for place in struck:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(places[place], signal.SIGCONT)
        elif what == "link cut":
            if cut_a_connection(self.rng):
                self._note(what)
        elif what == "network down":
            subprocess.run(["ip", "link", "set", "lo", "down"], check=True)
            time.sleep(self.rng.uniform(0.1, 2.0))
            subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
            self._note(what)
        elif what == "disk full":
            self._fill()
        else:
            self._kill_supervisor(what)

    def _kill_supervisor(self, what: str) -> None:
        old = alive(self.output)
        self.launcher.kill()
        self.launcher.wait()
        event = self._note(what, noticed_s=gone(old, self.output))
        if what == "file damaged":
            self._damage(event)
        self._begin()

    def _begin(self) -> None:
        self._listen()
        for _, _, event in self._waiting:  # nobody was left to say so
            self.events.remove(event)
        self._waiting.clear()
        self.launcher, self._moved = start(self.plan, self.output), time.monotonic()
        self._hold = self.rng.random() > IN_A_START

    def _fill(self) -> None:
        """Leave no room, until the command has ended by itself."""
        filler, begun = self.output.parent / "filler", time.monotonic()
        try:
            with open(filler, "wb") as file, contextlib.suppress(OSError):
                while True:
                    room = os.statvfs(filler).f_bavail * os.statvfs(filler).f_frsize
                    os.posix_fallocate(file.fileno(), file.tell(), max(room, 1))
                    file.seek(0, os.SEEK_END)
                    if not room:
                        break
            while self.launcher.poll() is None:
                time.sleep(0.02)
                if time.monotonic() - begun > LATE:
                    raise Unsound("the disk is full, and the command goes on.")
        finally:
            filler.unlink(missing_ok=True)
        if self.launcher.returncode:  # else it had finished before
            self._note("disk full", noticed_s=time.monotonic() - begun)
            self._begin()

    def _damage(self, event: dict) -> None:
        """Spoil a file that the next start reads."""
        files = [
            path
            for path in [
                *self.output.glob("*/*/checkpoints/**/*"),
                *self.output.glob("*/*/saved-*.npz"),
            ]
            if path.is_file() and path.stat().st_size
        ]
        tails = [
            *self.output.glob("*/*/metrics.jsonl"),
            *self.output.glob("*/*/steps-*.jsonl"),
            *self.output.glob("*/*/models-*.f32"),
            *self.output.glob("*/*/events-*.jsonl"),
        ]
        chosen = files if files and self.rng.random() < 0.6 else tails
        if not chosen:
            self.events.remove(event)
            return
        path = self.rng.choice(sorted(chosen))
        whole = bytearray(path.read_bytes())
        self._backup = (path, bytes(whole))
        if chosen is files and self.rng.random() < 0.7 and whole:
            whole[self.rng.randrange(len(whole))] ^= 1 << self.rng.randrange(8)
        else:  # what was being written when the machine lost power
            del whole[-self.rng.randint(1, 40) :]
        path.write_bytes(whole)
        event["file"] = re.sub(r"\d+", "N", path.name)

    def _again(self, status: int) -> None:
        """Go on after a command that has ended badly, as its user would."""
        said = self.log.read_text(errors="replace")[-6000:]
        if self._backup and str(self._backup[0]) in said:
            path, whole = self._backup
            path.write_bytes(whole)
            self._backup = None
            self._begin()
            return
        raise Unsound(f"the command ended with status {status}.")

    def _listen(self) -> None:
        """Read what the supervisor has noticed."""
        with open(self.log, "rb") as file:
            file.seek(self._read)
            text = file.read()
        whole = text[: text.rfind(b"\n") + 1]
        self._read += len(whole)
        noticed = _NOTICED.findall(whole.decode(errors="replace"))
        if noticed and self.plan.mode != "pairs":
            self._hold = self.rng.random() > IN_A_START
        for place, _ in noticed:
            for entry in list(self._waiting):
                struck, since, event = entry
                if self.plan.mode != "pairs" or struck == int(place):
                    event["noticed_s"] = time.monotonic() - since
                    self._waiting.remove(entry)

    def end(self) -> None:
        """Leave no process, whatever happened."""
        self.launcher.kill()
        for pid in alive(self.output):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def cut_a_connection(rng: random.Random) -> bool:
    """Destroy one established connection of this network namespace, on both sides."""
    listed = ["ss", "-tnH", "state", "established"]
    lines = subprocess.run(listed, capture_output=True, text=True).stdout.splitlines()
    if not lines:
        return False
    ours, theirs = rng.choice(lines).split()[2:4]
    for a, b in ((ours, theirs), (theirs, ours)):
        kill = ["ss", "-K", "src", a, "dst", b]
        subprocess.run(kill, capture_output=True)
    left = subprocess.run(listed, capture_output=True, text=True).stdout
    return not re.search(rf"{re.escape(ours)} +{re.escape(theirs)}", left)


# --- what has become of it ------------------------------------------------------------


def differences(ours: Path, theirs: Path) -> list[str]:
    """Name what differs between two runs: metrics, arrays of the last checkpoint."""
    from bagua_jax.experiments.runs import checkpoint

    found = []
    (a,), (b,) = (list(p.glob("*/*/metrics.jsonl")) for p in (ours, theirs))
    if a.read_bytes() != b.read_bytes():
        found.append("metrics")
    _, x = checkpoint.newest(a.parent / "checkpoints")
    _, y = checkpoint.newest(b.parent / "checkpoints")
    found += [
        path
        for path in {*x, *y}
        if path not in x or path not in y or x[path].tobytes() != y[path].tobytes()
    ]
    left = sorted(p.name for p in (a.parent / "checkpoints").iterdir())
    if len(left) != 2:
        found.append(f"checkpoints {left} are left")
    return found


def lost(plan: Plan, output: Path) -> list[str]:
    """Name what an asynchronous run has lost."""
    (folder,) = output.glob("*/async-*")
    found = []
    for worker in range(plan.workers):
        path = folder / f"steps-{worker}.jsonl"
        lines = integrity.peek(path)
        if path.read_bytes().count(b"\n") != len(lines):
            found.append(f"{path.name} is torn")
        if not lines or lines[-1].get("step") != plan.steps:
            found.append(f"worker {worker} ends with {lines[-1:]}")
        reached = 0
        for line in lines:
            start = line.get("starts", reached)
            behind = reached - start
            if plan.mode == "rounds" and behind > SAVES["rounds"]:
                found.append(f"worker {worker} fell from {reached} to {start}")
            if reached > 2 * SAVES[plan.mode] and not start:
                found.append(f"worker {worker} began again after {reached}")
            reached = line.get("step", start)
        models = (folder / f"models-{worker}.f32").stat().st_size
        told = sum("step" in line for line in lines)
        if told and models % told:
            found.append(f"worker {worker}: {models} bytes of models, {told} records")
    metrics = integrity.peek(folder / "metrics.jsonl")
    first, last = (metrics[k]["eval/distance_to_optimum"] for k in (0, -1))
    # A worker that fell behind ends alone, and pulls all to the optimum of its own
    # share of the data, which may be a quarter of the way back.
    if not last < first / 3:
        found.append(f"distance to the optimum: {first} at first, {last} at the end")
    if plan.mode == "rounds" and not metrics[-1]["consensus/distance_sq"] < 1e-9:
        found.append("models of the last round are not equal")
    return found


# --- the table ------------------------------------------------------------------------


def add(path: Path, run: dict, failure: dict | None) -> dict:
    """Add a run to what earlier commands have counted."""
    path.parent.mkdir(exist_ok=True)
    with open(path, "a+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        facts = json.loads(file.read() or '{"runs": [], "failures": []}')
        facts["failures" if failure else "runs"].append(failure or run)
        lines = {k: ",\n  ".join(map(json.dumps, rows)) for k, rows in facts.items()}
        text = ",\n".join(f' "{k}": [\n  {rows}\n ]' for k, rows in lines.items())
        file.truncate(0)
        file.write("{\n" + text + "\n}\n")
    return facts


def show(facts: dict, console: Console) -> None:
    """Print what was done to all runs, and how soon it was noticed."""
    rows: dict[tuple[str, str], list[float]] = {}
    counts: Counter[tuple[str, str]] = Counter()
    for run in facts["runs"]:
        for what, found in run["disturbances"].items():
            counts[run["mode"], what] += found["times"]
            rows.setdefault((run["mode"], what), []).extend(found["noticed_s"])
    title = f"{counts.total()} disturbances of {len(facts['runs'])} runs"
    table = Table(title=title, box=None)
    for header in ("mode", "what", "times", "noticed after, median s", "longest s"):
        left = header in ("mode", "what")
        table.add_column(header, justify="left" if left else "right")
    for mode, what in sorted(counts):
        seconds = rows[mode, what]
        median = f"{statistics.median(seconds):.2f}" if seconds else "-"
        longest = f"{max(seconds):.2f}" if seconds else "-"
        table.add_row(mode, what, str(counts[mode, what]), median, longest)
    console.print(table)
    for mode in SHARES:
        runs = [run for run in facts["runs"] if run["mode"] == mode]
        seconds = sum(run["seconds"] for run in runs)
        total = sum(n for (of, _), n in counts.items() if of == mode)
        if runs:
            console.print(
                f"{mode}: {len(runs)} runs, {seconds / 60:.0f} minutes, "
                f"{60 * total / seconds:.1f} disturbances a minute",
                highlight=False,
            )
    for machine in sorted({run["machine"] for run in facts["runs"]}):
        console.print(f"on {machine}", highlight=False)
    for failure in facts["failures"]:
        console.print(f"failed: {failure['mode']}, {failure['why']}", highlight=False)


def summary(plan: Plan, soak: Soak, seconds: float) -> dict[str, Any]:
    """Write down a run that was judged."""
    import jax

    found: dict[str, dict[str, Any]] = {}
    for event in soak.events:
        row = found.setdefault(event["what"], {"times": 0, "noticed_s": []})
        row["times"] += 1
        if "noticed_s" in event:
            row["noticed_s"].append(round(event["noticed_s"], 2))
    return {
        **plan._asdict(),
        "date": time.strftime("%Y-%m-%d"),
        "commit": folders.environment()["git_commit"],
        "machine": folders.processor(),
        "jax": jax.__version__,
        "load_average": round(os.getloadavg()[0], 1),
        "seconds": round(seconds),
        "disturbances": found,
    }


def plans(mode: str, steps: int, rng: random.Random) -> Iterator[Plan]:
    """Name one run after the other."""
    while True:
        if mode == "launch":
            n = rng.choice((2, 3, 4))
            algorithm = rng.choice(list(ALGORITHMS))
            yield Plan(mode, algorithm, n, 3 if n == 3 else 4, steps or 1500)
        else:
            n = 3 if mode == "rounds" else 5
            yield Plan(mode, mode, n, n, steps or 600)


def soak_runs(arguments, scratch: Path, console: Console) -> bool:
    """Disturb runs until the time is over; say whether all were sound."""
    rng = random.Random(arguments.seed)
    until = time.monotonic() + 60 * arguments.minutes
    whole: dict[tuple[str, int], Path] = {}
    for number, plan in enumerate(plans(arguments.mode, arguments.steps, rng)):
        if time.monotonic() > until - 60:
            return True
        console.print(f"{time.strftime('%H:%M:%S')} {plan}", highlight=False)
        like = plan.algorithm, plan.workers
        if plan.mode == "launch" and like not in whole:
            whole[like] = scratch / f"whole-{plan.algorithm}-{plan.workers}"
            reference = Soak(plan._replace(processes=1), whole[like], rng, 0.0)
            try:
                reference.run(arguments.span)
            finally:
                reference.end()
        output, begun = scratch / f"run{number}", time.monotonic()
        soak = Soak(plan, output, rng, until - 60 * arguments.grace)
        failure = None
        try:
            soak.run(arguments.span)
            gone(alive(output), output)
            wrong = (
                differences(output, whole[like])
                if plan.mode == "launch"
                else lost(plan, output)
            )
            if wrong:
                raise Unsound("; ".join(wrong))
        except Unsound as error:
            console.print(soak.log.read_text(errors="replace")[-3000:], markup=False)
            failure = {"mode": plan.mode, "why": str(error), "events": soak.events}
            if arguments.keep:
                shutil.copytree(output, Path(arguments.keep) / output.name)
                shutil.copy(soak.log, Path(arguments.keep))
        finally:
            soak.end()
        run = summary(plan, soak, time.monotonic() - begun)
        facts = add(arguments.results, run, failure)
        show(facts, console)
        shutil.rmtree(output, ignore_errors=True)
        if failure:
            return False
    return True


def main() -> None:
    """Soak one mode, and print what all commands have counted so far."""
    parser = argparse.ArgumentParser(description="Disturb runs of several processes")
    parser.add_argument("--mode", choices=SHARES, default="launch")
    parser.add_argument("--minutes", type=float, default=15.0)
    parser.add_argument("--grace", type=float, default=4.0, help="to finish, of these")
    parser.add_argument("--span", type=float, default=2.0, help="between two, in s")
    parser.add_argument("--steps", type=int, default=0, help="of each run")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--keep", help="a folder for what is left of a failed run")
    parser.add_argument("--show", action="store_true", help="print the table alone")
    arguments = parser.parse_args()
    console = Console(width=110)
    if arguments.show:
        show(json.loads(arguments.results.read_text()), console)
        return
    arguments.results = arguments.results.absolute()
    enter()
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    with small_disk() as scratch:
        sound = soak_runs(arguments, scratch, console)
    if not sound:
        raise SystemExit("a run did not come through as it should")


if __name__ == "__main__":
    main()
