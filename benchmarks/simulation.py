"""How fast workers are simulated: our one program against loops over workers.

``python benchmarks/simulation.py`` trains a 1,000-dimensional logistic regression with
local SGD, D-PSGD and CHOCO-SGD on 8 to 1,024 simulated workers:

- bagua_jax: all workers and steps in one compiled program (vmap, scan);
- NumPy: a loop over steps and workers, as one writes it down;
- PyTorch: the same loop, gradients by autograd (left out where torch is missing).

All three do the same arithmetic in float32, which is checked first. What is compared is
workers x steps per second, compilation not counted (it is shown by itself): medians of
interleaved repeats in one run, with their range. Our program does 1,000 steps; loops do
as many as take about as long. Peak memory is that of a process of its own for each
side. Prints a table; writes benchmarks/results/simulation.json, docs/simulation.md and
its figure, for which the package has to be importable.
"""

import argparse
import importlib.util
import json
import multiprocessing
import os
import platform
import resource
import statistics
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

DIM, ROWS, RATE, DECAY = 1000, 8, 0.5, 1e-3
LOCAL_STEPS, CONSENSUS = 8, 0.2
ALGORITHMS = ("local_sgd", "decentralized", "choco_sgd")
HOME = Path(__file__).parents[1]
RESULT = HOME / "benchmarks" / "results" / "simulation.json"
PAGE = HOME / "docs" / "simulation.md"
FIGURE = HOME / "docs" / "figures" / "simulation.png"


