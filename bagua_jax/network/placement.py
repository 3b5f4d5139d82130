"""Which worker sits on which device of a heterogeneous network."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import numpy as np

from bagua_jax.network.base import Network, require

if TYPE_CHECKING:
    from bagua_jax.topologies import Topology

__all__ = ["Placement", "embed"]

EXACT = 8  # devices up to which every placement is tried
SHUFFLES = 4  # random starts of the search beyond


class Placement(NamedTuple):
    """Which worker sits on which device."""

    device_of: tuple[int, ...]  # of each worker
    slowest: float  # seconds of the slowest edge
    total: float  # seconds of all edges, added
    exact: bool  # no placement is better; else none within one move is


def embed(
    network: Network,
    topology: Topology | Sequence[tuple[int, int]],
    num_bytes: float,
    *,
    objective: Literal["slowest", "total"] = "slowest",
) -> Placement:
    r"""Place workers on devices so that the edges between them are fast.

    Minimises the slowest edge, or the sum of all, over permutations; the other of the
    two decides among equals. An edge of workers u and v costs
    :math:`\alpha_{ij} + b/\beta_{ij}` for their devices i and j, as if it were alone.

    Up to 8 devices every placement is tried. Beyond, moves are made while one helps:
    two workers change places, or a stretch of them is reversed (2-opt on a ring). The
    search starts from the given order, a chain of nearest neighbours and four shuffles.
    Equal input gives equal output.

    Args:
        network: one device per worker.
        topology: who talks to whom, over its whole period; or the edges themselves,
            (source, target) pairs of workers, such as ``[(i, (i + 1) % n), ...]`` for
            the ring of an all-reduce.
        num_bytes: bytes of one message.
        objective: ``"slowest"`` or ``"total"``.

    Raises:
        ValueError: workers that are not as many as the devices, or another objective.

    Example (five regions: a ring in the order of the preset, and the best):
        >>> from bagua_jax import topologies
        >>> from bagua_jax.network import gossip, preset
        >>> net, ring = preset("geo", num_nodes=5), topologies.ring(5)
        >>> best = embed(net, ring, num_bytes=10e6).device_of
        >>> before, after = (gossip(net, 10e6, ring, p) for p in (None, best))
        >>> best, f"{before.seconds:.2f} s, {after.seconds:.2f} s"
        ((0, 3, 1, 2, 4), '0.85 s, 0.54 s')
    """
    rule = "embed: objective must be 'slowest' or 'total'"
    require(objective in ("slowest", "total"), rule, objective)
    n = network.num_devices
    edges, workers = _edges(topology, n)
    rule = f"embed: a network of {n} devices needs {n} workers, and edges among them"
    named = set(edges.ravel().tolist())
    require(workers == n and named <= set(range(n)), rule, (workers, sorted(named)))
    seconds = network.seconds(num_bytes)

    def score(orders: np.ndarray) -> np.ndarray:
        """Slowest edge and sum of each order, the objective first: [m, n] -> [m, 2]."""
        costs = seconds[orders[:, edges[:, 0]], orders[:, edges[:, 1]]]
        both = [costs.max(axis=1, initial=0.0), costs.sum(axis=1)]
        return np.stack(both if objective == "slowest" else both[::-1], axis=1)

    if n <= EXACT:
        every = np.array([*itertools.permutations(range(n))])
        order = every[_first(score(every))]
    else:
        rng = np.random.default_rng(0)
        shuffles = [rng.permutation(n) for _ in range(SHUFFLES)]
        starts = [np.arange(n), _chain(seconds), *shuffles]
        ends = np.array([_descend(score, start) for start in starts])
        order = ends[_first(score(ends))]
    costs = seconds[order[edges[:, 0]], order[edges[:, 1]]]
    return Placement(
        device_of=tuple(order.tolist()),
        slowest=float(costs.max(initial=0.0)),
        total=float(costs.sum()),
        exact=n <= EXACT,
    )


def _edges(topology: Any, n: int) -> tuple[np.ndarray, int]:
    """Edges [m, 2], each once and none of a worker with itself, and the workers."""
    if hasattr(topology, "steps"):
        sends = [send for step in topology.steps for send in step.sends]
        pairs, workers = [pair for send in sends for pair in send.pairs], topology.n
    else:
        pairs, workers = topology, n
    edges = sorted({(int(u), int(v)) for u, v in pairs if u != v})
    return np.array(edges, int).reshape(-1, 2), workers


def _first(scores: np.ndarray) -> int:
    """Index of the lexicographically smallest row, the first among equals."""
    return int(np.lexsort(scores.T[::-1])[0])


def _descend(
    score: Callable[[np.ndarray], np.ndarray], order: np.ndarray
) -> np.ndarray:
    """Make the best move of each worker in turn, until none has one that helps."""
    moves = [_moves(len(order), i) for i in range(len(order) - 1)]
    (now,), idle = score(order[None]), 0
    for move in itertools.cycle(moves):
        tried = order[move]
        scores = score(tried)
        best = _first(scores)
        (a, b), (c, d) = scores[best], now * (1 - 1e-12)  # rounding is no gain
        if a < c or (a <= now[0] and b < d):
            order, now, idle = tried[best], scores[best], 0
        else:
            idle += 1
        if idle == len(moves):
            break
    return order


def _moves(n: int, i: int) -> np.ndarray:
    """Orders after worker i and one behind it change places, or all in between do."""
    stay = np.arange(n)
    swaps, reversals = np.tile(stay, (2, n - 1 - i, 1))
    for row, j in enumerate(range(i + 1, n)):
        swaps[row, [i, j]] = j, i
        reversals[row, i : j + 1] = stay[i : j + 1][::-1]
    return np.concatenate([swaps, reversals])


def _chain(seconds: np.ndarray) -> np.ndarray:
    """Start at device 0 and go on to the nearest that is left."""
    order, left = [0], set(range(1, len(seconds)))
    while left:
        order.append(min(left, key=lambda j: (seconds[order[-1], j], j)))
        left.remove(order[-1])
    return np.array(order)
