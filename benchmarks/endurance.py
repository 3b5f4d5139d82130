"""Take 20,000 steps in one run, and watch its memory, descriptors and threads.

``run`` is one process on host devices, ``launch`` are two processes over gloo, and
``pairs`` two workers of ``bagua-jax async``, all on the ``quadratic`` task, with
checkpoints every 100 steps. Every so many seconds the resident memory, the open file
descriptors and the threads of each process are read from /proc. A leak of a few hundred
bytes a step shows: descriptors and threads must not be more in the last quarter of the
steps than in the second (medians), memory by at most ``TOLERANCE_MB``.

Run it from the repository's root, on Linux: ``python -m benchmarks.endurance``. The
table is printed, and written to ``benchmarks/results/endurance.json``.
"""

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from bagua_jax.experiments.runs import folders

MODES = {
    "run": ["run", "--where", "devices", "--workers", "2", "--algorithms", "bytegrad"],
    "launch": ["run", "--workers", "2", "--algorithms", "bytegrad"],
    "pairs": ["async", "--exchange", "pairs", "--workers", "2", "--sharding", "iid"],
}
RESULTS = Path(__file__).parent / "results" / "endurance.json"
TOLERANCE_MB = 2.0


def command(mode: str, steps: int, output: Path) -> list[str]:
    """Write what is run."""
    name, *flags = MODES[mode]
    words = [sys.executable, "-m", "bagua_jax.experiments"]
    words += ["launch", "-n", "2", "--"] if mode == "launch" else []
    words += [name, "quadratic", *flags, "--steps", str(steps)]
    words += ["--checkpoint-every", "100", "--eval-every", "1000"]
    return [*words, "--optimizer.learning-rate", "0.01", "--output", str(output)]


def sample(pid: int) -> dict[str, float]:
    """Read what a process holds now."""
    status = Path(f"/proc/{pid}/status").read_text()
    held = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
    return {
        "rss_mb": int(held["VmRSS"].split()[0]) / 1024,
        "descriptors": len(os.listdir(f"/proc/{pid}/fd")),
        "threads": int(held["Threads"]),
    }


def steps_of(output: Path) -> int:
    """Find how far the run has come."""
    last = 0
    for path in [*output.glob("*/*/metrics.jsonl"), *output.glob("*/*/steps-0.jsonl")]:
        with contextlib.suppress(OSError, ValueError, IndexError):
            with open(path, "rb") as file:
                file.seek(max(0, path.stat().st_size - 2000))
                line = file.read().splitlines()[-1]
            last = max(last, json.loads(line).get("step", 0))
    return last


def children(pid: int) -> list[int]:
    """Processes that a process has started; itself if there are none."""
    text = Path(f"/proc/{pid}/task/{pid}/children").read_text()
    return [int(number) for number in text.split()] or [pid]


def watch(mode: str, steps: int, every: float, console: Console) -> dict[str, Any]:
    """Run one mode to its end; return the samples and what they say."""
    samples: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as scratch:
        output = Path(scratch) / "runs"
        begun = time.monotonic()
        with (
            open(Path(scratch) / "log", "wb") as log,
            subprocess.Popen(
                command(mode, steps, output), stdout=log, stderr=log
            ) as ours,
        ):
            while ours.poll() is None:
                time.sleep(every)
                done = steps_of(output)
                if not 0 < done < steps:
                    continue
                with contextlib.suppress(OSError, KeyError):
                    pids = [ours.pid] if mode == "run" else children(ours.pid)
                    held = [sample(pid) for pid in pids]
                    most = {k: max(own[k] for own in held) for k in held[0]}
                    samples.append({"step": done, **most})
        if ours.returncode:
            raise SystemExit((Path(scratch) / "log").read_text()[-4000:])
    growth = grown(samples, steps)
    facts = {
        "steps": steps,
        "seconds": round(time.monotonic() - begun),
        "growth_from_second_to_last_quarter": growth,
        "flat": is_flat(growth),
        "samples": thinned(samples, steps),
    }
    table = Table(title=f"{mode}: the largest of its processes", box=None)
    for header in ("steps", "RSS, MB", "descriptors", "threads"):
        table.add_column(header, justify="right")
    for row in facts["samples"]:
        held = (f"{row['rss_mb']:.1f}", row["descriptors"], row["threads"])
        table.add_row(str(row["step"]), *map(str, held))
    console.print(table)
    console.print(f"grown, last against second quarter: {growth}", highlight=False)
    return facts


def grown(samples: list[dict], steps: int) -> dict[str, float]:
    """Compare the medians of the last quarter of the steps with the second's."""
    medians = []
    for low, high in ((0.25, 0.5), (0.75, 1.0)):
        own = [s for s in samples if low * steps <= s["step"] < high * steps]
        if not own:
            raise SystemExit("too few samples; lower --every")
        names = ("rss_mb", "descriptors", "threads")
        medians.append({k: statistics.median(s[k] for s in own) for k in names})
    return {k: round(medians[1][k] - medians[0][k], 2) for k in medians[0]}


def is_flat(growth: dict[str, float]) -> bool:
    """Say whether nothing that grows was held."""
    no_more = growth["descriptors"] <= 0 and growth["threads"] <= 0
    return no_more and growth["rss_mb"] <= TOLERANCE_MB


def thinned(samples: list[dict], steps: int) -> list[dict]:
    """Keep the sample that is nearest to each twentieth of the run."""
    wanted = [steps * k / 20 for k in range(1, 21)]
    kept = {
        min(range(len(samples)), key=lambda i: abs(samples[i]["step"] - at))
        for at in wanted
    }
    return [
        {**samples[i], "rss_mb": round(samples[i]["rss_mb"], 1)} for i in sorted(kept)
    ]


def main() -> None:
    """Watch the modes one after the other, and write what they held."""
    parser = argparse.ArgumentParser(description="Take many steps, hold no more")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--steps", type=int, default=20_000)
    parser.add_argument("--every", type=float, default=1.0, help="seconds")
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    console = Console(width=100)
    facts = (
        json.loads(arguments.results.read_text()) if arguments.results.exists() else {}
    )
    for mode in arguments.modes:
        found = watch(mode, arguments.steps, arguments.every, console)
        facts[mode] = {
            "machine": folders.processor(),
            "date": time.strftime("%Y-%m-%d"),
            "commit": folders.environment()["git_commit"],
            "load_average": round(os.getloadavg()[0], 1),
            **found,
        }
        arguments.results.parent.mkdir(exist_ok=True)
        arguments.results.write_text(json.dumps(facts, indent=1) + "\n")
    if not all(facts[mode]["flat"] for mode in arguments.modes):
        raise SystemExit("memory, descriptors or threads grow")


if __name__ == "__main__":
    main()
