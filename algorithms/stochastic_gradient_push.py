"""Stochastic gradient push: gossip on directed graphs, with a mass that undoes bias."""

from typing import NamedTuple

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

__all__ = ["StochasticGradientPushState", "stochastic_gradient_push"]


class StochasticGradientPushState(NamedTuple):
    """State of :func:`stochastic_gradient_push`."""

    count: jax.Array  # [] int32, steps taken; equal on all workers
    mass: jax.Array  # [] float32, w_i, 1 at first; worker-local

    def common_model(self, params):
        """Average the parameters by mass."""
        return resizing.by_mass(params, [self.mass])

    def resized(self, like, params, workers):
        """Every worker has the same model, and mass 1."""
        del params
        (count,) = resizing.mean((self.count,), workers)
        return StochasticGradientPushState(count, jnp.ones_like(like.mass))


def stochastic_gradient_push(
    *,
    axis_name: AxisName,
    topology: str | Topology = "one_peer_exponential",
    bucket_bytes: int = buckets.DEFAULT_BUCKET_BYTES,
) -> optax.GradientTransformationExtraArgs:
    r"""Push shares of the model and of a mass along directed edges (SGP).

    Placement: weight side, last in the chain. Receives the optimizer's update u_i with
    ``params``, returns ``new_params - params`` of this worker, varying.

    Params are the de-biased z_i, where gradients are taken; with the mass w_i they make
    the biased x_i = w_i z_i. At every step, with the topology's next W, whose columns
    sum to 1:

    .. math::
        x_i = w_i z_i + u_i,\qquad x_i' = \sum_j W_{ij} x_j,\qquad
        w_i' = \sum_j W_{ij} w_j,\qquad z_i' = x_i' / w_i'

    Args:
        axis_name: the workers' axis, or ``("node", "local")``: then devices of a node
            are averaged, masses too, and nodes push.
        topology: a name, built for the axis's size at trace time, or a ``Topology``
            whose columns sum to 1; directed, rotating or neither.
        bucket_bytes: target message size in bytes (static).

    Returns:
        A transform of updates of any floating dtype; shapes and dtypes are kept.

    Raises:
        ValueError: if an argument is out of range, the topology is unknown, has columns
            that do not sum to 1, is made for another n, or not legal for this one; if
            params are missing, of another structure, not floating point, or hold no
            elements.
        NameError: if the axis is not mapped where ``update`` is called.

    Communication:
        For each bucket one collective-permute of float32 for each neighbour of the
        step; the mass rides with the first bucket, 4 bytes.

    State:
        A counter, equal on all workers, and the mass, a scalar for each. On another
        number of workers :func:`bagua_jax.resize` keeps the mean by mass of the models;
        every mass is 1.

    Theory:
        Masses add up to n, and the mass-weighted mean of z moves by the mean update.
        Without updates z comes to the mean of what workers started from, while x keeps
        the weights of W's Perron vector. On doubly stochastic W masses stay 1 and it is
        ``decentralized(combine="after")``.

    Differences from the paper:
        x is not stored but recomputed as w z: equal up to rounding.

    References:
        Assran et al., `Stochastic Gradient Push for Distributed Deep Learning`, 2019
        (arXiv 1811.10792).

    Example:
        Of everybody's model 3/4 go to worker 0: masses become 1.5 and 0.5.

        >>> shares = [[0.75, 0.75], [0.25, 0.25]]
        >>> push = topologies.from_matrix(shares, stochastic="column")
        >>> tx = stochastic_gradient_push(axis_name="workers", topology=push)
        >>> params, updates = jnp.array([[0.0], [4.0]]), jnp.zeros((2, 1))
        >>> step = lambda u, x: x + tx.update(u, tx.init(x), x)[0]
        >>> jax.vmap(step, axis_name="workers")(updates, params).ravel().tolist()
        [2.0, 2.0]
    """
    caller = "stochastic_gradient_push"
    topologies.require_known(topology, caller)
    if isinstance(topology, Topology):
        _require_columns(topology, caller)
    checks.require_at_least(caller, "bucket_bytes", bucket_bytes, 1, "It is in bytes.")

    def init_fn(params):
        checks.require_floats(params, caller)
        return StochasticGradientPushState(
            count=jnp.zeros([], jnp.int32),
            mass=primitives.worker_local(
                jnp.ones([], precision.wide_dtype(params)), axis_name
            ),
        )

    def update_fn(updates, state, params=None, **extra_args):
        del extra_args
        checks.require_weights(updates, params, axis_name, caller)
        n = primitives.num_peers(axis_name, caller)
        graph = topologies.resolve(topology, n, caller)
        _require_columns(graph, caller)
        plan = buckets.plan(params, bucket_bytes, axis_name)

        def push(v):
            return primitives.d_fp_s(v, graph, axis_name=axis_name, step=state.count)

        x = jax.tree.map(
            lambda z, u: state.mass.astype(precision.wide_dtype(z)) * z + u,
            params,
            updates,
        )
        pushed = map(push, weights.append(plan.pack(x), state.mass))
        vectors, mass = weights.detach(list(pushed), plan, state.mass)
        z = plan.unpack([v / mass for v in vectors])
        new_updates = weights.updates_to(z, params, updates)
        count = schedules.increment(state.count)
        return new_updates, StochasticGradientPushState(count, mass)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _require_columns(topology: Topology, caller: str) -> None:
    if not topology.column_stochastic:
        raise ValueError(
            f"{caller}: every column of W must sum to 1, as it holds a worker's shares "
            f"of what it pushes, and {topology.name!r} has others. Transpose W, or "
            "divide each column by its sum."
        )
