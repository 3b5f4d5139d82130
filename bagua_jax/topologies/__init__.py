"""Who talks to whom: mixing matrices made of static permutations."""

import difflib

from bagua_jax.topologies.base import MixingStep, Send, Topology
from bagua_jax.topologies.base_k import base_k
from bagua_jax.topologies.complete import complete
from bagua_jax.topologies.exponential import one_peer_exponential, static_exponential
from bagua_jax.topologies.grids import hypercube, torus
from bagua_jax.topologies.matrix import from_matrix
from bagua_jax.topologies.metropolis import (
    binary_tree,
    erdos_renyi,
    from_edges,
    from_networkx,
    path,
    star,
)
from bagua_jax.topologies.random_matching import random_matching
from bagua_jax.topologies.ring import directed_ring, ring
from bagua_jax.topologies.shift_one import shift_one

__all__ = [
    "REGISTRY",
    "MixingStep",
    "Send",
    "Topology",
    "base_k",
    "binary_tree",
    "complete",
    "directed_ring",
    "erdos_renyi",
    "from_edges",
    "from_matrix",
    "from_networkx",
    "hypercube",
    "one_peer_exponential",
    "path",
    "random_matching",
    "require_known",
    "resolve",
    "ring",
    "shift_one",
    "star",
    "static_exponential",
    "torus",
]

REGISTRY = {
    "ring": ring,
    "complete": complete,
    "static_exponential": static_exponential,
    "one_peer_exponential": one_peer_exponential,
    "shift_one": shift_one,
    "directed_ring": directed_ring,
    "path": path,
    "star": star,
    "binary_tree": binary_tree,
    "torus": torus,
    "hypercube": hypercube,
    "base_k": base_k,
    "random_matching": random_matching,
    "erdos_renyi": erdos_renyi,
}
"""Every topology by name: what configs may say and what the tests walk over."""


def require_known(topology: str | Topology, caller: str) -> None:
    """Refuse what is neither a ``Topology`` nor the name of one.

    Raises:
        ValueError: naming the nearest valid names.
    """
    if isinstance(topology, Topology):
        return
    if isinstance(topology, str) and topology in REGISTRY:
        return
    if hasattr(topology, "is_directed") or hasattr(topology, "__array__"):
        is_graph = hasattr(topology, "is_directed")
        raise ValueError(
            f"{caller}: topology must be a Topology or a name, got a "
            f"{type(topology).__name__}. Pass bagua_jax.topologies."
            f"{'from_networkx(graph)' if is_graph else 'from_matrix(W)'}."
        )
    near = difflib.get_close_matches(str(topology), REGISTRY, n=3, cutoff=0.4)
    raise ValueError(
        f"{caller}: topology must be a Topology or one of {', '.join(REGISTRY)}; got "
        f"{topology!r}." + (f" Did you mean {' or '.join(near)}?" if near else "")
    )


def resolve(topology: str | Topology, n: int, caller: str) -> Topology:
    """Build a topology named by a string for n workers; check one that is given.

    Args:
        topology: a name in ``REGISTRY``, or a ``Topology``.
        n: number of workers on the axis.
        caller: named in errors.

    Returns:
        A topology of n workers.

    Raises:
        ValueError: for an unknown name, an n that the topology does not allow, or a
            ``Topology`` made for another number of workers.
    """
    require_known(topology, caller)
    if isinstance(topology, str):
        return REGISTRY[topology](n)
    if topology.n != n:
        raise ValueError(
            f"{caller}: the topology {topology.name!r} was made for n={topology.n} "
            f"workers, and the axis has {n}. Make it for {n}, or pass its name."
        )
    return topology
