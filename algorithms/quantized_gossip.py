"""Quantized gossip: models sent compressed as they are, which does not converge."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from bagua_jax import buckets, checks, compatibility, primitives, schedules, topologies
from bagua_jax.algorithms import weights
from bagua_jax.compressors import Compressor
from bagua_jax.primitives import AxisName
from bagua_jax.topologies import Topology

__all__ = ["QuantizedGossipState", "quantized_gossip"]


class QuantizedGossipState(NamedTuple):
    """State of :func:`quantized_gossip`."""

    count: jax.Array  # [] int32, steps taken; equal on all workers
    key: jax.Array  # [] typed PRNG key; equal on all workers


def quantized_gossip(
    compressor: Compressor,
    *,
    axis_name: AxisName,
    topology: str | Topology = "ring",
    bucket_bytes: int = buckets.DEFAULT_BUCKET_BYTES,
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Mix compressed models: the naive baseline, which stalls at the models' error.

    Placement: weight side, last in the chain. Receives the optimizer's update u_i with
    ``params``, returns ``new_params - params`` of this worker, varying.

    .. math::
        x_i' = \sum_j W_{ij}\, C(x_j + u_j)

    A baseline to compare with: use ``choco_sgd``, ``low_precision_decentralized`` or
    ``moniqua``, which send differences.

    Args:
        compressor: C, stateless.
        axis_name: the workers' axis, or ``("node", "local")``: then devices of a node
            are averaged and nodes mix, each device a shard.
        topology: a name, built for the axis's size, or a ``Topology``.
        bucket_bytes: target bucket size in bytes (static).
        seed: of the key that a stochastic compressor draws from.

    Returns:
        A transform of updates of any floating dtype; shapes and dtypes are kept.

    Raises:
        ValueError: if an argument is out of range, the topology is unknown, made for
            another n, or not legal for this one; if the compressor keeps state; if
            params are missing, of another structure, not floating point, or hold no
            elements.
        NameError: if the axis is not mapped where ``update`` is called.

    Warns:
        UserWarning: once, at construction, for a compressor of more than small error.

    Communication:
        For each bucket one collective-permute of the payload for each neighbour.

    State: a counter and a key, equal on all workers.

    Theory:
        With unbiased errors of variance v an element on every step, the variance of the
        mean model grows by v/n an element and step, and the squared distances from it
        add up to :math:`v \sum_{k \ge 2} \lambda_k^2 / (1 - \lambda_k^2)` an
        element, however small the step size. Relative errors, such as those of norms
        and top-k, are relative to the model, not to a difference that vanishes.
        ``identity()`` makes it ``decentralized(combine="after")``.

    References:
        The schemes that do not converge in Koloskova et al., `Decentralized Stochastic
        Optimization and Gossip Algorithms with Compressed Communication`, 2019 (arXiv
        1902.00340). The primitive is D_LP_S of Gan et al., BAGUA, 2021.

    Example:
        >>> from bagua_jax import compressors
        >>> tx = quantized_gossip(compressors.cast("bfloat16"), axis_name="workers")
        >>> params, updates = jnp.zeros((3, 2)), jnp.array([[3.0, 1.3]] * 3)
        >>> step = lambda u, x: x + tx.update(u, tx.init(x), x)[0]
        >>> jax.vmap(step, axis_name="workers")(updates, params)[0].tolist()
        [3.0, 1.296875]
    """
    caller = "quantized_gossip"
    topologies.require_known(topology, caller)
    checks.require_at_least(caller, "bucket_bytes", bucket_bytes, 1, "It is in bytes.")
    compatibility.require_compressor(caller, compressor, compatibility.CARRIED)

    def init_fn(params):
        checks.require_floats(params, caller)
        return QuantizedGossipState(jnp.zeros([], jnp.int32), jax.random.key(seed))

    def update_fn(updates, state, params=None, **extra_args):
        del extra_args
        checks.require_weights(updates, params, axis_name, caller)
        n = primitives.num_peers(axis_name, caller)
        graph = topologies.resolve(topology, n, caller)
        plan = buckets.plan(params, bucket_bytes, axis_name)
        key = jax.random.fold_in(state.key, state.count)

        def exchange(v, key):
            where = {"axis_name": axis_name, "step": state.count, "key": key}
            return (primitives.d_lp_s(v, compressor, graph, **where),)

        x = weights.adapt(params, updates, axis_name)
        (mixed,) = plan.map(exchange, x, keys=key)
        new_updates = weights.updates_to(mixed, params, updates)
        count = schedules.increment(state.count)
        return new_updates, QuantizedGossipState(count, state.key)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
