"""What weight-side algorithms share: the step before an exchange, and what follows."""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import optax

from bagua_jax import buckets, primitives
from bagua_jax.compressors import Compressor
from bagua_jax.primitives import AxisName, Errors
from bagua_jax.topologies import Topology

__all__ = [
    "adapt",
    "average",
    "compressed_average",
    "correct",
    "mix",
    "outer_step",
    "private",
    "require_doubly_stochastic",
    "require_static",
    "updates_to",
]


def private(params: Any, axis_name: AxisName) -> Any:
    """Copy a tree in float32, declared as each worker's own; for states."""
    return primitives.worker_local(optax.tree.cast(params, jnp.float32), axis_name)


def adapt(params: Any, updates: Any, axis_name: AxisName) -> Any:
    """Step on one's own: x_i + u_i in float32, each worker's own."""
    x = jax.tree.map(
        lambda x, u: x.astype(jnp.float32) + u.astype(jnp.float32), params, updates
    )
    return primitives.worker_local(x, axis_name)


def updates_to(x: Any, params: Any, updates: Any) -> Any:
    """Give the updates that move ``params`` to ``x``, in the dtypes of ``updates``."""
    return optax.tree.cast_like(optax.tree.sub(x, params), updates)


def average(x: Any, plan: buckets.Plan, axis_name: AxisName) -> Any:
    """Average a tree over the workers, one all-reduce a bucket; typed as varying."""
    means = [primitives.c_fp_s(v, axis_name=axis_name) for v in plan.pack(x)]
    return primitives.worker_local(plan.unpack(means), axis_name)


def compressed_average(
    x: Any,
    errors: Errors,
    plan: buckets.Plan,
    compressor: Compressor | None,
    key: jax.Array,
    axis_name: AxisName,
) -> tuple[Any, Errors]:
    """Average a tree by ScatterReduce of compressed buckets, or exactly with none.

    Args:
        x: this worker's tree.
        errors: what earlier messages left unsent, trees like x or ``None``.
        plan: of x.
        compressor: stateless; ``None`` averages exactly.
        key: equal on all workers.
        axis_name: the workers' axis.

    Returns:
        The mean and the errors, typed as varying.
    """
    if compressor is None:
        return average(x, plan, axis_name), errors
    bucket_keys = (jax.random.fold_in(key, b) for b in itertools.count())

    def exchange(move, worker, owner):
        mean, left = primitives.c_lp_s(
            move,
            compressor,
            Errors(worker, owner),
            axis_name=axis_name,
            key=next(bucket_keys),
        )
        return mean, *left

    mean, *left = plan.map(exchange, x, *errors)
    return primitives.worker_local((mean, Errors(*left)), axis_name)


def outer_step(
    anchor: Any, velocity: Any, gradient: Any, rate: float, momentum: float
) -> tuple[Any, Any]:
    """Step by Nesterov's rule: v' = beta v + D, theta' = theta - eta (D + beta v')."""
    velocity = jax.tree.map(lambda v, d: momentum * v + d, velocity, gradient)
    anchor = jax.tree.map(
        lambda a, d, v: a - rate * (d + momentum * v), anchor, gradient, velocity
    )
    return anchor, velocity


def mix(x: Any, plan: buckets.Plan, topology: Topology, axis_name: AxisName) -> Any:
    """Mix a tree with neighbours along a graph of period 1, bucket by bucket."""
    mixed = [primitives.d_fp_s(v, topology, axis_name=axis_name) for v in plan.pack(x)]
    return plan.unpack(mixed)


def correct(adapted: Any, params: Any, previous: Any) -> Any:
    r"""Add what the last exchange changed: :math:`\psi + x - \psi^{\text{old}}`."""
    return jax.tree.map(lambda psi, x, old: psi + (x - old), adapted, params, previous)


def require_doubly_stochastic(topology: Topology, caller: str) -> None:
    """Refuse a graph that moves the mean; it may rotate, and be directed."""
    if not topology.doubly_stochastic:
        raise ValueError(
            f"{caller}: rows and columns of W must sum to 1, or the mean drifts, and "
            f"those of {topology.name!r} do not. Use 'ring' or 'one_peer_exponential', "
            "or 'stochastic_gradient_push' for such graphs."
        )


def require_static(
    topology: Topology, caller: str, why: str, *, symmetric: bool = False
) -> None:
    """Refuse a graph that rotates, moves the mean, or (on wish) is directed.

    Args:
        topology: the graph.
        caller: named in the error.
        why: what needs it, a clause that ends in a colon's place.
        symmetric: whether W must equal its transpose.

    Raises:
        ValueError: naming the topology and ones to use.
    """
    faults = [
        (topology.period != 1, "rotates"),
        (not topology.doubly_stochastic, "is not doubly stochastic"),
        (symmetric and not topology.symmetric, "is directed"),
    ]
    for fault, word in faults:
        if fault:
            raise ValueError(
                f"{caller}: {why}; {topology.name!r} {word}. Use 'ring' or 'complete', "
                "or 'decentralized' or 'stochastic_gradient_push' for such graphs."
            )
