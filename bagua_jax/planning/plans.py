"""Plans: everything that a program for a cluster says of its step, in one place."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import PartitionSpec as P

from bagua_jax import wire
from bagua_jax.network import (
    CommunicationTime,
    Network,
    communication_time,
    step_time,
)
from bagua_jax.network.base import require
from bagua_jax.planning.clusters import Cluster
from bagua_jax.planning.compiling import Compiled, Constants, compile_lowered, lower
from bagua_jax.planning.timeline import Timeline, timeline
from bagua_jax.primitives import AxisName

__all__ = ["Plan", "plan", "plan_lowered"]


class Plan(NamedTuple):
    """What a compiled step sends, holds and, by two models, takes. No measurement.

    Attributes:
        cluster: what it is compiled for.
        compiled: the program.
        wire: what it sends, counted.
        communication: its time by the network's alpha-beta model, collective by
            collective, none beside another; ``None`` without a network.
        timeline: XLA's schedule and cost model; ``None`` where it has none.
    """

    cluster: Cluster
    compiled: Compiled
    wire: wire.WireCount
    communication: CommunicationTime | None
    timeline: Timeline | None

    @property
    def bytes_between(self) -> float:
        """Bytes per worker and step that leave the node."""
        return self.wire.bytes_between(self.cluster.nodes)

    @property
    def bytes_inside(self) -> float:
        """Bytes per worker and step that stay in the node."""
        return self.wire.bytes_per_worker - self.bytes_between

    @property
    def compute_seconds(self) -> float | None:
        """XLA's timeline without what waits for collectives."""
        if self.timeline is None:
            return None
        return (self.timeline.end - self.timeline.exposed) * 1e-6

    @property
    def xla_seconds(self) -> float | None:
        """The step by XLA's model: compute and links, as scheduled."""
        return None if self.timeline is None else self.timeline.end * 1e-6

    @property
    def network_seconds(self) -> tuple[float, float] | None:
        """The step by the network's model of links: all hidden, and nothing hidden.

        Compute is that of XLA's timeline, for want of another.
        """
        if self.compute_seconds is None or self.communication is None:
            return None
        parts = self.compute_seconds, self.communication.transfer
        latency = self.communication.latency
        return (
            step_time(*parts, latency=latency, overlap="all"),
            step_time(*parts, latency=latency, overlap="none"),
        )

    def facts(self) -> dict[str, Any]:
        """Return the numbers for tables and JSON; ``None`` where a model has none."""
        line, links = self.timeline, self.communication
        both = self.network_seconds or (None, None)
        constants = self.compiled.constants
        return {
            "cluster": self.cluster.text,
            "bytes_inside": self.bytes_inside,
            "bytes_between": self.bytes_between,
            "messages": self.wire.messages_per_worker,
            "memory_bytes": self.compiled.memory.total,
            "xla_step_seconds": self.xla_seconds,
            "xla_exposed_seconds": None if line is None else line.exposed * 1e-6,
            "xla_hidden_share": None if line is None else line.hidden,
            "xla_compute_seconds": self.compute_seconds,
            "xla_library_calls": None if line is None else line.library_calls,
            "xla_constants": None if constants is None else constants._asdict(),
            "network_communication_seconds": None if links is None else links.seconds,
            "network_step_all_hidden_seconds": both[0],
            "network_step_none_hidden_seconds": both[1],
            "network": None if links is None else links.network,
            "collectives": [
                {
                    "kind": c.kind,
                    "dtype": c.dtype,
                    "operand_bytes": c.operand_bytes,
                    "weight": c.weight,
                    "asynchronous": c.asynchronous,
                    "path": c.path,
                }
                for c in self.wire.collectives
            ],
            "xla_schedule": [
                {
                    "kind": c.kind,
                    "weight": c.weight,
                    "start_us": c.start,
                    "latency_us": c.latency,
                    "wait_us": c.wait,
                    "hidden_share": c.hidden,
                    "covered": len(c.covered),
                    "path": c.path,
                }
                for c in (line.collectives if line else ())
            ],
        }

    def __str__(self) -> str:
        """Write the report: prediction, and by which model."""
        sent, memory = self.wire, self.compiled.memory
        lines = [
            "PREDICTION, nothing was run or measured",
            str(self.cluster),
            "",
            "wire, counted from the compiled program; a step of one worker sends",
            f"  inside its node {self.bytes_inside:,.0f} bytes, between nodes "
            f"{self.bytes_between:,.0f}, in {sent.messages_per_worker:.4g} messages",
            "",
            "memory of one device, by XLA",
            f"  {memory.total:,} bytes: arguments {memory.argument_size_in_bytes:,}, "
            f"outputs {memory.output_size_in_bytes:,} (in place of arguments "
            f"{memory.alias_size_in_bytes:,}), temporaries "
            f"{memory.temp_size_in_bytes:,}",
            "",
        ]
        if self.timeline is None:
            known = self.cluster.has_timeline
            why = "a program that sends nothing" if known else "this chip"
            lines += [f"order, by XLA, which predicts no times for {why}"]
            lines += _indented(str(sent))
        else:
            lines += ["schedule, by XLA's cost model (us)"]
            lines += _indented(str(self.timeline))
        if self.communication is not None:
            lines += ["", "communication, by the network's alpha-beta model"]
            lines += _indented(str(self.communication))
        lines += ["", "predicted step"]
        if self.xla_seconds is not None:
            lines.append(f"  XLA's model: {1e3 * self.xla_seconds:,.4g} ms")
        if self.network_seconds is not None:
            low, high = (f"{1e3 * seconds:,.4g}" for seconds in self.network_seconds)
            lines.append(
                f"  network's model and XLA's compute: {low} ms if all communication "
                f"hides, {high} ms if none does"
            )
        elif self.communication is not None:
            only = f"{1e3 * self.communication.seconds:,.4g} ms"
            lines.append(f"  communication alone, by the network's model: {only}")
        if self.xla_seconds is None and self.communication is None:
            lines.append("  none: XLA predicts no times here, and no network was given")
        return "\n".join(lines)


