"""``bagua-jax async``: train with workers that wait for nobody, each a process."""

import errno
import math
import os
import secrets
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from bagua_jax.experiments.commands import base
from bagua_jax.experiments.commands.terminal import interruptible
from bagua_jax.experiments.runs import supervise
from bagua_jax.experiments.runs.folders import (
    RunError,
    locked,
    name_of,
    open_run,
    require_writable,
)
from bagua_jax.experiments.spec.config import (
    ConfigError,
    ExperimentConfig,
    require_ranges,
)

__all__ = ["Async", "main"]

_SECRET = "BAGUA_JAX_SECRET"
_LOOK = 0.5  # seconds between two looks at how far a run has come
_THREADS = "2"  # of XLA in every process: their number decides the last bits of sums


@dataclass(frozen=True)
class Async(base.OnConfig):
    """Train with workers that wait for nobody, each a process of its own.

    Local steps go on while a thread mixes models: by the config's algorithms in rounds,
    or in pairs, where a worker may die and come back. Processes of this host are
    started here and watched over: one of pairs that dies or hangs is started again by
    itself, those of rounds all together, from what they saved. With `--worker` this is
    one of several hosts' workers.
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
    policy: Annotated[supervise.Policy, tyro.conf.arg(name="")] = supervise.Policy(
        restarts=3
    )

    def __post_init__(self):
        seconds = dict.fromkeys(("interval", "timeout", "pace", "seconds"), (0, 10**9))
        require_ranges(self, seconds)


def main(command: Async) -> int:
    """Do the runs of a config, one algorithm after the other; or be one worker."""
    os.environ.setdefault("NPROC", _THREADS)
    config = command.experiment
    if command.worker is not None:
        return _work(command)

    from bagua_jax.experiments import tasks
    from bagua_jax.experiments.runs import asynchronous as runs
    from bagua_jax.experiments.spec import catalog

    if config.resume_from:
        raise ConfigError(
            "resume_from: is of `bagua-jax run`; a worker of `async` goes on from what "
            "it saved itself."
        )
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
        runs.require_suitable(run, _setting(command))
    task = tasks.load(config.task)
    data = task.data(config.seed, config.workers)
    console = base.console()
    failed = False
    for run in chosen:
        folder = _folder(run, command)
        require_writable(folder)
        try:
            with locked(folder):
                state = _open(command, run, folder, console)
                if state == "reported":
                    console.print(
                        f"finished before, in {folder} (--overwrite repeats it)"
                    )
                    continue
                if state != "finished":
                    _train(command, run, folder, console, state == "interrupted")
                _report(command, run, task, data, folder, console)
        except (RunError, OSError) as error:
            failed = True
            base.complain(f"{folder.name}: {error}", base.FAILED)
    return base.FAILED if failed else 0


_State = Literal["new", "interrupted", "finished", "reported"]
"""Of a run: it is finished when all its workers are, and then reported."""


def _open(command: Async, run: ExperimentConfig, folder: Path, console) -> _State:
    """Make a run's folder, or say how far the run has come that is there."""
    open_run(run, overwrite=command.overwrite, folder=folder)
    why_not = _unreported(run, folder)
    if why_not is None:
        return "reported"
    if why_not:
        console.print(f"{folder.name}: {why_not}; it is made again.", soft_wrap=True)
    return _state(run, folder, console)


def _unreported(run: ExperimentConfig, folder: Path) -> str | None:
    """Say what is wrong with the report of a run; empty where there is none."""
    from bagua_jax.experiments.runs import integrity

    try:
        summary = integrity.read_document(folder / "summary.json", name_of(run))
    except RunError as error:
        return str(error)
    if summary is None:
        return ""
    metrics = integrity.read(folder / "metrics.jsonl", name_of(run))
    mark = summary.marks["metrics.jsonl"]
    return metrics.differ_from(mark) or metrics.fault or metrics.mended or None


