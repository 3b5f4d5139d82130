"""How fast workers are simulated: our one program against loops over workers.

``python benchmarks/simulation.py`` trains a 1,000-dimensional logistic regression with
local SGD, D-PSGD and CHOCO-SGD on 8 to 1,024 simulated workers:

- bagua_jax: all workers and steps in one compiled program (vmap, scan);
- NumPy: a loop over steps and workers, as one writes it down;
- PyTorch: the same loop, gradients by autograd (left out where torch is missing).

All three do the same arithmetic in float32, which is checked first. What is compared is
workers x steps per second, compilation not counted (it is shown by itself): medians of
interleaved repeats in one run. Writes benchmarks/results/simulation.json and prints a
table. Peak memory is that of a process of its own for each side.
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
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

DIM, ROWS, RATE, DECAY = 1000, 8, 0.5, 1e-3
LOCAL_STEPS, CONSENSUS = 8, 0.2
ALGORITHMS = ("local_sgd", "decentralized", "choco_sgd")
RESULTS = Path(__file__).parent / "results"


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

    from bagua_jax import Workers, algorithms, compressors, worker_local

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
            updates, state = tx.update(jax.grad(loss)(x, features, labels), state, x)
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


def main() -> None:
    """Time all sides, print the table, write the numbers."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=1000, help="of our program")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--workers", type=int, nargs="+", default=[8, 64, 256, 1024])
    arguments = parser.parse_args()

    console, sides = Console(width=120), available_sides()
    worst = check_equal(sides)
    console.print(
        f"same models on all sides, to {worst:.1e}; timing {', '.join(sides)}"
    )
    rows = []
    for algorithm in ALGORITHMS:
        for n in arguments.workers:
            # Loops do as many steps as fit in about the same time.
            steps = {
                side: arguments.steps if side == "bagua_jax" else max(8, 4096 // n)
                for side in sides
            }
            start = time.perf_counter()
            runs = {side: SIDES[side](algorithm, n, steps[side]) for side in sides}
            compiling = time.perf_counter() - start
            rates: dict[str, list[float]] = {side: [] for side in sides}
            for _ in range(arguments.repeats):
                for side in sides:
                    rates[side].append(n * steps[side] / seconds_of(runs[side]))
            memory = {side: peak_memory(side, algorithm, n, 8) for side in sides}
            rows.append(
                {
                    "algorithm": algorithm,
                    "workers": n,
                    "worker_steps_per_s": {
                        side: statistics.median(rates[side]) for side in sides
                    },
                    "all_repeats": rates,
                    "compile_s": compiling,
                    "peak_memory_MB": memory,
                }
            )
            console.print(f"{algorithm}, {n} workers: done", highlight=False)
    show(rows, sides, arguments, console)


def show(rows, sides, arguments, console) -> None:
    """Print the table and write the JSON file."""
    machine = f"{processor()}, {os.cpu_count()} cores"
    table = Table(title=f"workers x steps per second, {machine}")
    table.add_column("algorithm", no_wrap=True)
    table.add_column("workers", justify="right")
    for side in sides:
        table.add_column(side, justify="right")
    for side in sides[1:]:
        table.add_column(f"ours / {side}", justify="right")
    table.add_column("compile s", justify="right")
    table.add_column("peak MB, each", justify="right")
    for row in rows:
        rates = row["worker_steps_per_s"]
        table.add_row(
            row["algorithm"],
            str(row["workers"]),
            *(f"{rates[side]:,.0f}" for side in sides),
            *(f"{rates['bagua_jax'] / rates[side]:.1f}" for side in sides[1:]),
            f"{row['compile_s']:.1f}",
            " ".join(f"{row['peak_memory_MB'][side]:.0f}" for side in sides),
        )
    console.print(table)
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / "simulation.json"
    facts = {
        "machine": machine,
        "dim": DIM,
        "rows_per_worker": ROWS,
        "steps_of_our_program": arguments.steps,
        "repeats": arguments.repeats,
        "rows": rows,
    }
    path.write_text(json.dumps(facts, indent=1) + "\n")
    console.print(f"wrote {path}")


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
