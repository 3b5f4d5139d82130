"""``bagua-jax async``: train with workers that wait for nobody, each a process."""

import math
import os
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from bagua_jax.experiments.commands import base
from bagua_jax.experiments.config import ConfigError, ExperimentConfig
from bagua_jax.experiments.folders import (
    RunError,
    locked,
    open_run,
    require_writable,
)

__all__ = ["Async", "main"]

_SECRET = "BAGUA_JAX_SECRET"
_PARENT = "BAGUA_JAX_PARENT"  # process that a worker does not outlive
_THREADS = "2"  # of XLA in every process: their number decides the last bits of sums


@dataclass(frozen=True)
class Async(base.OnConfig):
    """Train with workers that wait for nobody, each a process of its own.

    Local steps go on while a thread mixes models: by the config's algorithms in rounds,
    or in pairs, where a worker may die and come back. Processes of this host are
    started here; with `--worker` this is one of several hosts' workers.
    """

    exchange: Literal["rounds", "pairs"] = "rounds"
    """Rounds of the config's weight-side algorithm over jax.distributed, or averages of
    two workers at a time, without it."""
    compressor: str = ""
    """Of pairs, such as minmax_uint8; full precision where empty."""
    interval: float = 0.0
    """Seconds that a worker rests between exchanges."""
    timeout: float = 5.0
    """Seconds to wait for a peer; more than a model takes on the network."""
    pace: tuple[float, ...] = ()
    """Seconds that a step of each worker takes at least: so stragglers are imitated."""
    seconds: float | None = None
    """Stop every worker after so many seconds, however many steps it has taken."""
    restarts: int = 3
    """How often workers of pairs are started again after they were killed."""
    replay: bool = False
    """Afterwards repeat the run in one process from its log, and compare."""
    overwrite: bool = False
    """Throw away what an earlier run left, in place of going on from it."""
    worker: int | None = None
    """Be this one of the workers, on this host; needs `--addresses`, and for pairs the
    same secret for all in the environment variable BAGUA_JAX_SECRET."""
    resume: bool = False
    """With `--worker`: go on from what this worker saved. (Without `--worker` a run
    that was interrupted goes on by itself.)"""
    addresses: Annotated[tuple[str, ...], tyro.conf.arg(metavar="HOST:PORT")] = ()
    """Where each worker listens, loopback or private; in rounds the first one's is the
    coordinator's."""


def main(command: Async) -> int:
    """Do the runs of a config, one algorithm after the other; or be one worker."""
    os.environ.setdefault("NPROC", _THREADS)
    config = command.experiment
    if command.worker is not None:
        try:
            return _work(command)
        except (ValueError, ImportError) as error:  # an address, a secret, no pyzmq
            raise ConfigError(str(error)) from None

    from bagua_jax.experiments import asynchronous as runs
    from bagua_jax.experiments import catalog, tasks

    chosen = catalog.resolve(config)
    if command.addresses:
        raise ConfigError("--addresses: belongs to --worker; without it they are free.")
    if command.resume:
        raise ConfigError(
            "--resume: belongs to --worker; without it a run that was interrupted goes "
            "on by itself."
        )
    if command.exchange == "pairs":  # one run: it exchanges in no algorithm's way
        chosen = chosen[:1]
    for run in chosen:
        runs.require_suitable(run, _setting(command, ("",) * config.workers))
    task = tasks.load(config.task)
    data = task.data(config.seed, config.workers)
    console = base.console()
    failed = False
    for run in chosen:
        folder = _folder(run, command)
        require_writable(folder)
        try:
            with locked(folder):
                resume = _open(command, run, folder, console)
                if (folder / "summary.json").exists():
                    console.print(
                        f"finished before, in {folder} (--overwrite repeats it)"
                    )
                    continue
                setting = _setting(command, _free_addresses(config.workers))
                _train(command, run, setting, folder, console, resume)
                _report(command, run, task, data, setting, folder, console)
        except RunError as error:
            failed = True
            base.complain(f"{folder.name}: {error}", base.FAILED)
    return base.FAILED if failed else 0