def _state(run: ExperimentConfig, folder: Path, console) -> _State:
    """Judge what the workers have left; empty the folder if a run must begin again."""
    import jax

    from bagua_jax.experiments import tasks
    from bagua_jax.experiments.runs import asynchronous as runs
    from bagua_jax.experiments.runs import worker_checkpoint

    def say(message: str) -> None:
        console.print(f"{folder.name}: {message}", soft_wrap=True, highlight=False)

    params = jax.eval_shape(tasks.load(run.task).init, jax.random.key(run.seed))
    size = sum(math.prod(x.shape) for x in jax.tree.leaves(params))
    name, left, saved = name_of(run), [], []
    for worker in range(run.workers):
        left.append(runs.left(folder, worker, size, name))
        saved.append(worker_checkpoint.about(folder, worker, run=name))
        if told := runs.require_whole(left[-1], worker, saved[-1]):
            say(f"{told}; it is mended.")
    if all(map(runs.has_finished, left)):
        say("every worker had finished.")
        return "finished"
    steps = [str(about.steps) for about in saved if about is not None]
    if len(steps) == run.workers:
        say(f"the workers go on from steps {', '.join(steps)}.")
        return "interrupted"
    if any(own.steps.records or own.steps.fault for own in left):
        say(
            "it was interrupted before every worker had saved its model, and begins "
            "again."
        )
        open_run(run, overwrite=True, folder=folder)
    return "new"


def _setting(command: Async, addresses: tuple[str, ...] = ()):
    from bagua_jax.experiments.runs.asynchronous import Setting

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


# --- one worker ---


def _work(command: Async) -> int:
    n, worker = command.experiment.workers, command.worker
    if worker is None or not 0 <= worker < n:
        raise ConfigError(f"--worker: must be from 0 to {n - 1}; got {worker}.")
    if len(command.addresses) != n:
        raise ConfigError(f"--addresses: --worker needs those of all {n} workers.")
    try:
        _join(command, worker)
    except (ValueError, ImportError) as error:  # an address, a secret, no pyzmq
        raise ConfigError(str(error)) from None
    except ConnectionError as error:
        raise base.NotJoined(str(error)) from error

    from bagua_jax.experiments import tasks
    from bagua_jax.experiments.runs import asynchronous as runs
    from bagua_jax.experiments.spec import catalog

    run, *_ = catalog.resolve(command.experiment)
    setting = _setting(command, command.addresses)
    runs.require_suitable(run, setting)
    folder = _folder(run, command)
    require_writable(folder)
    task = tasks.load(run.task)
    data = task.data(run.seed, n)
    interruptible()
    try:
        found = runs.work(
            run,
            task,
            data,
            setting,
            worker,
            folder,
            _secret(),
            resume=command.resume,
            returns=supervise.is_launched(),
        )
    except OSError as error:
        if getattr(error.__cause__, "errno", None) == errno.EADDRINUSE:
            raise base.NotJoined(str(error)) from error  # another has its port now
        raise
    print(found, flush=True)
    return 0


def _secret() -> bytes:
    return bytes.fromhex(os.environ.get(_SECRET, ""))


def _join(command: Async, worker: int) -> None:
    """Refuse addresses and secrets that will not do; in rounds join the others."""
    from bagua_jax import processes
    from bagua_jax.asynchrony.transport import endpoint, require_secret

    for address in command.addresses:
        endpoint(address)  # refuses a public one
    if command.exchange == "pairs":
        require_secret(_secret())
        return
    import jax

    jax.config.update("jax_num_cpu_devices", 1)
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    processes.listening_address()  # refuses a public one for gloo
    first = command.addresses[0]
    processes.initialize(
        facts=base.facts_of(command.experiment),
        coordinator_address=first,
        num_processes=command.experiment.workers,
        process_id=worker,
        coordinator_bind_address=first,
    )


# --- all of them ---


