"""Links and networks: latency and bandwidth between devices."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

__all__ = ["GBIT", "Link", "Network", "require", "require_at_least"]

GBIT = 1e9 / 8  # bytes/s of one Gbit/s
STATED = "stated, not measured"

Matrix = np.ndarray | Sequence[Sequence[float]]


def require(valid: bool | np.bool, rule: str, value: object, cure: str = "") -> None:
    """Refuse a value, unless it is valid; this package works without jax."""
    if not valid:
        raise ValueError(f"{rule}; got {value!r}. {cure}".rstrip())


def require_at_least(caller: str, name: str, value: float, least: float) -> None:
    """Refuse a number below its least value, and one that is infinite or none."""
    valid = least <= value < math.inf
    require(valid, f"{caller}: {name} must be finite and at least {least}", value)


@dataclass(frozen=True)
class Link:
    """One class of links.

    Args:
        latency: one way, in seconds; at least 0.
        bandwidth: nominal, in bytes/s and each direction; above 0, may be infinite.
        goodput: the share of the bandwidth that payloads get, in (0, 1].

    Raises:
        ValueError: a number outside its range.

    Example (TCP over Ethernet, frames of 1500 bytes):
        >>> round(Link(20e-6, 10 * GBIT, goodput=1448 / 1538).rate / GBIT, 3)
        9.415
    """

    latency: float
    bandwidth: float
    goodput: float = 1.0

    def __post_init__(self) -> None:
        require_at_least("Link", "latency", self.latency, 0)
        rule = "Link: bandwidth must be above 0 bytes/s (GBIT is that of 1 Gbit/s)"
        require(self.bandwidth > 0, rule, self.bandwidth)
        require(0 < self.goodput <= 1, "Link: goodput must be in (0, 1]", self.goodput)

    @property
    def rate(self) -> float:
        """Bytes of payload per second."""
        return self.bandwidth * self.goodput


@dataclass(frozen=True, eq=False)
class Network:
    r"""Latency and bandwidth between devices, and the ports that nodes share.

    ``from_levels`` and ``from_matrices`` are the usual ways to make one. The arrays
    are read-only copies.

    Sends that run at once share what they use. With :math:`t_e = b_e / \beta_e`, the
    seconds that the bytes of send e need alone, and p ports per node, e waits for

    - inside a node: all that its source sends, or its target receives, inside the node;
    - between nodes: all that its source sends, or its target receives, between nodes,
      and 1/p of all that its source's node sends, or its target's receives, there.

    The largest of these sums of t is the load of e. Latencies pass side by side.

    Args:
        latency: [n, n] seconds, from the row's device to the column's. The diagonal
            counts for nothing.
        bandwidth: [n, n] bytes/s of payload (goodput, not the nominal bandwidth).
            Between nodes: through one port.
        nodes: the node of each device, [n] integers; numbered anew, from 0.
        ports: how many devices of a node can send to other nodes at full bandwidth at
            once, and as many receive; at least 1. One network card per node: 1. One
            per device: the number of devices in a node.
        name: shown in tables.
        origin: where the constants come from.

    Raises:
        ValueError: matrices that are not square or not of equal size, a latency that is
            negative, a bandwidth that is not positive, or one of them not a number.
    """

    latency: np.ndarray
    bandwidth: np.ndarray
    nodes: np.ndarray
    ports: int = 1
    name: str = "network"
    origin: str = STATED

    def __post_init__(self) -> None:
        latency = np.array(self.latency, np.float64)
        bandwidth = np.array(self.bandwidth, np.float64)
        nodes = np.array(self.nodes)
        n = len(latency) if latency.ndim else 0
        square = n > 0 and latency.shape == bandwidth.shape == (n, n)
        rule = "Network: latency and bandwidth must be square, one row per device"
        require(square, rule, (latency.shape, bandwidth.shape))
        integers = np.issubdtype(nodes.dtype, np.integer)
        rule = f"Network: nodes must hold one integer for each of {n} devices"
        require(nodes.shape == (n,) and integers, rule, self.nodes)
        np.fill_diagonal(latency, 0.0)
        np.fill_diagonal(bandwidth, np.inf)
        valid = (latency >= 0) & np.isfinite(latency)
        rule = "Network: latencies must be finite and at least 0 seconds"
        require(valid.all(), rule, latency[~valid].tolist())
        valid = bandwidth > 0
        rule = "Network: bandwidths must be above 0 bytes/s"
        cure = "Devices without a direct link have the bandwidth of their route."
        require(valid.all(), rule, bandwidth[~valid].tolist(), cure)
        whole = isinstance(self.ports, int) and not isinstance(self.ports, bool)
        rule = "Network: ports must be an integer >= 1"
        require(whole and self.ports >= 1, rule, self.ports)
        nodes = np.unique(nodes, return_inverse=True)[1]
        arrays = {"latency": latency, "bandwidth": bandwidth, "nodes": nodes}
        for key, array in arrays.items():
            array.setflags(write=False)
            object.__setattr__(self, key, array)

    @classmethod
    def from_levels(
        cls,
        num_nodes: int,
        per_node: int,
        *,
        inside: Link,
        between: Link,
        ports: int = 1,
        name: str = "two levels",
        origin: str = STATED,
    ) -> Network:
        """Describe equal nodes: one class of links inside them and one between them.

        Args:
            num_nodes: at least 1.
            per_node: devices of a node, which have neighbouring numbers; at least 1.
            inside: from device to device of a node.
            between: from node to node, through one port.
            ports: as in :class:`Network`.
            name: shown in tables.
            origin: where the constants come from.

        Raises:
            ValueError: a count below 1.

        Example:
            >>> link = Link(latency=1e-3, bandwidth=1e6)
            >>> net = Network.from_levels(2, 2, inside=link, between=link)
            >>> net.num_devices, net.nodes.tolist(), float(net.seconds(1e6)[0, 1])
            (4, [0, 0, 1, 1], 1.001)
        """
        valid = all(isinstance(x, int) and x >= 1 for x in (num_nodes, per_node))
        rule = "Network.from_levels: num_nodes and per_node must be integers >= 1"
        require(valid, rule, (num_nodes, per_node))
        nodes = np.repeat(np.arange(num_nodes), per_node)
        same = nodes[:, None] == nodes
        latency = np.where(same, inside.latency, between.latency)
        bandwidth = np.where(same, inside.rate, between.rate)
        return cls(latency, bandwidth, nodes, ports, name, origin)

    @classmethod
    def from_matrices(
        cls,
        latency: Matrix,
        bandwidth: Matrix,
        *,
        goodput: float = 1.0,
        nodes: Sequence[int] | np.ndarray | None = None,
        ports: int = 1,
        name: str = "matrices",
        origin: str = STATED,
    ) -> Network:
        """Describe any network by its matrices, with nominal bandwidths.

        Args:
            latency: [n, n] seconds.
            bandwidth: [n, n] bytes/s, nominal.
            goodput: the share of it that payloads get, in (0, 1].
            nodes: as in :class:`Network`; by default each device is a node.
            ports: as in :class:`Network`.
            name: shown in tables.
            origin: where the constants come from.

        Raises:
            ValueError: as :class:`Network`, or a goodput outside (0, 1].
        """
        rule = "Network.from_matrices: goodput must be in (0, 1]"
        require(0 < goodput <= 1, rule, goodput)
        latency, bandwidth = np.asarray(latency), goodput * np.asarray(bandwidth)
        at = np.arange(len(latency)) if nodes is None else np.asarray(nodes)
        return cls(latency, bandwidth, at, ports, name, origin)

    @property
    def num_devices(self) -> int:
        """Devices of all nodes."""
        return len(self.latency)

    @property
    def num_nodes(self) -> int:
        """Nodes; ``nodes`` numbers them from 0."""
        return int(self.nodes.max()) + 1

    def seconds(self, num_bytes: float) -> np.ndarray:
        """Time of one message between each pair, alone: latency + bytes / bandwidth."""
        require_at_least("Network.seconds", "num_bytes", num_bytes, 0)
        return self.latency + num_bytes / self.bandwidth

    def __str__(self) -> str:
        """State the constants: where they come from, and the range of each level."""
        cross = self.nodes[:, None] != self.nodes
        inside = ~cross & ~np.eye(self.num_devices, dtype=bool)
        lines = [
            f"{self.name}: {self.num_devices} devices on {self.num_nodes} nodes of "
            f"{self.ports} port{'s' * (self.ports > 1)}; constants {self.origin}"
        ]
        for level, pairs in (("inside a node", inside), ("between nodes", cross)):
            if pairs.any():
                delay = _range(self.latency[pairs] * 1e6)
                rate = _range(self.bandwidth[pairs] / GBIT)
                lines.append(f"  {level}: {delay} us, {rate} Gbit/s of payload")
        return "\n".join(lines)


def _range(values: np.ndarray) -> str:
    low, high = (f"{value:,.4g}" for value in (values.min(), values.max()))
    return low if low == high else f"{low} to {high}"
