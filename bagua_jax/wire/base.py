"""A collective, what it sends and over which links, and tables of them."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

__all__ = [
    "PAIRWISE",
    "RING",
    "Collective",
    "Groups",
    "WireCount",
    "collective",
    "columns",
    "num_bytes",
]

Groups = tuple[tuple[int, ...], ...]
Arrays = Sequence[tuple[str, int]]
Nodes = Sequence[int] | np.ndarray


class Collective(NamedTuple):
    """One communication site of a program."""

    kind: str  # HLO opcode, without "-start"
    dtype: str  # on the wire, as the program has it; "u8+f32" where mixed
    operands: int
    operand_bytes: int  # of one worker, summed over the operands
    group_size: int  # workers that take part together; of a permute, all devices
    bytes_sent: float  # per worker, for one execution
    weight: float  # executions per run of the program: loop trips x branch shares
    asynchronous: bool
    path: str  # op_name metadata: scopes and primitive of the source
    name: str  # of the instruction
    groups: Groups  # of devices, by place in the mesh; a permute's (source, target)
    arrays: tuple[tuple[str, int], ...] = ()  # of each operand: dtype and elements

    @property
    def messages(self) -> float:
        """Executions, or none where nothing is sent."""
        return self.weight if self.bytes_sent > 0 else 0.0

    def bytes_between(self, nodes: Nodes) -> float:
        """Of the bytes sent, in all executions, those that leave the sender's node."""
        if not self.bytes_sent:
            return 0.0
        return self.weight * self.bytes_sent * _crossing(self, _checked(self, nodes))


RING: Mapping[str, Callable[[int, int], float]] = {
    # bytes sent by each of n workers, for S operand bytes
    "all-reduce": lambda S, n: 2 * S * (n - 1) / n,
    "all-gather": lambda S, n: S * (n - 1.0),
    "reduce-scatter": lambda S, n: S * (n - 1) / n,
    "all-to-all": lambda S, n: S * (n - 1) / n,
    "ragged-all-to-all": lambda S, n: S * (n - 1) / n,
    "collective-broadcast": lambda S, n: S * (n - 1) / n,  # the last sends nothing
}
PAIRWISE = ("collective-permute", "send")


def collective(
    kind: str, arrays: Arrays, groups: Groups, devices: int, path: str, name: str
) -> Collective:
    """Work out what one execution of a collective sends.

    Args:
        kind: one of ``RING`` or ``PAIRWISE``.
        arrays: dtype and elements of each operand of one worker.
        groups: of devices; of a permute the pairs (source, target).
        devices: that run the program.
        path: scopes and primitive of the source.
        name: of the instruction.
    """
    size = sum(num_bytes(dtype, elements) for dtype, elements in arrays)
    if kind in PAIRWISE:
        n = devices
        sent = size * sum(source != target for source, target in groups) / n
    else:
        n = len(groups[0])
        sent = RING[kind](size, n)
    dtype = "+".join(dict.fromkeys(dtype for dtype, _ in arrays))
    return Collective(
        kind=kind,
        dtype=dtype,
        operands=len(arrays),
        operand_bytes=size,
        group_size=n,
        bytes_sent=sent,
        weight=1.0,
        asynchronous=False,
        path=path,
        name=name,
        groups=groups,
        arrays=tuple(arrays),
    )


def num_bytes(dtype: str, elements: int) -> int:
    """Size of an array; dtypes narrower than a byte are packed.

    >>> num_bytes("bf16", 3), num_bytes("s4", 3), num_bytes("pred", 3)
    (6, 2, 3)
    """
    bits = re.fullmatch(
        r"pred|(?:bf|[fsuc])(1|2|4|8|16|32|64|128)(e\d+m\d+\w*)?", dtype
    )
    if not bits:
        raise ValueError(f"wire: cannot tell the size of {dtype!r}.")
    return math.ceil(elements * int(bits[1] or 8) / 8)


