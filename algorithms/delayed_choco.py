"""Delayed CHOCO: compressed gossip whose messages arrive some steps late."""

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
    resizing,
    schedules,
    topologies,
)
from bagua_jax.algorithms import weights
from bagua_jax.compressors import Compressor
from bagua_jax.primitives import AxisName
from bagua_jax.topologies import Topology

__all__ = ["DelayedChocoState", "delayed_choco"]


class DelayedChocoState(NamedTuple):
    """State of :func:`delayed_choco`; trees like params in float32, worker-local."""

    count: jax.Array  # [] int32, steps taken; equal on all workers
    key: jax.Array  # [] typed PRNG key; equal on all workers
    public: optax.Params  # x_hat, all that this worker has sent; 0 at first
    disagreement: optax.Params  # (W x_hat - x_hat)_i of what has arrived; 0 at first
    in_flight: tuple[optax.Params, ...]  # the changes of it under way, oldest first

    def resized(self, like, params, workers):
        """All public copies are their mean, and nobody disagrees."""
        del params
        count, key, public, in_flight = resizing.mean(
            (self.count, self.key, self.public, self.in_flight), workers
        )
        zeros = jax.tree.map(jnp.zeros_like, like.disagreement)
        return DelayedChocoState(count, key, public, zeros, in_flight)


def delayed_choco(
    compressor: Compressor,
    *,
    axis_name: AxisName,
    topology: str | Topology = "ring",
    consensus_step_size: float,
    staleness: int = 1,
    bucket_bytes: int = buckets.DEFAULT_BUCKET_BYTES,
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Gossip with compressed differences that arrive tau steps late.

    Placement: weight side, last in the chain. Receives the optimizer's update u_i with
    ``params``, returns ``new_params - params`` of this worker, varying.

    Decentralized, low-precision and asynchronous at once: the cell that BAGUA's table
    of relaxations leaves empty. It is ``choco_sgd`` whose consensus step uses the
    public copies of tau steps ago, one's own included:

    .. math::
        x_i &\leftarrow x_i + u_i,\quad q_i = C(x_i - \hat x_i),\quad
        \hat x_i \leftarrow \hat x_i + q_i

        x_{i,t} &\leftarrow x_i + \gamma \Big( \sum_j W_{ij} \hat x_{j,t-\tau}
        - \hat x_{i,t-\tau} \Big)

    As both terms are equally late, the mean over workers moves by the mean update
    alone. It is the arithmetic of gossip that does not wait, inside a lockstep program:
    every worker is equally late, so that runs can be repeated and analysed.

    Args:
        compressor: C, stateless; contractive, biased or not.
        axis_name: the workers' axis, or ``("node", "local")``: then devices of a node
            are averaged and nodes gossip, each device a shard.
        topology: a name, built for the axis's size, or a ``Topology``; doubly
            stochastic and of period 1.
        consensus_step_size: gamma > 0; see Theory for its limit.
        staleness: tau, steps from a message to its use, at least 0; static.
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
        For each bucket one collective-permute of the payload for each neighbour. What
        is received at t is first read at t + tau.

    State:
        2 + tau trees like params in float32, worker-local, whatever the degree.
        Checkpoint them for every worker: messages under way are part of the mean. On
        another number of workers :func:`bagua_jax.resize` keeps the mean of the public
        copies, which all have, and of what is under way; nobody disagrees.

    Theory:
        Without compression and for symmetric W of eigenvalues lambda, consensus is
        :math:`x_{t+1} = x_t - \gamma (1 - \lambda) x_{t-\tau}` in each mode, stable
        exactly where

        .. math::
            \gamma (1 - \lambda_{\min}) < 2 \sin \frac{\pi}{2 (2 \tau + 1)}

        that is 2, 1, 0.62, 0.45 for tau = 0, 1, 2, 3. Compression only lowers it.
        ``staleness=0`` is ``choco_sgd``.

    References:
        Koloskova et al., `Decentralized Stochastic Optimization and Gossip Algorithms
        with Compressed Communication`, 2019, for tau = 0. The delay, its bookkeeping
        and the limit (that of a linear difference equation with delay) are ours.

    Example:
        >>> from bagua_jax import compressors
        >>> tx = delayed_choco(compressors.identity(), axis_name="workers",
        ...                    consensus_step_size=0.5, staleness=1)
        >>> def two_steps(x):
        ...     state, seen = tx.init(x), []
        ...     for _ in range(2):
        ...         updates, state = tx.update(jnp.zeros_like(x), state, x)
        ...         x = x + updates
        ...         seen.append(x)
        ...     return seen
        >>> seen = jax.vmap(two_steps, axis_name="workers")(jnp.array([6.0, 0.0, 0.0]))
        >>> [x.round(5).tolist() for x in seen]
        [[6.0, 0.0, 0.0], [4.0, 1.0, 1.0]]
    """
    caller = "delayed_choco"
    topologies.require_known(topology, caller)
    if isinstance(topology, Topology):
        _require_graph(topology, caller)
    checks.require_within(
        caller, "consensus_step_size", consensus_step_size, 0, open_below=True
    )
    checks.require_at_least(caller, "staleness", staleness, 0, "It is in steps.")
    checks.require_at_least(caller, "bucket_bytes", bucket_bytes, 1, "It is in bytes.")
    check = compatibility.require_compressor(caller, compressor, compatibility.FED_BACK)
    padding = compressor.facts.padding

    def init_fn(params):
        checks.require_floats(params, caller)
        zeros = lambda: primitives.worker_local(precision.zeros(params), axis_name)  # noqa: E731
        return DelayedChocoState(
            count=jnp.zeros([], jnp.int32),
            key=jax.random.key(seed),
            public=zeros(),
            disagreement=zeros(),
            in_flight=tuple(zeros() for _ in range(staleness)),
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

        def exchange(x, public, disagreement, *in_flight, key):
            shard = primitives.node_shard(x, axis_name, caller, padding)
            check(shard.value.shape[0])
            public, disagreement, *queue = map(
                shard.take, (public, disagreement, *in_flight)
            )
            own, *theirs = primitives.compressed_neighbours(
                shard.value - public,
                compressor,
                mixing,
                axis_name=peers,
                key=key,
            )
            public = public + own
            mixed = primitives.mix(own, tuple(theirs), mixing, axis_name=peers)
            arrived, *queue = [*queue, mixed - own]
            disagreement = disagreement + arrived
            x = shard.value + consensus_step_size * disagreement
            return shard.gather(x), *map(shard.put, (public, disagreement, *queue))

        x, public, disagreement, *in_flight = primitives.worker_local(
            plan.map(
                exchange,
                weights.adapt(params, updates, axis_name),
                state.public,
                state.disagreement,
                *state.in_flight,
                keys=key,
            ),
            axis_name,
        )
        new_updates = weights.updates_to(x, params, updates)
        count = schedules.increment(state.count)
        return new_updates, DelayedChocoState(
            count, state.key, public, disagreement, tuple(in_flight)
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _require_graph(topology: Topology, caller: str) -> None:
    why = "sums of differences under way need weights that stay"
    weights.require_static(topology, caller, why)
