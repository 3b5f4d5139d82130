"""What an experiment's algorithms send: intended beside compiled, without training."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from rich.text import Text

from bagua_jax import Workers, planning, wire
from bagua_jax.experiments import tasks
from bagua_jax.experiments.runs import train
from bagua_jax.experiments.runs.folders import RunError
from bagua_jax.experiments.spec import catalog
from bagua_jax.experiments.spec.config import ConfigError, ExperimentConfig
from bagua_jax.experiments.spec.messages import blame
from bagua_jax.experiments.tables.table import Table
from bagua_jax.planning import Cluster

__all__ = ["Place", "Row", "facts", "make", "table"]


class Place(NamedTuple):
    """Where workers stand, and for what their step is compiled.

    Attributes:
        cluster: to compile for ahead of time; ``None`` for host devices.
        workers: how many.
        nodes: the node of each, [n]; ``None`` where links are not told apart.
        hierarchy: relax between nodes only, in full precision inside them.
    """

    cluster: Cluster | None
    workers: int
    nodes: np.ndarray | None
    hierarchy: bool

    @property
    def shape(self) -> int | tuple[int, int]:
        """Of the mesh: workers, or (nodes, workers of each) in a hierarchy."""
        if not self.hierarchy or self.nodes is None:
            return self.workers
        num_nodes = 1 + int(self.nodes[-1])
        return num_nodes, self.workers // num_nodes

    @property
    def peers(self) -> int:
        """Who takes part in the relaxation: workers, or the nodes of a hierarchy."""
        return self.shape if isinstance(self.shape, int) else self.shape[0]


class Row(NamedTuple):
    """What a worker sends on a step of one algorithm."""

    label: str
    phase: str  # "in the long run" or "warm-up"
    steps: int | None  # how long the phase is; None: for good
    comparison: wire.WireComparison


def make(
    config: ExperimentConfig, place: Place, say: Callable[[str], None]
) -> tuple[list[Row], list[str]]:
    """Lower and compile the step of each algorithm, and compare what they send.

    Args:
        config: an experiment; its ``workers`` are not used, the place's are.
        place: where its workers stand.
        say: told what happens.

    Returns:
        Rows, algorithm by algorithm: the long run, and the warm-up where it sends
        otherwise. And a line for each algorithm that failed.

    Raises:
        ConfigError: if the config does not fit that many workers, or there are too few
            host devices.
        RunError: if the task fails, or what compiles for the cluster is not installed.
    """
    workers = _workers(place)
    runs = catalog.resolve(dataclasses.replace(config, workers=place.peers))
    task = tasks.load(config.task)
    try:
        data = task.data(config.seed, place.workers)
        params = jax.eval_shape(task.init, jax.random.key(config.seed))
    except Exception as error:
        raise RunError(f"the task failed: {blame(error)}.") from error
    shape = (place.workers, config.batch_size)
    batch = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((*shape, *x.shape[1:]), x.dtype), data.train
    )

    rows, failures = [], []
    for run in runs:
        label = run.algorithms[0].label
        say(label)
        try:
            lowered = _lower(run, task, params, batch, workers, place)
            meant, sent = lowered.as_text(debug_info=True), _compile(lowered, place)
            steady = wire.compare(meant, sent)
            first = wire.compare(train.in_warmup(meant), train.in_warmup(sent))
        except ConfigError:
            raise
        except planning.MissingCompiler as error:
            raise RunError(str(error)) from error
        except Exception as error:
            failures.append(f"{label}: {blame(error)}")
            continue
        rows.append(Row(label, "in the long run", None, steady))
        steps = train.warmup_steps(run.algorithms[0].arguments)
        if steps and first != steady:
            rows.append(Row(label, "warm-up", steps, first))
    return rows, failures


def _workers(place: Place) -> Workers:
    axis_name = ("node", "local") if place.hierarchy else "workers"
    if place.cluster:
        return Workers.abstract(place.shape, axis_name)
    host = jax.devices("cpu")
    if len(host) < place.workers:
        raise ConfigError(
            f"workers: {place.workers} workers need {place.workers} host devices, and "
            f"there are {len(host)}. Use fewer workers, or --target with a cluster."
        )
    return Workers.devices(place.shape, axis_name, devices=host[: place.workers])


def _lower(run, task, params, batch, workers: Workers, place: Place):
    init, step = train.functions(run, task, workers.axis_name)
    in_specs = (workers.specs(init, params), workers.spec)
    state = jax.eval_shape(workers.spmd(init), params)
    if place.cluster:
        return planning.lower(
            step,
            (state, batch),
            place.cluster,
            in_specs=in_specs,
            axis_name=workers.axis_name,
            donate_argnums=0,
        )
    return workers.spmd(step, in_specs, donate_argnums=0).lower(state, batch)


def _compile(lowered: jax.stages.Lowered, place: Place) -> str:
    """Return optimized HLO: the only place that knows what compiles for what."""
    if place.cluster:
        return planning.compile_lowered(lowered, place.cluster).as_text()
    quick: Any = {"xla_backend_optimization_level": 0}  # of machine code only
    return lowered.compile(quick).as_text() or ""


def table(rows: Sequence[Row], place: Place) -> Table:
    """Tabulate rows of :func:`make`, a line for each algorithm and phase."""
    columns = ["intended messages", "intended bytes"]
    columns += ["compiled messages", "compiled bytes"]
    if place.nodes is not None:
        columns += ["inside a node", "between nodes"]
    shown = []
    for row in rows:
        meant, sent = row.comparison.intended, row.comparison.compiled
        numbers = [meant.messages_per_worker, meant.bytes_per_worker]
        numbers += [sent.messages_per_worker, sent.bytes_per_worker]
        if place.nodes is not None:
            numbers += [sent.bytes_inside(place.nodes), sent.bytes_between(place.nodes)]
        label = f"  its first {row.steps} steps" if row.steps else row.label
        changes = "; ".join(
            name + f" ({more:+,.0f} bytes)" * (abs(more) >= 0.5)
            for name, more in row.comparison.differences.items()
        )
        cells = (f"{x:,.0f}" if x > 999 else f"{x:,.4g}" for x in numbers)
        shown.append([Text(label, "bold"), *cells, changes or "nothing"])
    changed = "changed by the compiler"
    return Table(["algorithm", *columns, changed], shown, words={changed})


def facts(rows: Sequence[Row], place: Place) -> list[dict[str, Any]]:
    """Return every number of every row, for JSON: each collective one by one, too."""

    def side(counted: wire.WireCount) -> dict[str, Any]:
        found: dict[str, Any] = {
            "bytes_per_worker": counted.bytes_per_worker,
            "messages_per_worker": counted.messages_per_worker,
        }
        if place.nodes is not None:
            found["bytes_inside_node"] = counted.bytes_inside(place.nodes)
            found["bytes_between_nodes"] = counted.bytes_between(place.nodes)
        kept = ("kind", "dtype", "operands", "operand_bytes", "group_size")
        kept += ("bytes_sent", "weight", "asynchronous", "path")
        found["collectives"] = [
            {name: getattr(c, name) for name in kept} for c in counted.collectives
        ]
        return found

    return [
        {
            "algorithm": row.label,
            "phase": row.phase,
            "steps": row.steps,
            "intended": side(row.comparison.intended),
            "compiled": side(row.comparison.compiled),
            "differences_in_bytes": row.comparison.differences,
        }
        for row in rows
    ]
