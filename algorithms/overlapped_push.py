"""Overlapped push: gossip on directed graphs whose messages arrive some steps late."""

import functools
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
from bagua_jax.topologies import MixingStep, Topology

__all__ = ["OverlappedPushState", "Parcel", "overlapped_push"]


class Parcel(NamedTuple):
    """What neighbours gave a worker in one step; worker-local."""

    model: optax.Params  # the sum of W_ij x_j over them; like params in float32
    mass: jax.Array  # [] float32, the sum of W_ij w_j


class OverlappedPushState(NamedTuple):
    """State of :func:`overlapped_push`."""

    count: jax.Array  # [] int32, steps taken; equal on all workers
    mass: jax.Array  # [] float32, w_i, 1 at first; worker-local
    in_flight: tuple[Parcel, ...]  # under way, oldest first; empty at first

    def common_model(self, params):
        """Average what is held and what is under way, by mass."""
        masses = [self.mass, *(parcel.mass for parcel in self.in_flight)]
        return resizing.by_mass(params, masses, *(p.model for p in self.in_flight))

    def resized(self, like, params, workers):
        """All that was under way has arrived; every worker has the same, and mass 1."""
        del params
        (count,) = resizing.mean((self.count,), workers)
        nothing = jax.tree.map(jnp.zeros_like, like.in_flight)
        return OverlappedPushState(count, jnp.ones_like(like.mass), nothing)


