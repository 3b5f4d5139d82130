"""How hard each link compresses: hardest where the network is slowest."""

import math
from collections.abc import Sequence

from bagua_jax.network.base import Network, require, require_at_least

__all__ = ["topk_per_edge"]


def topk_per_edge(
    network: Network,
    edges: Sequence[tuple[int, int]],
    num_elements: int,
    ratio: float,
    *,
    value_bytes: int = 4,
    index_bytes: int = 4,
) -> dict[tuple[int, int], int]:
    r"""Choose how many entries each edge of a gossip sends.

    .. math::
        k_e = \Big\lfloor \frac{d}{\rho\, r_e} \Big\rfloor, \qquad
        r_e = r\, \frac{R_e}{\max_f R_f}, \qquad
        \rho = \frac{\text{value and index bytes}}{\text{value bytes}}

    R is the predicted time of the dense message, alone. An edge with r_e <= 1 stays
    dense, k = d, and so does one whose sparse message would not be smaller. The slowest
    edge sends 1/r of the dense bytes; a faster one sends more, and without latencies
    takes no longer than the slowest does. So the step takes as long as with the ratio r
    on all edges, and less is lost.

    A permutation is one collective, with one shape: edges of different k belong in
    permutations of their own, or share the smallest k.

    Args:
        network: the network.
        edges: (source, target) devices.
        num_elements: d, entries of a dense message; at least 1.
        ratio: r, by which the slowest edge's bytes shrink; at least 1.
        value_bytes: of an entry; at least 1.
        index_bytes: of its position; 0 where both ends know it.

    Returns:
        k of each edge, an integer in [1, d].

    Raises:
        ValueError: a number outside its range, or edges that are not of this network.

    Differences from the paper: the idea is FusionLLM's AdaTopK. Its formula is known to
    us from memory only, unconfirmed: 3 r R_e / max R, for 32-bit values with 64-bit
    indices (rho = 3), dense where that is at most 1. Between 1 and rho its sparse
    messages would be larger than dense ones; such edges stay dense here.

    Example (one edge ten times slower than the other):
        >>> net = Network.from_matrices([[0] * 3] * 3, [[1, 10, 1]] * 3)
        >>> topk_per_edge(net, [(0, 1), (0, 2)], num_elements=1000, ratio=100)
        {(0, 1): 50, (0, 2): 5}

    References: Tang et al., `FusionLLM`, arXiv 2410.12707, 2024.
    """
    caller = "topk_per_edge"
    require_at_least(caller, "num_elements", num_elements, 1)
    require_at_least(caller, "ratio", ratio, 1)
    require_at_least(caller, "value_bytes", value_bytes, 1)
    require_at_least(caller, "index_bytes", index_bytes, 0)
    devices = range(network.num_devices)
    valid = all(u in devices and v in devices and u != v for u, v in edges)
    rule = f"{caller}: edges must join two of {len(devices)} devices"
    require(valid, rule, list(edges))

    entry, dense = value_bytes + index_bytes, value_bytes * num_elements
    seconds = network.seconds(dense)
    slowest = max((seconds[edge] for edge in edges), default=0.0)
    chosen = {}
    for edge in edges:
        shrink = ratio * seconds[edge] / slowest if slowest > 0 else 1.0
        sparse = max(1, math.floor(dense / (entry * shrink)))
        smaller = shrink > 1 and sparse * entry < dense
        chosen[edge] = sparse if smaller else num_elements
    return chosen
