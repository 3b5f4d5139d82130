"""ECD-PSGD: gossip on estimates that compressed extrapolations keep up to date."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from bagua_jax import buckets, checks, compatibility, primitives, schedules, topologies
from bagua_jax.algorithms import weights
from bagua_jax.compressors import Compressor
from bagua_jax.primitives import AxisName
from bagua_jax.topologies import Topology

__all__ = ["EcdPsgdState", "ecd_psgd"]


class EcdPsgdState(NamedTuple):
    """State of :func:`ecd_psgd`."""

    count: jax.Array  # [] int32, steps taken; equal on all workers
    key: jax.Array  # [] typed PRNG key; equal on all workers
    mixed_estimates: optax.Params  # sum_j W_ij y_j, x_0 at first; like params in
    # float32, worker-local


def ecd_psgd(
    compressor: Compressor,
    *,
    axis_name: AxisName,
    topology: str | Topology = "ring",
    bucket_bytes: int = buckets.DEFAULT_BUCKET_BYTES,
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Mix estimates of neighbours that unbiased codes of extrapolations refine (ECD).

    Placement: weight side, last in the chain. Receives the optimizer's update u_i with
    ``params``, returns ``new_params - params`` of this worker, varying.

    With y_j what everybody believes of worker j, at first the common x_0, in step
    t = 1, 2, ...:

    .. math::
        x_i^{t+1} &= \sum_j W_{ij}\, y_j^t + u_i

        z_i &= \big(1 - \tfrac t2\big)\, x_i^t + \tfrac t2\, x_i^{t+1}

        y_i^{t+1} &= \big(1 - \tfrac 2t\big)\, y_i^t + \tfrac 2t\, C(z_i)

    The model is extrapolated so far that an estimate may weigh the news by 2/t: noise
    of compression then averages out. Estimates enter by their mixture alone, and the
    same recursion holds for it, so that no estimate of any neighbour is held.

    Args:
        compressor: C, unbiased and stateless. Its noise should be bounded: z grows as
            t for as long as models move.
        axis_name: the workers' axis, or ``("node", "local")``: then devices of a node
            are averaged and nodes mix, each device a shard.
        topology: a name, built for the axis's size, or a ``Topology``; doubly
            stochastic and of period 1.
        bucket_bytes: target bucket size in bytes (static).
        seed: of the key that a stochastic compressor draws from.

    Returns:
        A transform of updates of any floating dtype; shapes and dtypes are kept. All
        workers must start from equal params.

    Raises:
        ValueError: if an argument is out of range, the topology is unknown, rotates, is
            not doubly stochastic, is made for another n, or not legal for this one; if
            the compressor is biased or keeps state; if params are missing, of another
            structure, not floating point, or hold no elements.
        NameError: if the axis is not mapped where ``update`` is called.

    Warns:
        UserWarning: once, at construction, for noise that is large against the message.

    Communication:
        For each bucket one collective-permute of the payload for each neighbour.

    State:
        One tree like params in float32, worker-local, whatever the degree. Checkpoint
        it for every worker. On another number of workers :func:`bagua_jax.resize` keeps
        the mean of the estimates.

    Theory:
        Where each message adds noise of variance v, an estimate is off by a variance of
        4v after one step and after t >= 2 steps of

        .. math:: \frac{2v}{3}\, \frac{2t - 1}{t (t - 1)} \approx \frac{4v}{3t}

        It starts without harm: estimates are exact before step 1, whose coefficients
        are -1 and 2, and step 2, with 0 and 1, forgets what step 1 added. Noise that is
        relative to z, as of random sparsity, grows with t and no longer averages out.
        With ``identity()`` it is ``decentralized(combine="before")``.

    Differences from the paper:
        The mixture of estimates in place of one for each neighbour: equal up to
        rounding, as W stays.

    References:
        Tang et al., `Communication Compression for Decentralized Training`, 2018 (arXiv
        1803.06443), the extrapolation scheme; its difference scheme is
        ``low_precision_decentralized``. The variance is derived from the recursion.

    Example:
        Mixing stands before the update: what a worker does now is heard next time.

        >>> from bagua_jax import compressors
        >>> tx = ecd_psgd(compressors.identity(), axis_name="workers")
        >>> def two_steps(u):
        ...     x, state = jnp.zeros_like(u), tx.init(jnp.zeros_like(u))
        ...     for u in (u, jnp.zeros_like(u)):
        ...         updates, state = tx.update(u, state, x)
        ...         x = x + updates
        ...     return x
        >>> x = jax.vmap(two_steps, axis_name="workers")(jnp.array([3.0, 0.0, 0.0]))
        >>> x.round(5).tolist()
        [1.0, 1.0, 1.0]
    """
    caller = "ecd_psgd"
    compatibility.require_compressor(caller, compressor, compatibility.WEIGHED)
    topologies.require_known(topology, caller)
    if isinstance(topology, Topology):
        _require_graph(topology, caller)
    checks.require_at_least(caller, "bucket_bytes", bucket_bytes, 1, "It is in bytes.")
    padding = compressor.facts.padding

    def init_fn(params):
        checks.require_floats(params, caller)
        return EcdPsgdState(
            count=jnp.zeros([], jnp.int32),
            key=jax.random.key(seed),
            mixed_estimates=weights.private(params, axis_name),
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
        count = schedules.increment(state.count)

        def exchange(x, u, estimates, key):
            shard = primitives.node_shard(u, axis_name, caller, padding)
            x, estimates = shard.take(x), shard.take(estimates)
            t = count.astype(x.dtype)
            new = estimates + shard.value
            z = x + t / 2 * (new - x)
            own, *theirs = primitives.compressed_neighbours(
                z, compressor, mixing, axis_name=peers, key=key
            )
            sent = primitives.mix(own, tuple(theirs), mixing, axis_name=peers)
            estimates = (1 - 2 / t) * estimates + 2 / t * sent
            return shard.gather(new), shard.put(estimates)

        x, estimates = primitives.worker_local(
            plan.map(
                exchange,
                weights.private(params, axis_name),
                weights.private(updates, axis_name),
                state.mixed_estimates,
                keys=key,
            ),
            axis_name,
        )
        new_updates = weights.updates_to(x, params, updates)
        return new_updates, EcdPsgdState(count, state.key, estimates)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _require_graph(topology: Topology, caller: str) -> None:
    why = "the mixture of estimates needs weights that stay"
    weights.require_static(topology, caller, why)