def overlapped_push(
    *,
    axis_name: AxisName,
    topology: str | Topology = "one_peer_exponential",
    staleness: int = 1,
    bucket_bytes: int = buckets.DEFAULT_BUCKET_BYTES,
) -> optax.GradientTransformationExtraArgs:
    r"""Push shares of the model that arrive tau steps late (overlapped SGP).

    Placement: weight side, last in the chain. Receives the optimizer's update u_i with
    ``params``, returns ``new_params - params`` of this worker, varying.

    ``stochastic_gradient_push`` that does not wait: a worker keeps its own share at
    once, and adds what was sent to it tau steps ago. Params are the de-biased z_i; with
    the mass w_i they make the biased x_i = w_i z_i:

    .. math::
        x_i &= w_i z_i + u_i

        x_i' &= W_{ii}\, x_i + \sum_{j \ne i} W_{ij}\, x_j^{t - \tau},\qquad
        w_i' = W_{ii}\, w_i + \sum_{j \ne i} W_{ij}\, w_j^{t - \tau},\qquad
        z_i' = x_i' / w_i'

    with the weights of the step in which a share was sent. A share carries its mass, so
    that z needs no correction for what is under way. It is the arithmetic of gossip
    that does not wait, inside a lockstep program: every message is equally late.

    Args:
        axis_name: the workers' axis, or ``("node", "local")``: then devices of a node
            are averaged, masses too, and nodes push, each device a shard.
        topology: a name, built for the axis's size at trace time, or a ``Topology``
            whose columns sum to 1; directed, rotating or neither. Every worker keeps a
            share of its own.
        staleness: tau, steps from a message to its use, at least 0; static.
        bucket_bytes: target message size in bytes (static).

    Returns:
        A transform of updates of any floating dtype; shapes and dtypes are kept.

    Raises:
        ValueError: if an argument is out of range, the topology is unknown, has columns
            that do not sum to 1 or a worker that keeps nothing, is made for another n,
            or not legal for this one; if params are missing, of another structure, not
            floating point, or hold no elements.
        NameError: if the axis is not mapped where ``update`` is called.

    Communication:
        For each bucket one collective-permute of float32 for each neighbour of the
        step; the mass rides with the first bucket, 4 bytes. What is received at t is
        first read at t + tau.

    State:
        A counter, equal on all workers; the mass, a scalar for each; tau trees like
        params in float32 with their masses, worker-local. Checkpoint them for every
        worker: parcels under way are part of the mean. On another number of workers
        :func:`bagua_jax.resize` keeps the mean by mass of the models and of what is
        under way, all of which arrives; every mass is 1.

    Theory:
        Masses of workers and of parcels add up to n, and their models to n times a mean
        that moves by the mean update. Where rows of W sum to 1, too, and every worker
        keeps a share a, a worker's mass settles at :math:`1 / (1 + \tau (1 - a))`, the
        rest is under way: 2/3 of one-peer graphs with tau = 1. An update therefore
        moves z by more, until it has spread. ``staleness=0`` is
        ``stochastic_gradient_push``.

    Differences from the paper:
        Every step sends, and every message takes exactly tau steps, which there is a
        bound. x is not stored but recomputed as w z: equal up to rounding. A step
        shares before it adds what has arrived; the overlap of the authors' published
        program adds first.

    References:
        Assran et al., `Stochastic Gradient Push for Distributed Deep Learning`, 2019
        (arXiv 1811.10792), overlap. The masses' limit is derived.

    Example:
        Half of both models is under way after a step, and with it half of the masses.

        >>> tx = overlapped_push(axis_name="workers")
        >>> def two_steps(x):
        ...     state, seen = tx.init(x), []
        ...     for _ in range(2):
        ...         updates, state = tx.update(jnp.zeros_like(x), state, x)
        ...         x = x + updates
        ...         seen.append((state.mass, x))
        ...     return seen
        >>> seen = jax.vmap(two_steps, axis_name="workers")(jnp.array([0.0, 6.0]))
        >>> [(mass[0].item(), x.tolist()) for mass, x in seen]
        [(0.5, [0.0, 6.0]), (0.75, [4.0, 2.0])]
    """
    caller = "overlapped_push"
    topologies.require_known(topology, caller)
    checks.require_at_least(caller, "staleness", staleness, 0, "It is in steps.")
    if isinstance(topology, Topology):
        _require_shares(topology, staleness, caller)
    checks.require_at_least(caller, "bucket_bytes", bucket_bytes, 1, "It is in bytes.")

    def init_fn(params):
        checks.require_floats(params, caller)
        dtype = precision.wide_dtype(params)

        def nothing():
            return Parcel(model=precision.zeros(params), mass=jnp.zeros([], dtype))

        return OverlappedPushState(
            jnp.zeros([], jnp.int32),
            *primitives.worker_local(
                (jnp.ones([], dtype), tuple(nothing() for _ in range(staleness))),
                axis_name,
            ),
        )

    def update_fn(updates, state, params=None, **extra_args):
        del extra_args
        checks.require_weights(updates, params, axis_name, caller)
        n = primitives.num_peers(axis_name, caller)
        graph = topologies.resolve(topology, n, caller)
        _require_shares(graph, staleness, caller)
        peers, period = primitives.peer_axis(axis_name), graph.period
        plan = buckets.plan(params, bucket_bytes, axis_name)

        def push(v, mixing: MixingStep):
            """Share a vector out: what is kept, and what the neighbours give."""
            alone, nothing = mixing._replace(sends=()), jnp.zeros_like(v)
            kept = primitives.mix(v, (), alone, axis_name=peers)
            received = primitives.neighbours(v, mixing, axis_name=peers)
            given = primitives.mix(nothing, received, mixing, axis_name=peers)
            return primitives.worker_local((kept, given), peers)

        def exchange(v, *in_flight):
            shard = primitives.node_shard(v, axis_name, caller)
            kept, given = schedules.switch(
                state.count % period,
                [functools.partial(push, mixing=mixing) for mixing in graph.steps],
                shard.value,
                shares=(1 / period,) * period,
            )
            arrived, *in_flight = [*map(shard.take, in_flight), given]
            return shard.gather(kept + arrived), *map(shard.put, in_flight)

        def pack(parcel: Parcel):
            return weights.append(plan.pack(parcel.model), parcel.mass)

        def unpack(vectors):
            vectors = primitives.worker_local(list(vectors), axis_name)
            vectors, mass = weights.detach(vectors, plan, state.mass)
            model = plan.unpack(vectors)  # the mass may be wider than a narrow bucket
            return Parcel(optax.tree.cast_like(model, x), mass)

        x = jax.tree.map(
            lambda z, u: state.mass.astype(precision.wide_dtype(z)) * z + u,
            params,
            updates,
        )
        parcels = map(pack, (Parcel(x, state.mass), *state.in_flight))
        exchanged = [exchange(*vectors) for vectors in zip(*parcels, strict=True)]
        (kept, mass), *in_flight = map(unpack, zip(*exchanged, strict=True))
        z = jax.tree.map(lambda v: v / mass, kept)
        new_updates = weights.updates_to(z, params, updates)
        count = schedules.increment(state.count)
        return new_updates, OverlappedPushState(count, mass, tuple(in_flight))

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _require_shares(topology: Topology, staleness: int, caller: str) -> None:
    if not topology.column_stochastic:
        raise ValueError(
            f"{caller}: every column of W must sum to 1, as it holds a worker's shares "
            f"of what it pushes, and {topology.name!r} has others. Transpose W, or "
            "divide each column by its sum."
        )
    kept = [min(mixing.self_weights) for mixing in topology.steps]
    if staleness and min(kept) <= 0:
        raise ValueError(
            f"{caller}: with staleness={staleness} every worker must keep a share of "
            "its own, or it has no mass until messages arrive, and a worker of "
            f"{topology.name!r} keeps {min(kept):g}. Put weights on W's diagonal."
        )
