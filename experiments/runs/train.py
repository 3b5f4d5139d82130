"""One run: build the step, train, evaluate, checkpoint, continue where it stopped."""

import contextlib
import math
import re
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from rich.console import Console

from bagua_jax import (
    Workers,
    diagnostics,
    processes,
    skip_not_finite,
    value_and_grad,
    wire,
    worker_local,
)
from bagua_jax.compressors import numerics
from bagua_jax.experiments.runs import (
    ancestry,
    checkpoint,
    folders,
    integrity,
    supervise,
)
from bagua_jax.experiments.runs.folders import RunError
from bagua_jax.experiments.runs.integrity import Journal, Mark, Records
from bagua_jax.experiments.runs.progress import progress
from bagua_jax.experiments.runs.supervise import beat
from bagua_jax.experiments.spec import catalog
from bagua_jax.experiments.spec.config import ConfigError, ExperimentConfig, identity
from bagua_jax.experiments.spec.messages import blame
from bagua_jax.experiments.tasks import Task
from bagua_jax.experiments.tasks.data import Data, Shards
from bagua_jax.guards import SkipNotFiniteState
from bagua_jax.primitives import AxisName

__all__ = [
    "Crashed",
    "Diverged",
    "Program",
    "Stopped",
    "TrainState",
    "build",
    "evaluate",
    "functions",
    "in_warmup",
    "metric_names",
    "run",
    "train",
    "warmup_steps",
    "wire_facts",
]

_WIRE = (
    "bytes_per_worker",
    "messages_per_worker",
    "warmup_bytes_per_worker",
    "warmup_steps",
)
_BLOWN_UP = 1e6
"""A loss above it ends a run that may diverge."""
_SKIPPED = "train/skipped_by"
"""In the metrics of a skipped step: number of workers whose loss or gradient was not
finite; 0 where only the update was not."""
_SKIPS = 10
"""Maximum number of consecutive skipped steps before the run fails."""
_PENDING = 256
"""Maximum number of per-step reports kept on device before they are written out."""
_STRETCH = 0.2
"""Seconds between two records of the metrics, about."""
_METRICS, _TIMING, _SUMMARY = "metrics.jsonl", "timing.jsonl", "summary.json"


class Diverged(RunError):
    """A loss, or a number of the evaluation, is not finite."""


class Stopped(RunError):
    """This process alone cannot go on; the others wait for it and must be stopped."""


class Crashed(Stopped):
    """The same, for a reason that may not be there the next time."""

    status = supervise.CRASHED


class TrainState(NamedTuple):
    """Everything that the next step needs."""

    params: optax.Params  # stacked over workers where the algorithm is weight side
    opt_state: optax.OptState  # worker-local leaves stacked, the others held once


class Program(NamedTuple):
    """A run's compiled parts.

    Attributes:
        workers: where they live.
        state: the initial state, on its devices.
        step: ``(state, batch) -> state, reports``; the batch has leaves [n, B, ...], as
            ``workers.stack`` makes them; the reports are [n, 3], see :func:`functions`.
        checksums: ``state -> [n]``, of each worker's copy of what all workers share.
        text: optimized HLO of the step on one device for each worker; ``None`` where
            there are too few devices to compile it for.
        stacked: whether each worker has parameters of its own.
    """

    workers: Workers
    state: TrainState
    step: Callable[[TrainState, Any], tuple[TrainState, jax.Array]]
    checksums: Callable[[TrainState], jax.Array]
    text: str | None
    stacked: bool


