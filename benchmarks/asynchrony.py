"""One of four workers is three times slower: who waits, and what is learned?

``python -m benchmarks.asynchrony`` trains ``mnist5k`` with four workers, each a process
in a network namespace of its own behind links of 100 Mbit/s, one of them slowed
threefold (a step is made to last, by sleeping, as on a slower machine), in these modes:

- ``local``: no exchange at all; gives every worker's own rate.
- ``synchronous``: gradients averaged on every step.
- ``rounds``, ``rounds-u8``: exact and 8-bit averages in the background.
- ``pairs``, ``pairs-u8``: pair gossip, in full precision and 8 bits.

and judges three things, each against the run beside it:

1. the three fast workers keep at least 95 % of their local rate;
2. all workers together take at least 5 times the steps per second of synchronous
   training, over the same time;
3. the averaged model reaches the test loss that synchronous training ends with in at
   most 1.3 times its steps (steps of all workers, divided by their number).

``--ballast`` parameters, which training leaves alone, ride along in every exchange, so
that the wire matters as it does for a model of that size. ``--faults`` kills a worker
of pairs with SIGKILL, starts it again, and reports how the others fared and how soon it
was back. Prints a table and writes benchmarks/results/asynchrony.json; ends with status
1 where a target is missed, 77 where namespaces are not allowed (``--loopback`` does
without, and says so).
"""

import argparse
import contextlib
import json
import os
import secrets
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.network import lab, machine

N, SLOW, SLOWDOWN = 4, 3, 3.0
MODES: dict[str, Any] = {
    "local": None,
    "synchronous": {"name": "gradient_allreduce"},
    "rounds": {"name": "async_model_average", "local_steps": 1},
    "rounds-u8": {
        "name": "diloco",  # whose outer step, without momentum, is the mean
        "local_steps": 1,
        "outer_learning_rate": 1.0,
        "outer_momentum": 0.0,
        "compressor": "minmax_uint8",
    },
    "pairs": "",
    "pairs-u8": "minmax_uint8",
}
RESULTS = Path(__file__).parent / "results" / "asynchrony.json"
PORT = 29600


# --- one worker -----------------------------------------------------------------------


def with_ballast(task, size: int):
    """Add parameters that no gradient moves, and every exchange carries."""
    import jax
    import jax.numpy as jnp

    if not size:
        return task

    def init(key):
        return {"model": task.init(key), "ballast": jnp.zeros(size)}

    return task._replace(
        init=init,
        loss=lambda params, batch: (
            task.loss(params["model"], batch)
            + 0.0 * jnp.sum(jax.lax.stop_gradient(params["ballast"][:1]))
        ),
        evaluate=lambda params, test: task.evaluate(params["model"], test),
    )


def model_of(params):
    """Leave the ballast out of what is recorded."""
    return params["model"] if "ballast" in params else params


def recorder_of(arguments, config, params):
    """Record what a worker does."""
    from bagua_jax.experiments.runs import asynchronous as runs
    from bagua_jax.experiments.runs import folders

    every, run = config.eval_every, folders.name_of(config)
    like = model_of(params)
    return runs.Recorder(arguments.folder, arguments.work, every, like, run)


def configure(arguments, mode: str):
    """Write the config of a mode, as `bagua-jax run` would read it."""
    from bagua_jax.experiments.spec import catalog
    from bagua_jax.experiments.spec.config import (
        AlgorithmConfig,
        ExperimentConfig,
        OptimizerConfig,
    )

    chosen = MODES[mode]
    steps: dict[str, Any] = {"name": "local_sgd", "local_steps": 1}
    algorithm = dict(chosen) if isinstance(chosen, dict) else steps
    name = algorithm.pop("name")
    config = ExperimentConfig(
        experiment="asynchrony",
        task=arguments.task,
        algorithms=(AlgorithmConfig(name, arguments=algorithm),),
        workers=N,
        steps=arguments.sync_steps if mode == "synchronous" else 10**6,
        batch_size=16,
        seed=arguments.seed,
        eval_every=arguments.record_every,
        optimizer=OptimizerConfig("sgd", 0.05, momentum=0.9),
    )
    return catalog.resolve(config)[0]


