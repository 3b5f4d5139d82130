"""What an experiment's algorithms would do on clusters, compiled ahead of time."""

import dataclasses
import time
from collections.abc import Callable, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from bagua_jax import Workers, planning
from bagua_jax.experiments import tasks
from bagua_jax.experiments.runs import train
from bagua_jax.experiments.runs.folders import RunError
from bagua_jax.experiments.spec import catalog
from bagua_jax.experiments.spec.config import ConfigError, ExperimentConfig
from bagua_jax.experiments.spec.messages import blame
from bagua_jax.experiments.tables.report import human_bytes
from bagua_jax.experiments.tables.table import Table
from bagua_jax.network import Network
from bagua_jax.planning import Cluster, Plan

__all__ = ["Row", "draw", "facts", "make", "table"]


class Row(NamedTuple):
    """An algorithm's plan on a network."""

    label: str
    network: str
    plan: Plan


Say = Callable[[str, bool], None]
"""``(message, whether a plan is finished)``."""


def make(
    config: ExperimentConfig,
    cluster: Cluster,
    networks: Sequence[Network],
    *,
    hierarchy: bool,
    say: Say,
) -> tuple[list[Row], list[str]]:
    """Compile a config's own step for a cluster, with each algorithm, and plan it.

    Each algorithm is lowered once, and compiled for each network, whose links XLA's
    scheduler follows; where it predicts no times, once.

    Args:
        config: an experiment; its ``workers`` are not used, the cluster's devices are.
        cluster: what to compile for.
        networks: for the cluster's nodes.
        hierarchy: relax between nodes only, in full precision inside them.
        say: told what happens.

    Returns:
        Rows, algorithm by algorithm, and a line for each algorithm that failed.

    Raises:
        ConfigError: if a config does not fit that many workers.
        RunError: if the task fails, or what compiles is not installed.
    """
    n = cluster.num_devices
    shape, axis_name = n, "workers"
    if hierarchy:
        shape, axis_name = (cluster.num_nodes, cluster.per_node), ("node", "local")
    peers = cluster.num_nodes if hierarchy else n  # who takes part in a topology
    workers = Workers.abstract(shape, axis_name)
    runs = catalog.resolve(dataclasses.replace(config, workers=peers))
    task = tasks.load(config.task)
    try:
        data = task.data(config.seed, n)
        params = jax.eval_shape(task.init, jax.random.key(config.seed))
    except Exception as error:
        raise RunError(f"the task failed: {blame(error)}.") from error
    batch = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((n, config.batch_size, *x.shape[1:]), x.dtype),
        data.train,
    )

    rows, failures = [], []
    for run in runs:
        label = run.algorithms[0].label
        say(f"{label}: lowering", False)
        try:
            init, step = train.functions(run, task, axis_name)
            specs = workers.specs(init, params)
            state = jax.eval_shape(workers.spmd(init), params)
            lowered = planning.lower(
                step,
                (state, batch),
                cluster,
                in_specs=(specs, workers.spec),
                axis_name=axis_name,
                donate_argnums=0,  # a training loop gives its old state away
            )
            for network in networks:
                say(f"{label}, {network.name}: compiling", False)
                begin = time.perf_counter()
                found = planning.plan_lowered(lowered, cluster, network=network)
                took = f"compiled in {time.perf_counter() - begin:.1f} s"
                if found.compiled.from_cache:
                    took = "compiled before"
                say(f"{label}, {network.name}: {took}", True)
                rows.append(Row(label, network.name, found))
        except ConfigError:
            raise
        except planning.MissingCompiler as error:
            raise RunError(str(error)) from error
        except Exception as error:
            failures.append(f"{label}: {blame(error)}")
    return rows, failures


def table(rows: Sequence[Row], cluster: Cluster) -> Table:
    """Tabulate plans, a line for each algorithm and network.

    Args:
        rows: of :func:`make`.
        cluster: of the plans.

    Returns:
        A table; ``*`` marks what a model finds fastest on a network.
    """
    timed = cluster.has_timeline
    columns = ["inside", "between", "memory"]
    columns += ["XLA: step ms", "XLA: exposed", "network: step ms"] * timed
    columns += ["network: ms", "async"] * (not timed)
    shown = []
    best = {(r.network, m): r for m in _MODELS for r in _fastest(rows, m)}
    last = ""
    for row in rows:
        plan, facts = row.plan, row.plan.facts()
        own = [human_bytes(plan.bytes_inside), human_bytes(plan.bytes_between)]
        own += [human_bytes(facts["memory_bytes"])]
        cells = own if row.label != last else [""] * 3
        for model in ("xla", "network") if timed else ("communication",):
            star = "*" if best.get((row.network, model)) is row else " "
            cells.append(f"{_ms(_MODELS[model](plan))}{star}")
            if model == "xla":
                cells.append(_ms(facts["xla_exposed_seconds"]))
        if not timed:
            sent = [c.asynchronous for c in plan.wire.collectives if c.weight]
            cells.append(f"{sum(sent)} of {len(sent)}")
        shown.append([row.label if row.label != last else "", row.network, *cells])
        last = row.label
    return Table(["algorithm", "network", *columns], shown, keys=2)


