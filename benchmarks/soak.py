"""Kill random processes of one run, again and again, and show that nothing is lost.

A run in several processes is started with ``bagua-jax launch``. At random moments, half
of them while it starts or compiles, half while it steps, evaluates or saves, a random
process is killed (the coordinator as often as any other), now and then one is stopped
so that it hangs, and now and then the supervisor itself is killed, after which the same
command is given again. At the end metrics and checkpoints must equal, bit for bit,
those of a run that nobody disturbed, and no process may be left.

Run it from the repository's root: ``python benchmarks/soak.py`` (a quarter of an hour,
Linux). The table is printed, and the events go to ``benchmarks/results/soak.json``.
"""

import argparse
import json
import math
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import jax
from rich.console import Console
from rich.table import Table

from bagua_jax.experiments import checkpoint, folders

ALGORITHMS = [
    {"name": "gradient_allreduce"},
    {"name": "bytegrad", "error_feedback": "both"},
    {"name": "low_precision_decentralized"},
]
RESULTS = Path(__file__).parent / "results"
PATIENCE = 180.0
"""Seconds without a new line of metrics after which the run counts as hung."""


def start(output: Path, arguments, processes: int) -> subprocess.Popen:
    """Launch the run, or continue it."""
    patience = ["--restarts", "1000", "--fruitless", "1000", "--backoff", "0.02"]
    run = ["run", "quadratic", "--workers", str(arguments.workers)]
    run += ["--algorithms", json.dumps(ALGORITHMS), "--steps", str(arguments.steps)]
    run += ["--checkpoint-every", "25", "--eval-every", "400", "--output", str(output)]
    stuck = ["--stuck-after", str(arguments.stuck_after), "--start-within", "120"]
    command = [sys.executable, "-m", "bagua_jax.experiments", "launch"]
    with open(output.with_suffix(".log"), "ab") as log:
        return subprocess.Popen(
            [*command, "-n", str(processes), *patience, *stuck, "--", *run],
            stdout=log,
            stderr=log,
            start_new_session=True,
        )


def children(pid: int) -> list[int]:
    """Processes that a process has started and that still are."""
    try:
        text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    except OSError:
        return []
    return [int(number) for number in text.split()]


def alive(output: Path) -> set[int]:
    """Every process, whoever started it, that works on this output folder."""
    found = set()
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal() and int(entry.name) != os.getpid():
            try:
                words = (entry / "cmdline").read_bytes().split(b"\0")
                state = (entry / "stat").read_text().rpartition(")")[2].split()[0]
            except OSError:
                continue
            if str(output).encode() in words and state != "Z":
                found.add(int(entry.name))
    return found


def lines(output: Path) -> int:
    """Metrics written so far, of all algorithms."""
    paths = output.glob("*/*/metrics.jsonl")
    return sum(path.read_bytes().count(b"\n") for path in paths)


def wait_gone(pids: set[int], output: Path, limit: float = 60.0) -> float:
    """Wait until processes are gone; the seconds it took."""
    begun = time.monotonic()
    while pids & alive(output):
        if time.monotonic() - begun > limit:
            raise SystemExit(f"orphans after {limit:g} s: {pids & alive(output)}")
        time.sleep(0.02)
    return time.monotonic() - begun


def draw_moment(rng: random.Random, arguments) -> tuple[float, bool]:
    """Choose when to strike: soon, or a little after the run has come further.

    On a busy machine a start takes long: of moments drawn evenly nearly all would be
    in one.
    """
    if rng.random() < 0.5:
        return time.monotonic() + rng.uniform(0, arguments.span), False
    return math.inf, True


def soak(output: Path, arguments, console: Console) -> list[dict]:
    """Disturb the run until it has been killed often enough; let it finish."""
    rng, events = random.Random(arguments.seed), []
    launcher, begun = start(output, arguments, arguments.processes), time.monotonic()
    moved, best = time.monotonic(), 0
    due, steps_first = draw_moment(rng, arguments)
    while launcher.poll() is None:
        time.sleep(0.02)
        if (now := lines(output)) > best:
            best, moved = now, time.monotonic()
        if time.monotonic() - moved > PATIENCE + arguments.span:
            raise SystemExit(f"hung: no new line of metrics for {PATIENCE:g} s")
        workers = children(launcher.pid)
        if steps_first and now > (events[-1]["lines"] if events else 0):
            due, steps_first = time.monotonic() + rng.uniform(0, 3), False
        if time.monotonic() < due or len(events) >= arguments.kills:
            continue
        if len(workers) < arguments.processes:
            continue  # between two starts
        draw = rng.random()
        event = {"at_s": round(time.monotonic() - begun, 2), "lines": now}
        if draw < arguments.launcher_share:
            event |= {"what": "supervisor killed", "process": None}
            old = alive(output)
            launcher.kill()
            launcher.wait()
            event["gone_s"] = round(wait_gone(old, output), 3)
            launcher = start(output, arguments, arguments.processes)
        else:
            hangs = draw > 1 - arguments.hang_share
            index = rng.randrange(len(workers))
            event |= {"what": "stopped" if hangs else "killed", "process": index}
            try:
                os.kill(workers[index], signal.SIGSTOP if hangs else signal.SIGKILL)
            except ProcessLookupError:
                continue
            limit = 240.0 if hangs else 60.0  # it may be starting
            event["gone_s"] = round(wait_gone(set(workers), output, limit), 3)
        events.append(event)
        console.print(f"{len(events)}: {event}", highlight=False)
        due, steps_first = draw_moment(rng, arguments)
        moved = time.monotonic()
    if launcher.returncode:
        raise SystemExit(f"launch ended with status {launcher.returncode}")
    return events