def _open(command: Async, run: ExperimentConfig, folder: Path, console) -> bool:
    """Make a run's folder; say whether the run goes on from what its workers saved."""
    from bagua_jax.experiments import saves

    began = (folder / "config.yaml").exists()
    open_run(run, overwrite=command.overwrite, folder=folder)
    if command.overwrite or not began or (folder / "summary.json").exists():
        return False
    steps = saves.steps_of(folder, run.workers)
    if steps is None:
        console.print(
            f"{folder.name}: it was interrupted before every worker had saved its "
            "model, and begins again.",
            soft_wrap=True,
        )
        open_run(run, overwrite=True, folder=folder)
        return False
    console.print(
        f"{folder.name}: the workers go on from steps {', '.join(map(str, steps))}.",
        soft_wrap=True,
    )
    return True


def _setting(command: Async, addresses: tuple[str, ...]):
    from bagua_jax.experiments.asynchronous import Setting

    return Setting(
        command.exchange,
        addresses,
        command.compressor,
        command.interval,
        command.timeout,
        command.pace,
        math.inf if command.seconds is None else command.seconds,
    )


def _folder(run: ExperimentConfig, command: Async) -> Path:
    label = run.algorithms[0].label
    if command.exchange == "pairs":
        label = "pairs" + f"-{command.compressor}" * bool(command.compressor)
    return Path(run.output) / run.experiment / f"async-{label}-s{run.seed}"


def _free_addresses(count: int) -> tuple[str, ...]:
    probes = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    found = tuple(f"127.0.0.1:{probe.getsockname()[1]}" for probe in probes)
    for probe in probes:
        probe.close()
    return found


# --- one worker ---


def _work(command: Async) -> int:
    from bagua_jax import processes
    from bagua_jax.asynchrony.transport import endpoint

    n, worker = command.experiment.workers, command.worker
    if worker is None or not 0 <= worker < n:
        raise ConfigError(f"--worker: must be from 0 to {n - 1}; got {worker}.")
    if len(command.addresses) != n:
        raise ConfigError(f"--addresses: --worker needs those of all {n} workers.")
    for address in command.addresses:
        endpoint(address)  # refuses a public one
    if _PARENT in os.environ:
        parent = int(os.environ[_PARENT])
        threading.Thread(target=_die_with, args=(parent,), daemon=True).start()
    if command.exchange == "rounds":
        import jax

        jax.config.update("jax_num_cpu_devices", 1)
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        processes.listening_address()  # refuses a public one for gloo
        first = command.addresses[0]
        processes.initialize(
            coordinator_address=first,
            num_processes=n,
            process_id=worker,
            coordinator_bind_address=first,
        )

    from bagua_jax.experiments import asynchronous as runs
    from bagua_jax.experiments import catalog, tasks

    run, *_ = catalog.resolve(command.experiment)
    setting = _setting(command, command.addresses)
    runs.require_suitable(run, setting)
    folder = _folder(run, command)
    require_writable(folder)
    task = tasks.load(run.task)
    data = task.data(run.seed, n)
    secret = bytes.fromhex(os.environ.get(_SECRET, ""))
    try:
        found = runs.work(
            run, task, data, setting, worker, folder, secret, resume=command.resume
        )
    except Exception as error:
        if command.exchange == "rounds":
            # jax.distributed would wait for the others, who wait for this worker.
            print(f"bagua-jax: {error}", file=sys.stderr, flush=True)
            os._exit(base.FAILED)
        raise
    print(found, flush=True)
    return 0


def _die_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(0.5)
    os._exit(base.FAILED)


# --- all of them ---