def work(arguments) -> None:
    """Be one of the workers in one mode; leave records in the folder."""
    worker, folder = arguments.work, arguments.folder
    import jax

    jax.config.update("jax_platforms", "cpu")
    addresses = tuple(arguments.addresses)
    if arguments.mode in ("synchronous", "rounds", "rounds-u8"):
        jax.config.update("jax_num_cpu_devices", 1)
        jax.config.update("jax_cpu_collectives_implementation", "gloo")

        from bagua_jax import processes

        processes.initialize(
            coordinator_address=addresses[0],
            num_processes=N,
            process_id=worker,
            initialization_timeout=120,
        )

    from bagua_jax.experiments import tasks
    from bagua_jax.experiments.runs import asynchronous as runs

    config = configure(arguments, arguments.mode)
    task = with_ballast(tasks.load(arguments.task), arguments.ballast)
    data = task.data(config.seed, N)
    pace = tuple(arguments.pace * (SLOWDOWN if w == SLOW else 1) for w in range(N))
    if arguments.mode == "local":
        train_alone(arguments, config, task, data, worker, pace[worker])
        return
    if arguments.mode == "synchronous":
        train_together(arguments, config, task, data, worker, pace[worker])
        return
    setting = runs.Setting(
        "rounds" if arguments.mode.startswith("rounds") else "pairs",
        addresses,
        "" if isinstance(MODES[arguments.mode], dict) else MODES[arguments.mode],
        interval_s=arguments.interval,
        pace_s=pace,
        most_s=arguments.seconds,
    )
    secret = bytes.fromhex(os.environ["BAGUA_JAX_SECRET"])
    print(runs.work(config, task, data, setting, worker, folder, secret, model_of))


def train_alone(arguments, config, task, data, worker: int, pace: float) -> None:
    """Take steps and talk to nobody."""
    from bagua_jax import asynchrony
    from bagua_jax.experiments.runs import asynchronous as runs
    from bagua_jax.experiments.tasks.data import Shards

    shards = Shards.deal(data, N, config.sharding, config.batch_size, config.seed)
    train = runs.Trainer(config, task, shards, worker)
    replica = asynchrony.Replica(train.params)
    recorder = recorder_of(arguments, config, train.params)
    meet(arguments, worker)
    recorder.start(0)
    until = time.monotonic() + arguments.seconds
    while replica.steps < config.steps and time.monotonic() < until:
        loss = replica.step(runs.paced(train, pace))
        recorder.step(replica.steps, float(loss), model_of(replica.params))
    recorder.stop(replica.steps)
    recorder.now(replica.steps, model_of(replica.params))


def meet(arguments, worker: int) -> None:
    """Wait until every worker has compiled: they share the cores."""
    (arguments.folder / f"ready-{worker}").touch()
    while len(list(arguments.folder.glob("ready-*"))) < N:
        time.sleep(0.05)


