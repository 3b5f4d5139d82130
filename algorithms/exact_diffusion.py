"""Exact diffusion: gossip with a memory that removes the bias of heterogeneity."""

from typing import NamedTuple

import jax
import optax

from bagua_jax import buckets, checks, primitives, topologies
from bagua_jax.algorithms import weights
from bagua_jax.primitives import AxisName
from bagua_jax.topologies import Topology

__all__ = ["ExactDiffusionState", "exact_diffusion"]


class ExactDiffusionState(NamedTuple):
    """State of :func:`exact_diffusion`."""

    adapted: optax.Params  # psi of the last step, x_0 at first; like params in float32,
    # worker-local


def exact_diffusion(
    *,
    axis_name: AxisName,
    topology: str | Topology = "ring",
    bucket_bytes: int = buckets.DEFAULT_BUCKET_BYTES,
) -> optax.GradientTransformationExtraArgs:
    r"""Adapt, correct by the last step, combine: no bias from heterogeneous data.

    Placement: weight side, last in the chain. Receives the optimizer's update u_i with
    ``params``, returns ``new_params - params`` of this worker, varying.

    .. math::
        \psi_i = x_i + u_i,\qquad \phi_i = \psi_i + x_i - \psi_i^{\text{old}},\qquad
        x_i' = \sum_j \tfrac12 (I + W)_{ij}\, \phi_j

    with :math:`\psi^{\text{old}} = x_0` at first.

    Args:
        axis_name: the workers' axis, or ``("node", "local")``: then W is that of the
            nodes times the mean inside each.
        topology: a name, built for the axis's size, or a ``Topology``; symmetric,
            doubly stochastic and of period 1.
        bucket_bytes: target message size in bytes (static).

    Returns:
        A transform of updates of any floating dtype; shapes and dtypes are kept. All
        workers must start from equal params.

    Raises:
        ValueError: if an argument is out of range, the topology is unknown, rotates, is
            not symmetric, is made for another n, or not legal for this one; if params
            are missing, of another structure, not floating point, or hold no elements.
        NameError: if the axis is not mapped where ``update`` is called.

    Communication:
        For each bucket one collective-permute of float32 for each neighbour; one
        all-reduce for ``"complete"``: what ``decentralized`` sends.

    State:
        One tree like params in float32, worker-local. On another number of workers
        :func:`bagua_jax.resize` keeps the mean of the memories: the correction begins
        anew.

    Theory:
        The mean over workers moves by the mean update. A fixed point is consensus on a
        model whose mean update is zero: with a constant step size and exact gradients
        every worker comes to the optimum of the mean, where ``decentralized`` stays as
        far off as workers differ. Halfway to I, no eigenvalue of W is too small. The
        memory keeps rounding errors of float32 as well: where no gradient pulls back,
        the mean drifts by some 1e-5 in 60 steps, and faster later.

    References:
        Yuan et al., `Exact Diffusion for Distributed Optimization and Learning`, 2017
        (arXiv 1702.05122).

    Example:
        >>> import jax.numpy as jnp
        >>> tx = exact_diffusion(axis_name="workers", topology="complete")
        >>> params, updates = jnp.array([[0.0], [4.0]]), jnp.array([[2.0], [0.0]])
        >>> step = lambda u, x: x + tx.update(u, tx.init(x), x)[0]
        >>> jax.vmap(step, axis_name="workers")(updates, params).ravel().tolist()
        [2.5, 3.5]
    """
    caller = "exact_diffusion"
    topologies.require_known(topology, caller)
    if isinstance(topology, Topology):
        _require_graph(topology, caller)
    checks.require_at_least(caller, "bucket_bytes", bucket_bytes, 1, "It is in bytes.")

    def init_fn(params):
        checks.require_floats(params, caller)
        return ExactDiffusionState(weights.private(params, axis_name))

    def update_fn(updates, state, params=None, **extra_args):
        del extra_args
        checks.require_weights(updates, params, axis_name, caller)
        n = primitives.num_peers(axis_name, caller)
        graph = topologies.resolve(topology, n, caller)
        _require_graph(graph, caller)
        plan = buckets.plan(params, bucket_bytes, axis_name)

        adapted = weights.adapt(params, updates, axis_name)
        corrected = weights.correct(adapted, params, state.adapted)
        mixed = weights.mix(corrected, plan, graph, axis_name)
        x = jax.tree.map(lambda c, m: (c + m) / 2, corrected, mixed)
        new_updates = weights.updates_to(x, params, updates)
        return new_updates, ExactDiffusionState(adapted)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _require_graph(topology: Topology, caller: str) -> None:
    why = "the memory of one step needs a symmetric W that stays"
    weights.require_static(topology, caller, why, symmetric=True)