def problem(n: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw features [n, m, d] and labels [n, m] of n unlike workers."""
    rng = np.random.default_rng(7)
    shift = rng.standard_normal((n, 1, DIM))
    features = (rng.standard_normal((n, ROWS, DIM)) + 0.3 * shift) / np.sqrt(DIM)
    labels = np.sign(features @ rng.standard_normal(DIM) + 0.1)
    return features.astype(np.float32), labels.astype(np.float32)


# --- one compiled program -------------------------------------------------------------


def bagua_jax(algorithm: str, n: int, steps: int) -> Callable[[], np.ndarray]:
    """Compile a whole run; give what runs it and returns the models [n, d]."""
    import jax
    import jax.numpy as jnp
    import optax

    from bagua_jax import (
        Workers,
        algorithms,
        compressors,
        value_and_grad,
        worker_local,
    )

    workers = Workers.simulate(n)
    options = {
        "local_sgd": {"local_steps": LOCAL_STEPS},
        "decentralized": {"topology": "ring", "combine": "after"},
        "choco_sgd": {
            "compressor": compressors.sign("l1"),
            "consensus_step_size": CONSENSUS,
        },
    }[algorithm]
    relaxation = algorithms.REGISTRY[algorithm].factory(axis_name="workers", **options)
    tx = optax.chain(optax.sgd(RATE), relaxation)

    def loss(x, features, labels):
        losses = jnp.log1p(jnp.exp(-labels * (features @ x)))
        return jnp.mean(losses) + 0.5 * DECAY * jnp.sum(x**2)

    def train(features, labels):
        x = worker_local(jnp.zeros(DIM), "workers")

        def step(carry, _):
            x, state = carry
            _, grads = value_and_grad(loss, "workers")(x, features, labels)
            updates, state = tx.update(grads, state, x)
            return (optax.apply_updates(x, updates), state), None

        return jax.lax.scan(step, (x, tx.init(x)), length=steps)[0][0]

    data = problem(n)
    program = workers.spmd(train, in_specs=workers.spec).lower(*data).compile()
    return lambda: np.asarray(program(*data))


# --- loops over workers ---------------------------------------------------------------


def numpy_loop(algorithm: str, n: int, steps: int) -> Callable[[], np.ndarray]:
    """Loop over steps and workers in NumPy."""
    features, labels = problem(n)

    def gradient(x, i):
        slope = -labels[i] / (1 + np.exp(labels[i] * (features[i] @ x)))
        return features[i].T @ (slope / ROWS) + np.float32(DECAY) * x

    def run():
        x = [np.zeros(DIM, np.float32) for _ in range(n)]
        public = [np.zeros(DIM, np.float32) for _ in range(n)]
        for t in range(steps):
            x = [x[i] - np.float32(RATE) * gradient(x[i], i) for i in range(n)]
            x, public = exchange(algorithm, t, x, public, np.sign, np.abs)
        return np.stack(x)

    return run


def torch_loop(algorithm: str, n: int, steps: int) -> Callable[[], np.ndarray]:
    """Loop over steps and workers in PyTorch, gradients by autograd."""
    torch: Any = importlib.import_module("torch")
    features, labels = map(torch.from_numpy, problem(n))

    def gradient(x, i):
        x = x.detach().requires_grad_()
        margins = labels[i] * (features[i] @ x)
        loss = torch.nn.functional.softplus(-margins).mean()
        (loss + 0.5 * DECAY * (x * x).sum()).backward()
        return x.grad

    def run():
        x = [torch.zeros(DIM) for _ in range(n)]
        public = [torch.zeros(DIM) for _ in range(n)]
        for t in range(steps):
            grads = [gradient(x[i], i) for i in range(n)]
            with torch.no_grad():
                x = [torch.sub(x[i], RATE * grads[i]) for i in range(n)]
                x, public = exchange(algorithm, t, x, public, torch.sign, torch.abs)
        return torch.stack(x).numpy()

    return run


def exchange(algorithm, t, x, public, sign, absolute):
    """Let the workers talk after step t; lists of one vector for each."""
    n = len(x)
    if algorithm == "local_sgd":
        if (t + 1) % LOCAL_STEPS == 0:
            mean = sum(x) / n
            x = [mean for _ in range(n)]
        return x, public
    if algorithm == "decentralized":
        return [(x[i - 1] + x[i] + x[(i + 1) % n]) / 3 for i in range(n)], public
    for i in range(n):
        difference = x[i] - public[i]
        public[i] = public[i] + absolute(difference).mean() * sign(difference)
    mixed = [(public[i - 1] + public[i] + public[(i + 1) % n]) / 3 for i in range(n)]
    return [x[i] + CONSENSUS * (mixed[i] - public[i]) for i in range(n)], public


SIDES = {"bagua_jax": bagua_jax, "NumPy loop": numpy_loop, "PyTorch loop": torch_loop}


# --- measuring ------------------------------------------------------------------------


def available_sides() -> list[str]:
    """Name the sides that can run here."""
    has_torch = importlib.util.find_spec("torch") is not None
    return [name for name in SIDES if has_torch or name != "PyTorch loop"]


def check_equal(sides: list[str]) -> float:
    """Refuse to time unlike things: all sides end at the same models."""
    worst = 0.0
    for algorithm in ALGORITHMS:
        ends = [SIDES[side](algorithm, 8, 24)() for side in sides]
        for end in ends[1:]:
            worst = max(worst, float(np.abs(end - ends[0]).max()))
    if worst > 1e-4:
        raise SystemExit(f"the sides differ by {worst:.2g}: nothing was timed.")
    return worst


def peak_memory(side: str, algorithm: str, n: int, steps: int) -> float:
    """Run one side in a process of its own, and give its peak memory in MB."""
    context = multiprocessing.get_context("spawn")
    parent, child = context.Pipe()
    process = context.Process(
        target=_report_peak, args=(child, side, algorithm, n, steps)
    )
    process.start()
    peak = parent.recv()
    process.join()
    return peak


def _report_peak(pipe, side, algorithm, n, steps):
    SIDES[side](algorithm, n, steps)()
    try:  # of this program; getrusage remembers the one that started it
        status = Path("/proc/self/status").read_text()
        kilobytes = int(status.partition("VmHWM:")[2].split()[0])
    except (OSError, IndexError, ValueError):
        kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    pipe.send(kilobytes / 1024)


def seconds_of(run: Callable[[], object]) -> float:
    """Time one run."""
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def measure(sides, workers, steps, repeats, say) -> list[dict[str, Any]]:
    """Time all sides; one row for each algorithm and number of workers."""
    rows = []
    for algorithm in ALGORITHMS:
        for n in workers:
            counts = {side: max(8, 16384 // n) for side in sides} | {"bagua_jax": steps}
            runs, built = {}, {}
            for side in sides:
                start = time.perf_counter()
                runs[side] = SIDES[side](algorithm, n, counts[side])
                built[side] = time.perf_counter() - start
            spent: dict[str, list[float]] = {side: [] for side in sides}
            load = [os.getloadavg()[0]]
            for _ in range(repeats):
                for side in sides:
                    spent[side].append(seconds_of(runs[side]))
            load.append(os.getloadavg()[0])
            rates = {
                side: [n * counts[side] / seconds for seconds in spent[side]]
                for side in sides
            }
            rows.append(
                {
                    "algorithm": algorithm,
                    "workers": n,
                    "steps": counts,
                    "worker_steps_per_s": {
                        side: statistics.median(rates[side]) for side in sides
                    },
                    "all_repeats": rates,
                    "compile_s": built["bagua_jax"],
                    "peak_memory_MB": {
                        side: peak_memory(side, algorithm, n, 8) for side in sides
                    },
                    "load_before_and_after": load,
                }
            )
            say(f"{algorithm}, {n} workers: done")
    return rows


def main() -> None:
    """Time all sides, print the table, write the numbers and the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=1000, help="of our program")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--workers", type=int, nargs="+", default=[8, 64, 256, 1024])
    parser.add_argument("--page-only", action="store_true", help="from the last run")
    arguments = parser.parse_args()

    console, sides = Console(width=140), available_sides()
    if not arguments.page_only:
        worst = check_equal(sides)
        console.print(
            f"same models on all sides, to {worst:.1e}; timing {', '.join(sides)}"
        )
        facts = {
            "machine": f"{processor()}, {os.cpu_count()} cores",
            "versions": {
                name: metadata.version(name)
                for name in ("jax", "numpy", *(["torch"] if len(sides) > 2 else []))
            },
            "dim": DIM,
            "rows_per_worker": ROWS,
            "steps_of_our_program": arguments.steps,
            "repeats": arguments.repeats,
            "largest_difference_of_sides": worst,
            "rows": measure(
                sides,
                arguments.workers,
                arguments.steps,
                arguments.repeats,
                console.print,
            ),
        }
        RESULT.parent.mkdir(exist_ok=True)
        RESULT.write_text(json.dumps(facts, indent=1) + "\n")
    facts = json.loads(RESULT.read_text())
    show(facts, console)
    PAGE.write_text(page(facts))
    draw(facts)
    console.print(f"wrote {RESULT}, {PAGE} and {FIGURE}")