def functions(
    config: ExperimentConfig, task: Task, axis_name: AxisName
) -> tuple[Callable[..., TrainState], Callable[..., tuple[TrainState, jax.Array]]]:
    """Write what a worker does, once, to run or to be compiled anywhere.

    Args:
        config: of one run, resolved.
        task: what is trained.
        axis_name: of the workers.

    Returns:
        ``params -> state`` and ``(state, batch) -> state, report``, per-worker
        functions for ``Workers.specs`` and ``Workers.spmd``; the batch has leaves
        [B, ...]. The report is [3] float32: the loss of the worker's own batch; 1 if
        loss and gradient are finite, else 0; and the number of consecutive skipped
        steps up to this one. The last two are 1 and 0 where the config skips none.
    """
    if config.on_nan == "drop":
        raise ConfigError(
            "on_nan: drop is for workers that wait for nobody, of bagua-jax async "
            "--exchange pairs; here every step needs all of them. Use stop or skip."
        )
    tx = catalog.transform(config, axis_name)
    skips = config.on_nan == "skip"
    if skips:
        tx = skip_not_finite(tx, axis_name)  # train counts them, and ends the run
    stacked = catalog.entry(config.algorithms[0].name).own_params

    def init(params):
        if stacked:
            params = worker_local(params, axis_name)
        return TrainState(params, tx.init(params))

    def step(state, batch):
        take = value_and_grad(task.loss, axis_name)
        loss, grads = take(state.params, batch)
        sound, in_a_row = jnp.ones([], bool), jnp.zeros([], jnp.int32)
        if skips:
            # A loss that is not finite spoils the step even if its gradient is finite.
            grads = jax.tree.map(
                lambda g: jnp.where(numerics.is_finite(loss), g, jnp.nan), grads
            )
            finite = [numerics.all_finite(g) for g in jax.tree.leaves(grads)]
            sound = jnp.stack(finite).all()
        updates, opt_state = tx.update(
            grads,
            state.opt_state,
            state.params,
            gradient_fn=lambda params: take(params, batch)[1],
        )
        if skips:
            in_a_row = cast(SkipNotFiniteState, opt_state).consecutive
        params = optax.apply_updates(state.params, updates)
        report = jnp.stack(
            [jnp.asarray(x, jnp.float32) for x in (loss, sound, in_a_row)]
        )
        return TrainState(params, opt_state), report

    return init, step


def build(
    config: ExperimentConfig, task: Task, workers: Workers, batch: Any
) -> Program:
    """Compile a run.

    Args:
        config: of one run, resolved.
        task: what is trained.
        workers: where they live.
        batch: one batch of this process's workers, leaves [own, B, ...].

    Returns:
        The program. A simulation's step is compiled for host devices as well, which
        shows what it would send.
    """
    (algorithm,) = config.algorithms
    stacked = catalog.entry(algorithm.name).own_params

    initial = jax.device_get(jax.jit(task.init)(jax.random.key(config.seed)))

    def compile_on(workers: Workers):
        init, step = functions(config, task, workers.axis_name)
        specs = workers.specs(init, initial)
        state = workers.spmd(init)(initial)
        mapped = workers.spmd(step, in_specs=(specs, workers.spec))
        step = mapped.lower(state, workers.stack(batch)).compile()
        return state, step, replica_checksums(workers, specs)

    state, step, checksums = compile_on(workers)
    text = None
    if workers.mesh is not None:
        text = step.as_text()
    elif len(host := _host_devices()) >= config.workers:
        on_host = Workers.devices(config.workers, devices=host)
        text = compile_on(on_host)[1].as_text()
    return Program(workers, state, step, checksums, text, stacked)


def replica_checksums(workers: Workers, specs: Any) -> Callable[[Any], jax.Array]:
    """Compile, on first use, what compares the copies of what all workers share.

    Args:
        workers: on devices.
        specs: of a state's leaves; those that are ``P()`` are shared.

    Returns:
        ``state -> [n]`` uint32, the checksum of each worker's own copy. Each device
        reads what it holds; nothing is communicated.
    """
    is_spec = lambda x: isinstance(x, P)  # noqa: E731
    shared = [spec == P() for spec in jax.tree.leaves(specs, is_leaf=is_spec)]

    def checksum(state):
        leaves = zip(jax.tree.leaves(state), shared, strict=True)
        own = diagnostics.replica_checksum([x for x, is_shared in leaves if is_shared])
        return worker_local(own, workers.axis_name)

    return workers.spmd(checksum, in_specs=(specs,))


