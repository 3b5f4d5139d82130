"""Signum: workers vote with the signs of their momenta, one bit an element."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from bagua_jax import buckets, checks, precision, primitives, schedules
from bagua_jax.compressors import Compressor, CompressorFacts
from bagua_jax.compressors.numerics import all_finite
from bagua_jax.compressors.packing import pack, packed_bytes, unpack
from bagua_jax.primitives import AxisName

__all__ = ["SignumState", "signum"]


class SignumState(NamedTuple):
    """State of :func:`signum`."""

    count: jax.Array  # [] int32, steps taken; equal on all workers
    momentum: optax.Updates  # like params, float32; worker-local


def signum(
    learning_rate: optax.ScalarOrSchedule,
    *,
    axis_name: AxisName,
    momentum: float = 0.9,
    weight_decay: float = 0.0,
    bucket_bytes: int = buckets.DEFAULT_BUCKET_BYTES,
) -> optax.GradientTransformationExtraArgs:
    r"""Step along the majority vote of the signs of the workers' momenta.

    Placement: optimizer, alone. Receives this worker's own gradient, returns a
    finished update, invariant over ``axis_name``.

    .. math::
        m_t^i = \beta m_{t-1}^i + (1 - \beta) g_t^i,\quad
        V_t = \mathrm{sign}\Big(\sum_i \mathrm{sign}(m_t^i)\Big),\quad
        u_t = -\gamma_t (V_t + \lambda x_t)

    with sign(0) = +1, so that a tied vote is +1 on all workers. Also called signSGD
    with majority vote.

    Args:
        learning_rate: gamma; a number, or a schedule of steps already taken.
        axis_name: the workers' axis, or ``("node", "local")``: then momenta are
            averaged in full precision inside the node, and nodes vote.
        momentum: beta, in [0, 1); 0 is signSGD.
        weight_decay: lambda, decoupled; needs params where it is not 0.
        bucket_bytes: target bucket size in bytes, counted in the updates' dtype;
            static.

    Returns:
        A transform of updates of any floating dtype; shapes and dtypes are kept, the
        momentum is float32.

    Raises:
        ValueError: if an argument is out of range; if gradients arrive already summed
            over the axis, are not floating point, or hold no elements; if params of
            another structure are given, or none where weight_decay is not 0.
        NameError: if the axis is not mapped where ``update`` is called.

    Communication:
        For each bucket one all-to-all of packed signs to the owner of each part, who
        counts, and one all-gather of packed votes: about 2(n-1)/n bits per element and
        worker, one 32nd of float32 all-reduce. One more byte a part says that all of it
        was finite; else the vote is NaN on all workers.

    State:
        One tree like params, worker-local. On another number of workers
        :func:`bagua_jax.resize` keeps the mean of the momenta.

    Theory:
        Every element moves by exactly gamma, down where all gradients are zero: keep
        unused parameters out with ``optax.masked``. The vote is biased: it descends if
        noise is symmetric, and need not otherwise. On workers with different data it
        looks for a median of their gradients, not the mean.

    References:
        Bernstein et al., `signSGD: Compressed Optimisation for Non-Convex Problems`,
        2018 (arXiv 1802.04434), and `signSGD with Majority Vote is Communication
        Efficient and Fault Tolerant`, 2019 (arXiv 1810.05291).

    Example:
        >>> tx = signum(0.5, axis_name="workers")
        >>> grads = jnp.array([[1.0, -9.0], [2.0, 1.0], [-6.0, -1.0], [1.0, 2.0]])
        >>> step = lambda g: tx.update(g, tx.init(g))[0]
        >>> jax.vmap(step, axis_name="workers")(grads)[0].tolist()
        [-0.5, -0.5]
    """
    caller = "signum"
    checks.require_within(caller, "momentum", momentum, 0, 1)
    checks.require_within(caller, "weight_decay", weight_decay, 0)
    checks.require_at_least(caller, "bucket_bytes", bucket_bytes, 1, "It is in bytes.")
    signs = _signs()

    def init_fn(params):
        checks.require_floats(params, caller)
        zeros = precision.zeros(params)
        return SignumState(
            count=jnp.zeros([], jnp.int32),
            momentum=primitives.worker_local(zeros, axis_name),
        )

    def update_fn(updates, state, params=None, **extra_args):
        del extra_args
        checks.require_gradients(updates, params, axis_name, caller)
        grads = precision.wide(updates)
        local = optax.tree.update_moment(grads, state.momentum, momentum, 1)

        def vote(m):  # The mean of signs has the sign of their sum.
            return primitives.c_lp_s(m, signs, axis_name=axis_name)[:1]

        (direction,) = buckets.plan(updates, bucket_bytes, axis_name).map(vote, local)
        if isinstance(weight_decay, jax.Array) or weight_decay:
            if params is None:
                raise ValueError(
                    "signum: weight decay works on the parameters, and params is None. "
                    "Call tx.update(updates, state, params)."
                )
            direction = jax.tree.map(
                lambda d, x: d + weight_decay * x.astype(d.dtype), direction, params
            )
        rate = learning_rate(state.count) if callable(learning_rate) else learning_rate
        new_updates = optax.tree.cast_like(
            optax.tree.scale(jnp.negative(rate), direction), updates
        )
        return new_updates, SignumState(schedules.increment(state.count), local)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


class _Signs(NamedTuple):
    signs: jax.Array  # [ceil(d/8)] uint8, a bit for each element that is not negative
    finite: jax.Array  # [1] uint8, 1 if every element is finite


def _signs() -> Compressor:
    """Send signs without a scale: x as +1 or -1; as NaN if any x is not finite."""

    def compress(key, x, state):
        del key
        finite = all_finite(x)[None].astype(jnp.uint8)
        return _Signs(pack(x >= 0, 2), finite), state

    def decompress(payload, like):
        positive = unpack(payload.signs, 2, math.prod(like.shape)) > 0
        size = jnp.where(payload.finite > 0, 1.0, jnp.nan).astype(like.dtype)
        return jnp.where(positive, size, -size)

    facts = CompressorFacts(
        name="signs",
        unbiased=False,
        payload_bytes=lambda like: packed_bytes(2, math.prod(like.shape)) + 1,
        source="exact; not homogeneous, hence of no class",
    )
    return Compressor(lambda x: (), compress, decompress, facts)
