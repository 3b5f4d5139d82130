"""bagua_jax against PyTorch DDP on the same shaped networks, step by step.

``python -m benchmarks.network.versus_ddp`` trains one perceptron of 4.0 million
parameters on MNIST-5k with four workers, batch 32 each, from the same weights, on the
same batches: PyTorch DDP over gloo, plain and with the hooks that work there, and
bagua_jax over gloo.

Step times: all cases of both sides are alive at once and take turns, some steps at a
time, repeated; a repeat's value is the mean over its steps and workers, and medians of
repeats are compared. Bytes are those that left by the card. Loss: the mean model's on
1,000 held-out images, every ten steps, from one run of each case; steps do not depend
on the network, so that time to a loss is steps to it x median step time. QAdam's losses
come from a run with a longer warm-up, whose steps count as those of an all-reduce.

Writes benchmarks/results/versus_ddp.json and docs/figures/versus_ddp.png; ends with
status 1 if a case in one program trains differently from the same in several, and 77 if
namespaces are not allowed here.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

from rich.console import Console
from rich.table import Table

from benchmarks.network import asynchronous, lab, machine, ours, problem, theirs

N, WARM_UP, PERIOD = 4, 8, 8  # warm-up: past compilation, QAdam's and post-local's
QUICK = 5 * PERIOD  # steps of a repeat where a step takes a tenth of a second
ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "versus_ddp.json"
FIGURE = ROOT / "docs" / "figures" / "versus_ddp.png"
SIDES = {
    "ours": ours.CASES,
    "asynchronous": asynchronous.CASES,
    "theirs": theirs.CASES,
}


class Pair(NamedTuple):
    """What is compared with what, and how it should come out at 100 Mbit/s."""

    ours: str
    theirs: str
    target: float | None = None


PAIRS = (
    Pair("gradient_allreduce", "ddp", 1.02),
    Pair("gradient_allreduce, one program", "ddp", 1.02),
    Pair("ring_allreduce", "ddp", 1.02),
    Pair("ring_allreduce, one program", "ddp", 1.02),
    Pair("f16", "ddp_fp16", 1.0),
    Pair("f16, one program", "ddp_fp16", 1.0),
    Pair("f16_allreduce", "ddp_fp16", 1.0),
    Pair("bytegrad", "ddp", 0.28),
    Pair("powersgd1", "ddp_powersgd1", 0.9),
    Pair("powersgd2", "ddp_powersgd2", 0.9),
    Pair("powersgd4", "ddp_powersgd4", 0.9),
    Pair("local_sgd", "ddp_post_local"),
    Pair("qadam", "ddp"),
    Pair("decentralized", "ddp"),
    Pair("low_precision_decentralized", "ddp"),
    Pair("asynchronous averaging", "ddp"),
)
UNSHAPED_TARGET = 1.1  # of every pair that has a target


class Side:
    """The workers of one side, alive and waiting for orders."""

    def __init__(self, network: lab.Lab, name: str, log: Any) -> None:
        command = [sys.executable, "-m", "benchmarks.network.serve", name]
        self._log, self.name = log, name
        self._workers = [
            network.start(
                i, command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log
            )
            for i in range(network.n)
        ]
        self._answers()

    def order(self, case: str, **what: Any) -> list[dict]:
        """Send all workers an order; wait for their answers."""
        for worker in self._workers:
            assert worker.stdin is not None
            worker.stdin.write(json.dumps({"case": case, **what}).encode() + b"\n")
            worker.stdin.flush()
        return self._answers()

    def _answers(self) -> list[dict]:
        answers = []
        for i, worker in enumerate(self._workers):
            assert worker.stdout is not None
            while True:
                line = worker.stdout.readline()
                if not line:
                    self._log.seek(0)
                    said = self._log.read().decode(errors="replace")[-3000:]
                    raise lab.LabError(f"worker {i} of {self.name} ended:\n{said}")
                if line.startswith(b"{"):
                    answers.append(json.loads(line))
                    break
        return answers


def measure(
    network: lab.Lab, cases: dict[str, list[str]], steps: int, arguments, console
) -> dict:
    """Time all cases on one network, in turns; give each its repeats."""
    with open(arguments.log, "w+b") as log:
        sides = {name: Side(network, name, log) for name in cases if cases[name]}
        turns = [(side, case) for side in sides for case in cases[side]]
        found: dict[str, dict] = {
            case: {"side": side, "step_ms": [], "cpu_ms": [], "bytes": 0.0}
            for side, case in turns
        }
        for side, case in turns:
            sides[side].order(case, steps=WARM_UP)
            console.print(f"  {case}: warm", highlight=False)
        for repeat in range(arguments.repeats):
            for side, case in turns if repeat % 2 == 0 else turns[::-1]:
                answers = sides[side].order(case, steps=steps)
                seconds = [statistics.mean(a["seconds"]) for a in answers]
                found[case]["step_ms"].append(1e3 * statistics.mean(seconds))
                found[case]["bytes"] = statistics.mean(a["bytes"] for a in answers)
                cpu = statistics.mean(a["cpu_seconds"] for a in answers)
                found[case]["cpu_ms"].append(1e3 * cpu)
                told = f"{case}: {found[case]['step_ms'][-1]:,.0f} ms a step"
                console.print(f"  {repeat + 1}. {told}", highlight=False)
    return found


def curves(network: lab.Lab, cases: dict[str, list[str]], arguments, console) -> dict:
    """Train every case once; give the held-out loss every ten steps."""
    found: dict[str, list[tuple[int, float | None]]] = {}  # None: not finite
    with open(arguments.log, "w+b") as log:
        sides = {name: Side(network, name, log) for name in cases if cases[name]}
        for name, side in sides.items():
            for case in cases[name]:
                if case.startswith("asynchronous"):
                    continue  # its steps do depend on the network
                trained = ours.LOSSES.get(case, case)
                losses = [(0, side.order(trained, loss=True)[0]["loss"])]
                # The same numbers once more: as many steps as show that they are.
                steps = 20 if "one program" in case else arguments.curve_steps
                for step in range(10, steps + 1, 10):
                    loss = side.order(trained, steps=10, loss=True)[0]["loss"]
                    losses.append((step, loss if math.isfinite(loss) else None))
                side.order(trained, forget=True)
                found[case] = losses
                console.print(
                    f"  {case}: loss {_loss(losses)} after {losses[-1][0]} steps",
                    highlight=False,
                )
    return found


def differing(curves: dict) -> list[str]:
    """Find cases in one program that train differently from the same in several.

    More than 1 % of a loss is a difference: XLA contracts products and sums to single
    roundings in the one and not in the other, and a quantizer makes more of it.
    """
    found = []
    for case, losses in curves.items():
        same = curves.get(case.partition(", one program")[0], [])
        if "one program" not in case or not same:
            continue
        for (step, one), (_, several) in zip(losses, same, strict=False):
            if one is None or several is None or abs(one - several) > 0.01 * several:
                found.append(f"{case}: {one} after {step} steps, in parts {several}")
                break
    return found


def steps_to(losses: list, target: float) -> int | None:
    """Find the first evaluated step whose loss is at most the target.

    None where there is none, or where training diverges afterwards.
    """
    if any(loss is None for _, loss in losses):
        return None
    return next((step for step, loss in losses if loss <= target), None)


def seconds_to(needed: int | None, case: str, cases: dict) -> float | None:
    """Return the time that so many steps take; warm-up's take those of an all-reduce.

    None where it cannot be known.
    """
    if needed is None:
        return None
    warm_up = min(needed, ours.LONG_WARM_UP) if case in ours.LOSSES else 0
    if warm_up and "gradient_allreduce" not in cases:
        return None
    full = cases["gradient_allreduce"]["step_ms"] if warm_up else [0.0]
    own = statistics.median(cases[case]["step_ms"])
    return (warm_up * statistics.median(full) + (needed - warm_up) * own) / 1e3


def _loss(losses: list) -> str:
    if not losses:
        return "-"
    return "diverged" if losses[-1][1] is None else f"{losses[-1][1]:.3f}"


# --- what is shown --------------------------------------------------------------------


def ratios(facts: dict) -> list[dict]:
    """Compare every pair on every network."""
    rows = []
    for name, network in facts["networks"].items():
        cases = network["cases"]
        for pair in PAIRS:
            if pair.ours not in cases or pair.theirs not in cases:
                continue
            ratio = statistics.median(cases[pair.ours]["step_ms"])
            ratio /= statistics.median(cases[pair.theirs]["step_ms"])
            target = None
            if pair.target is not None and name in ("100mbit", "unshaped"):
                target = pair.target if name == "100mbit" else UNSHAPED_TARGET
            rows.append(
                {"network": name, **pair._asdict(), "ratio": ratio, "target": target}
            )
    return rows


def show(facts: dict, console: Console) -> None:
    """Print the tables."""
    networks, target = facts["networks"], facts["target_loss"]
    title = f"step time in ms: median (min to max) of {facts['repeats']} repeats"
    table = Table(title=title)
    loss = ("last loss", f"steps to {target}", *networks)
    for column in ("case", "MB sent", "CPU ms", *networks, *loss):
        table.add_column(column, justify="left" if column == "case" else "right")
    for cases in SIDES.values():
        for case in cases:
            rows = [network["cases"].get(case) for network in networks.values()]
            if not any(rows):
                continue
            needed = steps_to(facts["curves"].get(case, []), target)
            times, ends = [], []
            for row, network in zip(rows, networks.values(), strict=True):
                ms = row["step_ms"] if row else []
                end = seconds_to(needed, case, network["cases"]) if ms else None
                times.append(
                    f"{statistics.median(ms):,.0f} ({min(ms):,.0f} to {max(ms):,.0f})"
                    if ms
                    else "-"
                )
                ends.append("-" if end is None else f"{end:,.1f} s")
            sent = next(row["bytes"] for row in rows if row)
            cpu = min(statistics.median(row["cpu_ms"]) for row in rows if row)
            table.add_row(
                case,
                f"{sent / 1e6:.2f}",
                f"{cpu:,.0f}",
                *times,
                _loss(facts["curves"].get(case, [])),
                str(needed or "-"),
                *ends,
            )
        table.add_section()
    console.print(table)
    table = Table(title="ours / theirs, of median step times")
    for column in ("network", "ours", "theirs", "ratio", "target"):
        table.add_column(column)
    for row in ratios(facts):
        goal = row["target"]
        verdict = "" if goal is None else f"at most {goal}"
        missed = goal is not None and row["ratio"] > goal
        ratio = f"{row['ratio']:.3f}" + (" !" if missed else "")
        table.add_row(row["network"], row["ours"], row["theirs"], ratio, verdict)
    console.print(table)


def draw(facts: dict, path: Path) -> None:
    """Draw ratios of every pair, network by network."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = ratios(facts)
    networks = list(facts["networks"])
    pairs = [p for p in PAIRS if any(r["ours"] == p.ours for r in rows)]
    style = ROOT / "experiments" / "bagua.mplstyle"
    with plt.style.context(str(style)):
        figure, axes = plt.subplots(figsize=(7, 0.5 + 0.45 * len(pairs)))
        markers = dict(zip(networks, "osD^", strict=False))
        for network in networks:
            of = {r["ours"]: r["ratio"] for r in rows if r["network"] == network}
            places = [k for k, p in enumerate(pairs) if p.ours in of]
            axes.plot(
                [of[pairs[k].ours] for k in places],
                places,
                markers[network],
                label=network,
            )
        goals = [(k, p.target) for k, p in enumerate(pairs) if p.target is not None]
        axes.plot(
            [goal for _, goal in goals],
            [k for k, _ in goals],
            "|",
            color="black",
            markersize=14,
            label="target at 100mbit",
        )
        axes.axvline(1, color="grey", linewidth=0.8)
        axes.set_xscale("log")
        axes.set_yticks(range(len(pairs)), [f"{p.ours} / {p.theirs}" for p in pairs])
        axes.invert_yaxis()
        axes.set_xlabel("step time, ours / theirs (left of 1: ours is faster)")
        axes.legend(fontsize="small")
        figure.savefig(path, dpi=150)
        plt.close(figure)


