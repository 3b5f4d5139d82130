"""``bagua-jax wire``: what an experiment's algorithms send, without training."""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from bagua_jax.experiments.commands import base
from bagua_jax.experiments.runs.folders import write_json
from bagua_jax.experiments.spec.config import ConfigError, require_ranges

if TYPE_CHECKING:
    from bagua_jax.experiments.tables.wire import Place

__all__ = ["Wire", "main"]


@dataclass(frozen=True)
class Wire(base.OnConfig):
    """Count what a config's algorithms send on a step, without training.

    The step of each algorithm is lowered and compiled, not run. The table shows bytes
    and messages of one worker that the algorithm asks for (intended) and that the
    compiled program sends, and names what the compiler changed. docs/wire.md explains.
    """

    target: str = "cpu"
    """What to compile for: cpu, or ahead of time a cluster, NODESxGPUS:CHIP or a TPU
    slice such as v5e:4x4 (needs the extra bagua-jax[plan]). A cluster's devices are the
    workers, whatever the config says."""
    nodes: int = 0
    """Nodes that the workers stand on, in order and as many on each: bytes inside and
    between nodes are told apart. A cluster has its own."""
    hierarchy: bool = False
    """Relax between nodes only, in full precision inside them. Flat where not given."""
    json: str = ""
    """A file for the numbers."""
    verbose: bool = False
    """Show the collectives one by one."""

    def __post_init__(self):
        require_ranges(self, {"nodes": (0, 4_096)})


def main(command: Wire) -> int:
    """Compile, print the table, write JSON."""
    config = command.experiment
    if command.target == "cpu":
        base.prepare_host_devices(config)
    else:
        os.environ.setdefault("JAX_PLATFORMS", "cpu")  # nothing attached is looked for

    import jax

    from bagua_jax.experiments.tables import wire

    place = _place(command)
    on = f"{place.cluster}" if place.cluster else "host devices"
    form = "hierarchical exchange" if place.hierarchy else "flat exchange"
    title = f"{config.experiment}: {place.workers} workers, {form}, compiled for {on}"
    console = base.console()
    console.print(title, highlight=False, soft_wrap=True)
    with console.status("compiling") as status:
        rows, failures = wire.make(
            config, place, lambda label: status.update(f"{label}: compiling")
        )
    if rows:
        console.print(wire.table(rows, place))
        console.print(
            "[dim]Of one worker and step, on average over a schedule's period; after "
            "any warm-up, where no other line says otherwise.",
            highlight=False,
        )
    for row in rows if command.verbose else ():
        print(f"\n{row.label}, {row.phase}:\n{row.comparison.table(place.nodes)}")
        print(f"\ncompiled, one by one:\n{row.comparison.compiled.table(place.nodes)}")
    if command.json and rows:
        nodes = None if place.nodes is None else place.nodes.tolist()
        write_json(
            Path(command.json),
            {
                "experiment": config.experiment,
                "target": command.target,
                "workers": place.workers,
                "nodes": nodes,
                "hierarchy": place.hierarchy,
                "jax": jax.__version__,
                "steps": wire.facts(rows, place),
            },
        )
        console.print(f"written: {command.json}", highlight=False, soft_wrap=True)
    for failure in failures:
        base.complain(failure, base.FAILED)
    return base.FAILED if failures else 0


def _place(command: Wire) -> "Place":
    import numpy as np

    from bagua_jax import planning
    from bagua_jax.experiments.tables.wire import Place

    cluster, n = None, command.experiment.workers
    num_nodes = command.nodes
    if command.target != "cpu":
        try:
            cluster = planning.Cluster.parse(command.target)
        except ValueError as error:
            raise ConfigError(f"target: is cpu or a cluster. {error}") from None
        if command.nodes:
            raise ConfigError(
                f"nodes: {cluster.text} has nodes of its own, got {command.nodes}."
            )
        n = cluster.num_devices
        num_nodes = cluster.num_nodes if cluster.num_nodes > 1 else 0
    if num_nodes and n % num_nodes:
        raise ConfigError(
            f"nodes: must divide the {n} workers among them, got {command.nodes}."
        )
    if command.hierarchy and not 1 < num_nodes < n:
        raise ConfigError(
            "hierarchy: needs --nodes, or a cluster, of several nodes with several "
            f"workers on each; got {num_nodes} nodes for {n} workers."
        )
    nodes = np.repeat(np.arange(num_nodes), n // num_nodes) if num_nodes else None
    return Place(cluster, n, nodes, command.hierarchy)
