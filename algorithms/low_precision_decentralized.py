"""Low-precision decentralized training: compressed differences between neighbours."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from bagua_jax import (
    buckets,
    checks,
    compatibility,
    primitives,
    resizing,
    schedules,
    topologies,
)
from bagua_jax.algorithms import weights
from bagua_jax.compressors import Compressor, minmax_uint8
from bagua_jax.primitives import AxisName
from bagua_jax.renamed import takes_old_names
from bagua_jax.topologies import Topology

__all__ = ["LowPrecisionDecentralizedState", "low_precision_decentralized"]


class LowPrecisionDecentralizedState(NamedTuple):
    """State of :func:`low_precision_decentralized`."""

    count: jax.Array  # [] int32, steps taken; equal on all workers
    key: jax.Array  # [] typed PRNG key; equal on all workers
    replicas: tuple[optax.Params, ...]  # this worker's public model, then a neighbour's
    # for each send of the topology; like params in float32, worker-local

    def resized(self, like, params, workers):
        """Every copy is the mean of the public models; as many as there are now."""
        del params
        count, key, public = resizing.mean(
            (self.count, self.key, self.replicas[0]), workers
        )
        return LowPrecisionDecentralizedState(
            count, key, (public,) * len(like.replicas)
        )


@takes_old_names
def low_precision_decentralized(
    compressor: Compressor = minmax_uint8(),  # noqa: B008  (immutable)
    *,
    axis_name: AxisName,
    topology: str | Topology = "ring",
    local_steps: int = 1,
    bucket_bytes: int = buckets.DEFAULT_BUCKET_BYTES,
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Mix with neighbours by compressed differences against replicas (DCD-PSGD).

    Placement: weight side, last in the chain. Receives the optimizer's update u_i with
    ``params``, returns ``new_params - params`` of this worker, varying.

    Every worker holds its public model :math:`\hat x_i` and a replica of each
    neighbour's, all starting at the common x_0. On steps 0, H, 2H, ...:

    .. math::
        z_i &= (x_i + u_i) + \sum_j W_{ij} \hat x_j - 2 \hat x_i,\quad q_i = C(z_i)

        \hat x_j &\leftarrow \hat x_j + q_j \ \text{ for } j = i \text{ and its
        neighbours},\qquad x_i' = \hat x_i

    On the ring with weights 1/3 that is the original's
    :math:`z = x + \tfrac13 L + \tfrac13 R - \tfrac53 w`. Replicas are updated with what
    was sent, so that a worker's copy of a neighbour equals the neighbour's own.

    Args:
        compressor: stateless; one range or norm for each bucket.
        axis_name: the workers' axis, or ``("node", "local")``: then devices of a node
            are averaged and nodes mix, each device a shard.
        topology: a name, built for the axis's size, or a ``Topology``; symmetric and
            of period 1.
        local_steps: H, at least 1; static.
        bucket_bytes: target bucket size in bytes (static).
        seed: of the key that a stochastic compressor draws from.

    Returns:
        A transform of updates of any floating dtype; shapes and dtypes are kept,
        replicas are float32. All workers must start from equal params.

    Raises:
        ValueError: if an argument is out of range, the topology is unknown, rotates, is
            not symmetric, is made for another n, or not legal for this one; if
            ``init`` runs outside any axis with a topology's name whose number of
            neighbours depends on n; if params are missing, of another structure, not
            floating point, or hold no elements; if the compressor keeps state.
        NameError: if the axis is not mapped where ``update`` is called.

    Warns:
        UserWarning: once, at construction, for a compressor whose error may be as large
            as the vector.

    Communication:
        For each bucket one collective-permute of the payload for each neighbour: with
        8-bit codes, a quarter of ``decentralized``.

    State:
        1 + (number of neighbours) trees like params, worker-local. Checkpoint them for
        every worker: replicas that no longer agree do not recover. On another number of
        workers :func:`bagua_jax.resize` keeps the mean of the public models, of which
        all are copies.

    Theory:
        The mean over workers moves by the mean update plus the mean compression error.
        Stable while compression is mild against the topology's gap: for large errors
        it diverges, however small the step.

    Differences from the original:
        Any symmetric topology and compressor. Replicas are part of the state and
        survive a restart. Hierarchy is asked for, not the default.

    References:
        Tang et al., `Communication Compression for Decentralized Training`, 2018. Gan
        et al., BAGUA, 2021 (arXiv 2107.01499), ``low_precision_decentralized``.

    Example:
        >>> tx = low_precision_decentralized(axis_name="workers")
        >>> params, updates = jnp.zeros((3, 1)), jnp.array([[3.0], [0.0], [0.0]])
        >>> step = lambda u, x: x + tx.update(u, tx.init(x), x)[0]
        >>> jax.vmap(step, axis_name="workers")(updates, params).ravel().tolist()
        [3.0, 0.0, 0.0]
    """
    caller = "low_precision_decentralized"
    topologies.require_known(topology, caller)
    if isinstance(topology, Topology):
        _require_symmetric_static(topology, caller)
    checks.require_at_least(caller, "local_steps", local_steps, 1, "It is in steps.")
    checks.require_at_least(caller, "bucket_bytes", bucket_bytes, 1, "It is in bytes.")
    compatibility.require_compressor(caller, compressor, compatibility.REPLICATED)
    padding = compressor.facts.padding

    def init_fn(params):
        checks.require_floats(params, caller)
        neighbours = _num_neighbours(topology, axis_name, caller)
        return LowPrecisionDecentralizedState(
            count=jnp.zeros([], jnp.int32),
            key=jax.random.key(seed),
            replicas=tuple(
                weights.private(params, axis_name) for _ in range(1 + neighbours)
            ),
        )

    def update_fn(updates, state, params=None, **extra_args):
        del extra_args
        checks.require_weights(updates, params, axis_name, caller)
        n = primitives.num_peers(axis_name, caller)
        graph = topologies.resolve(topology, n, caller)
        _require_symmetric_static(graph, caller)
        mixing = graph.steps[0]
        peers = primitives.peer_axis(axis_name)
        plan = buckets.plan(params, bucket_bytes, axis_name)
        key = jax.random.fold_in(state.key, state.count)

        def communicate(x, replicas):
            def exchange(x, *replicas, key):
                shard = primitives.node_shard(x, axis_name, caller, padding)
                public = jnp.stack([shard.take(replica) for replica in replicas])
                own, theirs = public[0], tuple(public[1:])
                mixed = primitives.mix(own, theirs, mixing, axis_name=peers)
                z = shard.value + mixed - 2 * own
                public = public + primitives.compressed_neighbours(
                    z, compressor, mixing, axis_name=peers, key=key
                )
                return shard.gather(public[0]), *map(shard.put, public)

            x, *replicas = plan.map(exchange, x, *replicas, keys=key)
            return primitives.worker_local(x, axis_name), tuple(replicas)

        x, replicas = schedules.every(
            state.count % local_steps == 0,
            local_steps,
            communicate,
            lambda x, replicas: (x, replicas),
            weights.adapt(params, updates, axis_name),
            state.replicas,
        )
        new_updates = weights.updates_to(x, params, updates)
        return new_updates, LowPrecisionDecentralizedState(
            schedules.increment(state.count), state.key, replicas
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _num_neighbours(topology: str | Topology, axis_name: AxisName, caller: str) -> int:
    if isinstance(topology, Topology):
        return len(topology.steps[0].sends)
    try:
        n = primitives.num_peers(axis_name, caller)
    except NameError:
        if topology == "ring":
            return 2  # whatever n
        raise ValueError(
            f"{caller}: outside the axis {axis_name!r} `init` cannot know how many "
            f"neighbours {topology!r} has. Pass the topology itself, such as "
            f"topologies.{topology}(8), or call `init` where the axis is mapped."
        ) from None
    return len(topologies.resolve(topology, n, caller).steps[0].sends)


def _require_symmetric_static(topology: Topology, caller: str) -> None:
    if topology.period != 1 or not topology.symmetric:
        raise ValueError(
            f"{caller}: replicas need neighbours that stay, both ways: the topology "
            f"must be symmetric and of period 1, and {topology.name!r} is "
            f"{'directed' if topology.period == 1 else 'rotating'}. Use 'ring' or "
            "'complete', or 'decentralized' for rotating graphs."
        )
