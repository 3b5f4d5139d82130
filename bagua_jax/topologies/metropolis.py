"""Any undirected graph with Metropolis-Hastings weights: trees, stars, drawn graphs."""

import itertools
import math
from collections.abc import Iterable
from typing import Any

import numpy as np

from bagua_jax.topologies.base import (
    Topology,
    reached,
    require_few,
    require_workers,
    weighted_step,
)

__all__ = [
    "binary_tree",
    "erdos_renyi",
    "from_edges",
    "from_networkx",
    "path",
    "star",
]

_ROWS = 256  # of a matrix at a time
_DRAWS = 1000  # of a random graph, before giving up on a connected one
_DRAWN = 2**26  # pairs of workers in all of them; ten draws of a larger graph
_LONELY = 14.0  # workers without a neighbour, expected: e^-14 of the draws has none


def from_edges(
    n: int, edges: Iterable[tuple[int, int]], *, name: str = "from_edges"
) -> Topology:
    r"""Mix over the edges of an undirected graph with Metropolis-Hastings weights.

    With :math:`d_i` the number of worker i's neighbours,

    .. math:: W_{ij} = \frac{1}{1 + \max(d_i, d_j)},
              \quad W_{ii} = 1 - \sum_{j \ne i} W_{ij}

    Each worker needs to know its neighbours' degrees only, and W is symmetric and
    doubly stochastic on any graph.

    Args:
        n: number of workers, at least 1.
        edges: pairs of workers in 0..n-1, in any order. An edge that is given twice
            counts once, and an edge from a worker to itself not at all.
        name: of the topology, and in errors.

    Returns:
        A symmetric topology of period 1. A worker sends one message to each neighbour,
        in as many rounds as the largest degree, which is the fewest that there can be.

    Raises:
        ValueError: if n < 1, an edge leaves 0..n-1, or the graph is not connected.

    References:
        Xiao, Boyd, Lall, `Distributed Average Consensus with Time-Varying Metropolis
        Weights`, 2006.

    Example:
        >>> from_edges(3, [(0, 1), (1, 2)]).mixing_matrix().round(3).tolist()
        [[0.667, 0.333, 0.0], [0.333, 0.333, 0.333], [0.0, 0.333, 0.667]]
    """
    require_workers(name, n)
    linked = np.zeros((n, n), bool)
    for edge in edges:
        i, j = edge
        if not (0 <= i < n and 0 <= j < n):
            raise ValueError(
                f"{name}: edges must join workers 0..{n - 1}, got {edge!r}. Number the "
                "workers from 0, and pass n as their number."
            )
        linked[i, j] = linked[j, i] = i != j
    if not reached(linked).all():
        raise ValueError(
            f"{name}: the graph must be connected, and these edges leave its {n} "
            "workers in parts that never hear of one another. Add edges between them."
        )
    degrees = linked.sum(0)
    weights: dict[tuple[int, int], float] = {}
    for start in range(0, n, _ROWS):  # W as a whole would be large
        i, j = np.nonzero(linked[start : start + _ROWS])
        i += start
        rows = np.zeros((min(_ROWS, n - start), n))
        rows[i - start, j] = heard = 1 / (1 + np.maximum(degrees[i], degrees[j]))
        pairs = zip(i.tolist(), j.tolist(), strict=True)
        weights |= zip(pairs, heard.tolist(), strict=True)
        own = (1 - rows.sum(1)).tolist()
        weights |= {(start + k, start + k): x for k, x in enumerate(own)}
    require_few(name, len(weights) - n)
    return Topology(name, n, (weighted_step(n, weights),))


def star(n: int) -> Topology:
    r"""Mix with the hub, worker 0; the hub with everybody.

    The Metropolis weights are :math:`W = I - L/n`, L the graph's Laplacian:

    .. math:: x_i' = x_i + \tfrac1n (x_0 - x_i), \quad
              x_0' = \tfrac1n \sum_j x_j

    Args:
        n: number of workers, at least 1.

    Returns:
        A symmetric topology of period 1. Eigenvalues: 1; 1 - 1/n, n-2 times; 0.
        Contraction 1 - 1/n for n > 2. A leaf sends one message, the hub n-1, in n-1
        rounds, for the hub can hear one worker at a time.

    Raises:
        ValueError: if n < 1.

    Example:
        >>> round(star(4).contraction, 4), star(4).messages, star(4).max_degree
        (0.75, 1.5, 3)
    """
    require_workers("star", n)
    return from_edges(n, ((0, i) for i in range(1, n)), name="star")


def path(n: int) -> Topology:
    r"""Mix with the left and the right neighbour on a line with two ends.

    .. math:: x_i' = \tfrac13 (x_{i-1} + x_i + x_{i+1}), \quad
              x_0' = \tfrac13 (2 x_0 + x_1)

    and likewise at the other end: Metropolis weights. Two workers average.

    Args:
        n: number of workers, at least 1.

    Returns:
        A symmetric topology of period 1; every worker sends two messages, an end one,
        in two rounds. Eigenvalues: (1 + 2 cos(pi k / n)) / 3 for n > 2.

    Raises:
        ValueError: if n < 1.

    Example:
        >>> round(path(8).contraction, 4)
        0.9493
    """
    require_workers("path", n)
    return from_edges(n, itertools.pairwise(range(n)), name="path")


