"""Runs of real asynchrony: what a worker's process does, and what they left together.

A run's folder holds, for each worker::

    steps-0.jsonl   starts, stops, saves, and every so many steps: step, seconds since
                    1970, mean loss, the check of the model
    models-0.f32    the parameters at those steps, one flat float32 vector after another
    events-0.jsonl  its exchanges; see bagua_jax.asynchrony
    saved-0.npz     its parameters, optimizer state and steps, from which a run that was
                    interrupted goes on
    log-0.txt       what the process said

Steps and events are journals with copies (:mod:`bagua_jax.experiments.runs.integrity`).
A record of the steps states the mark of the events before it, and a save states both
marks. What a save states must be there; of what came after it a machine that lost power
may have lost some, and the run goes on without.
"""

import contextlib
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree

from bagua_jax import Workers, asynchrony, primitives
from bagua_jax.algorithms import REGISTRY
from bagua_jax.asynchrony.transport import require_zmq
from bagua_jax.experiments.runs import folders, integrity, worker_checkpoint
from bagua_jax.experiments.runs.folders import RunError
from bagua_jax.experiments.runs.integrity import Journal, Mark, Records
from bagua_jax.experiments.runs.supervise import beat
from bagua_jax.experiments.spec import catalog
from bagua_jax.experiments.spec.config import ConfigError, ExperimentConfig, identity
from bagua_jax.experiments.tasks import Task
from bagua_jax.experiments.tasks.data import Data, Shards

__all__ = [
    "Diverged",
    "Recorder",
    "Setting",
    "Trainer",
    "averaged",
    "has_finished",
    "left",
    "paced",
    "replay",
    "require_suitable",
    "staleness",
    "why_not_replayed",
    "work",
]


class Diverged(RunError):
    """A worker's loss is not finite: it leaves. ``on_nan`` says what the others do."""

    status = 4  # of the worker's process: by it the others' is decided


class Setting(NamedTuple):
    """How the workers of a run talk to one another.

    Attributes:
        exchange: the config's algorithm in ``"rounds"``, or ``"pairs"``.
        addresses: ``host:port`` of every worker; of the coordinator first in rounds.
        compressor: of pairs, as a config writes it; empty for full precision.
        interval_s: seconds to rest between exchanges.
        timeout_s: how long to wait for an answer.
        pace_s: seconds that a step of each worker takes at least; empty for none.
        most_s: seconds after which a worker stops, however many steps it has taken.
    """

    exchange: Literal["rounds", "pairs"]
    addresses: tuple[str, ...]
    compressor: str = ""
    interval_s: float = 0.0
    timeout_s: float = 5.0
    pace_s: tuple[float, ...] = ()
    most_s: float = math.inf


def require_suitable(config: ExperimentConfig, setting: Setting) -> None:
    """Refuse what has no asynchronous form.

    Raises:
        ConfigError: if the algorithm does not exchange models, or the setting does not
            fit the workers.
    """
    (algorithm,) = config.algorithms
    if (
        setting.exchange == "rounds"
        and catalog.entry(algorithm.name).placement != "weight"
    ):
        names = [k for k, entry in REGISTRY.items() if entry.placement == "weight"]
        raise ConfigError(
            f"algorithms.{algorithm.label}: rounds exchange models, and "
            f"{algorithm.name} exchanges gradients of one step, which all would have "
            f"to wait for. These exchange models: {', '.join(names)}."
        )
    if config.on_nan == "skip":
        raise ConfigError(
            "on_nan: skip is for steps that all workers take together. Workers that "
            "wait for nobody have stop, and in pairs drop."
        )
    if config.on_nan == "drop" and setting.exchange == "rounds":
        raise ConfigError(
            "on_nan: drop needs --exchange pairs: rounds end when a worker leaves."
        )
    if setting.exchange == "rounds" and setting.compressor:
        raise ConfigError(
            "--compressor: is of pairs; in rounds it is the algorithm's own, as in "
            "{name: diloco, local_steps: 1, outer_learning_rate: 1.0, "
            "outer_momentum: 0.0, compressor: minmax_uint8}."
        )
    if setting.compressor:
        catalog.compressor(setting.compressor, "--compressor")
    if setting.exchange == "pairs":
        try:
            require_zmq()
        except ImportError as error:
            raise ConfigError(f"--exchange: {error}") from None
    for name, found in (("addresses", setting.addresses), ("pace", setting.pace_s)):
        if found and len(found) != config.workers:
            raise ConfigError(
                f"--{name}: one for each of the {config.workers} workers; got "
                f"{len(found)}."
            )


