"""From what a compiled program sends to the time of its step: predictions."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np

from bagua_jax.network import collectives
from bagua_jax.network.base import Network, require
from bagua_jax.network.collectives import Cost, checked_placement

if TYPE_CHECKING:
    from bagua_jax.wire import WireCount

__all__ = ["CollectiveTime", "CommunicationTime", "communication_time", "step_time"]


class CollectiveTime(NamedTuple):
    """Predicted time of one communication site of a program."""

    kind: str
    path: str
    operand_bytes: int
    weight: float  # executions per run of the program
    cost: Cost  # of one execution


class CommunicationTime(NamedTuple):
    """A prediction: the time of a program's collectives, one by one."""

    collectives: tuple[CollectiveTime, ...]
    network: str  # its constants, in words

    @property
    def latency(self) -> float:
        """Seconds per run that do not depend on bytes."""
        return math.fsum(c.weight * c.cost.latency for c in self.collectives)

    @property
    def transfer(self) -> float:
        """Seconds per run that do."""
        return math.fsum(c.weight * c.cost.transfer for c in self.collectives)

    @property
    def seconds(self) -> float:
        """Seconds per run: one collective at a time, none beside compute."""
        return self.latency + self.transfer

    def __str__(self) -> str:
        """Show a table, one collective a line, then the total and the constants."""
        head = ("kind", "bytes", "weight", "latency us", "transfer us", "path")
        rows: list[tuple[str, ...]] = [head]
        for c in self.collectives:
            size, weight = f"{c.operand_bytes:,}", f"{c.weight:.10g}"
            parts = (f"{1e6 * part:,.1f}" for part in c.cost)
            rows.append((c.kind, size, weight, *parts, c.path))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(map("{:{}{}}".format, r, "<>>>><", widths)) for r in rows]
        return "\n".join(line.rstrip() for line in lines) + (
            f"\npredicted: {1e3 * self.seconds:,.4g} ms"
            f" ({1e3 * self.latency:,.4g} ms latency)\n{self.network}"
        )


_FORMULA: Mapping[str, Callable[..., Cost]] = {
    "all-reduce": collectives.all_reduce,
    "all-gather": collectives.all_gather,
    "reduce-scatter": collectives.reduce_scatter,
    "all-to-all": collectives.all_to_all,
    "ragged-all-to-all": collectives.all_to_all,
    "collective-broadcast": collectives.broadcast,
    "collective-permute": collectives.permute,
    "send": collectives.permute,
}


def communication_time(
    count: WireCount,
    network: Network,
    *,
    placement: Sequence[int] | None = None,
    algorithm: Literal["ring", "tree"] = "ring",
) -> CommunicationTime:
    """Predict how long the collectives of a compiled program take on a network.

    Each collective of :func:`bagua_jax.wire.count` is priced with the formula of its
    kind, all of its groups at once, and weighted with its executions. Collectives run
    one after the other and nothing hides behind compute: :func:`step_time` adds that.

    Args:
        count: what the program sends.
        network: where it would run.
        placement: the network's device of each device of the mesh; by default mesh
            device i is network device i. ``embed(...).device_of`` is one.
        algorithm: of all-reduce.

    Returns:
        The prediction, with its parts and the constants that it rests on.

    Raises:
        ValueError: a placement that does not fit the program or the network, or a kind
            of collective that has no formula.

    Example:
        >>> from bagua_jax import network, wire
        >>> text = '''HloModule step, replica_count=4
        ... ENTRY %main (x: f32[250000]) -> f32[250000] {
        ...   %x = f32[250000]{0} parameter(0)
        ...   ROOT %sum = f32[250000]{0} all-reduce(%x), replica_groups={{0,1,2,3}}
        ... }'''
        >>> print(communication_time(wire.count(text), network.preset("10gbit", 2, 2)))
        kind            bytes  weight  latency us  transfer us  path
        all-reduce  1,000,000       1        69.0      1,274.6
        predicted: 1.344 ms (0.069 ms latency)
        10gbit: 4 devices on 2 nodes of 1 port; constants stated, not measured
          inside a node: 3 us, 1,920 Gbit/s of payload
          between nodes: 20 us, 9.415 Gbit/s of payload
    """
    named = [d for c in count.collectives for group in c.groups for d in group]
    needed = max(named, default=-1) + 1
    workers = needed if placement is None else max(needed, len(placement))
    device = checked_placement(network, placement, workers, "communication_time")
    parts = []
    for c in count.collectives:
        rule = f"communication_time: kind must be one of {sorted(_FORMULA)}"
        require(c.kind in _FORMULA, rule, c.kind, "Nothing is guessed.")
        options = {"algorithm": algorithm} if c.kind == "all-reduce" else {}
        at = device[np.array(c.groups, int)] if c.groups else ()
        cost = _FORMULA[c.kind](network, c.operand_bytes, at, **options)
        part = CollectiveTime(c.kind, c.path, c.operand_bytes, c.weight, cost)
        parts.append(part)
    return CommunicationTime(tuple(parts), str(network))


def step_time(
    compute: float,
    transfer: float,
    *,
    latency: float = 0.0,
    host: float = 0.0,
    overlap: Literal["none", "transfer", "all"],
) -> float:
    """Predict a step from its parts, under a stated rule of overlap.

    - ``"none"``: compute + host + latency + transfer. Everything waits.
    - ``"transfer"``: max(transfer, compute + host + latency). Bytes on the wire hide
      behind work, or work behind them; latency and the host's work are exposed.
    - ``"all"``: max(compute, host + latency + transfer). All communication hides.

    The rule is the caller's claim about a system, nothing that a network knows.

    Args:
        compute: seconds of the step without communication.
        transfer: seconds of bytes on the wire.
        latency: seconds of latency.
        host: seconds of copies and codecs.
        overlap: the rule.

    Raises:
        ValueError: negative seconds, or another rule.

    Example:
        >>> step_time(0.1, 0.3, latency=0.05, overlap="transfer")
        0.3
    """
    parts = compute, transfer, latency, host
    require(min(parts) >= 0, "step_time: seconds must be at least 0", parts)
    rules = {
        "none": compute + host + latency + transfer,
        "transfer": max(transfer, compute + host + latency),
        "all": max(compute, host + latency + transfer),
    }
    rule = f"step_time: overlap must be one of {', '.join(map(repr, rules))}"
    require(overlap in rules, rule, overlap)
    return rules[overlap]
