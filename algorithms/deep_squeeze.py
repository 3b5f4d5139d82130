"""DeepSqueeze: gossip on compressed models whose compression errors are fed back."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from bagua_jax import (
    buckets,
    checks,
    compatibility,
    precision,
    primitives,
    schedules,
    topologies,
)
from bagua_jax.algorithms import weights
from bagua_jax.compressors import Compressor
from bagua_jax.primitives import AxisName
from bagua_jax.renamed import takes_old_names
from bagua_jax.topologies import Topology

__all__ = ["DeepSqueezeState", "deep_squeeze"]


class DeepSqueezeState(NamedTuple):
    """State of :func:`deep_squeeze`."""

    count: jax.Array  # [] int32, steps taken; equal on all workers
    key: jax.Array  # [] typed PRNG key; equal on all workers
    error: optax.Params  # d, what compression left out; like params in float32,
    # worker-local


@takes_old_names
def deep_squeeze(
    compressor: Compressor,
    *,
    axis_name: AxisName,
    topology: str | Topology = "ring",
    consensus_step_size: float,
    bucket_bytes: int = buckets.DEFAULT_BUCKET_BYTES,
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Gossip on compressed models with error feedback (DeepSqueeze).

    Placement: weight side, last in the chain. Receives the optimizer's update u_i with
    ``params``, returns ``new_params - params`` of this worker, varying.

    .. math::
        v_i = x_i + u_i + d_i,\qquad c_i = C(v_i),\qquad d_i' = v_i - c_i,\qquad
        x_i' = x_i + u_i + \eta \Big( \sum_j W_{ij} c_j - c_i \Big)

    Args:
        compressor: C, stateless; contractive, biased or not.
        axis_name: the workers' axis, or ``("node", "local")``: then devices of a node
            are averaged and nodes gossip, each device a shard.
        topology: a name, built for the axis's size, or a ``Topology``; doubly
            stochastic and of period 1.
        consensus_step_size: eta > 0: 1 without compression, the smaller the coarser C.
        bucket_bytes: target bucket size in bytes (static).
        seed: of the key that a stochastic compressor draws from.

    Returns:
        A transform of updates of any floating dtype; shapes and dtypes are kept.

    Raises:
        ValueError: if an argument is out of range, the topology is unknown, rotates, is
            not doubly stochastic, is made for another n, or not legal for this one; if
            the compressor keeps state, or its error can exceed the vector (unbiased,
            omega >= 1); if params are missing, of another structure, not floating
            point, or hold no elements.
        NameError: if the axis is not mapped where ``update`` is called.

    Warns:
        UserWarning: once, at construction, for a compressor without a known
            contraction.

    Communication:
        For each bucket one collective-permute of the payload for each neighbour.

    State:
        One tree like params in float32, worker-local: no copies of anybody, so that a
        worker may forget it at the price of some compression error. On another number
        of workers :func:`bagua_jax.resize` keeps the mean of the errors.

    Theory:
        The mean over workers moves by the mean update alone, whatever C. It compresses
        models, not differences: C's error scales with the model, and workers agree
        only up to it. With ``identity()`` and eta = 1 it is
        ``decentralized(combine="after")``.

    References:
        Tang et al., `DeepSqueeze: Decentralization Meets Error-Compensated
        Compression`, 2019 (arXiv 1907.07346).

    Example:
        >>> from bagua_jax import compressors
        >>> tx = deep_squeeze(compressors.identity(), axis_name="workers",
        ...                   consensus_step_size=0.5)
        >>> params, updates = jnp.zeros((3, 1)), jnp.array([[6.0], [0.0], [0.0]])
        >>> step = lambda u, x: x + tx.update(u, tx.init(x), x)[0]
        >>> x = jax.vmap(step, axis_name="workers")(updates, params)
        >>> x.ravel().round(5).tolist()
        [4.0, 1.0, 1.0]
    """
    caller = "deep_squeeze"
    topologies.require_known(topology, caller)
    if isinstance(topology, Topology):
        _require_graph(topology, caller)
    checks.require_within(
        caller, "consensus_step_size", consensus_step_size, 0, open_below=True
    )
    checks.require_at_least(caller, "bucket_bytes", bucket_bytes, 1, "It is in bytes.")
    check = compatibility.require_compressor(caller, compressor, compatibility.FED_BACK)
    padding = compressor.facts.padding

    def init_fn(params):
        checks.require_floats(params, caller)
        return DeepSqueezeState(
            count=jnp.zeros([], jnp.int32),
            key=jax.random.key(seed),
            error=primitives.worker_local(precision.zeros(params), axis_name),
        )

    def update_fn(updates, state, params=None, **extra_args):
        del extra_args
        checks.require_weights(updates, params, axis_name, caller)
        n = primitives.num_peers(axis_name, caller)
        graph = topologies.resolve(topology, n, caller)
        _require_graph(graph, caller)
        mixing, peers = graph.steps[0], primitives.peer_axis(axis_name)
        plan = buckets.plan(params, bucket_bytes, axis_name)
        key = jax.random.fold_in(state.key, state.count)

        def exchange(x, error, key):
            shard = primitives.node_shard(x, axis_name, caller, padding)
            check(shard.value.shape[0])
            v = shard.value + shard.take(error)
            own, *theirs = primitives.compressed_neighbours(
                v, compressor, mixing, axis_name=peers, key=key
            )
            mixed = primitives.mix(own, tuple(theirs), mixing, axis_name=peers)
            x = shard.value + consensus_step_size * (mixed - own)
            return shard.gather(x), shard.put(v - own)

        x, error = primitives.worker_local(
            plan.map(
                exchange,
                weights.adapt(params, updates, axis_name),
                state.error,
                keys=key,
            ),
            axis_name,
        )
        new_updates = weights.updates_to(x, params, updates)
        count = schedules.increment(state.count)
        return new_updates, DeepSqueezeState(count, state.key, error)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _require_graph(topology: Topology, caller: str) -> None:
    why = "its analysis needs weights that stay"
    weights.require_static(topology, caller, why)