def train_together(arguments, config, task, data, worker: int, pace: float) -> None:
    """Average gradients on every step: all are as slow as the slowest."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from bagua_jax import Workers
    from bagua_jax.experiments.runs import asynchronous as runs
    from bagua_jax.experiments.runs import train
    from bagua_jax.experiments.tasks.data import Shards
    from benchmarks.network import process

    workers = Workers.devices(N)
    init, step = train.functions(config, task, workers.axis_name)
    initial = jax.jit(task.init)(jax.random.key(config.seed))
    initial = jax.tree.map(np.asarray, initial)
    shards = Shards.deal(data, N, config.sharding, config.batch_size, config.seed)

    def batch(t):
        own = shards.indices(t)[worker]
        rows = jax.tree.map(lambda x: np.asarray(x[own]), shards.train)
        return jax.tree.map(
            lambda x: process.global_array(x, workers.spec, workers.mesh), rows
        )

    specs = workers.specs(init, initial)
    state = workers.spmd(init)(initial)
    program = workers.spmd(step, in_specs=(specs, workers.spec))
    program = program.lower(state, batch(0)).compile()
    jax.block_until_ready(program(state, batch(0)))  # opens the connections
    alone = runs.Trainer(config, task, shards, worker)
    params, computing = alone.params, []
    for _ in range(5):
        begun = time.monotonic()
        params, _ = jax.block_until_ready(alone(params))
        computing.append(time.monotonic() - begun)
    rest = max(0.0, pace - statistics.median(computing))
    recorder = recorder_of(arguments, config, params)
    meet(arguments, worker)
    recorder.start(0)
    begun = time.monotonic()
    for t in range(config.steps):
        # Its computation lasts `pace` as in the other modes; the exchange comes on top.
        time.sleep(rest)
        state, losses = jax.block_until_ready(program(state, batch(t)))
        own = jax.tree.map(lambda x: x.addressable_data(0), state.params)
        loss = float(jnp.mean(losses.addressable_data(0)))
        recorder.step(t + 1, loss, model_of(own))
    recorder.stop(config.steps)
    recorder.now(config.steps, model_of(own))


# --- all of them ----------------------------------------------------------------------


class Here:
    """Workers on loopback, unshaped: for trying things out."""

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    @staticmethod
    def address(worker: int) -> str:
        """Return the address of a worker."""
        return "127.0.0.1"

    @staticmethod
    def start(worker: int, command: Sequence[str], **popen: Any) -> subprocess.Popen:
        """Start a command as one worker."""
        return subprocess.Popen(command, **popen)

    @staticmethod
    def verify() -> dict[str, float | str]:
        """Measure nothing."""
        return {}


def run(arguments, network, mode: str, folder: Path, kill: bool = False) -> None:
    """Run one mode to its end."""
    addresses = [f"{network.address(w)}:{arguments.port + w}" for w in range(N)]
    arguments.port += N  # a port of the mode before may not be free yet
    words = [sys.executable, "-m", "benchmarks.asynchrony", "--mode", mode]
    words += ["--folder", str(folder), "--addresses", *addresses]
    words += ["--sync-steps", str(arguments.sync_steps), "--pace", str(arguments.pace)]
    words += ["--task", arguments.task, "--seed", str(arguments.seed)]
    words += ["--ballast", str(arguments.ballast), "--seconds", str(arguments.seconds)]
    words += ["--record-every", str(arguments.record_every)]
    words += ["--interval", str(arguments.interval)]

    def start(worker: int) -> subprocess.Popen:
        with open(folder / f"log-{worker}.txt", "ab") as log:
            command = [*words, "--work", str(worker)]
            return network.start(worker, command, stdout=log, stderr=log)

    alive = {w: start(w) for w in range(N)}
    limit = time.monotonic() + 1200
    killed_at = None
    try:
        while alive:
            time.sleep(0.02)
            for worker, process in list(alive.items()):
                if process.poll() is None:
                    continue
                del alive[worker]
                if process.returncode:
                    log = (folder / f"log-{worker}.txt").read_text(errors="replace")
                    raise lab.LabError(
                        f"{mode}: worker {worker} failed:\n{log[-3000:]}"
                    )
            if (
                kill
                and killed_at is None
                and seconds_since_start(folder) > (arguments.seconds / 3)
            ):
                victim = alive.pop(1)
                victim.send_signal(signal.SIGKILL)
                victim.wait()
                killed_at = time.time()
                (folder / "killed").write_text(str(killed_at))
                alive[1] = start(1)
            if time.monotonic() > limit:
                raise lab.LabError(f"{mode}: 20 minutes have passed.")
    finally:
        for process in alive.values():
            process.kill()
            process.wait()


def records(folder: Path, worker: int) -> list[dict]:
    """Read what a worker wrote down."""
    from bagua_jax.experiments.runs import integrity

    return integrity.peek(folder / f"steps-{worker}.jsonl")


def seconds_since_start(folder: Path) -> float:
    """Say for how long all workers have been training."""
    starts = [records(folder, w)[:1] for w in range(N)]
    if not all(starts):
        return 0.0
    return time.time() - max(line["seconds"] for (line,) in starts)


def rate(folder: Path, worker: int) -> float:
    """Count a worker's steps per second, from its start to its stop."""
    lines = records(folder, worker)
    stop = next(line for line in lines if "stops" in line)
    return stop["stops"] / (stop["seconds"] - lines[0]["seconds"])