def _host_devices() -> list[Any]:
    try:
        return jax.devices("cpu")
    except RuntimeError:  # JAX_PLATFORMS leaves the CPU out
        return []


def evaluate(
    program: Program, judge: Callable[[Any, Any], dict], params: Any, test: Any
) -> dict[str, float]:
    """Judge a model on the test data.

    Args:
        program: says whether workers have parameters of their own.
        judge: the task's ``evaluate``, compiled.
        params: stacked over workers where they have their own.
        test: the task's test data.

    Returns:
        ``eval/<name>`` for each number of the task. Where workers have parameters of
        their own, these are the averaged model's; ``eval/<name>_worker_min`` and
        ``_max`` give the spread over workers, and ``consensus/distance_sq`` is
        (1/n) sum_i |x_i - mean|^2.

    Raises:
        Diverged: if a number is not finite.
        RunError: if there is none.
    """
    params = processes.fetch(params)
    if not program.stacked:
        return _judged(judge(params, test))
    mean = jax.tree.map(lambda x: x.mean(0, dtype=np.float64).astype(x.dtype), params)
    metrics = _judged(judge(mean, test))
    leaves, structure = jax.tree.flatten(params)
    each = [
        judge(jax.tree.unflatten(structure, own), test)
        for own in zip(*leaves, strict=True)
    ]
    for name in each[0]:
        values = [float(worker[name]) for worker in each]
        metrics[f"eval/{name}_worker_min"] = min(values)
        metrics[f"eval/{name}_worker_max"] = max(values)
    squares = jax.tree.map(
        lambda x: np.sum((x - x.mean(0, dtype=np.float64)) ** 2) / len(x), params
    )
    metrics["consensus/distance_sq"] = float(sum(jax.tree.leaves(squares)))
    return metrics


def _in_order(evaluate: Callable[[Any, Any], dict]) -> Callable[[Any, Any], dict]:
    """Compile an evaluation; its numbers stay in order, which jax would sort."""
    names: list[str] = []

    @jax.jit
    def numbers(params, test):
        found = evaluate(params, test)
        names[:] = found
        return list(found.values())

    def judge(params, test):
        return dict(zip(names, numbers(params, test), strict=True))

    return judge


def _judged(numbers: dict[str, Any]) -> dict[str, float]:
    metrics = {f"eval/{name}": float(value) for name, value in numbers.items()}
    if not metrics:
        raise RunError("the task's evaluate must give at least one number; got none.")
    if not all(map(math.isfinite, metrics.values())):
        raise Diverged(f"the evaluation gives {metrics}, which is not all finite.")
    return metrics


def metric_names(
    config: ExperimentConfig, task: Task, data: Data
) -> dict[bool, list[str]]:
    """Name what a run will have measured, before it runs.

    Args:
        config: of one run, resolved.
        task: what is trained.
        data: the task's data.

    Returns:
        Under ``False`` what its summary holds at the end, ``wire/...`` for the numbers
        under ``wire``, time left out; under ``True`` what its metrics hold on a step.

    Raises:
        RunError: if the task fails.
    """
    try:
        params = jax.eval_shape(task.init, jax.random.key(config.seed))
        judged = jax.eval_shape(task.evaluate, params, data.test)
    except Exception as error:
        raise RunError(f"the task's evaluate failed: {blame(error)}.") from error
    names = [f"eval/{name}" for name in judged]
    if catalog.entry(config.algorithms[0].name).own_params:
        names += [f"{n}_worker_{end}" for n in names for end in ("min", "max")]
        by_step = ["train/loss", *names, "consensus/distance_sq"]
    else:
        by_step = ["train/loss", *names]
    final = ["steps", "diverged", "train/loss_last_10", *names, "consensus/distance_sq"]
    return {False: final + [f"wire/{name}" for name in _WIRE], True: by_step}