class Trainer:
    """One worker's optimizer and data: its local step, compiled.

    Args:
        config: of one run, resolved.
        task: what is trained.
        shards: of all workers.
        worker: which.
        start: steps that were taken before.
    """

    def __init__(
        self,
        config: ExperimentConfig,
        task: Task,
        shards: Shards,
        worker: int,
        start: int = 0,
    ):
        tx = catalog.optimizer(config)

        @jax.jit
        def step(params, state, batch):
            loss, grads = jax.value_and_grad(task.loss)(params, batch)
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state, loss

        self.params = jax.jit(task.init)(jax.random.key(config.seed))
        self.state = tx.init(self.params)
        self.steps, self._shards, self._worker = start, shards, worker
        args = self.params, self.state, self._batch()
        self._step = step.lower(*args).compile()

    def _batch(self) -> Any:
        chosen = self._shards.indices(self.steps)[self._worker]
        return jax.tree.map(lambda x: jnp.asarray(x[chosen]), self._shards.train)

    def __call__(self, params: Any) -> tuple[Any, jax.Array]:
        """Take a step: ``params -> new params, loss``."""
        params, self.state, loss = self._step(params, self.state, self._batch())
        self.steps += 1
        return params, loss


class Left(NamedTuple):
    """What a worker has left, up to the first record that is damaged.

    Attributes:
        steps: its records.
        events: its exchanges.
        models: [k, d], one for each record of a step.
    """

    steps: Records
    events: Records
    models: np.ndarray