def _indented(text: str) -> list[str]:
    return ["  " + line for line in text.splitlines()]


def plan(
    fn: Callable[..., Any],
    args: tuple,
    cluster: Cluster,
    *,
    network: Network | None = None,
    in_specs: Any = P(),  # noqa: B008
    axis_name: AxisName = "workers",
    options: Mapping[str, Any] | None = None,
    branch_shares: Mapping[str, Sequence[float]] | None = None,
    trip_counts: Mapping[str, int] | None = None,
    **jit: Any,
) -> Plan:
    """Plan a step on a cluster, ahead of time.

    Two models predict its time, and both are shown: XLA's, which knows the schedule and
    gives each GPU its share of the network cards, and the network's alpha-beta model,
    which knows who sends through which card and has no compute.

    Args:
        fn: per-worker function, as :func:`compile` takes it.
        args: likewise.
        cluster: what to compile for.
        network: links between and inside nodes, for as many devices. Its links between
            nodes are XLA's constants, too; without it these are XLA's own.
        in_specs: as in :func:`compile`.
        axis_name: as in :func:`compile`.
        options: as in :func:`compile`.
        branch_shares: as in :func:`bagua_jax.wire.count`.
        trip_counts: as in :func:`bagua_jax.wire.count`.
        **jit: options of ``jax.jit``.

    Returns:
        The plan; ``print`` shows it.

    Raises:
        ValueError: as :func:`compile`, :func:`bagua_jax.wire.count` and
            :func:`timeline`, or a network of other nodes than the cluster's.
        CompileError: as :func:`compile`.
    """
    lowered = lower(fn, args, cluster, in_specs=in_specs, axis_name=axis_name, **jit)
    return plan_lowered(
        lowered,
        cluster,
        network=network,
        options=options,
        branch_shares=branch_shares,
        trip_counts=trip_counts,
    )


def plan_lowered(
    lowered: jax.stages.Lowered,
    cluster: Cluster,
    *,
    network: Network | None = None,
    options: Mapping[str, Any] | None = None,
    branch_shares: Mapping[str, Sequence[float]] | None = None,
    trip_counts: Mapping[str, int] | None = None,
) -> Plan:
    """Plan what :func:`lower` has lowered; see :func:`plan`."""
    constants = None
    if network is not None:
        same = np.array_equal(network.nodes, cluster.nodes)
        rule = f"plan: the network must have the nodes of {cluster.text}"
        cure = f"network.preset(name, {cluster.num_nodes}, {cluster.per_node}) has."
        require(same, rule, np.bincount(network.nodes).tolist(), cure)
        constants = Constants.of(network) if cluster.has_timeline else None
    compiled = compile_lowered(lowered, cluster, constants=constants, options=options)
    said = {"branch_shares": branch_shares, "trip_counts": trip_counts}
    count = wire.count(compiled, **said)
    has_times = cluster.has_timeline and any(c.bytes_sent for c in count.collectives)
    return Plan(
        cluster=cluster,
        compiled=compiled,
        wire=count,
        communication=None if network is None else communication_time(count, network),
        timeline=timeline(compiled, **said) if has_times else None,
    )
