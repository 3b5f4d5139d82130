"""RelaySGD: means of all models, relayed along a tree and some steps old."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bagua_jax import buckets, checks, primitives, topologies
from bagua_jax.algorithms import weights
from bagua_jax.primitives import AxisName
from bagua_jax.topologies import Topology

__all__ = ["RelaySGDState", "relay_sgd"]

_DEGREES = {"path": 2, "binary_tree": 3}  # of a worker, at most, whatever n


class RelaySGDState(NamedTuple):
    """State of :func:`relay_sgd`."""

    heard: tuple[optax.Params, ...]  # from a neighbour for each: the mean model of all
    # workers on its side, x_0 at first; like params in float32, worker-local

    def resized(self, like, params, workers):
        """All have heard the new model, as at the start."""
        del self, workers
        return RelaySGDState(
            tuple(optax.tree.cast_like(params, heard) for heard in like.heard)
        )


def relay_sgd(
    *,
    axis_name: AxisName,
    topology: str | Topology = "binary_tree",
    bucket_bytes: int = buckets.DEFAULT_BUCKET_BYTES,
) -> optax.GradientTransformationExtraArgs:
    r"""Relay models along a tree, so that everyone averages everyone (RelaySGD).

    Placement: weight side, last in the chain. Receives the optimizer's update u_i with
    ``params``, returns ``new_params - params`` of this worker, varying.

    Every worker tells each neighbour the mean of what is on its own side of their edge:
    its model, and what its other neighbours told it last. With :math:`s_{i \to j}` the
    number of workers on i's side of the edge to j, and :math:`m_{i \to j} = x_0` at
    first:

    .. math::
        x_i^{1/2} &= x_i + u_i

        m_{i \to j} &\leftarrow \frac{1}{s_{i \to j}} \Big( x_i^{1/2} +
        \sum_{k \in N_i,\, k \ne j} s_{k \to i}\, m_{k \to i}^{\text{old}} \Big)

        x_i &\leftarrow \frac1n \Big( x_i^{1/2} + \sum_{j \in N_i} s_{j \to i}\,
        m_{j \to i} \Big)

    Args:
        axis_name: the workers' axis, or ``("node", "local")``: then devices of a node
            are averaged and nodes relay, each device a shard.
        topology: ``"binary_tree"`` or ``"path"``, built for the axis's size, or a
            ``Topology`` whose links are a tree: connected, both ways, n-1 edges, of
            period 1. Its weights do not matter.
        bucket_bytes: target message size in bytes (static).

    Returns:
        A transform of updates of any floating dtype; shapes and dtypes are kept. All
        workers must start from equal params.

    Raises:
        ValueError: if an argument is out of range, the topology is unknown or no tree,
            or is made for another n; if params are missing, of another structure, not
            floating point, or hold no elements.
        NameError: if the axis is not mapped where ``update`` is called.

    Communication:
        For each bucket and permutation of the tree one collective-permute of float32:
        a worker sends one message to each neighbour, each another one; 2(n-1)/n on
        average.

    State:
        A tree like params in float32 for each neighbour of the busiest worker,
        worker-local. Checkpoint them for every worker. On another number of workers
        :func:`bagua_jax.resize` keeps no memory: all have heard the mean model.

    Theory:
        A worker's model is the mean of all models, each as old as its way is long: with
        :math:`d_{ij}` the edges between two workers,

        .. math:: x_i^{t+1} = \frac1n \sum_j x_j^{1/2}\big(t - \max(d_{ij} - 1, 0)\big)

        where models before the start are x_0. So every worker counts alike, and with a
        constant step size and exact gradients all come to the optimum of the mean,
        however different they are. On quadratics it is stable wherever every worker by
        itself is, :math:`\gamma h_i < 2`, on any tree: it averages points of which each
        has contracted. Two workers, or a star's hub, are parallel SGD.

    Differences from the paper:
        Means instead of sums. There counts travel with the messages, and x_0 fills in
        for workers not heard yet; here no message is lost, so that sizes are known
        from the start, and x_0 is in the first messages: equal up to rounding.

    References:
        Vogels et al., `RelaySum for Decentralized Deep Learning on Heterogeneous Data`,
        2021 (arXiv 2110.04175).

    Example:
        On a path of three the ends hear each other a step late.

        >>> tx = relay_sgd(axis_name="workers", topology="path")
        >>> def two_steps(u):
        ...     x, state = jnp.zeros_like(u), tx.init(jnp.zeros_like(u))
        ...     for u in (u, jnp.zeros_like(u)):
        ...         updates, state = tx.update(u, state, x)
        ...         x = x + updates
        ...     return x
        >>> x = jax.vmap(two_steps, axis_name="workers")(jnp.array([9.0, 0.0, 0.0]))
        >>> x.round(5).tolist()
        [2.0, 2.0, 4.0]
    """
    caller = "relay_sgd"
    topologies.require_known(topology, caller)
    if isinstance(topology, Topology):
        _require_tree(topology, caller)
    elif topology not in _DEGREES:
        raise ValueError(
            f"{caller}: by name the topology must be one of "
            f"{', '.join(map(repr, _DEGREES))}, got {topology!r}. Pass any other tree "
            "as a Topology, such as topologies.star(8)."
        )
    checks.require_at_least(caller, "bucket_bytes", bucket_bytes, 1, "It is in bytes.")

    def init_fn(params):
        checks.require_floats(params, caller)
        if isinstance(topology, Topology):
            slots = len(topology.steps[0].sends)
        else:
            slots = _DEGREES[topology]  # the number of workers may be unknown here
        return RelaySGDState(
            heard=tuple(weights.private(params, axis_name) for _ in range(slots))
        )

    def update_fn(updates, state, params=None, **extra_args):
        del extra_args
        checks.require_weights(updates, params, axis_name, caller)
        n = primitives.num_peers(axis_name, caller)
        graph = topologies.resolve(topology, n, caller)
        _require_tree(graph, caller)
        mixing, peers = graph.steps[0], primitives.peer_axis(axis_name)
        links = [mixing._replace(sends=(send,)) for send in mixing.sends]
        plan = buckets.plan(params, bucket_bytes, axis_name)
        index = primitives.axis_index(peers, caller)
        *tell, average = jnp.asarray(_shares(graph))[index]

        def exchange(x, *heard):
            shard = primitives.node_shard(x, axis_name, caller)
            told = jnp.stack([shard.value, *map(shard.take, heard)])
            heard = [
                received
                for share, link in zip(tell, links, strict=True)
                for received in primitives.neighbours(
                    _weigh(share, told), link, axis_name=peers
                )
            ]
            x = _weigh(average, jnp.stack([shard.value, *heard]))
            return shard.gather(x), *map(shard.put, heard)

        used, idle = state.heard[: len(links)], state.heard[len(links) :]
        x, *heard = primitives.worker_local(
            plan.map(exchange, weights.adapt(params, updates, axis_name), *used),
            axis_name,
        )
        new_updates = weights.updates_to(x, params, updates)
        return new_updates, RelaySGDState((*heard, *idle))

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _weigh(shares: jax.Array, rows: jax.Array) -> jax.Array:
    return jnp.sum(shares[:, None].astype(rows.dtype) * rows, axis=0)


@functools.lru_cache(maxsize=64)
def _shares(tree: Topology) -> np.ndarray:
    """Weigh a worker's own model, and what it heard in each send.

    Returns:
        [n, sends + 1, 1 + sends]: for each worker a row for what it tells in
        each send, and a last one for its new model.
    """
    n, sends = tree.n, tree.steps[0].sends
    told = [dict(send.pairs) for send in sends]
    told_by = [{j: i for i, j in pairs.items()} for pairs in told]

    parent, order = {0: 0}, [0]  # the tree as it hangs from worker 0
    for i in order:
        found = [to[i] for to in told if i in to and to[i] not in parent]
        parent |= dict.fromkeys(found, i)
        order += found
    below = np.ones(n, int)  # workers that hang from one, itself among them
    for i in reversed(order[1:]):
        below[parent[i]] += below[i]

    shares = np.zeros((n, len(sends) + 1, 1 + len(sends)))
    for i in range(n):
        own = np.eye(1, 1 + len(sends))[0]
        sizes = own.copy()
        for k, by in enumerate(told_by, start=1):
            if i in by:  # all who are nearer to that neighbour
                hangs = by[i] != parent[i]
                sizes[k] = below[by[i]] if hangs else n - below[i]
        shares[i, -1] = sizes / n
        for k, to in enumerate(told):
            if i in to:  # nobody is told what came from it
                others = [by.get(i) != to[i] for by in told_by]
                behind = np.where([True, *others], sizes, 0)
                shares[i, k] = behind / behind.sum()
    return shares


def _require_tree(topology: Topology, caller: str) -> None:
    n, mixing = topology.n, topology.steps[0]
    links = [pair for send in mixing.sends for pair in send.pairs]
    both_ways = set(links) & {(j, i) for i, j in links}
    if (
        topology.period != 1
        or not len(links) == len(both_ways) == 2 * (n - 1)
        or not topology.connected
    ):
        raise ValueError(
            f"{caller}: the topology must be a tree of period 1: n={n} workers joined "
            f"both ways by {n - 1} edges, so that there is one way between any two, "
            f"and {topology.name!r} is none. Use 'path' or 'binary_tree', "
            "topologies.star, or from_edges with the edges of a tree."
        )