class WireCount(NamedTuple):
    """Everything that one run of a program sends."""

    collectives: tuple[Collective, ...]

    @property
    def bytes_per_worker(self) -> float:
        """Bytes that one worker sends, weighted by loops and branches."""
        return math.fsum(c.weight * c.bytes_sent for c in self.collectives)

    @property
    def messages_per_worker(self) -> float:
        """Collectives that one worker runs, without those that send nothing."""
        return math.fsum(c.messages for c in self.collectives)

    def by_kind(self) -> dict[str, tuple[float, float]]:
        """Messages and bytes per worker of each kind of collective."""
        parts: dict[str, tuple[Collective, ...]] = {}
        for c in self.collectives:
            parts[c.kind] = (*parts.get(c.kind, ()), c)
        return {
            kind: (
                WireCount(part).messages_per_worker,
                WireCount(part).bytes_per_worker,
            )
            for kind, part in parts.items()
        }

    def bytes_between(self, nodes: Nodes) -> float:
        """Bytes per worker that leave their node, on average over all workers.

        A ring runs in the order of its group; all-to-all sends to each peer alike.

        Args:
            nodes: the node of each device, in the order of the mesh.

        Raises:
            ValueError: no node for a device that communicates.

        Example (two nodes of two workers; two of the four ring edges cross):
            >>> from bagua_jax import wire
            >>> text = '''HloModule step, replica_count=4
            ... ENTRY %main (x: f32[100]) -> f32[100] {
            ...   %x = f32[100]{0} parameter(0)
            ...   ROOT %sum = f32[100]{0} all-reduce(%x), replica_groups={{0,1,2,3}}
            ... }'''
            >>> counted = wire.count(text)
            >>> counted.bytes_per_worker, counted.bytes_between([0, 0, 1, 1])
            (600.0, 300.0)
        """
        return math.fsum(c.bytes_between(nodes) for c in self.collectives)

    def bytes_inside(self, nodes: Nodes) -> float:
        """Bytes per worker that stay inside their node; see :meth:`bytes_between`."""
        return self.bytes_per_worker - self.bytes_between(nodes)

    def table(self, nodes: Nodes | None = None) -> str:
        """Show one collective a line, and the totals.

        Args:
            nodes: the node of each device. Bytes sent are then shown in two columns,
                inside a node and between nodes.

        Example:
            >>> from bagua_jax import wire
            >>> text = '''HloModule step, replica_count=4
            ... ENTRY %main (x: u8[100]) -> u8[400] {
            ...   %x = u8[100]{0} parameter(0)
            ...   ROOT %all = u8[400]{0} all-gather(%x), replica_groups={}
            ... }'''
            >>> print(wire.count(text).table(nodes=[0, 0, 1, 1]))
            kind        dtype  ops  bytes  group  inside  between  weight  path
            all-gather  u8       1    100      4     150      150       1
            per worker: 300 bytes sent in 1 messages, 150 between nodes
        """
        links = ("sent",) if nodes is None else ("inside", "between")
        head = ("kind", "dtype", "ops", "bytes", "group", *links, "weight", "path")
        rows: list[tuple[str, ...]] = [head]
        for c in self.collectives:
            sent: tuple[float, ...] = (c.bytes_sent,)
            if nodes is not None:
                between = c._replace(weight=1.0).bytes_between(nodes)
                sent = (c.bytes_sent - between, between)
            numbers = (c.operands, c.operand_bytes, c.group_size, *sent, c.weight)
            kind = c.kind + " (async)" * c.asynchronous
            rows.append((kind, c.dtype, *map(show, numbers), c.path))
        total = (
            f"per worker: {show(self.bytes_per_worker)} bytes sent"
            f" in {show(self.messages_per_worker)} messages"
        )
        if nodes is not None:
            total += f", {show(self.bytes_between(nodes))} between nodes"
        return columns(rows, "<<>>>" + ">" * len(links) + "><") + "\n" + total

    def __str__(self) -> str:
        """Show the table."""
        return self.table()


def show(number: float) -> str:
    """Write a number as tables do.

    >>> show(458752.0), show(1 / 3)
    ('458,752', '0.3333333333')
    """
    return f"{number:,.10g}"


def columns(rows: Sequence[Iterable[str]], align: str) -> str:
    """Lay rows of text out in columns, each to the left (<) or the right (>)."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(map("{:{}{}}".format, row, align, widths)) for row in rows]
    return "\n".join(line.rstrip() for line in lines)


def _checked(c: Collective, nodes: Nodes) -> np.ndarray:
    at, needed = np.asarray(nodes), 1 + max(map(max, c.groups))
    if at.ndim != 1 or len(at) < needed:
        raise ValueError(
            f"wire: nodes must give the node of each of {needed} devices or more, in "
            f"the order of the mesh; got {at.tolist()}."
        )
    return at


def _crossing(c: Collective, nodes: np.ndarray) -> float:
    """Share of what a collective sends that leaves the sender's node."""
    at = nodes[np.array(c.groups)]  # [groups, n], or [pairs, 2]
    if c.kind in PAIRWISE:
        source, target = at[[a != b for a, b in c.groups]].T
        return float(np.mean(source != target))
    if c.kind.endswith("all-to-all"):
        n = c.group_size
        return float(np.mean(at[:, :, None] != at[:, None, :]) * n / (n - 1))
    return float(np.mean(at != np.roll(at, -1, axis=1)))
