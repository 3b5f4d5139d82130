"""MARINA: compressed gradient differences, and now and then the whole gradient."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from bagua_jax import buckets, checks, compatibility, precision, primitives, schedules
from bagua_jax.compressors import Compressor
from bagua_jax.primitives import AxisName

__all__ = ["MarinaState", "marina"]


class MarinaState(NamedTuple):
    """State of :func:`marina`."""

    count: jax.Array  # [] int32, steps taken; equal on all workers
    key: jax.Array  # [] typed PRNG key; equal on all workers
    estimate: optax.Updates  # g, like params, float32; equal on all workers
    previous_gradient: (
        optax.Updates
    )  # like params, float32; this worker's, worker-local
    previous_params: optax.Params  # where it was taken; equal on all workers


def marina(
    compressor: Compressor,
    *,
    axis_name: AxisName,
    probability: float,
    bucket_bytes: int = buckets.DEFAULT_BUCKET_BYTES,
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Move an estimate of the mean gradient by compressed gradient differences.

    Placement: gradient side, before the optimizer. Updates out are invariant over
    ``axis_name``.

    .. math::
        u_t = \begin{cases}
            \tfrac1n \sum_i \nabla f_i(x_t) & \text{with probability } p,
                \text{ and for } t = 0 \\
            u_{t-1} + \tfrac1n \sum_i C\big(\nabla f_i(x_t) - \nabla f_i(x_{t-1})\big)
                & \text{otherwise}
        \end{cases}

    One coin for all workers, drawn from a key and a counter that they share.

    Both gradients of a difference belong on the same sample. Hand ``update`` a function
    that takes the gradient of this step's batch at other parameters::

        take = bagua_jax.value_and_grad(loss, axis_name)
        tx.update(grads, state, params, gradient_fn=lambda x: take(x, batch)[1])

    Its argument is typed as the worker's own, its result is this worker's gradient. It
    runs on steps with a difference only. Without it the last step's gradient stands
    for it: the same for full gradients, which do not depend on a batch.

    Args:
        compressor: C, unbiased and stateless.
        axis_name: the workers' axis, or ``("node", "local")``: then gradients are
            averaged in full precision inside the node and nodes are the workers.
        probability: p of a dense step, in (0, 1]; static. The share of the vector that
            C sends balances the bytes of both kinds of step.
        bucket_bytes: target bucket size in bytes (static).
        seed: of the key that the coin and a stochastic compressor draw from.

    Returns:
        A transform of updates of any floating dtype; shapes and dtypes are kept.
        ``update`` takes ``gradient_fn``; with it, it needs ``params``.

    Raises:
        ValueError: if an argument is out of range; if the compressor is biased or
            keeps state; if gradients arrive already summed over the axis, are not
            floating point, or hold no elements; if params of another structure are
            given, or none beside ``gradient_fn``, or it gives another structure.
        NameError: if the axis is not mapped where ``update`` is called.

    Communication:
        On a share p of the steps one all-reduce for each bucket; on the others one
        all-gather of the payload, or an all-reduce where payloads may be summed.

    State:
        Three trees like params: the estimate, this worker's last gradient, and the
        parameters it was taken at. Checkpoint them all. On another number of workers
        :func:`bagua_jax.resize` keeps the estimate, and the mean of the last gradients.

    Theory:
        Noise is that of differences, which vanish as the parameters settle: with full
        gradients it comes to the optimum itself. With e_t = u_t - grad f(x_t),
        :math:`E[e_t \mid x_t] = (1 - p)\, e_{t-1}`, and for a compressor whose error is
        omega times the square of every vector, drawn by each worker for itself,

        .. math::
            E|e_t|^2 = (1-p) \Big(|e_{t-1}|^2 + \frac{\omega}{n^2} \sum_i
            |\nabla f_i(x_t) - \nabla f_i(x_{t-1})|^2\Big).

        ``probability=1`` is ``gradient_allreduce``. So is the identity compressor
        without ``gradient_fn``, up to rounding: differences telescope.

    Differences from the paper:
        The last gradient may stand for one at the last parameters. A dense step takes
        the gradient at hand, where the paper's variant for finite sums takes the full
        one: hand a large batch to such steps for that.

    References:
        Gorbunov et al., `MARINA: Faster Non-Convex Distributed Learning with
        Compression`, 2021 (arXiv 2102.07845). The moments follow from the update.

    Example:
        >>> from bagua_jax.compressors import identity
        >>> tx = marina(identity(), axis_name="workers", probability=0.1)
        >>> def two_steps(g):
        ...     first, state = tx.update(g, tx.init(g))
        ...     return first, tx.update(2 * g, state)[0]
        >>> first, second = jax.vmap(two_steps, axis_name="workers")(jnp.arange(4.0))
        >>> first.tolist(), second.tolist()
        ([1.5, 1.5, 1.5, 1.5], [3.0, 3.0, 3.0, 3.0])
    """
    caller = "marina"
    compatibility.require_compressor(caller, compressor, compatibility.LEARNED)
    if isinstance(probability, bool) or not 0 < probability <= 1:
        raise ValueError(
            f"marina: probability must be in (0, 1], got {probability!r}: without "
            "dense steps errors of the estimate never leave it. 0.1 is one in ten."
        )
    checks.require_at_least(caller, "bucket_bytes", bucket_bytes, 1, "It is in bytes.")
    padding = compressor.facts.padding

    def init_fn(params):
        checks.require_floats(params, caller)
        return MarinaState(
            count=jnp.zeros([], jnp.int32),
            key=jax.random.key(seed),
            estimate=precision.zeros(params),
            previous_gradient=primitives.worker_local(
                precision.zeros(params), axis_name
            ),
            # A copy: callers may donate the parameters and the state alike.
            previous_params=jax.tree.map(jnp.copy, params),
        )

    def update_fn(
        updates,
        state,
        params=None,
        *,
        gradient_fn: Callable[[Any], Any] | None = None,
        **extra_args,
    ):
        del extra_args
        checks.require_gradients(updates, params, axis_name, caller)
        if gradient_fn is not None and params is None:
            raise ValueError(
                "marina: gradient_fn is evaluated at the last parameters, and params "
                "is None, so that they are not known. Call tx.update(updates, state, "
                "params, gradient_fn=...)."
            )
        plan = buckets.plan(updates, bucket_bytes, axis_name)
        coin, key = jax.random.split(jax.random.fold_in(state.key, state.count))
        gradient = precision.wide(updates)

        def dense():
            vectors = plan.pack(updates)
            means = [primitives.c_fp_s(g, axis_name=axis_name) for g in vectors]
            mean = precision.wide(plan.unpack(means))
            return primitives.vary_like(mean, state.estimate)

        def exchange(g, before, estimate, key):
            shard = primitives.node_shard(g - before, axis_name, caller, padding)
            mean, _ = primitives.mean_and_own(
                shard.value,
                compressor,
                axis_name=primitives.peer_axis(axis_name),
                key=key,
            )
            return (estimate + shard.gather(mean),)

        def difference():
            before = state.previous_gradient
            if gradient_fn is not None:
                there = primitives.worker_local(state.previous_params, axis_name)
                before = gradient_fn(there)
                checks.require_gradients(
                    before, updates, axis_name, f"{caller}'s gradient_fn"
                )
                before = precision.wide(before)
            return plan.map(exchange, gradient, before, state.estimate, keys=key)[0]

        branches, shares = [dense, difference], (probability, 1 - probability)
        if probability == 1:
            branches, shares = [dense], (1,)
        take_difference = (state.count > 0) & ~jax.random.bernoulli(coin, probability)
        estimate = schedules.switch(
            take_difference.astype(jnp.int32), branches, shares=shares
        )
        here = state.previous_params if params is None else params
        return optax.tree.cast_like(estimate, updates), MarinaState(
            count=schedules.increment(state.count),
            key=state.key,
            estimate=estimate,
            previous_gradient=primitives.worker_local(gradient, axis_name),
            previous_params=primitives.vary_like(here, state.previous_params),
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
