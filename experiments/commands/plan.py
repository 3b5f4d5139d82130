"""``bagua-jax plan``: an experiment's step on a cluster, ahead of time."""

import contextlib
import dataclasses
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from bagua_jax.experiments.commands import base
from bagua_jax.experiments.runs.folders import require_writable, write_json
from bagua_jax.experiments.spec.config import (
    ConfigError,
    quote,
    require_ranges,
    unknown,
)

if TYPE_CHECKING:
    from rich.console import Console

    from bagua_jax.network import Network
    from bagua_jax.planning import Cluster

__all__ = ["Plan", "main"]


@dataclass(frozen=True)
class Plan(base.OnConfig):
    """Compile a config's step for a cluster ahead of time, and predict its step time.

    Nothing runs: every time is a prediction. Each algorithm is compiled for each
    network; what was compiled before is read. The table, a report on each plan, and a
    map of which algorithm is fastest where are kept in OUTPUT/EXPERIMENT. Needs the
    extra bagua-jax[plan], and no GPU or TPU. docs/planning.md says how far to trust it.
    """

    cluster: str = "16x8:h100"
    """NODESxGPUS:CHIP, or a TPU slice CHIP:XxY; its devices are the workers."""
    network: str = ""
    """Between nodes, presets with commas: 10gbit,25gbit,100gbit where empty."""
    ports: int = 1
    """Network cards of a node, each of the named bandwidth."""
    hierarchy: bool = False
    """Relax between nodes only, in full precision inside them; else flat."""

    def __post_init__(self):
        require_ranges(self, {"ports": (1, 1024)})


def main(command: Plan) -> int:
    """Compile, print the table, write JSON, reports and the figure."""
    os.environ.setdefault("JAX_PLATFORMS", "cpu")  # nothing attached is looked for

    from bagua_jax import planning
    from bagua_jax.experiments.tables import plan

    config = command.experiment
    try:
        cluster = planning.Cluster.parse(command.cluster)
    except ValueError as error:
        raise ConfigError(f"cluster: {error}") from None
    networks = _networks(command, cluster)
    if command.hierarchy and min(cluster.num_nodes, cluster.per_node) < 2:
        raise ConfigError(
            "hierarchy: needs nodes of several devices, and several nodes; got "
            f"{cluster}."
        )
    folder = Path(config.output) / config.experiment
    require_writable(folder)

    console = base.console()
    form = "hierarchical exchange" if command.hierarchy else "flat exchange"
    title = f"{config.experiment} on {cluster.text}, {form}"
    console.print(f"{title} ({cluster})", highlight=False)
    total = len(config.algorithms) * len(networks)
    with _progress(console, total) as say:
        rows, failures = plan.make(
            config, cluster, networks, hierarchy=command.hierarchy, say=say
        )
    if rows:
        console.print(f"\n[bold]PREDICTION, nothing measured: {title}", highlight=False)
        console.print(plan.table(rows, cluster))
        console.print(f"[dim]{_caption(cluster)}", highlight=False)
        name = f"plan-{cluster.text}".replace(":", "-")
        name += "-hierarchy" * command.hierarchy
        path = folder / f"{name}.json"
        write_json(path, {"title": title, "form": form, "plans": plan.facts(rows)})
        plan.draw(rows, cluster, title, path.with_suffix(".png"))
        reports = [f"# {row.label}, {row.network}\n\n{row.plan}\n" for row in rows]
        path.with_suffix(".txt").write_text("\n".join(reports), encoding="utf-8")
        for written in (path, path.with_suffix(".txt"), path.with_suffix(".png")):
            console.print(f"written: {written}", highlight=False, soft_wrap=True)
    for failure in failures:
        base.complain(failure, base.FAILED)
    return base.FAILED if failures else 0


def _networks(command: Plan, cluster: "Cluster") -> "list[Network]":
    from bagua_jax import network

    names = [name.strip() for name in command.network.split(",") if name.strip()]
    if names and cluster.num_nodes == 1:
        raise ConfigError(
            f"network: {cluster.text} is one node, and all of its links are its own; "
            f"got {quote(command.network)}. Leave the flag away."
        )
    if cluster.platform == "tpu":
        return [cluster.ici()]
    if cluster.num_nodes == 1:
        inside = network.preset("100gbit", 1, cluster.per_node)
        return [dataclasses.replace(inside, name="nvlink")]
    for name in names:
        if name not in network.PRESETS:
            raise unknown("network", name, network.PRESETS, "network")
    shape = cluster.num_nodes, cluster.per_node
    chosen = dict.fromkeys(names or ("10gbit", "25gbit", "100gbit"))
    return [network.preset(name, *shape, ports=command.ports) for name in chosen]


def _caption(cluster: "Cluster") -> str:
    """Explain the columns, and what they rest on."""
    sent = (
        "inside, between: bytes that a worker sends on a step inside its node and "
        "between nodes, counted from the compiled program. memory: of a device. "
    )
    if not cluster.has_timeline:
        return sent + (
            "network: ms of communication, alpha-beta, one collective after the other. "
            "XLA predicts no times for this chip: neither compute nor overlap. async: "
            "how many collectives XLA lets run beside other work. *: fastest."
        )
    return sent + (
        "XLA: its schedule and costs, ms; of a step, exposed waits for collectives. "
        "network: alpha-beta, nothing hidden, and XLA's compute. *: fastest by that "
        "model. Constants are in the JSON. Compare algorithms on one cluster, never "
        "clusters."
    )


@contextlib.contextmanager
def _progress(console: "Console", total: int) -> Iterator[Callable[[str, bool], None]]:
    """Show which program is compiled: a live bar on a terminal, else lines."""
    if not console.is_terminal or console.is_dumb_terminal:
        done = 0

        def say(message: str, finished: bool) -> None:
            nonlocal done
            done += finished
            if finished:
                line = f"{done}/{total}  {message}"
                console.print(line, highlight=False, soft_wrap=True)

        yield say
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    columns = (
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn("{task.fields[now]}"),
    )
    with Progress(*columns, console=console) as bars:
        task = bars.add_task("", total=total, now="")

        def show(message: str, finished: bool) -> None:
            bars.update(task, advance=int(finished), now=message)

        yield show