def fault(folder: Path) -> dict[str, float]:
    """Say how a killed worker came back, and how the others fared."""
    killed = float((folder / "killed").read_text())
    back = [line for line in records(folder, 1) if "starts" in line][-1]
    found = {"back_after_s": back["seconds"] - killed, "at_step": back["starts"]}
    window = back["seconds"] + 2 - killed
    for worker in (0, 2):
        lines = [line for line in records(folder, worker) if "step" in line]
        during = [x for x in lines if killed <= x["seconds"] <= killed + window]
        before = [x for x in lines if x["seconds"] < killed]
        if len(during) > 1 and len(before) > 1:
            pace = [
                (x[-1]["step"] - x[0]["step"]) / (x[-1]["seconds"] - x[0]["seconds"])
                for x in (during, before)
            ]
            found[f"rate_kept_by_{worker}"] = pace[0] / pace[1]
    return found


def main() -> int:
    """Run all modes, judge them, write the numbers; 1 if a target is missed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--loopback", action="store_true", help="no shaped network")
    parser.add_argument("--network", choices=lab.NETWORKS, default="100mbit")
    parser.add_argument("--modes", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--faults", action="store_true", help="kill a worker of pairs")
    parser.add_argument("--repeats", type=int, default=3, help="interleaved")
    parser.add_argument("--seconds", type=float, default=40, help="of a mode")
    parser.add_argument("--sync-steps", type=int, default=120)
    parser.add_argument("--pace", type=float, default=0.1, help="seconds of a step")
    parser.add_argument("--task", default="mnist5k")
    parser.add_argument("--ballast", type=int, default=870_000, help="parameters")
    parser.add_argument("--interval", type=float, default=0.0)
    parser.add_argument("--record-every", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    for hidden in ("--mode", "--folder", "--work"):
        kind = {"--folder": Path, "--mode": str}.get(hidden, int)
        parser.add_argument(hidden, type=kind, help=argparse.SUPPRESS)
    parser.add_argument("--addresses", nargs="+", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    os.environ.setdefault("NPROC", "2")
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    if arguments.work is not None:
        work(arguments)
        return 0
    if not arguments.loopback:
        lab.enter()
    os.environ["BAGUA_JAX_SECRET"] = secrets.token_hex(32)
    arguments.port = PORT

    console, found, faults = Console(width=110), [], []
    load = round(os.getloadavg()[0], 1)
    with contextlib.ExitStack() as stack:
        root = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        os.environ["JAX_COMPILATION_CACHE_DIR"] = str(root / "compiled")
        os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
        os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
        shaped = lab.NETWORKS[arguments.network]
        place = Here() if arguments.loopback else lab.Lab(N, shaped)
        network: Any = stack.enter_context(place)
        name = "loopback, unshaped" if arguments.loopback else arguments.network
        measured = {"name": name, **network.verify()}
        console.print(
            f"{machine.describe()}, load {load} before; network {measured}",
            highlight=False,
        )
        for repeat in range(arguments.repeats):
            for mode in arguments.modes:
                folder = root / f"{mode}-{repeat}"
                folder.mkdir()
                with console.status(f"{mode}, {repeat + 1} of {arguments.repeats}"):
                    run(arguments, network, mode, folder)
                found.append({"mode": mode, **judge(arguments, mode, folder)})
                rates = " ".join(f"{x:.2f}" for x in found[-1]["rates"])
                console.print(f"{mode}: {rates} steps/s", highlight=False)
            if arguments.faults:
                folder = root / f"fault-{repeat}"
                folder.mkdir()
                with console.status("pairs-u8, one killed"):
                    run(arguments, network, "pairs-u8", folder, kill=True)
                faults.append(fault(folder))

    facts = {
        "machine": machine.describe(),
        "load_average_before": load,  # of processes that are not the benchmark's
        "network": measured,
        "workers": N,
        "slowed": {"worker": SLOW, "times": SLOWDOWN},
        **{k: getattr(arguments, k) for k in ("task", "ballast", "pace", "seconds")},
        **{k: getattr(arguments, k) for k in ("sync_steps", "repeats", "interval")},
        "runs": found,
        "faults": faults,
    }
    met = report(console, arguments, facts)
    if arguments.modes == list(MODES) and not arguments.loopback:
        RESULTS.write_text(json.dumps(facts, indent=1) + "\n")
        console.print(f"wrote {RESULTS}")
    return 0 if met else 1


def judge(arguments, mode: str, folder: Path) -> dict[str, Any]:
    """Collect the numbers of one run."""
    from bagua_jax.experiments import tasks
    from bagua_jax.experiments.runs import asynchronous as runs

    config = configure(arguments, mode)
    task = tasks.load(arguments.task)
    data = task.data(config.seed, N)
    metrics = list(runs.averaged(config, task, data, folder))
    late = []
    if mode not in ("local", "synchronous"):
        late = [
            {str(k): v for k, v in own.items()}
            for own in runs.staleness(config, folder)
        ]
    return {
        "rates": [rate(folder, w) for w in range(N)],
        "curve": [[m["steps/mean"], m["seconds"], m["eval/loss"]] for m in metrics],
        "staleness": late,
    }


def report(console: Console, arguments, facts: dict[str, Any]) -> bool:
    """Print the table; say whether every target is met."""
    found = facts["runs"]

    def of(mode: str) -> list[dict]:
        return [one for one in found if one["mode"] == mode]

    def middle(values: Sequence[float]) -> float:
        return statistics.median(values) if values else float("nan")

    def rates(mode: str) -> list[float]:
        return [middle([one["rates"][w] for one in of(mode)]) for w in range(N)]

    local, together = rates("local"), sum(rates("synchronous"))
    target = middle([one["curve"][-1][2] for one in of("synchronous")])
    title = f"medians of {arguments.repeats}; the last worker is slowed"
    table = Table(title=f"{title}; late: median staleness in steps")
    columns = ("mode", "steps/s of each", "kept by the fast", "steps/s, all")
    columns += ("x sync.", "steps to its loss", "x its steps", "late")
    for column in columns:
        side = "left" if column == "mode" else "right"
        table.add_column(column, justify=side, no_wrap="steps/s of" in column)
    met = True
    for mode in arguments.modes:
        own = rates(mode)
        kept = min(own[w] / local[w] for w in range(N) if w != SLOW)
        needed = [
            next((s for s, _, loss in one["curve"] if loss <= target), float("inf"))
            for one in of(mode)
        ]
        times, more = middle(needed) / arguments.sync_steps, sum(own) / together
        late = [
            int(k)
            for one in of(mode)
            for own_late in one["staleness"]
            for k, v in own_late.items()
            for _ in range(v)
        ]
        row = [
            mode,
            " ".join(f"{x:.1f}" for x in own),
            f"{kept:.1%}",
            f"{sum(own):.1f}",
        ]
        row += [f"{more:.2f}", f"{middle(needed):.0f}", f"{times:.2f}"]
        row += [f"{middle(late):.0f}" if late else "-"]
        table.add_row(*row)
        if mode not in ("local", "synchronous"):
            verdict = {
                "keeps_95_percent": kept >= 0.95,
                "throughput_5_times": more >= 5,
                "loss_within_1.3_times_the_steps": times <= 1.3,
            }
            facts.setdefault("verdicts", {})[mode] = {
                "rate_kept": kept,
                "times_synchronous": more,
                "steps_to_loss_times": times if times < float("inf") else None,
                **verdict,
            }
            met = met and all(verdict.values())
    console.print(table)
    console.print(f"test loss at the end of synchronous training: {target:.4f}")
    for mode, verdict in facts.get("verdicts", {}).items():
        missed = [name for name, held in verdict.items() if held is False]
        console.print(
            f"{mode}: " + (f"misses {', '.join(missed)}" if missed else "met")
        )
    for one in facts["faults"]:
        console.print(f"killed and started again: {one}", highlight=False)
    return met


if __name__ == "__main__":
    sys.exit(main())