def train(
    config: ExperimentConfig,
    task: Task,
    data: Data,
    console: Console,
    folder: Path,
) -> tuple[dict[str, Any], dict[str, Mark]]:
    """Train from the newest checkpoint to the end.

    Args:
        config: of one run, resolved.
        task: what is trained.
        data: the task's data.
        console: for progress.
        folder: of the run.

    Returns:
        The summary, and the marks of the records that it was made of; both are empty in
        all processes but the first.

    Raises:
        RunError: if the loss stops being finite where it may not, or the folder's
            records and checkpoints are of another run, or damaged beyond mending.
    """
    (algorithm,) = config.algorithms
    facts = identity(config)
    first = processes.is_first()  # the one that writes
    say = _teller(console, algorithm.label, folder)

    shards = Shards.deal(
        data, config.workers, config.sharding, config.batch_size, config.seed
    )
    beat("compiling", algorithm.label)
    place = Workers.simulate if config.where == "simulate" else Workers.devices
    workers = place(config.workers)
    with console.status(f"{algorithm.label}: compiling"):
        program = build(config, task, workers, shards.batch(0, workers.own))
    judge = _in_order(task.evaluate)
    on_cpu = jax.default_backend() == "cpu"
    limit = _BLOWN_UP if algorithm.may_diverge else math.inf

    found = _records(config, folder)
    start, state, marks = checkpoint.restore(
        folder / "checkpoints",
        program.state,
        facts,
        trouble=lambda marks: _differ(found, marks),
        say=say,
    )
    kept = {name: marks[name][0] if start else 0 for name in found}
    if config.resume_from and not start:
        ancestor = ancestry.find(config)
        state = ancestry.inherit(
            ancestor,
            lambda axis: functions(ancestor.config, task, axis)[0],
            jax.device_get(jax.jit(task.init)(jax.random.key(config.seed))),
            program.state,
            config.workers,
        )
        ancestry.write(folder, ancestor, folders.name_of(config))
        say(
            f"begins with step {ancestor.step} of {ancestor.folder}, which "
            f"{ancestor.config.workers} workers trained"
        )

    with (
        _journals(config, folder, found, kept, say) as journals,
        progress(console, algorithm.label, start, config.steps) as show,
    ):
        if start:
            say(f"continues after step {start}")
        else:
            judged = {"step": 0} | evaluate(program, judge, state.params, data.test)
            if first:
                journals[_METRICS].append([judged])
        pending, note, mark, stride = [], "", time.perf_counter(), 8
        for step in range(start + 1, config.steps + 1):
            beat("step", algorithm.label, step)
            batch = workers.stack(shards.batch(step - 1, workers.own))
            state, reports = program.step(state, batch)
            if on_cpu:  # two steps in flight on more host devices than cores deadlock
                jax.block_until_ready((state, reports))
            pending.append(reports)
            if config.where != "simulate" and step % config.check_replicas_every == 0:
                _require_equal_replicas(step, program, state)
            last = step == config.steps
            judged = last or step % config.eval_every == 0
            saved = last or step % config.checkpoint_every == 0
            if not judged and not saved and len(pending) < stride:
                continue

            records, end = [], ""
            table, seconds = _gather(workers, pending, mark)
            try:
                for taken, reports in enumerate(table, step + 1 - len(pending)):
                    if in_a_row := int(reports[0, 2]):
                        say(f"step {taken} is skipped: {_fault(workers, reports)}")
                    if in_a_row > _SKIPS:
                        raise Diverged(f"{in_a_row} steps in a row were skipped.")
                    records.append(_record(taken, reports, limit, workers))
                if judged:
                    beat("evaluating", algorithm.label, step)
                    records[-1] |= evaluate(program, judge, state.params, data.test)
                    note = _note(records[-1])
            except Diverged as error:
                end = str(error)
                if not algorithm.may_diverge:
                    raise
            if first:
                stretch = {"step": step, "steps": len(pending), "seconds": seconds}
                journals[_METRICS].append(records)
                journals[_TIMING].append([stretch])
            if end:
                say(f"diverged: {end}")
                return _summary(config, program, journals, diverged=True)
            loss = records[-1].get("train/loss", math.nan)
            show(step, loss, len(pending) / seconds, note)
            if saved:
                beat("saving", algorithm.label, step)
                checkpoint.save(
                    folder / "checkpoints",
                    step,
                    state,
                    facts,
                    {name: journal.mark for name, journal in journals.items()},
                    keep=config.keep_checkpoints,
                )
            stride = max(1, min(_PENDING, round(_STRETCH * len(pending) / seconds)))
            pending, mark = [], time.perf_counter()
    return _summary(config, program, journals, diverged=False)


