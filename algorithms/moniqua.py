"""Moniqua: gossip with models modulo a bound, which the receiver's own model undoes."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from bagua_jax import buckets, checks, primitives, schedules, topologies
from bagua_jax.algorithms import weights
from bagua_jax.compressors import Compressor, CompressorFacts
from bagua_jax.compressors.base import stateless
from bagua_jax.compressors.numerics import all_finite
from bagua_jax.compressors.packing import pack, packed_bytes, unpack
from bagua_jax.primitives import AxisName
from bagua_jax.topologies import MixingStep, Topology

__all__ = ["MoniquaState", "moniqua"]


class MoniquaState(NamedTuple):
    """State of :func:`moniqua`."""

    count: jax.Array  # [] int32, steps taken; equal on all workers


def moniqua(
    *,
    axis_name: AxisName,
    topology: str | Topology = "ring",
    theta: optax.ScalarOrSchedule,
    bits: int = 8,
    bucket_bytes: int = buckets.DEFAULT_BUCKET_BYTES,
) -> optax.GradientTransformationExtraArgs:
    r"""Gossip with b-bit residues of the models: no replicas, any graph (Moniqua).

    Placement: weight side, last in the chain. Receives the optimizer's update u_i with
    ``params``, returns ``new_params - params`` of this worker, varying.

    Neighbours are near one another, so that of x_j only its place modulo B need be
    sent; the receiver finds the nearest number to its own x_i that fits. With Q the
    nearest of the :math:`2^b` points :math:`0, 2^{-b}, 2 \cdot 2^{-b}, \dots` of the
    circle of length 1:

    .. math::
        q_j &= Q(x_j / B \bmod 1),\qquad B = \frac{2 \theta}{1 - 2^{-b}}

        \hat x_j &= x_i + B \Big\langle q_j - \frac{x_i}{B} \Big\rangle,\qquad
        \langle d \rangle = d - \mathrm{round}(d)

        x_i' &= x_i + \sum_j W_{ij} (\hat x_j - \hat x_i) + u_i

    with :math:`\hat x_i` one's own model as others recover it: then the mean over
    workers moves by the mean update alone.

    Args:
        axis_name: the workers' axis, or ``("node", "local")``: then devices of a node
            are averaged and nodes mix, each device a shard.
        topology: a name, built for the axis's size at trace time, or a ``Topology``;
            doubly stochastic; it may rotate. For few bits one with large self weights,
            such as ``topologies.ring(n, self_weight=0.9)``.
        theta: > 0, more than any element of the models of two neighbours differs by
            when they exchange; a number, or a schedule of steps already taken (such as
            a multiple of the learning rate). Beyond it a difference is recovered
            wrong by a multiple of B, and **nothing tells**: the step is silently wrong.
        bits: b, 1 .. 16, of an element; static. Nine and more travel as two bytes.
        bucket_bytes: target bucket size in bytes (static).

    Returns:
        A transform of updates of any floating dtype; shapes and dtypes are kept.

    Raises:
        ValueError: if an argument is out of range, the topology is unknown, not doubly
            stochastic, is made for another n, or not legal for this one; if params are
            missing, of another structure, not floating point, or hold no elements.
        NameError: if the axis is not mapped where ``update`` is called.

    Communication:
        For each bucket one collective-permute for each neighbour of the step: packed
        codes, b bits an element, and a byte that says that the bucket is finite. A
        bucket that is not becomes NaN at every neighbour.

    State: a counter, equal on all workers.

    Theory:
        Within the bound a model is recovered up to

        .. math:: |\hat x_j - x_j| \le \frac{B}{2^{b+1}} = \frac{\theta}{2^b - 1}

        so that workers agree up to it, and with many bits it is
        ``decentralized(combine="before")``. Float32 knows x/B to about
        :math:`|x|/B \cdot 2^{-24}`: theta should not be a tiny part of x.

    Differences from the paper:
        Of the quantizers it allows this is rounding to the nearest, which draws no
        random numbers. The slack matrix that it puts around W for one bit is a topology
        with a larger self weight.

    References:
        Lu, De Sa, `Moniqua: Modulo Quantized Communication in Decentralized SGD`, 2020
        (arXiv 2002.11787).

    Example:
        B = 2: the models are sent as 9.5 and 10, modulo 2; their mean stays.

        >>> tx = moniqua(axis_name="workers", theta=0.75, topology="complete", bits=2)
        >>> step = lambda x: x + tx.update(jnp.zeros_like(x), tx.init(x), x)[0]
        >>> jax.vmap(step, axis_name="workers")(jnp.array([9.375, 10.125])).tolist()
        [9.625, 9.875]
    """
    caller = "moniqua"
    topologies.require_known(topology, caller)
    if isinstance(topology, Topology):
        weights.require_doubly_stochastic(topology, caller)
    if not callable(theta):
        checks.require_within(caller, "theta", theta, 0, open_below=True)
    checks.require_at_least(caller, "bits", bits, 1, "It is of an element's code.")
    if bits > 16:
        raise ValueError(
            f"{caller}: bits must be at most 16, got {bits}. Use decentralized where "
            "codes would be as long as numbers."
        )
    checks.require_at_least(caller, "bucket_bytes", bucket_bytes, 1, "It is in bytes.")
    points = _points(bits)

    def init_fn(params):
        checks.require_floats(params, caller)
        return MoniquaState(count=jnp.zeros([], jnp.int32))

    def update_fn(updates, state, params=None, **extra_args):
        del extra_args
        checks.require_weights(updates, params, axis_name, caller)
        n = primitives.num_peers(axis_name, caller)
        graph = topologies.resolve(topology, n, caller)
        weights.require_doubly_stochastic(graph, caller)
        peers, period = primitives.peer_axis(axis_name), graph.period
        plan = buckets.plan(params, bucket_bytes, axis_name)
        bound = theta(state.count) if callable(theta) else theta
        modulus = 2 * bound / (1 - 2.0**-bits)

        def move(x, mixing: MixingStep):
            place = x / modulus
            sent = primitives.compressed_neighbours(
                place, points, mixing, axis_name=peers
            )
            apart = sent - place[None]
            own, *theirs = apart - jnp.rint(apart)
            mixed = primitives.mix(own, tuple(theirs), mixing, axis_name=peers)
            return modulus * (mixed - own)

        def exchange(x):
            shard = primitives.node_shard(x, axis_name, caller)
            moves = schedules.switch(
                state.count % period,
                [functools.partial(move, mixing=mixing) for mixing in graph.steps],
                shard.value,
                shares=(1 / period,) * period,
            )
            return (shard.gather(shard.value + moves),)

        (mixed,) = plan.map(exchange, weights.private(params, axis_name))
        mixed = primitives.worker_local(mixed, axis_name)
        x = weights.adapt(mixed, updates, axis_name)
        new_updates = weights.updates_to(x, params, updates)
        return new_updates, MoniquaState(schedules.increment(state.count))

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


class _Places(NamedTuple):
    """What :func:`moniqua` sends."""

    codes: jax.Array  # packed uint8, or [d] uint16
    finite: jax.Array  # [1] uint8, 1 if all elements are


def _points(bits: int) -> Compressor:
    """Code the fractional part of each element as the nearest of 2^bits points."""
    levels = 2**bits

    def compress(key, x, state):
        del key
        finite = all_finite(x)
        nearest = jnp.rint((x - jnp.floor(x)) * levels)
        codes = jnp.where(finite, nearest % levels, 0).astype(jnp.uint16)
        return _Places(pack(codes, levels), finite.astype(jnp.uint8)[None]), state

    def decompress(payload, like):
        codes = unpack(payload.codes, levels, like.size).astype(like.dtype)
        return jnp.where(payload.finite == 1, codes / levels, jnp.nan)

    facts = CompressorFacts(
        name=f"points(bits={bits})",
        unbiased=False,
        payload_bytes=lambda like: packed_bytes(levels, like.size) + 1,
        source="exact up to 2^-(bits+1), on the circle",
    )
    return Compressor(stateless, compress, decompress, facts)
