"""Runs of real asynchrony: what a worker's process does, and what they left together.

A run's folder holds, for each worker::

    steps-0.jsonl   starts, stops, and every so many steps: step, seconds since 1970,
                    mean loss
    models-0.f32    the parameters at those steps, one flat float32 vector after another
    events-0.jsonl  its exchanges; see bagua_jax.asynchrony
    saved-0.npz     its parameters, optimizer state and steps, from which a run that was
                    interrupted goes on
    log-0.txt       what the process said
"""

import json
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.flatten_util import ravel_pytree

from bagua_jax import Workers, asynchrony, primitives
from bagua_jax.algorithms import REGISTRY
from bagua_jax.asynchrony.transport import require_zmq
from bagua_jax.experiments import catalog, folders, saves
from bagua_jax.experiments.config import ConfigError, ExperimentConfig
from bagua_jax.experiments.data import Data, Shards
from bagua_jax.experiments.folders import RunError
from bagua_jax.experiments.tasks import Task

__all__ = [
    "Diverged",
    "Recorder",
    "Setting",
    "Trainer",
    "averaged",
    "paced",
    "replay",
    "require_suitable",
    "staleness",
    "why_not_replayed",
    "work",
]


class Diverged(RunError):
    """A worker's loss is not finite: it leaves. ``on_nan`` says what the others do."""

    status = 3  # of the worker's process: by it the others' is decided


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
    if setting.exchange == "rounds" and REGISTRY[algorithm.name].placement != "weight":
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


class Recorder:
    """Write down how a worker goes on; what is written survives the process.

    Args:
        folder: of the run.
        worker: which.
        every: steps between records.
        like: parameters as they will be recorded.
    """

    def __init__(self, folder: Path, worker: int, every: int, like: Any):
        _mend(folder, worker, ravel_pytree(like)[0].size)
        self._steps = open(folder / f"steps-{worker}.jsonl", "a", buffering=1)  # noqa: SIM115
        self._models = open(folder / f"models-{worker}.f32", "ab")  # noqa: SIM115
        self._every, self._losses, self._worker = every, [], worker

    def __enter__(self) -> "Recorder":
        return self

    def __exit__(self, *error: Any) -> None:
        self._steps.close()
        self._models.close()

    def start(self, steps: int) -> None:
        """Record that the worker begins, after so many steps of its own or a peer."""
        self._write({"starts": steps, "seconds": time.time()})

    def stop(self, steps: int) -> None:
        """Record that the worker takes no more steps, and goes on mixing."""
        self._write({"stops": steps, "seconds": time.time()})

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
        vector = np.asarray(ravel_pytree(params)[0], np.float32)
        self._models.write(vector.tobytes())
        self._models.flush()
        loss = float(np.mean(self._losses)) if self._losses else None
        self._losses.clear()
        self._write({"step": steps, "seconds": time.time(), "train/loss": loss})

    def _write(self, record: dict[str, Any]) -> None:
        self._steps.write(json.dumps(record) + "\n")


def _mend(folder: Path, worker: int, size: int) -> None:
    """Cut off the record that a worker was writing when it was killed.

    What stays are as many models, in order, as lines that tell of one.
    """
    models = folder / f"models-{worker}.f32"
    models.touch()
    whole = models.stat().st_size // (4 * size)
    kept, told = [], 0
    for line in folders.read_lines(folder / f"steps-{worker}.jsonl"):
        told += "step" in line
        if told <= whole or "step" not in line:
            kept.append(line)
    folders.write_lines(folder / f"steps-{worker}.jsonl", kept)
    os.truncate(models, 4 * size * min(told, whole))


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

    Returns:
        Steps taken, and what pairs refused, by reason.

    Raises:
        Diverged: if the loss stops being finite.
        RunError: if this worker saved nothing that can be read, or cannot save.
    """
    n, seed = config.workers, config.seed
    shards = Shards.deal(data, n, config.sharding, config.batch_size, seed)
    train = Trainer(config, task, shards, worker)
    params, steps = train.params, 0
    if resume:
        (params, train.state), steps = saves.load(folder, worker, (params, train.state))
        if setting.exchange == "rounds":
            params = _mean_of_all(params, Workers.devices(n))
    replica = asynchrony.Replica(params, steps)
    pace = setting.pace_s[worker] if setting.pace_s else 0.0
    folders.mend_lines(folder / f"events-{worker}.jsonl")
    with (
        open(folder / f"events-{worker}.jsonl", "a") as log,
        Recorder(folder, worker, config.eval_every, recorded(params)) as recorder,
    ):
        mixing = _mixing(config, setting, worker, replica, log, secret)
        with mixing:
            train.steps = replica.steps
            recorder.start(replica.steps)
            until = time.monotonic() + setting.most_s
            while replica.steps < config.steps and time.monotonic() < until:
                loss = replica.step(paced(train, pace))
                recorder.step(replica.steps, float(loss), recorded(replica.params))
                if replica.steps % config.checkpoint_every == 0:
                    saves.save(
                        folder, worker, (replica.params, train.state), replica.steps
                    )
            recorder.stop(replica.steps)
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


def _mixing(config, setting, worker, replica, log: IO[str], secret: bytes):
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
    return asynchrony.PairGossip(
        replica,
        worker=worker,
        addresses=setting.addresses,
        secret=secret,
        compressor=_compressor(setting),
        log=log,
        interval_s=setting.interval_s,
        timeout_s=setting.timeout_s,
        seed=config.seed,
    )


def _compressor(setting: Setting):
    return catalog.compressor(setting.compressor) if setting.compressor else None


# --- afterwards ---


class _Record(NamedTuple):
    steps: int
    seconds: float
    loss: float | None
    model: np.ndarray  # [d]


def _records(folder: Path, worker: int, size: int) -> list[_Record]:
    lines = folders.read_lines(folder / f"steps-{worker}.jsonl")
    lines = [line for line in lines if "step" in line]
    path = folder / f"models-{worker}.f32"
    models = np.fromfile(path, np.float32) if path.exists() else np.empty(0)
    models = models[: models.size // size * size].reshape(-1, size)
    return [
        _Record(line["step"], line["seconds"], line["train/loss"], model)
        for line, model in zip(lines, models, strict=False)
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
    starts = [folders.read_lines(folder / f"steps-{w}.jsonl")[:1] for w in range(n)]
    begun = min(line["seconds"] for own in starts for line in own if "seconds" in line)
    first = _Record(0, begun, None, np.asarray(vector, np.float32))
    workers = [[first, *_records(folder, w, vector.size)] for w in range(n)]
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


def staleness(folder: Path, workers: int) -> list[dict[int, int]]:
    """Count each worker's exchanges by their staleness, in steps."""
    return [
        asynchrony.staleness(asynchrony.read(folder / f"events-{worker}.jsonl"))
        for worker in range(workers)
    ]


def why_not_replayed(folder: Path, workers: int) -> str:
    """Say why a run cannot be replayed; empty where it can."""
    for worker in range(workers):
        lines = folders.read_lines(folder / f"steps-{worker}.jsonl")
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
    why = why_not_replayed(folder, n)
    if why:
        raise ValueError(f"replay: {why}")
    events = {w: asynchrony.read(folder / f"events-{w}.jsonl") for w in range(n)}
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
    ends = {worker: _records(folder, worker, size)[-1] for worker in range(n)}
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