def _teller(console: Console, label: str, folder: Path) -> Callable[[str], None]:
    """Return what tells the console, and the run's log, what happens."""

    def say(message: str) -> None:
        if processes.is_first():
            folders.log(folder, message)
        console.print(f"{label}: {message}", highlight=False, soft_wrap=True)

    return say


def _records(config: ExperimentConfig, folder: Path) -> dict[str, Records]:
    """Read the records of a run by their files' names; only the first process does."""
    if not processes.is_first():
        return {}
    run = folders.name_of(config)
    return {name: integrity.read(folder / name, run) for name in (_METRICS, _TIMING)}


def _differ(found: Mapping[str, Records], marks: Mapping[str, Mark]) -> str:
    """Say why records are not those of which marks were made; empty if they are."""
    return "; ".join(filter(None, (found[k].differ_from(m) for k, m in marks.items())))


@contextlib.contextmanager
def _journals(
    config: ExperimentConfig,
    folder: Path,
    found: Mapping[str, Records],
    kept: Mapping[str, int],
    say: Callable[[str], None],
) -> Iterator[dict[str, Journal]]:
    """Open the journals of a run with the first so many of their records."""
    run = folders.name_of(config)
    with contextlib.ExitStack() as files:
        journals = {}
        for name, records in found.items():
            if fault := records.fault:
                say(f"{fault}; it is computed again from the checkpoint")
            elif fault := records.mended:
                say(f"{fault}; it is restored from {integrity.COPIES} or written there")
            journal = Journal(folder / name, run, records.records[: kept[name]])
            journals[name] = files.enter_context(journal)
        yield journals


def _gather(
    workers: Workers, pending: list[jax.Array], mark: float
) -> tuple[np.ndarray, float]:
    """Bring the reports of some steps to every process: [steps, n, 3], and the seconds.

    The seconds are the slowest process's, so that all agree on when the next stretch
    ends. The message has one shape, however many steps there are: one compilation.
    """
    message = np.zeros((len(workers.own), _PENDING + 1, 3), np.float32)
    for i, reports in enumerate(pending):
        message[:, i] = workers.rows(reports)
    message[:, -1] = time.perf_counter() - mark
    message = processes.fetch(workers.stack(message))
    return message[:, : len(pending)].swapaxes(0, 1), float(message[:, -1].max())


def _record(
    step: int, reports: np.ndarray, limit: float, workers: Workers
) -> dict[str, Any]:
    """Make a step's line of the metrics; one that was skipped may have no loss."""
    losses, sound, in_a_row = reports.T
    finite = np.isfinite(losses)
    if in_a_row.any():
        record: dict[str, Any] = {"step": step, _SKIPPED: int((sound == 0).sum())}
        if finite.any():
            record["train/loss"] = float(np.mean(losses[finite], dtype=np.float64))
        return record
    loss = float(np.mean(losses, dtype=np.float64))
    if not math.isfinite(loss) or loss > limit:
        whose = "" if finite.all() else f", that of {_names(workers, ~finite)} first"
        raise Diverged(
            f"the training loss is {loss:.6g} on step {step}{whose}. Lower the "
            "learning rate, or compress less."
        )
    return {"step": step, "train/loss": loss}