def _train(command: Async, run, setting, folder: Path, console, resume: bool):
    """Start the workers, and those of pairs again that were killed."""
    from bagua_jax.experiments.asynchronous import Diverged
    from bagua_jax.experiments.progress import progress

    words = [sys.executable, "-m", "bagua_jax.experiments", "async"]
    words += [str(folder / "config.yaml"), "--exchange", command.exchange]
    words += ["--interval", str(command.interval), "--timeout", str(command.timeout)]
    words += ["--addresses", *setting.addresses]
    words += ["--compressor", command.compressor] if command.compressor else []
    words += ["--pace", *map(str, command.pace)] if command.pace else []
    words += ["--seconds", str(command.seconds)] if command.seconds else []
    compiled = {  # by the first worker, read by the others and by one that comes back
        "JAX_COMPILATION_CACHE_DIR": str((folder / "compiled").absolute()),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
    }
    own = {_SECRET: secrets.token_hex(32), _PARENT: str(os.getpid())}
    env = compiled | os.environ | own

    def start(worker: int, *flags: str) -> subprocess.Popen:
        with open(folder / f"log-{worker}.txt", "ab") as log:
            return subprocess.Popen(
                [*words, "--worker", str(worker), *flags],
                env=env,
                stdout=log,
                stderr=log,
            )

    label, left = folder.name, command.restarts
    flags = ["--resume"] * resume
    alive, failures = {w: start(w, *flags) for w in range(run.workers)}, []
    finished = False
    try:
        with progress(console, label, 0, run.steps) as show:
            while alive:
                time.sleep(0.1)
                for worker, process in list(alive.items()):
                    status = process.poll()
                    if status is None:
                        continue
                    del alive[worker]
                    if status == 0:
                        finished = True
                    elif command.exchange == "rounds":
                        raise RunError(_epitaph(worker, status, folder))
                    elif status == Diverged.status and run.on_nan == "stop":
                        raise RunError(
                            f"{_epitaph(worker, status, folder)} With on_nan: drop "
                            "the others would go on."
                        )
                    elif status < 0 and left and not finished:
                        left -= 1
                        console.print(
                            f"{label}: {_epitaph(worker, status, folder)} "
                            "It is started again.",
                            soft_wrap=True,
                        )
                        alive[worker] = start(worker)
                    else:
                        failures.append(_epitaph(worker, status, folder))
                        console.print(
                            f"{label}: {failures[-1]} The others go on.", soft_wrap=True
                        )
                _show_last(folder, run, show)
    finally:
        for process in alive.values():
            process.kill()  # jax.distributed traps SIGTERM
        for process in alive.values():
            process.wait()
    if len(failures) == run.workers:
        raise RunError("every worker failed. " + failures[0])
    return failures


def _epitaph(worker: int, status: int, folder: Path) -> str:
    how = signal.Signals(-status).name if status < 0 else f"exit status {status}"
    lines = (folder / f"log-{worker}.txt").read_text(errors="replace").splitlines()
    said = [line for line in lines if line.strip() and "[Gloo]" not in line]
    last = f"; its log ends with {said[-1]!r}." if said else "."
    return f"worker {worker} ended with {how}{last}"


def _show_last(folder: Path, run: ExperimentConfig, show) -> None:
    from bagua_jax.experiments import folders

    lines = folders.read_lines(folder / "steps-0.jsonl")
    begun = max((k for k, line in enumerate(lines) if "starts" in line), default=0)
    made = [line for line in lines[begun:] if line.get("train/loss") is not None]
    if made and made[-1]["step"] <= run.steps:
        taken = made[-1]["step"] - lines[begun]["starts"]
        rate = taken / max(made[-1]["seconds"] - lines[begun]["seconds"], 1e-9)
        show(made[-1]["step"], made[-1]["train/loss"], rate, "worker 0")


def _report(command: Async, run, task, data, setting, folder: Path, console) -> None:
    from rich.table import Table

    from bagua_jax.experiments import asynchronous as runs
    from bagua_jax.experiments import folders

    metrics = list(runs.averaged(run, task, data, folder))
    folders.write_lines(folder / "metrics.jsonl", metrics)
    late = runs.staleness(folder, run.workers)
    summary = {"label": folder.name, "steps": run.steps, **metrics[-1]}
    summary["staleness"] = [{str(k): v for k, v in own.items()} for own in late]
    why_not = runs.why_not_replayed(folder, run.workers)
    if command.replay and not why_not:
        difference = runs.replay(run, task, data, setting, folder)
        summary["replay/largest_difference"] = difference
    folders.write_json(folder / "summary.json", summary)

    table = Table(title=f"{folder.name}: exchanges and their staleness", box=None)
    for header in ("worker", "exchanges", "median steps late", "most"):
        table.add_column(header, justify="right")
    for worker, own in enumerate(late):
        each = sorted(k for k, count in own.items() for _ in range(count))
        middle = str(each[len(each) // 2]) if each else "-"
        most = str(each[-1]) if each else "-"
        table.add_row(str(worker), str(len(each)), middle, most)
    console.print(table)
    judged = {k: v for k, v in metrics[-1].items() if k.startswith(("eval/", "cons"))}
    words = [f"{name} {value:.4g}" for name, value in judged.items()]
    console.print(f"averaged model: {', '.join(words)}", highlight=False)
    if command.replay and why_not:
        console.print(f"not replayed: {why_not}", soft_wrap=True)
    elif command.replay:
        difference = summary["replay/largest_difference"]
        console.print(
            f"replayed in one process: largest difference {difference:.3g}"
            + (", bit for bit" if difference == 0 else ""),
            highlight=False,
        )
    console.print(f"in {folder}", soft_wrap=True)