def differences(ours: Path, theirs: Path) -> list[str]:
    """Name what differs between two runs: metrics, arrays of the last checkpoint."""
    found = []
    for entry in ALGORITHMS:
        (a,), (b,) = (list(p.glob(f"*/{entry['name']}-*")) for p in (ours, theirs))
        if (a / "metrics.jsonl").read_bytes() != (b / "metrics.jsonl").read_bytes():
            found.append(f"{entry['name']}: metrics")
        _, x = checkpoint.newest(a / "checkpoints")
        _, y = checkpoint.newest(b / "checkpoints")
        found += [
            f"{entry['name']}: {path}"
            for path in {*x, *y}
            if path not in x or path not in y or x[path].tobytes() != y[path].tobytes()
        ]
        left = [p.name for p in (a / "checkpoints").iterdir()]
        if len(left) != 2:
            found.append(f"{entry['name']}: checkpoints {sorted(left)} are left")
    return found


def show(events: list[dict], facts: dict, console: Console) -> None:
    """Print what was done to the run, and how soon it was noticed."""
    table = Table(title=f"{facts['disturbed']} disturbances of one run", box=None)
    for header in ("what", "times", "all stopped after, median s", "longest s"):
        table.add_column(header, justify="left" if header == "what" else "right")
    kinds = sorted({(e["what"], e["process"]) for e in events}, key=str)
    for what, process in kinds:
        seconds = [
            e["gone_s"] for e in events if (e["what"], e["process"]) == (what, process)
        ]
        name = what if process is None else f"process {process} {what}"
        name += " (coordinator)" if process == 0 else ""
        median = f"{statistics.median(seconds):.2f}"
        table.add_row(name, str(len(seconds)), median, f"{max(seconds):.2f}")
    console.print(table)
    for key, value in facts.items():
        console.print(f"{key}: {value}", highlight=False)


def main() -> None:
    """Run the reference and the soak, compare them, and write what happened."""
    parser = argparse.ArgumentParser(description="Kill a run's processes")
    parser.add_argument("--kills", type=int, default=60)
    parser.add_argument("--processes", type=int, default=3)
    parser.add_argument("--workers", type=int, default=6)
    parser.add_argument("--steps", type=int, default=2000, help="of each algorithm")
    parser.add_argument("--span", type=float, default=10.0, help="at most, in s")
    parser.add_argument("--stuck-after", type=float, default=20.0)
    parser.add_argument("--hang-share", type=float, default=0.05)
    parser.add_argument("--launcher-share", type=float, default=0.08)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    console, begun = Console(width=110), time.monotonic()
    with tempfile.TemporaryDirectory() as scratch:
        whole, cut = Path(scratch) / "whole", Path(scratch) / "cut"
        if start(whole, arguments, 1).wait():
            raise SystemExit(whole.with_suffix(".log").read_text())
        console.print("the undisturbed run is there", highlight=False)
        try:
            events = soak(cut, arguments, console)
        except BaseException:
            for pid in alive(cut):
                os.kill(pid, signal.SIGKILL)
            console.print(cut.with_suffix(".log").read_text()[-4000:], markup=False)
            raise
        wrong = differences(cut, whole)
        left = sorted(alive(cut))
    facts = {
        "machine": folders.processor(),
        "load_average_at_the_end": os.getloadavg()[0],
        "jax": jax.__version__,
        "processes": arguments.processes,
        "workers": arguments.workers,
        "steps_of_each_algorithm": arguments.steps,
        "algorithms": [entry["name"] for entry in ALGORITHMS],
        "disturbed": len(events),
        "seconds": round(time.monotonic() - begun),
        "differs_from_the_undisturbed_run": wrong,
        "processes_left": left,
    }
    show(events, facts, console)
    RESULTS.mkdir(exist_ok=True)
    text = json.dumps({**facts, "events": events}, indent=1)
    (RESULTS / "soak.json").write_text(text + "\n")
    if wrong or left or len(events) < arguments.kills:
        raise SystemExit("the run did not come through as it should")


if __name__ == "__main__":
    main()