def _fault(workers: Workers, reports: np.ndarray) -> str:
    """Say why a step was skipped."""
    sound = reports[:, 1] == 1
    if sound.all():
        return "the update is not finite, though every gradient is"
    return f"not finite at {_names(workers, ~sound)}"


def _names(workers: Workers, which: np.ndarray) -> str:
    """Name workers, with their processes and hosts where there are several."""
    numbers = np.arange(workers.num_workers)[which]
    if processes.count() == 1 or not isinstance(workers.mesh, Mesh):
        return ", ".join(f"worker {i}" for i in numbers)
    hosts, devices = processes.hosts(), workers.mesh.devices.flat
    at = [devices[int(i)].process_index for i in numbers]
    return ", ".join(
        f"worker {i} (process {p}, host {hosts[p]})"
        for i, p in zip(numbers, at, strict=True)
    )


def _require_equal_replicas(step: int, program: Program, state: TrainState) -> None:
    """Refuse to go on where what all workers share is not the same on all."""
    sums = processes.fetch(program.checksums(state))
    values, counts = np.unique(sums, return_counts=True)
    if len(values) > 1:
        strays = sums != values[np.argmax(counts)]
        raise RunError(
            f"replicas have drifted by step {step}: {_names(program.workers, strays)} "
            f"differ from the other {int((~strays).sum())}. Nothing in the program can "
            "do that: suspect the hardware, or a fault in a library."
        )


def _note(record: dict[str, Any]) -> str:
    name = next(k for k in record if k.startswith("eval/"))
    return f"{name.removeprefix('eval/').replace('_', ' ')} {record[name]:.4g}"


def _summary(
    config: ExperimentConfig,
    program: Program,
    journals: Mapping[str, Journal],
    *,
    diverged: bool,
) -> tuple[dict[str, Any], dict[str, Mark]]:
    """Collect the final numbers of a run; of one that diverged the last sound ones.

    Only the first process has them.
    """
    if not processes.is_first():
        return {}, {}
    lines, timing = (journals[name].reread() for name in (_METRICS, _TIMING))
    losses = [line["train/loss"] for line in lines[1:] if "train/loss" in line][-10:]
    seconds = sum(t["seconds"] for t in timing)
    judged = [line for line in lines if any(k.startswith("eval/") for k in line)]
    of_step = ("step", "train/loss", _SKIPPED)
    final = {k: v for k, v in judged[-1].items() if k not in of_step}
    arguments = config.algorithms[0].arguments
    summary = {
        "label": config.algorithms[0].label,
        "algorithm": config.algorithms[0].name,
        "steps": lines[-1]["step"],
        "diverged": diverged,
        "train/loss_last_10": sum(losses) / len(losses) if losses else None,
        **final,
        "consensus/distance_sq": final.get("consensus/distance_sq", 0.0),
        "wire": wire_facts(program.text, arguments),
        "time/steps_per_s": sum(t["steps"] for t in timing) / seconds,
        "processor": folders.processor(),
        "devices": jax.devices()[0].device_kind,
    }
    return summary, {name: journal.mark for name, journal in journals.items()}


def wire_facts(text: str | None, arguments: Mapping[str, Any]) -> dict[str, Any] | None:
    """Count what a worker sends on a step, in the warm-up and after it.

    Args:
        text: optimized HLO of the train step; ``None`` where it is not known.
        arguments: of the algorithm; before its ``warmup_steps``, if it has any,
            branches of share 0 are taken.

    Returns:
        Bytes and messages of a worker on a step in the long run, the same for a step of
        the warm-up, and its length.
    """
    if text is None:
        return None
    steady, first = wire.count(text), wire.count(in_warmup(text))
    facts = (
        steady.bytes_per_worker,
        steady.messages_per_worker,
        first.bytes_per_worker,
        warmup_steps(arguments),
    )
    return dict(zip(_WIRE, facts, strict=True))