def keep(facts: dict, path: Path) -> None:
    """Write the numbers."""
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(facts, indent=1) + "\n")


def main() -> int:
    """Measure, print the tables, write the numbers and the figure."""
    parser = argparse.ArgumentParser(description=__doc__)
    names = [case for cases in SIDES.values() for case in cases]
    names = [case for case in names if case not in ours.LOSSES.values()]
    parser.add_argument(
        "--networks",
        nargs="+",
        choices=lab.NETWORKS,
        default=["100mbit", "1gbit", "unshaped"],
    )
    parser.add_argument("--cases", nargs="+", choices=names, default=names)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--steps",
        type=int,
        help=f"of a repeat; by default {PERIOD}, and {QUICK} where networks are faster "
        "than 100 Mbit/s",
    )
    parser.add_argument("--curve-steps", type=int, default=150, help="0: no curves")
    parser.add_argument("--target-loss", type=float, default=0.3)
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--log", type=Path, default=Path("/dev/shm/versus_ddp.log"))
    arguments = parser.parse_args()
    if arguments.steps is not None and arguments.steps % PERIOD:
        parser.error(f"--steps must be a multiple of {PERIOD}, the longest period.")
    lab.enter()
    os.environ["OMP_NUM_THREADS"] = "1"  # four workers on few cores

    console, start = Console(width=150), time.monotonic()
    cases = {s: [c for c in SIDES[s] if c in arguments.cases] for s in SIDES}
    facts: dict[str, Any] = {
        "machine": machine.describe(),
        "workers": N,
        "parameters": problem.num_params(),
        "batch": problem.BATCH,
        "repeats": arguments.repeats,
        "target_loss": arguments.target_loss,
        "networks": {},
        "curves": {},
    }
    for name in arguments.networks:
        with lab.Lab(N, lab.NETWORKS[name]) as network:
            verified = network.verify()
            console.print(f"{name}: {verified}", highlight=False)
            steps = arguments.steps or (PERIOD if name.startswith("100mbit") else QUICK)
            found = measure(network, cases, steps, arguments, console)
        facts["networks"][name] = {
            **verified,
            "steps_of_a_repeat": steps,
            "cases": found,
        }
        keep(facts, arguments.out)  # what has been measured, whatever comes
    if arguments.curve_steps:
        with lab.Lab(N, lab.NETWORKS["unshaped"]) as network:
            facts["curves"] = curves(network, cases, arguments, console)
    facts["load_average"] = os.getloadavg()
    facts["seconds"] = round(time.monotonic() - start)
    console.print(facts["machine"], highlight=False)
    show(facts, console)
    keep(facts, arguments.out)
    figure = FIGURE if arguments.out == RESULTS else arguments.out.with_suffix(".png")
    if ratios(facts):
        draw(facts, figure)
    console.print(f"wrote {arguments.out} and {figure} after {facts['seconds']} s")
    for difference in differing(facts["curves"]):
        console.print(f"trains differently: {difference}", highlight=False)
    return 1 if differing(facts["curves"]) else 0


if __name__ == "__main__":
    sys.exit(main())
