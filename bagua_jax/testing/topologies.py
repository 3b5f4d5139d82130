"""What every topology promises, as checks of its matrices."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from bagua_jax import Workers, primitives
from bagua_jax.testing.base import run_all
from bagua_jax.topologies import Topology

__all__ = ["check_topology"]


def weights_are_stochastic(topology: Topology) -> None:
    """No weight is negative; rows or columns, at best both, sum to 1."""
    assert topology.row_stochastic or topology.column_stochastic, [
        topology.mixing_matrix(t).round(4).tolist() for t in range(topology.period)
    ]


def everybody_is_reached(topology: Topology) -> None:
    """The graph, over a period, is connected."""
    assert topology.connected


def pairs_are_permutations(topology: Topology) -> None:
    """No worker sends or receives twice in one message, and all are there."""
    for t, step in enumerate(topology.steps):
        for send in step.sends:
            for side in zip(*send.pairs, strict=True):
                assert len(set(side)) == len(side), f"step {t}: {send.pairs}"
                assert set(side) <= set(range(topology.n)), f"step {t}: {send.pairs}"


def mixing_is_the_matrix(topology: Topology) -> None:
    """``primitives.d_fp_s`` computes W x at every step of the period."""
    n = topology.n
    x = jax.random.normal(jax.random.key(0), (n, 5))

    def mix(x, t):
        return primitives.d_fp_s(x, topology, axis_name="workers", step=t)

    places = [Workers.simulate(n)]
    if n <= len(jax.devices()):
        places.append(Workers.devices(n))
    from jax.sharding import PartitionSpec as P

    for place in places:
        mixed = place.spmd(mix, in_specs=(place.spec, P()))
        for t in range(topology.period):
            expected = topology.mixing_matrix(t) @ np.asarray(x)
            found = jax.block_until_ready(mixed(x, jnp.int32(t)))
            np.testing.assert_allclose(found, expected, atol=1e-5)


def contraction_is_that_of_the_product(topology: Topology) -> None:
    """The stated rate is the spectral radius over one period."""
    product = np.eye(topology.n)
    for t in range(topology.period):
        product = topology.mixing_matrix(t) @ product
    values = np.sort(np.abs(np.linalg.eigvals(product)))[::-1]
    second = values[1] if topology.n > 1 else 0.0
    expected = second ** (1 / topology.period)
    # A radius that is zero comes out as a root of the rounding.
    assert abs(topology.contraction - expected) < 1e-6 or (
        topology.contraction == 0 and second < 1e-6
    ), f"stated {topology.contraction:.6g}, found {expected:.6g}"


CHECKS: dict[Callable[[Topology], None], str] = {
    weights_are_stochastic: "Divide each row, or each column, by its sum.",
    everybody_is_reached: "Add edges, or steps to the period.",
    pairs_are_permutations: "Split the edges into sends in which nobody stands twice.",
    mixing_is_the_matrix: "weights[i] is what i puts on what it receives.",
    contraction_is_that_of_the_product: "Do not override what is computed.",
}


def check_topology(topology: Topology) -> None:
    """Hold a topology to what algorithms expect of it.

    Args:
        topology: of any number of workers.

    Raises:
        AssertionError: naming every failed check, what was seen, and the cure.

    Example:
        >>> from bagua_jax import topologies
        >>> check_topology(topologies.ring(5))
    """
    run_all(
        topology.name,
        (
            (check.__name__, lambda check=check: check(topology), cure)
            for check, cure in CHECKS.items()
        ),
    )
