r"""The time of each collective, by the alpha-beta model.

:math:`\alpha_e` is the latency of edge e, and :math:`\tau_e(b)` its load, in seconds,
where every send of a round carries b bytes (:class:`bagua_jax.network.Network` says how
sends share links and ports). All groups of a collective run at once. In a ring of n,
latencies add along the way of one chunk, and the slowest edge sets the pace:

.. math::
    R(h, b) = \sum_{k=1}^{h} \alpha_{s+k} + h \max_e \tau_e(b)

is the time of h rounds, for the start s from which the way is longest. It is never less
than what a ring that sends each chunk as soon as it may would need, and never more than
twice that; on equal links it is exactly h(alpha + b/beta). A ring leaves a node by as
many ports as it has devices there, as rings in several channels do.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np

from bagua_jax.network.base import Network, require, require_at_least

if TYPE_CHECKING:
    from bagua_jax.topologies import Topology

__all__ = [
    "Cost",
    "Devices",
    "all_gather",
    "all_reduce",
    "all_to_all",
    "broadcast",
    "checked_placement",
    "gossip",
    "hierarchical_all_reduce",
    "permute",
    "reduce_scatter",
]

Devices = Sequence[Sequence[int]] | np.ndarray


class Cost(NamedTuple):
    """Predicted seconds of one collective, by what causes them."""

    latency: float
    transfer: float

    @property
    def seconds(self) -> float:
        """Both together: nothing overlaps inside one collective."""
        return self.latency + self.transfer


def all_reduce(
    network: Network,
    num_bytes: float,
    groups: Devices | None = None,
    *,
    algorithm: Literal["ring", "tree"] = "ring",
) -> Cost:
    r"""Predict an all-reduce.

    .. math::
        T_{ring} = R(2(n-1), S/n), \qquad
        T_{tree} = 2 \sum_{r=1}^{\lceil \log_2 n \rceil}
        \max_{e \in r} (\alpha_e + \tau_e(S))

    On equal links: 2(n-1)(alpha + S/(n beta)), and 2 log2(n) (alpha + S/beta). The tree
    is binomial, up and down, and not pipelined.

    Args:
        network: the network.
        num_bytes: S, operand bytes of one device.
        groups: of equal size, [groups, n] devices in the order of the ring; by default
            one group of all devices.
        algorithm: ``"ring"`` or ``"tree"``.

    Raises:
        ValueError: groups that share devices or are not of this network, or another
            algorithm.

    Example:
        >>> from bagua_jax.network import Link
        >>> link = Link(latency=1e-3, bandwidth=1e6)
        >>> net = Network.from_levels(4, 1, inside=link, between=link)
        >>> ring, tree = (all_reduce(net, 1e6, algorithm=a) for a in ("ring", "tree"))
        >>> f"{ring.seconds:.3f} s, {tree.seconds:.3f} s"
        '1.506 s, 4.004 s'
    """
    rule = "all_reduce: algorithm must be 'ring' or 'tree'"
    require(algorithm in ("ring", "tree"), rule, algorithm)
    at = _groups(network, groups, "all_reduce")
    n = at.shape[1]
    if algorithm == "ring":
        return _ring(network, at, num_bytes / n, hops=2 * (n - 1))
    rounds, stride = [], 1
    while stride < n:
        child = at[:, stride :: 2 * stride]
        parent = at[:, :: 2 * stride][:, : child.shape[1]]
        rounds.append(_at_once(network, child, parent, num_bytes))
        rounds.append(_at_once(network, parent, child, num_bytes))
        stride *= 2
    return _sum(rounds)


def reduce_scatter(
    network: Network, num_bytes: float, groups: Devices | None = None
) -> Cost:
    """Predict a ring reduce-scatter, R(n-1, S/n).

    Args:
        network: the network.
        num_bytes: S, operand bytes of one device; it ends with S/n of them.
        groups: as in :func:`all_reduce`.

    Raises:
        ValueError: groups that share devices or are not of this network.
    """
    at = _groups(network, groups, "reduce_scatter")
    n = at.shape[1]
    return _ring(network, at, num_bytes / n, hops=n - 1)


def all_gather(
    network: Network, num_bytes: float, groups: Devices | None = None
) -> Cost:
    """Predict a ring all-gather, R(n-1, S).

    Args:
        network: the network.
        num_bytes: S, operand bytes of one device; it ends with nS of them.
        groups: as in :func:`all_reduce`.

    Raises:
        ValueError: groups that share devices or are not of this network.
    """
    at = _groups(network, groups, "all_gather")
    return _ring(network, at, num_bytes, hops=at.shape[1] - 1)


def all_to_all(
    network: Network, num_bytes: float, groups: Devices | None = None
) -> Cost:
    r"""Predict an all-to-all: all pairs at once.

    .. math:: T = \max_{e} \big(\alpha_e + \tau_e(S/n)\big)

    On equal links, one device a node: alpha + S(n-1)/(n beta).

    Args:
        network: the network.
        num_bytes: S, operand bytes of one device; each peer gets S/n of them.
        groups: as in :func:`all_reduce`.

    Raises:
        ValueError: groups that share devices or are not of this network.
    """
    at = _groups(network, groups, "all_to_all")
    n = at.shape[1]
    first, second = np.nonzero(~np.eye(n, dtype=bool))
    return _at_once(network, at[:, first], at[:, second], num_bytes / n)


def broadcast(
    network: Network, num_bytes: float, groups: Devices | None = None
) -> Cost:
    r"""Predict a broadcast by the first device of each group, in pieces down a chain.

    .. math:: T = \sum_{k=1}^{n-1} \alpha_{k} + \max_e \tau_e(S)

    Args:
        network: the network.
        num_bytes: S, operand bytes of one device.
        groups: as in :func:`all_reduce`.

    Raises:
        ValueError: groups that share devices or are not of this network.
    """
    at = _groups(network, groups, "broadcast")
    source, target = at[:, :-1], at[:, 1:]
    load = _load(network, source, target, num_bytes).max(axis=1, initial=0.0)
    return _slowest(network.latency[source, target].sum(axis=1), load)


def permute(network: Network, num_bytes: float, pairs: Devices) -> Cost:
    r"""Predict a collective-permute: its slowest edge.

    .. math:: T = \max_{e} \big(\alpha_e + \tau_e(S)\big)

    Args:
        network: the network.
        num_bytes: S, bytes of one message.
        pairs: (source, target) devices; a device sends itself nothing.

    Raises:
        ValueError: pairs that are not of this network.
    """
    at = _devices(network, pairs, "permute: pairs")
    require(at.shape[1] == 2, "permute: pairs must be (source, target)", pairs)
    source, target = at[at[:, 0] != at[:, 1]].T
    return _at_once(network, source, target, num_bytes)


def gossip(
    network: Network,
    num_bytes: float,
    topology: Topology,
    placement: Sequence[int] | None = None,
) -> Cost:
    """Predict a step of gossip, on average over the topology's period.

    A step's permutations run one after the other; each takes as long as its slowest
    edge.

    Args:
        network: the network.
        num_bytes: bytes of one message.
        topology: who talks to whom.
        placement: the device of each worker; by default worker i is on device i.

    Raises:
        ValueError: a placement that does not give every worker a device of its own.

    Example:
        >>> from bagua_jax import topologies
        >>> from bagua_jax.network import preset
        >>> cost = gossip(preset("wan", num_nodes=8), 1e6, topologies.ring(8))
        >>> f"{cost.seconds * 1e3:.1f} ms, {cost.latency * 1e3:.1f} of them latency"
        '77.0 ms, 60.0 of them latency'
    """
    device = checked_placement(network, placement, topology.n, "gossip")
    costs = [
        permute(network, num_bytes, device[np.array(send.pairs, int).reshape(-1, 2)])
        for step in topology.steps
        for send in step.sends
    ]
    return Cost(*(part / topology.period for part in _sum(costs)))


def hierarchical_all_reduce(network: Network, num_bytes: float) -> Cost:
    r"""Predict an all-reduce by levels, without leaders: the sum of three collectives.

    Reduce-scatter inside the nodes of m devices, all-reduce of the shards of S/m bytes
    by each device with its peers on the other nodes, all-gather inside. On equal links,
    with k nodes of p <= m ports:

    .. math::
        T = 2(m-1) \Big(\alpha_{in} + \frac{S}{m \beta_{in}}\Big) +
        2(k-1) \Big(\alpha_{out} + \frac{S}{k p \beta_{out}}\Big)

    Args:
        network: its nodes must be of equal size.
        num_bytes: S, operand bytes of one device.

    Raises:
        ValueError: nodes of different sizes.

    Example (the gradients of BERT-Large in float32):
        >>> from bagua_jax.network import preset
        >>> net = preset("10gbit", num_nodes=16, per_node=8)
        >>> flat, levels = all_reduce(net, 1336e6), hierarchical_all_reduce(net, 1336e6)
        >>> f"{flat.seconds:.3f} s, {levels.seconds:.3f} s"
        '2.254 s, 2.139 s'
    """
    sizes = np.bincount(network.nodes)
    rule = "hierarchical_all_reduce: nodes must have equally many devices"
    require((sizes == sizes[0]).all(), rule, sizes.tolist())
    inside = np.argsort(network.nodes, kind="stable").reshape(len(sizes), -1)  # [k, m]
    shard = num_bytes / inside.shape[1]
    return _sum(
        (
            reduce_scatter(network, num_bytes, inside),
            all_reduce(network, shard, inside.T),
            all_gather(network, shard, inside),
        )
    )


# --- rounds of sends --------------------------------------------------------------


def _load(
    network: Network,
    source: np.ndarray,
    target: np.ndarray,
    num_bytes: float,
    channels: np.ndarray | int = 1,
) -> np.ndarray:
    """Seconds until each of these sends is through, all at once, without latencies.

    ``channels``: by how many devices of its node a send between nodes may leave.
    """
    require_at_least("network", "num_bytes", num_bytes, 0)
    nodes = network.nodes
    seconds = num_bytes / network.bandwidth[source, target]
    cross = nodes[source] != nodes[target]
    own = seconds / np.where(cross, channels, 1)
    load = np.zeros_like(seconds)
    for end in (source, target):
        lane = end + network.num_devices * cross  # inside and between: other wires
        node = _total(nodes[end], seconds * cross) / network.ports
        load = np.maximum.reduce([load, _total(lane, own), node * cross])
    return load


def _total(resource: np.ndarray, seconds: np.ndarray) -> np.ndarray:
    """Seconds on the resource of each send, over all sends."""
    return np.bincount(resource.ravel(), seconds.ravel())[resource]


def _at_once(
    network: Network, source: np.ndarray, target: np.ndarray, num_bytes: float
) -> Cost:
    load = _load(network, source, target, num_bytes)
    return _slowest(network.latency[source, target], load)


def _ring(network: Network, groups: np.ndarray, num_bytes: float, hops: int) -> Cost:
    """R(hops, num_bytes) of the slowest group."""
    source, target = groups, np.roll(groups, -1, axis=1)
    nodes = network.nodes[groups]
    members = (nodes[:, :, None] == nodes[:, None, :]).sum(axis=2)
    ends = np.minimum(members, np.roll(members, -1, axis=1))
    channels = np.minimum(ends, network.ports)
    load = _load(network, source, target, num_bytes, channels).max(axis=1)
    delay = network.latency[source, target]
    laps, rest = divmod(hops, groups.shape[1])
    way = np.cumsum(np.tile(delay, 2), axis=1)
    longest = (way[:, rest:][:, : groups.shape[1]] - way[:, : groups.shape[1]]).max(1)
    return _slowest(laps * delay.sum(axis=1) + longest, hops * load)


def _slowest(latency: np.ndarray, transfer: np.ndarray) -> Cost:
    if latency.size == 0:
        return Cost(0.0, 0.0)
    worst = np.argmax(latency + transfer)
    return Cost(float(latency.flat[worst]), float(transfer.flat[worst]))


def _sum(costs: Iterable[Cost]) -> Cost:
    latency, transfer = np.sum([(0.0, 0.0), *costs], axis=0).tolist()
    return Cost(latency, transfer)


# --- what may be asked ------------------------------------------------------------


def _devices(network: Network, devices: Devices, what: str) -> np.ndarray:
    if len(devices) == 0:
        return np.empty((0, 2), int)
    try:
        at = np.array(devices)
    except ValueError:  # rows of different lengths
        at = np.empty(0)
    valid = at.ndim == 2 and np.issubdtype(at.dtype, np.integer) and at.size > 0
    valid = valid and 0 <= at.min() and at.max() < network.num_devices
    rule = f"{what} must be rows of equal length of devices below {network.num_devices}"
    require(valid, rule, devices)
    return at


def _groups(network: Network, groups: Devices | None, caller: str) -> np.ndarray:
    if groups is None:
        return np.arange(network.num_devices)[None]
    at = _devices(network, groups, f"{caller}: groups")
    once = at.size > 0 and np.unique(at).size == at.size
    require(once, f"{caller}: groups must hold each device at most once", groups)
    return at


def checked_placement(
    network: Network, placement: Sequence[int] | None, workers: int, caller: str
) -> np.ndarray:
    """Return the device of each worker, by default its own number, or refuse."""
    device = np.arange(workers) if placement is None else np.array(placement)
    integers = device.ndim == 1 and np.issubdtype(device.dtype, np.integer)
    valid = integers and len(device) == workers == np.unique(device).size
    valid = valid and set(device.tolist()) <= set(range(network.num_devices))
    rule = (
        f"{caller}: placement must give each of {workers} workers its own of "
        f"{network.num_devices} devices"
    )
    require(valid, rule, device.tolist())
    return device