# --- showing --------------------------------------------------------------------------


def cells(row, ranges: bool) -> list[str]:
    """Write a row: rates, perhaps with their ranges, ratios, seconds and memory."""
    ours, *others = row["worker_steps_per_s"]
    rates, memory = row["worker_steps_per_s"], row["peak_memory_MB"]
    spread = row["all_repeats"]
    return [
        row["algorithm"],
        f"{row['workers']:,}",
        *(
            f"{rates[side]:,.0f}"
            + ranges * f" ({min(spread[side]):,.0f} to {max(spread[side]):,.0f})"
            for side in rates
        ),
        *(f"{rates[ours] / rates[side]:.1f}" for side in others),
        f"{row['workers'] * row['steps'][ours] / rates[ours]:.2g}",
        f"{row['compile_s']:.1f}",
        " / ".join(f"{memory[side]:.0f}" for side in rates),
    ]


def headings(facts) -> list[str]:
    """Name the columns of :func:`cells`."""
    ours, *others = facts["rows"][0]["worker_steps_per_s"]
    return [
        "algorithm",
        "workers",
        ours,
        *others,
        *(f"ours / {side}" for side in others),
        f"s for {facts['steps_of_our_program']:,} steps",
        "compile s",
        "peak MB, each",
    ]


def show(facts, console) -> None:
    """Print the table."""
    table = Table(title=f"workers x steps per second, {facts['machine']}")
    for heading in headings(facts):
        table.add_column(heading, justify="left" if heading == "algorithm" else "right")
    for row in facts["rows"]:
        table.add_row(*cells(row, ranges=False))
    console.print(table)


def page(facts) -> str:
    """Write docs/simulation.md."""
    loads = [load for row in facts["rows"] for load in row["load_before_and_after"]]
    versions = ", ".join(f"{k} {v}" for k, v in facts["versions"].items())
    text = f"""\
# How fast workers are simulated

*Written by `python benchmarks/simulation.py`; do not edit it.*

A logistic regression of {facts["dim"]:,} dimensions, {facts["rows_per_worker"]} rows of
its own on each worker. `bagua_jax`: all workers and {facts["steps_of_our_program"]:,}
steps in one compiled program (`Workers.simulate`, `lax.scan`). The others loop over
steps and workers in one process, as one writes it down; they do fewer steps, since a
rate is compared, and PyTorch's gradients come from autograd. CHOCO sends signs: our
program packs them eight to a byte and unpacks them, as on a real network, the loops do
not. All sides come to the same models: after 24 steps of 8 workers they differ by
{facts["largest_difference_of_sides"]:.0e} at most.

Numbers are workers x steps per second, medians of {facts["repeats"]} interleaved
repeats (range in brackets), without compilation, which is shown. Measured on
{facts["machine"]} ({versions}), in use by others: the load was {min(loads):.1f} to
{max(loads):.1f}. Peak memory is of a process of its own for each side, in the order of
the columns, its libraries included. A worker has 32 kB of rows and 4 kB of each vector:
1,024 of them no longer fit the caches.

"""
    table = [headings(facts), ["---"] + ["---:"] * (len(headings(facts)) - 1)]
    table += [cells(row, ranges=True) for row in facts["rows"]]
    lines = ["| " + " | ".join(row) + " |" for row in table]
    return text + "\n".join(lines) + "\n\n![simulation](figures/simulation.png)\n"


def draw(facts) -> None:
    """Draw rates over the number of workers."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    from bagua_jax.experiments import studies

    plt.style.use(studies.STYLE)
    figure, panels = plt.subplots(1, len(ALGORITHMS), figsize=(10, 3.4), sharey=True)
    for axes, algorithm in zip(panels, ALGORITHMS, strict=True):
        rows = [row for row in facts["rows"] if row["algorithm"] == algorithm]
        n = [row["workers"] for row in rows]
        for side, marker in zip(SIDES, "os^", strict=True):
            rates = [row["worker_steps_per_s"].get(side) for row in rows]
            if None not in rates:
                axes.loglog(n, rates, marker=marker, label=side)
        axes.set(title=algorithm, xlabel="workers n")
        axes.set_xticks(n, [f"{k:,}" for k in n])
        axes.minorticks_off()
        studies.label_ends(axes, width=0.55)
    panels[0].set_ylabel("workers x steps per second")
    studies.write(figure, FIGURE)


def processor() -> str:
    """Name the processor."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line for line in text.splitlines() if line.startswith("model name")]
    return names[0].partition(":")[2].strip() if names else platform.machine()


if __name__ == "__main__":
    main()