def _train(
    command: Async, run: ExperimentConfig, folder: Path, console, resume: bool
) -> None:
    """Start the workers and watch over them.

    Raises:
        RunError: if a worker was given up that the config does not let drop out.
    """
    from bagua_jax.experiments.runs.asynchronous import Diverged
    from bagua_jax.experiments.runs.progress import progress

    n, rounds = run.workers, command.exchange == "rounds"
    words = [sys.executable, "-m", "bagua_jax.experiments", "async"]
    words += [str(folder / "config.yaml"), "--exchange", command.exchange]
    words += ["--interval", str(command.interval), "--timeout", str(command.timeout)]
    words += ["--compressor", command.compressor] if command.compressor else []
    words += ["--pace", *map(str, command.pace)] if command.pace else []
    words += ["--seconds", str(command.seconds)] if command.seconds else []
    # A program that was damaged there would not be noticed: none of another command's.
    shutil.rmtree(folder / "compiled", ignore_errors=True)
    secret = {_SECRET: secrets.token_hex(32)}

    def program(worker: int, addresses: Sequence[str], resumes: bool):
        own = ["--addresses", *addresses, "--worker", str(worker)]
        return supervise.Program([*words, *own, *["--resume"] * resumes], secret)

    def all_together(attempt: int) -> list[supervise.Program]:
        addresses = supervise.free_addresses(n)
        resumes = _state(run, folder, console) != "new" if attempt else resume
        return [program(worker, addresses, resumes) for worker in range(n)]

    def alone(worker: int):
        return lambda attempt: [program(worker, known, resume and not attempt)]

    known = supervise.free_addresses(n)
    with progress(console, folder.name, 0, run.steps) as show:
        looked = 0.0

        def look() -> None:
            nonlocal looked
            if time.monotonic() > looked + _LOOK:
                looked = time.monotonic()
                _show_last(folder, run, show)

        statuses = supervise.supervise(
            [all_together] if rounds else [alone(worker) for worker in range(n)],
            n,
            folder,
            name="async",
            labels=[folder.name],
            workers=n,
            policy=command.policy,
            log="log-{}.txt",
            shown=False,
            fatal=() if run.on_nan == "drop" else (Diverged.status,),
            look=look,
        )
        _show_last(folder, run, show)
    dropped = Diverged.status if run.on_nan == "drop" else 0
    failed = [k for k, status in enumerate(statuses) if status not in (0, dropped)]
    if failed or all(statuses):
        some = not rounds and 0 in statuses
        whose = f"worker {', '.join(map(str, failed))}" if some else "the workers"
        hint = " With on_nan: drop the others of pairs would go on."
        raise RunError(
            f"{whose} failed. The same command goes on with all of them from what they "
            f"saved.{hint * (Diverged.status in statuses and not dropped)}"
        )


def _show_last(folder: Path, run: ExperimentConfig, show) -> None:
    from bagua_jax.experiments.runs import integrity

    lines = integrity.peek(folder / "steps-0.jsonl")
    begun = max((k for k, line in enumerate(lines) if "starts" in line), default=0)
    made = [line for line in lines[begun:] if line.get("train/loss") is not None]
    if made and made[-1]["step"] <= run.steps:
        taken = made[-1]["step"] - lines[begun]["starts"]
        rate = taken / max(made[-1]["seconds"] - lines[begun]["seconds"], 1e-9)
        show(made[-1]["step"], made[-1]["train/loss"], rate, "worker 0")


def _report(command: Async, run, task, data, folder: Path, console) -> None:
    from bagua_jax.experiments.runs import asynchronous as runs
    from bagua_jax.experiments.runs import integrity
    from bagua_jax.experiments.tables.table import Table

    metrics = list(runs.averaged(run, task, data, folder))
    late = runs.staleness(run, folder)
    summary = {"label": folder.name, "steps": run.steps, **metrics[-1]}
    summary["staleness"] = [{str(k): v for k, v in own.items()} for own in late]
    why_not = runs.why_not_replayed(run, folder)
    if command.replay and not why_not:
        difference = runs.replay(run, task, data, _setting(command), folder)
        summary["replay/largest_difference"] = difference
    with integrity.Journal(folder / "metrics.jsonl", name_of(run), metrics) as journal:
        marks = {journal.path.name: journal.mark}
    integrity.write_document(folder / "summary.json", summary, name_of(run), marks)

    rows = []
    for worker, own in enumerate(late):
        each = sorted(k for k, count in own.items() for _ in range(count))
        middle = str(each[len(each) // 2]) if each else "-"
        most = str(each[-1]) if each else "-"
        rows.append([str(worker), str(len(each)), middle, most])
    headers = ("worker", "exchanges", "median steps late", "most")
    title = f"{folder.name}: exchanges and their staleness"
    console.print(Table(headers, rows, title=title))
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