def warmup_steps(arguments: Mapping[str, Any]) -> int:
    """Read how long the warm-up is from the arguments of an algorithm."""
    return arguments.get("warmup_steps", 0)


def in_warmup(text: str) -> str:
    """Rewrite a program's text: branches of share 0, which end, are those taken.

    >>> in_warmup("branch_shares(0.0,1.0)/cond branch_shares(0.75,0.25)/cond")
    'branch_shares(1.0,0.0)/cond branch_shares(0.75,0.25)/cond'
    """

    def warm(scope: re.Match) -> str:
        shares = [float(share) for share in scope[1].split(",")]
        if 0.0 in shares:
            at = shares.index(0.0)
            shares = [float(i == at) for i in range(len(shares))]
        return f"branch_shares({','.join(map(repr, shares))})"

    return re.sub(r"branch_shares\(([^()]*)\)", warm, text)


def run(
    config: ExperimentConfig,
    task: Task,
    data: Data,
    console: Console,
    *,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Do one run in its folder, or read the result of one that is finished.

    Args:
        config: of one run, resolved.
        task: what is trained.
        data: the task's data.
        console: for progress and messages.
        overwrite: throw away what is there and start afresh.

    Returns:
        The summary.

    Raises:
        RunError: if the run fails, in every process alike.
        Stopped: if one of several processes fails.
    """
    label, folder = config.algorithms[0].label, folders.path_of(config)
    several = processes.count() > 1
    say = _teller(console, label, folder)

    def enter() -> dict[str, Any] | None:
        """Go into the folder; return its summary if it holds a finished run."""
        stack.enter_context(folders.locked(folder))
        folders.open_run(config, overwrite=overwrite)
        summary = _finished(config, folder, say)
        if summary is None:
            folders.log(folder, f"starts: {' '.join(sys.argv)}")
        return summary

    try:
        with contextlib.ExitStack() as stack:
            summary = processes.from_first(enter, RunError)
            if summary is not None:
                console.print(
                    f"{label}: finished before, in {folder} (--overwrite repeats it)",
                    highlight=False,
                    soft_wrap=True,
                )
                return summary
            summary, marks = train(config, task, data, console, folder)
            if processes.is_first():
                path, name = folder / _SUMMARY, folders.name_of(config)
                if ancestors := ancestry.read(folder, name):
                    summary["ancestors"] = ancestors
                integrity.write_document(path, summary, name, marks)
                folders.log(folder, "finished")
            return summary
    except (ConfigError, RunError) as error:
        _log_failure(folder, str(error))
        raise
    except OSError as error:
        _log_failure(folder, str(error))
        raise (Stopped if several else RunError)(str(error)) from error
    except Exception as error:  # from the task or the algorithm: theirs to read
        _log_failure(folder, traceback.format_exc())
        where = f"The traceback is in {folder / 'log.txt'}."
        kind = Crashed if several else RunError
        raise kind(f"{blame(error)}. {where}") from error


def _finished(
    config: ExperimentConfig, folder: Path, say: Callable[[str], None]
) -> dict[str, Any] | None:
    """Read the summary of a finished run, and mend its records if need be.

    Returns:
        ``None`` where there is none, or it or the records were altered: then the run
        goes on from a checkpoint, and makes them again.
    """
    try:
        summary = integrity.read_document(folder / _SUMMARY, folders.name_of(config))
    except RunError as error:
        say(f"{error}; it is made again")
        return None
    if summary is None:
        return None
    found = _records(config, folder)
    if fault := _differ(found, summary.marks):
        say(f"{fault}; the run goes on from a checkpoint before it")
        return None
    kept = {name: summary.marks[name][0] for name in found}
    whole = [(len(x.checks), x.fault, x.mended) for x in found.values()]
    if whole != [(count, "", "") for count in kept.values()]:
        with _journals(config, folder, found, kept, say):
            pass
    return summary.value


def _log_failure(folder: Path, text: str) -> None:
    with contextlib.suppress(OSError):
        folders.log(folder, f"failed: {text}")
