"""Quasi-global momentum: a heavy ball that follows the mixed model, not one's own."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from bagua_jax import buckets, checks, precision, primitives, schedules, topologies
from bagua_jax.algorithms import weights
from bagua_jax.primitives import AxisName
from bagua_jax.topologies import Topology

__all__ = ["QuasiGlobalMomentumState", "quasi_global_momentum"]


class QuasiGlobalMomentumState(NamedTuple):
    """State of :func:`quasi_global_momentum`."""

    count: jax.Array  # [] int32, steps taken; equal on all workers
    direction: optax.Updates  # m_hat, in units of gradients, 0 at first; like params in
    # float32, worker-local


def quasi_global_momentum(
    learning_rate: optax.ScalarOrSchedule,
    *,
    axis_name: AxisName,
    topology: str | Topology = "ring",
    momentum: float = 0.9,
    smoothing: float = 0.9,
    bucket_bytes: int = buckets.DEFAULT_BUCKET_BYTES,
) -> optax.GradientTransformationExtraArgs:
    r"""Add momentum taken from how the mixed model moves, then mix (QG-DSGDm).

    Placement: weight side, last in the chain, behind plain ``optax.sgd(learning_rate)``
    without momentum. Receives the update u_i with ``params``, returns
    ``new_params - params`` of this worker, varying.

    Momentum of local gradients pulls each worker to its own optimum; the moves of the
    mixed model contain what neighbours do:

    .. math::
        x_i^{1/2} &= x_i + u_i - \gamma \beta\, \hat m_i,\qquad
        x_i' = \sum_j W_{ij}\, x_j^{1/2}

        \hat m_i &\leftarrow \mu\, \hat m_i + (1 - \mu)\, \frac{x_i - x_i'}{\gamma}

    Args:
        learning_rate: gamma of the optimizer before it, a number or a schedule of steps
            already taken; the direction is kept in units of gradients, so that it
            outlives a fall. A step of rate 0 leaves no trace in it.
        axis_name: the workers' axis, or ``("node", "local")``: then devices of a node
            are averaged and nodes mix.
        topology: a name, built for the axis's size at trace time, or a ``Topology``;
            doubly stochastic; it may rotate.
        momentum: beta in [0, 1), the share of the direction in a step.
        smoothing: mu in [0, 1), of the direction; the paper takes beta.
        bucket_bytes: target message size in bytes (static).

    Returns:
        A transform of updates of any floating dtype; shapes and dtypes are kept.

    Raises:
        ValueError: if an argument is out of range, the topology is unknown, not doubly
            stochastic, is made for another n, or not legal for this one; if params are
            missing, of another structure, not floating point, or hold no elements.
        NameError: if the axis is not mapped where ``update`` is called.

    Communication:
        For each bucket one collective-permute of float32 for each neighbour of the
        step: what ``decentralized`` sends.

    State:
        A counter, and one tree like params in float32, worker-local. On another number
        of workers :func:`bagua_jax.resize` keeps the mean of the directions.

    Theory:
        One worker has :math:`\hat m \leftarrow (\mu + \beta - \mu \beta) \hat m +
        (1 - \mu) g`: quasi-hyperbolic momentum, of discount
        :math:`\mu + \beta - \mu \beta` and total step :math:`\gamma / (1 - \beta)`.
        With mu = 0 that is the heavy ball, ``optax.sgd(learning_rate, beta)``. For any
        W the mean over workers moves as that one worker would with the mean update.
        ``momentum=0`` is ``decentralized(combine="after")``.

    Differences from the paper:
        Its heavy-ball form; the Nesterov form is left out.

    References:
        Lin et al., `Quasi-Global Momentum: Accelerating Decentralized Deep Learning on
        Heterogeneous Data`, 2021 (arXiv 2102.04761). Ma, Yarats, `Quasi-hyperbolic
        momentum and Adam for deep learning`, 2019, for one worker.

    Example:
        Both workers go on where their mean went, though only one has a gradient.

        >>> tx = quasi_global_momentum(axis_name="workers", learning_rate=1.0,
        ...                            topology="complete", momentum=0.5, smoothing=0.0)
        >>> def two_steps(u):
        ...     x, state = jnp.zeros_like(u), tx.init(jnp.zeros_like(u))
        ...     for u in (u, jnp.zeros_like(u)):
        ...         updates, state = tx.update(u, state, x)
        ...         x = x + updates
        ...     return x
        >>> jax.vmap(two_steps, axis_name="workers")(jnp.array([4.0, 0.0])).tolist()
        [3.0, 3.0]
    """
    caller = "quasi_global_momentum"
    topologies.require_known(topology, caller)
    if isinstance(topology, Topology):
        weights.require_doubly_stochastic(topology, caller)
    if not callable(learning_rate):
        checks.require_within(
            caller, "learning_rate", learning_rate, 0, open_below=True
        )
    checks.require_within(caller, "momentum", momentum, 0, 1)
    checks.require_within(caller, "smoothing", smoothing, 0, 1)
    checks.require_at_least(caller, "bucket_bytes", bucket_bytes, 1, "It is in bytes.")

    def init_fn(params):
        checks.require_floats(params, caller)
        return QuasiGlobalMomentumState(
            count=jnp.zeros([], jnp.int32),
            direction=primitives.worker_local(precision.zeros(params), axis_name),
        )

    def update_fn(updates, state, params=None, **extra_args):
        del extra_args
        checks.require_weights(updates, params, axis_name, caller)
        n = primitives.num_peers(axis_name, caller)
        graph = topologies.resolve(topology, n, caller)
        weights.require_doubly_stochastic(graph, caller)
        plan = buckets.plan(params, bucket_bytes, axis_name)
        rate = learning_rate(state.count) if callable(learning_rate) else learning_rate
        per_rate = jnp.where(rate == 0, 0.0, 1 / jnp.where(rate == 0, 1.0, rate))

        half = jax.tree.map(
            lambda x, m: x - rate * momentum * m,
            weights.adapt(params, updates, axis_name),
            state.direction,
        )
        mixed = plan.unpack(
            [
                primitives.d_fp_s(v, graph, axis_name=axis_name, step=state.count)
                for v in plan.pack(half)
            ]
        )
        direction = jax.tree.map(
            lambda m, x, y: smoothing * m + (1 - smoothing) * per_rate * (x - y),
            state.direction,
            weights.private(params, axis_name),
            mixed,
        )
        new_updates = weights.updates_to(mixed, params, updates)
        count = schedules.increment(state.count)
        return new_updates, QuasiGlobalMomentumState(count, direction)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
