"""What weight-side algorithms share: the step before an exchange, and what follows."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from bagua_jax import buckets, precision, primitives
from bagua_jax.algorithms.feedback import scatter_reduce
from bagua_jax.compressors import Compressor
from bagua_jax.primitives import AxisName, Errors
from bagua_jax.topologies import Topology

__all__ = [
    "adapt",
    "append",
    "average",
    "compressed_average",
    "correct",
    "detach",
    "mix",
    "outer_step",
    "private",
    "require_doubly_stochastic",
    "require_static",
    "updates_to",
]


def private(params: Any, axis_name: AxisName) -> Any:
    """Copy a tree in float32 or wider, declared as each worker's own; for states."""
    return primitives.worker_local(precision.copy(params), axis_name)


def adapt(params: Any, updates: Any, axis_name: AxisName) -> Any:
    """Step on one's own: x_i + u_i in float32 or wider, each worker's own."""
    x = optax.tree.add(precision.wide(params), precision.wide(updates))
    return primitives.worker_local(x, axis_name)


def updates_to(x: Any, params: Any, updates: Any) -> Any:
    """Return updates that move ``params`` to ``x``, in the dtypes of ``updates``."""
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
    check: Callable[[int], None] = lambda d: None,
) -> tuple[Any, Errors]:
    """Average a tree by ScatterReduce of compressed buckets, or exactly with none.

    Args:
        x: this worker's tree.
        errors: what earlier messages left unsent, trees like x or ``None``.
        plan: of x.
        compressor: stateless; ``None`` averages exactly.
        key: equal on all workers.
        axis_name: the workers' axis.
        check: refuses a length of the vectors that are compressed.

    Returns:
        The mean and the errors, typed as varying.
    """
    if compressor is None:
        return average(x, plan, axis_name), errors
    averaged = scatter_reduce(
        x, errors, plan, compressor, axis_name=axis_name, key=key, check=check
    )
    return primitives.worker_local(averaged, axis_name)


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


def append(vectors: Sequence[jax.Array], number: jax.Array) -> list[jax.Array]:
    """Let a number ride along with buckets: at the end of one that varies no more.

    Args:
        vectors: of a plan.
        number: [] of this worker.

    Returns:
        The vectors, one of them longer; or one more where all vary over further axes,
        such as one of experts, along which the number is equal.
    """
    place = _place(vectors, number)
    return [
        jnp.append(vector, number) if bucket == place else vector
        for bucket, vector in enumerate((*vectors, number[None][:0]))
        if bucket < len(vectors) or bucket == place
    ]


def detach(
    vectors: Sequence[jax.Array], plan: buckets.Plan, number: jax.Array
) -> tuple[list[jax.Array], jax.Array]:
    """Take apart what :func:`append` put together: the vectors, and the number."""
    sizes = (*plan.sizes, 0)
    (place,) = (b for b, v in enumerate(vectors) if v.shape[0] > sizes[b])
    apart = [v[:size] for v, size in zip(vectors, plan.sizes, strict=False)]
    return apart, vectors[place][-1]


def _place(vectors: Sequence[jax.Array], number: jax.Array) -> int:
    axes = primitives.varying_axes(number)
    fits = (b for b, v in enumerate(vectors) if primitives.varying_axes(v) <= axes)
    return next(fits, len(vectors))


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