def left(folder: Path, worker: int, size: int, run: str) -> Left:
    """Read what a worker has left.

    Args:
        folder: of the run.
        worker: which.
        size: d, of a model.
        run: as :func:`bagua_jax.experiments.runs.folders.name_of` names it.
    """
    names = _names(worker)
    steps, events = (integrity.read(folder / name, run) for name in names)
    path = folder / f"models-{worker}.f32"
    models = np.fromfile(path, np.float32) if path.exists() else np.empty(0, np.float32)
    models = models[: models.size // size * size].reshape(-1, size)
    count = 0
    for index, record in enumerate(steps.records):
        fault = events.differ_from(record["events"])
        if "step" in record and not fault:
            if count == len(models):
                fault = f"{path} ends before the model of step {record['step']}"
            elif integrity.check_of(models[count].tobytes()) != record["model"]:
                fault = (
                    f"{path}, model {count + 1}, of step {record['step']}, was altered"
                )
            count += not fault
        if fault:
            steps = steps.first(index)._replace(fault=fault)
            break
    return Left(steps, events, models[:count])


def _names(worker: int) -> tuple[str, str]:
    return f"steps-{worker}.jsonl", f"events-{worker}.jsonl"


def require_whole(
    found: Left, worker: int, about: worker_checkpoint.About | None
) -> str:
    """Require that what a worker has left is what its save states.

    Args:
        found: what it has left.
        worker: which.
        about: its save; ``None`` where it has not saved.

    Returns:
        What is not whole in what came after the save, or was mended; else empty.

    Raises:
        RunError: if what came before the save is not, or the save is lost.
    """
    saved = [x["saves"] for x in found.steps.records if "saves" in x]
    steps, events = found.steps, found.events
    fault = ""
    if about is not None:
        marks = zip((steps, events), _names(worker), strict=True)
        faults = [records.differ_from(about.marks[name]) for records, name in marks]
        fault = "; ".join(filter(None, faults))
    elif saved:
        path = steps.path.with_name(f"saved-{worker}.npz")
        fault = f"{path} is lost, which worker {worker} saved on step {saved[-1]}"
    if fault:
        raise RunError(f"{fault}. Restore it, or start afresh with --overwrite.")
    told = (steps.fault, events.fault, steps.mended, events.mended)
    return "; ".join(filter(None, told))


def has_finished(found: Left) -> bool:
    """Say whether a worker came to its end: it stopped, and made a last record."""
    *_, stop, last = [{}, {}, *found.steps.records]
    return "stops" in stop and "step" in last and not found.steps.fault


class Recorder:
    """Write down how a worker goes on; what is written survives the process.

    Args:
        folder: of the run.
        worker: which.
        every: steps between records.
        like: parameters as they will be recorded.
        run: whose records they are.
        about: what the worker has saved.

    Attributes:
        events: the journal of its exchanges.
        mended: what was damaged in what the worker left, and is dropped or restored.

    Raises:
        RunError: if what the worker has left is damaged.
    """

    def __init__(
        self,
        folder: Path,
        worker: int,
        every: int,
        like: Any,
        run: str = "",
        about: worker_checkpoint.About | None = None,
    ):
        found = left(folder, worker, ravel_pytree(like)[0].size, run)
        self.mended = require_whole(found, worker, about)
        self._steps, self.events = (
            Journal(folder / name, run, records.records, durable=False)
            for name, records in zip(_names(worker), found[:2], strict=True)
        )
        self._models = open(folder / f"models-{worker}.f32", "ab", buffering=0)  # noqa: SIM115
        self._models.truncate(found.models.nbytes)
        self._every, self._losses, self._worker = every, [], worker
        # A clock that is set back would make what came later look as if it came before.
        seconds = [x["seconds"] for x in found.steps.records]
        self._begun = max(time.time(), *seconds[-1:], 0.0) - time.monotonic()

    def __enter__(self) -> "Recorder":
        return self

    def __exit__(self, *error: Any) -> None:
        for file in (self._steps, self.events, self._models):
            file.close()

    def start(self, steps: int) -> None:
        """Record that the worker begins, after so many steps of its own or a peer."""
        self._write({"starts": steps})

    def stop(self, steps: int) -> None:
        """Record that the worker takes no more steps, and goes on mixing."""
        self._write({"stops": steps})

    def step(self, steps: int, loss: float, params: Any) -> None:
        """Record a step.

        Raises:
            Diverged: if the loss is not finite.
        """
        if not math.isfinite(loss):
            raise Diverged(
                f"worker {self._worker}: the training loss is {loss} on step {steps}."
            )
        self._losses.append(loss)
        if steps % self._every == 0:
            self.now(steps, params)

    def now(self, steps: int, params: Any) -> None:
        """Record the parameters, as on every so many steps."""
        model = np.asarray(ravel_pytree(params)[0], np.float32).tobytes()
        self._models.write(model)
        loss = float(np.mean(self._losses)) if self._losses else None
        self._losses.clear()
        check = integrity.check_of(model)
        self._write({"step": steps, "train/loss": loss, "model": check})

    def save(self, save: Callable[[dict[str, Mark]], None], steps: int) -> None:
        """Save, with the marks of what has been recorded, which is then on disk.

        Args:
            save: is given the marks by file name.
            steps: taken.
        """
        journals = (self._steps, self.events)
        marks = {journal.path.name: journal.mark for journal in journals}
        for journal in journals:
            journal.sync()
        os.fsync(self._models.fileno())
        save(marks)
        self._write({"saves": steps})

    def _write(self, record: dict[str, Any]) -> None:
        key, *rest = record.items()
        seconds = ("seconds", self._begun + time.monotonic())
        events = ("events", self.events.mark)
        self._steps.append([dict([key, seconds, *rest, events])])


def work(
    config: ExperimentConfig,
    task: Task,
    data: Data,
    setting: Setting,
    worker: int,
    folder: Path,
    secret: bytes,
    recorded: Callable[[Any], Any] = lambda params: params,
    resume: bool = False,
    returns: bool = False,
) -> dict[str, Any]:
    r"""Be one worker of a run, to its last step, and until the others have finished.

    In rounds ``jax.distributed`` must have been initialized. Every ``checkpoint_every``
    steps the worker saves its parameters, its optimizer's state and its steps. To
    resume is to go on from these: in pairs each worker from its own, and in rounds,
    which begin with equal models, from :math:`\tfrac1n \sum_i x_i`. What an algorithm
    keeps from round to round, such as an outer momentum, and the references of pairs,
    start afresh.

    Args:
        config: of one run, resolved.
        task: what is trained.
        data: the task's data.
        setting: how workers talk.
        worker: which this is.
        folder: of the run.
        secret: by which pairs know one another.
        recorded: the part of the parameters that is written down.
        resume: go on from what this worker saved.
        returns: in pairs, if this worker has saved something, it died and comes back:
            it takes over from a peer that is ahead of the start, and goes on from what
            it saved where there is none.

    Returns:
        Steps taken, and what pairs refused, by reason.

    Raises:
        Diverged: if the loss stops being finite.
        RunError: if this worker saved nothing that can be read, or cannot save.
    """
    n, seed = config.workers, config.seed
    beat("compiling", folder.name)
    shards = Shards.deal(data, n, config.sharding, config.batch_size, seed)
    train = Trainer(config, task, shards, worker)
    params, steps, run = train.params, 0, folders.name_of(config)
    about = worker_checkpoint.about(folder, worker, run=run)
    if resume:
        like = params, train.state
        (params, train.state), steps = worker_checkpoint.load(
            folder, worker, like, run=run
        )
        if setting.exchange == "rounds":
            params = _mean_of_all(params, Workers.devices(n))
    replica = asynchrony.Replica(params, steps)
    pace = setting.pace_s[worker] if setting.pace_s else 0.0

    def save(marks: dict[str, Mark]) -> None:
        state = replica.params, train.state
        worker_checkpoint.save(
            folder, worker, state, replica.steps, run=run, marks=marks
        )

    every, like = config.eval_every, recorded(params)
    with Recorder(folder, worker, every, like, run, about) as recorder:
        if recorder.mended:
            print(f"{recorder.mended}; it is mended.", flush=True)
        mixing = _mixing(config, setting, worker, replica, recorder.events, secret)
        joined = contextlib.ExitStack()
        try:
            joined.enter_context(mixing)
        except ValueError as error:  # others are there, and differ
            raise ConfigError(str(error)) from None
        with joined:
            if returns and not replica.steps and about is not None:
                like = params, train.state
                (params, train.state), steps = worker_checkpoint.load(
                    folder, worker, like, run=run
                )
                replica.adopt(params, steps)
            train.steps = replica.steps
            recorder.start(replica.steps)
            until = time.monotonic() + setting.most_s
            while replica.steps < config.steps and time.monotonic() < until:
                beat("step", folder.name, replica.steps + 1)
                loss = replica.step(paced(train, pace))
                recorder.step(replica.steps, float(loss), recorded(replica.params))
                if replica.steps % config.checkpoint_every == 0:
                    beat("saving", folder.name, replica.steps)
                    recorder.save(save, replica.steps)
            recorder.stop(replica.steps)
            beat("waiting", folder.name, replica.steps)
        recorder.now(replica.steps, recorded(replica.params))
    refused = dict(getattr(mixing, "refused", {}))
    return {"steps": replica.steps, "refused": refused}


def _mean_of_all(params: Any, workers: Workers) -> Any:
    """Average the models of all processes, each of which gives its own."""
    vector, unravel = ravel_pytree(params)
    mean = workers.spmd(
        lambda x: primitives.c_fp_s(x, axis_name=workers.axis_name),
        in_specs=workers.spec,
    )
    return unravel(mean(workers.stack(vector[None])).addressable_data(0))


def paced(
    step: Callable[[Any], tuple[Any, Any]], seconds: float
) -> Callable[[Any], tuple[Any, Any]]:
    """Make a step last at least so long: how a slow worker is imitated."""

    def slowly(params):
        until = time.monotonic() + seconds
        result = jax.block_until_ready(step(params))
        time.sleep(max(0.0, until - time.monotonic()))
        return result

    return slowly


def _mixing(config, setting, worker, replica, log: Journal, secret: bytes):
    if setting.exchange == "rounds":
        workers = Workers.devices(config.workers)
        return asynchrony.Rounds(
            replica,
            catalog.relaxation(config, workers.axis_name),
            workers,
            log=log,
            interval_s=setting.interval_s,
            timeout_s=max(60.0, setting.timeout_s),
        )
    try:
        return asynchrony.PairGossip(
            replica,
            worker=worker,
            addresses=setting.addresses,
            secret=secret,
            compressor=_compressor(setting),
            log=log,
            interval_s=setting.interval_s,
            timeout_s=setting.timeout_s,
            facts={f"config.{k}": v for k, v in identity(config).items()},
            seed=config.seed,
        )
    except ValueError as error:
        raise ConfigError(str(error)) from None


def _compressor(setting: Setting):
    return catalog.compressor(setting.compressor) if setting.compressor else None


# --- afterwards ---


class _Record(NamedTuple):
    steps: int
    seconds: float
    loss: float | None
    model: np.ndarray  # [d]


def _all_left(config: ExperimentConfig, folder: Path, size: int) -> list[Left]:
    """Read what all workers have left, and require that it is whole."""
    run = folders.name_of(config)
    found = [left(folder, worker, size, run) for worker in range(config.workers)]
    for own in found:
        if fault := own.steps.fault or own.events.fault:
            raise RunError(f"{fault}. Start afresh with --overwrite.")
    return found


def _records(found: Left) -> list[_Record]:
    lines = [line for line in found.steps.records if "step" in line]
    return [
        _Record(line["step"], line["seconds"], line["train/loss"], model)
        for line, model in zip(lines, found.models, strict=True)
    ]


def averaged(
    config: ExperimentConfig, task: Task, data: Data, folder: Path
) -> Iterator[dict[str, float]]:
    """Judge the average of the workers' models as it was over time.

    At every time when the worker with the most records made one, and at the end, the
    newest model of each worker counts; at first that is the initial one.

    Args:
        config: of one run, resolved.
        task: what is trained.
        data: the task's data.
        folder: of the run.

    Yields:
        ``seconds`` since the first start, ``steps/mean`` and ``steps/max`` of the
        workers, ``train/loss`` of the newest stretch, ``eval/...`` of the averaged
        model and ``consensus/distance_sq``.
    """
    initial = jax.jit(task.init)(jax.random.key(config.seed))
    vector, unravel = ravel_pytree(initial)
    judge = jax.jit(task.evaluate)
    n = config.workers
    found = _all_left(config, folder, vector.size)
    begun = min(line["seconds"] for own in found for line in own.steps.records[:1])
    first = _Record(0, begun, None, np.asarray(vector, np.float32))
    workers = [[first, *_records(own)] for own in found]
    times = [record.seconds for record in max(workers, key=len)]
    end = max(own[-1].seconds for own in workers)
    for now in times + [end] * (times[-1] < end):
        newest = [[r for r in own if r.seconds <= now][-1] for own in workers]
        models = np.stack([record.model for record in newest]).astype(np.float64)
        mean = models.mean(0)
        losses = [record.loss for record in newest if record.loss is not None]
        judged = judge(unravel(jnp.asarray(mean, jnp.float32)), data.test)
        yield {
            "seconds": now - begun,
            "steps/mean": sum(record.steps for record in newest) / n,
            "steps/max": max(record.steps for record in newest),
            **({"train/loss": sum(losses) / len(losses)} if losses else {}),
            **{f"eval/{name}": float(value) for name, value in judged.items()},
            "consensus/distance_sq": float(np.sum((models - mean) ** 2) / n),
        }


def staleness(config: ExperimentConfig, folder: Path) -> list[dict[int, int]]:
    """Count each worker's exchanges by their staleness, in steps.

    Raises:
        RunError: if a record of them is damaged.
    """
    return [asynchrony.staleness(own) for own in _events(config, folder)]


def _events(config: ExperimentConfig, folder: Path) -> list[list[asynchrony.Event]]:
    run, events = folders.name_of(config), []
    for worker in range(config.workers):
        found = integrity.read(folder / _names(worker)[1], run)
        if found.fault:
            raise RunError(f"{found.fault}. Start afresh with --overwrite.")
        events.append([asynchrony.event(record) for record in found.records])
    return events


def why_not_replayed(config: ExperimentConfig, folder: Path) -> str:
    """Say why a run cannot be replayed; empty where it can."""
    run = folders.name_of(config)
    for worker in range(config.workers):
        lines = integrity.read(folder / _names(worker)[0], run).records
        if [line["starts"] for line in lines if "starts" in line] != [0]:
            return (
                f"worker {worker} did not start once and at step 0. A run that was "
                "interrupted, or in which a worker died, cannot be repeated."
            )
    return ""


def replay(
    config: ExperimentConfig, task: Task, data: Data, setting: Setting, folder: Path
) -> float:
    """Repeat a run in this process from its log: the deterministic form of it.

    Args:
        config: of one run, resolved.
        task: what is trained.
        data: the task's data.
        setting: as the run had it.
        folder: of the run.

    Returns:
        The largest difference of a parameter at the end; 0 where they agree bit for
        bit.

    Raises:
        ValueError: if the run was interrupted, or a worker died in it.
    """
    n = config.workers
    why = why_not_replayed(config, folder)
    if why:
        raise ValueError(f"replay: {why}")
    events = dict(enumerate(_events(config, folder)))
    shards = Shards.deal(data, n, config.sharding, config.batch_size, config.seed)
    trainers = [Trainer(config, task, shards, worker) for worker in range(n)]
    replicas = {w: asynchrony.Replica(trainers[w].params) for w in range(n)}
    params = trainers[0].params
    if setting.exchange == "rounds":
        mix = _replayed_rounds(config, params)
    else:
        arithmetic = asynchrony.PairArithmetic(
            params, _compressor(setting), config.seed
        )
        mix = arithmetic.replayed()
    size = ravel_pytree(params)[0].size
    found = _all_left(config, folder, size)
    ends = {worker: _records(own)[-1] for worker, own in enumerate(found)}
    steps = {worker: end.steps for worker, end in ends.items()}
    asynchrony.replay(events, replicas, lambda w, x: trainers[w](x)[0], mix, steps)
    return max(
        float(np.max(np.abs(ravel_pytree(replicas[w].params)[0] - ends[w].model)))
        for w in range(n)
    )


def _replayed_rounds(config: ExperimentConfig, params: Any):
    n = config.workers
    workers = Workers.simulate(n)
    tx = catalog.relaxation(config, workers.axis_name)
    exchange = asynchrony.make_exchange(tx, workers, params)

    def stack(models: Sequence[Any]) -> Any:
        return jax.tree.map(lambda *x: jnp.stack(x), *models)

    carry = exchange.init(stack([params] * n))

    def mix(number, everyone, snapshots):
        nonlocal carry
        del number, everyone
        carry, corrections, _ = exchange.step(carry, stack(snapshots), jnp.zeros(n))
        return [jax.tree.map(lambda x, w=w: x[w], corrections) for w in range(n)]

    return mix