def facts(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Return every number of every row, for JSON."""
    return [
        {"algorithm": row.label, "network_name": row.network} | row.plan.facts()
        for row in rows
    ]


def draw(rows: Sequence[Row], cluster: Cluster, title: str, path: Path) -> None:
    """Draw who is fastest where: a map of algorithms and networks for each model.

    Args:
        rows: of :func:`make`.
        cluster: of the plans.
        title: over the figure; "prediction" is written before it.
        path: of a PNG.
    """
    import matplotlib

    matplotlib.use("Agg", force=False)
    import matplotlib.pyplot as plt

    labels = list(dict.fromkeys(row.label for row in rows))
    networks = list(dict.fromkeys(row.network for row in rows))
    models = {"xla": "ms a step, XLA's model", "network": "ms a step, network model"}
    if not cluster.has_timeline:
        models = {"communication": "ms of communication, network model"}
    style = Path(str(resources.files("bagua_jax.experiments"))) / "bagua.mplstyle"
    with plt.style.context(str(style)):
        width = 3.6 + len(models) * max(2.4, 0.95 * len(networks))
        size = (width, 1.6 + 0.42 * len(labels))
        figure, panels = plt.subplots(
            1, len(models), figsize=size, sharey=True, squeeze=False
        )
        for panel, (model, name) in zip(panels[0], models.items(), strict=True):
            at = {(r.label, r.network): _MODELS[model](r.plan) for r in rows}
            seconds = np.array(
                [[at.get((a, b)) or np.nan for b in networks] for a in labels]
            )
            slower = seconds / np.nanmin(seconds, axis=0)
            shade = np.log2(slower).clip(0, 5)
            image = panel.imshow(shade, cmap="Blues", vmin=0, vmax=5, aspect="auto")
            for (i, j), value in np.ndenumerate(seconds):
                if not np.isfinite(value):
                    continue
                first = slower[i, j] == 1
                text = f"{_ms(value)}*" if first else _ms(value)
                ink = "white" if shade[i, j] > 3 else "black"
                weight = "bold" if first else "normal"
                panel.text(
                    j, i, text, ha="center", va="center", color=ink, weight=weight
                )
            panel.set_title(name)
            panel.set_xticks(range(len(networks)), networks)
            panel.set_yticks(range(len(labels)), labels)
            panel.grid(False)
            panel.tick_params(length=0)
        bar = figure.colorbar(image, ax=list(panels[0]), shrink=0.9, aspect=14)
        bar.set_ticks(range(6), labels=["1", "2", "4", "8", "16", "≥ 32"])
        bar.set_label("times the column's fastest (*)")
        figure.suptitle(f"Prediction, nothing measured: {title}")
        figure.savefig(path)
        plt.close(figure)


_MODELS: dict[str, Callable[[Plan], float | None]] = {
    "xla": lambda plan: plan.xla_seconds,
    "network": lambda plan: plan.network_seconds and plan.network_seconds[1],
    "communication": lambda plan: plan.communication and plan.communication.seconds,
}
"""What a plan predicts, in seconds; ``None`` where it cannot."""


def _fastest(rows: Sequence[Row], model: str) -> list[Row]:
    """Pick the fastest algorithm on each network."""
    found: dict[str, Row] = {}
    for row in rows:
        seconds = _MODELS[model](row.plan)
        best = found.get(row.network)
        if seconds is not None and (
            best is None or seconds < (_MODELS[model](best.plan) or 0)
        ):
            found[row.network] = row
    return list(found.values())


def _ms(seconds: float | None) -> str:
    """Write seconds as milliseconds with three digits.

    >>> _ms(0.0123456), _ms(1.5e-6), _ms(2.0), _ms(None)
    ('12.3', '0.0015', '2,000', '-')
    """
    if seconds is None:
        return "-"
    return f"{1e3 * seconds:.3g}" if seconds < 1 else f"{1e3 * seconds:,.0f}"
