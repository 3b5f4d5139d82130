"""Gradient tracking: gossip on models and on estimates of the mean gradient."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from bagua_jax import (
    buckets,
    checks,
    precision,
    primitives,
    resizing,
    schedules,
    topologies,
)
from bagua_jax.algorithms import weights
from bagua_jax.primitives import AxisName
from bagua_jax.topologies import Topology

__all__ = ["GradientTrackingState", "gradient_tracking"]


class GradientTrackingState(NamedTuple):
    """State of :func:`gradient_tracking`."""

    count: jax.Array  # [] int32, steps taken; equal on all workers
    correction: optax.Updates  # W y - g of the last step, 0 at first: what one's own
    # gradient lacks; like params, float32, worker-local; its mean over workers is 0

    def resized(self, like, params, workers):
        """Corrections, whose mean is 0, are 0."""
        del params
        (count,) = resizing.mean((self.count,), workers)
        zeros = jax.tree.map(jnp.zeros_like, like.correction)
        return GradientTrackingState(count, zeros)


def gradient_tracking(
    learning_rate: optax.ScalarOrSchedule,
    *,
    axis_name: AxisName,
    topology: str | Topology = "ring",
    bucket_bytes: int = buckets.DEFAULT_BUCKET_BYTES,
) -> optax.GradientTransformationExtraArgs:
    r"""Descend along a tracked mean gradient: no bias from heterogeneous data.

    Placement: local optimizer, alone. Receives this worker's own gradient with
    ``params``, returns a finished update of this worker, varying.

    .. math::
        y_t = W y_{t-1} + g_t - g_{t-1},\qquad x_{t+1} = W (x_t - \gamma_t\, y_t)

    with :math:`y_0 = g_0`. Also called DIGing or DSGT, here combining after adapting.

    Args:
        learning_rate: gamma; a number, or a schedule of steps already taken.
        axis_name: the workers' axis, or ``("node", "local")``: then W is that of the
            nodes times the mean inside each.
        topology: a name, built for the axis's size, or a ``Topology``; every W doubly
            stochastic. It may be directed and may rotate: the W of a step mixes both
            vectors.
        bucket_bytes: target message size in bytes (static).

    Returns:
        A transform of updates of any floating dtype; shapes and dtypes are kept. It is
        plain gradient descent: momentum, or Adam on y, would move the fixed point.

    Raises:
        ValueError: if an argument is out of range, the topology is unknown, not doubly
            stochastic, made for another n, or not legal for this one; if params are
            missing, of another structure, not floating point, or hold no elements; if
            gradients arrive already summed over the axis.
        NameError: if the axis is not mapped where ``update`` is called.

    Communication:
        Models and estimates travel together, twice what ``decentralized`` sends: for
        each bucket of both one collective-permute of float32 for each neighbour; one
        all-reduce for ``"complete"``.

    State:
        One tree like params in float32, worker-local. On another number of workers
        :func:`bagua_jax.resize` keeps that corrections add up to 0: all are 0.

    Theory:
        The mean of y is the mean of the current gradients, and the mean of x moves by
        -gamma times that. A fixed point is consensus on a model whose mean gradient is
        zero: with a constant step size and exact gradients every worker comes to the
        optimum of the mean, where ``decentralized`` stays as far off as workers differ.
        Where all have curvature h, the mode of eigenvalue lambda has the polynomial
        :math:`z^2 - \lambda (2 - \gamma h) z + \lambda (\lambda - \gamma h)` and the
        mean the factor :math:`1 - \gamma h`: stable for :math:`\gamma h < 2` where
        lambda is at least :math:`1 - \sqrt 2`, else for
        :math:`\gamma h < |\lambda|^{-1} - |\lambda|`.

    Differences from the papers:
        They combine before adapting (:math:`x' = W x - \gamma y`), which has another
        polynomial. Instead of y and the last gradient one tree is kept, W y - g.

    References:
        Nedic, Olshevsky and Shi, `Achieving Geometric Convergence for Distributed
        Optimization over Time-Varying Graphs`, 2017 (arXiv 1607.03218). Pu and Nedic,
        `Distributed Stochastic Gradient Tracking Methods`, 2018.

    Example:
        >>> tx = gradient_tracking(1.0, axis_name="workers", topology="complete")
        >>> params, grads = jnp.array([[0.0], [4.0]]), jnp.array([[2.0], [0.0]])
        >>> step = lambda g, x: x + tx.update(g, tx.init(x), x)[0]
        >>> jax.vmap(step, axis_name="workers")(grads, params).ravel().tolist()
        [1.0, 1.0]
    """
    caller = "gradient_tracking"
    topologies.require_known(topology, caller)
    if isinstance(topology, Topology):
        weights.require_doubly_stochastic(topology, caller)
    checks.require_at_least(caller, "bucket_bytes", bucket_bytes, 1, "It is in bytes.")

    def init_fn(params):
        checks.require_floats(params, caller)
        zeros = precision.zeros(params)
        return GradientTrackingState(
            count=jnp.zeros([], jnp.int32),
            correction=primitives.worker_local(zeros, axis_name),
        )

    def update_fn(updates, state, params: Any = None, **extra_args):
        del extra_args
        checks.require_weights(updates, params, axis_name, caller)
        primitives.require_local(updates, axis_name, caller)
        n = primitives.num_peers(axis_name, caller)
        graph = topologies.resolve(topology, n, caller)
        weights.require_doubly_stochastic(graph, caller)
        rate = learning_rate(state.count) if callable(learning_rate) else learning_rate

        grads = precision.wide(updates)
        y = optax.tree.add(state.correction, grads)
        step = optax.tree.scale(jnp.negative(rate), y)
        adapted = weights.adapt(params, step, axis_name)
        both = (adapted, y)
        plan = buckets.plan(both, bucket_bytes, axis_name)
        x, mixed = plan.unpack(
            [
                primitives.d_fp_s(v, graph, axis_name=axis_name, step=state.count)
                for v in plan.pack(both)
            ]
        )
        new_updates = weights.updates_to(x, params, updates)
        return new_updates, GradientTrackingState(
            count=schedules.increment(state.count),
            correction=optax.tree.sub(mixed, grads),
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