def binary_tree(n: int) -> Topology:
    r"""Mix with the parent :math:`\lfloor (i-1)/2 \rfloor` and the two children.

    Metropolis weights: 1/4 on an edge where one end has three neighbours, 1/3 or 1/2 on
    the others.

    Args:
        n: number of workers, at least 1; they fill the tree row by row from the root,
            worker 0.

    Returns:
        A symmetric topology of period 1. A worker sends at most three messages, in
        three rounds: 2(n-1)/n on average. No closed form for its eigenvalues.

    Raises:
        ValueError: if n < 1.

    Example:
        >>> binary_tree(7).mixing_matrix()[1].round(3).tolist()
        [0.25, 0.25, 0.0, 0.25, 0.25, 0.0, 0.0]
    """
    require_workers("binary_tree", n)
    return from_edges(n, (((i - 1) // 2, i) for i in range(1, n)), name="binary_tree")


def erdos_renyi(n: int, p: float | None = None, seed: int = 0) -> Topology:
    r"""Mix over a random graph G(n, p): every edge is there with probability p.

    The graph is drawn on the host when this is called, again until it is connected, and
    is static from then on. Metropolis-Hastings weights, as in :func:`from_edges`.

    Args:
        n: number of workers, at least 1.
        p: in (0, 1]; by default :math:`\min(1, 2 \ln n / n)`, twice the threshold above
            which nearly all graphs are connected.
        seed: of the draw; the same seed gives the same graph.

    Returns:
        A symmetric topology of period 1; a worker sends as many messages as it has
        neighbours, p (n-1) on average, in as many rounds as the largest degree. No
        closed form for its eigenvalues.

    Raises:
        ValueError: if n < 1, p is outside (0, 1], or none of 1000 draws is connected.

    References:
        Erdős, Rényi, `On Random Graphs I`, 1959.

    Example:
        >>> erdos_renyi(16, 0.4, seed=1).connected
        True
    """
    require_workers("erdos_renyi", n)
    if p is None:
        p = min(1.0, 2 * math.log(n) / n) if n > 1 else 1.0
    if not 0 < p <= 1:
        raise ValueError(
            f"erdos_renyi: p must be in (0, 1], got {p}. It is the probability of an "
            "edge; leave it out for 2 ln(n)/n."
        )
    rng = np.random.default_rng(seed)
    draws = max(10, min(_DRAWS, _DRAWN // n**2))
    for _ in range(draws if n * (1 - p) ** (n - 1) < _LONELY else 0):
        rows = (min(_ROWS, n - start) for start in range(0, n, _ROWS))
        linked = np.triu(np.vstack([rng.random((k, n)) < p for k in rows]), k=1)
        if reached(linked | linked.T).all():
            require_few("erdos_renyi", 2 * int(linked.sum()))
            edges = zip(*np.nonzero(linked), strict=True)
            return from_edges(n, edges, name="erdos_renyi")
    raise ValueError(
        f"erdos_renyi: none of {draws} graphs with n={n} and p={p} is connected. "
        f"Take a larger p: above ln(n)/n = {math.log(n) / n:.3g} most are."
    )


def from_networkx(graph: Any) -> Topology:
    """Mix over the edges of a networkx graph with Metropolis-Hastings weights.

    Worker i is the i-th node in sorted order. Weights on edges are ignored, parallel
    edges count once, and self-loops not at all: see :func:`from_edges`.

    Args:
        graph: an undirected ``networkx.Graph``, connected, with nodes that sort. Only
            its nodes and edges are read, so that networkx is not needed here.

    Returns:
        A symmetric topology of period 1, as :func:`from_edges` gives it.

    Raises:
        TypeError: if it is no graph.
        ValueError: if it is directed, empty, not connected, or its nodes do not sort.

    Example:
        With networkx installed::

            topologies.from_networkx(networkx.petersen_graph())
    """
    if not all(hasattr(graph, name) for name in ("nodes", "edges", "is_directed")):
        raise TypeError(
            f"from_networkx: graph must be a networkx.Graph, got {graph!r:.80}. Use "
            "from_edges for pairs of workers, or from_matrix for weights."
        )
    if graph.is_directed():
        raise ValueError(
            "from_networkx: the graph must be undirected: Metropolis-Hastings weights "
            "need messages both ways. Pass graph.to_undirected(), or your weights to "
            "from_matrix(w, stochastic='column')."
        )
    if not graph.nodes:
        raise ValueError(
            "from_networkx: the graph must have at least one node, got an empty one."
        )
    try:
        nodes = sorted(graph.nodes)
    except TypeError as error:
        raise ValueError(
            f"from_networkx: nodes must sort, so that worker i is known: {error}. Use "
            "networkx.convert_node_labels_to_integers(graph)."
        ) from None
    number = {node: i for i, node in enumerate(nodes)}
    edges = ((number[a], number[b]) for a, b in graph.edges())
    return from_edges(len(nodes), edges, name="from_networkx")
