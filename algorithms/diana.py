"""DIANA: workers compress how their gradient differs from what was learned of it."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.core
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
)
from bagua_jax.compressors import Compressor
from bagua_jax.primitives import AxisName

__all__ = ["TrackerState", "diana", "difference_coding"]


class TrackerState(NamedTuple):
    """State of :func:`diana` and of ``ef21``."""

    count: jax.Array  # [] int32, steps taken; equal on all workers
    key: jax.Array  # [] typed PRNG key; equal on all workers
    tracker: optax.Updates  # like params, float32, worker-local; what this worker sent
    mean_tracker: optax.Updates  # like params, float32, equal; the mean of trackers

    def resized(self, like, params, workers):
        """Every tracker is the mean tracker, which stays."""
        del params
        count, key, mean_tracker = resizing.mean(
            (self.count, self.key, self.mean_tracker), workers
        )
        tracker = jax.tree.map(
            lambda x, like: jnp.broadcast_to(x, like.shape), mean_tracker, like.tracker
        )
        return TrackerState(count, key, tracker, mean_tracker)


def diana(
    compressor: Compressor,
    *,
    axis_name: AxisName,
    alpha: float | None = None,
    bucket_bytes: int = buckets.DEFAULT_BUCKET_BYTES,
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Average compressed differences between gradients and learned shifts.

    Placement: gradient side, before the optimizer. Updates out are invariant over
    ``axis_name``.

    .. math::
        q^i = C(g_t^i - h_t^i),\quad u_t = h_t + \tfrac1n \sum_i q^i

        h_{t+1}^i = h_t^i + \alpha q^i,\quad
        h_{t+1} = h_t + \tfrac\alpha n \sum_i q^i

    The shifts :math:`h^i` come to the workers' gradients at the optimum, where the
    differences vanish and with them the noise of compression.

    Args:
        compressor: C, unbiased and stateless.
        axis_name: the workers' axis, or ``("node", "local")``: then gradients are
            averaged in full precision inside the node and nodes are the workers.
        alpha: step of the shifts, in (0, 1]; where ``None`` 1/(1 + omega), with the
            compressor's omega for a vector of the bucket's length, which its facts
            must then state.
        bucket_bytes: target bucket size in bytes (static).
        seed: of the key that a stochastic compressor draws from.

    Returns:
        A transform of updates of any floating dtype; shapes and dtypes are kept.

    Raises:
        ValueError: if an argument is out of range; if the compressor is biased or
            keeps state; if gradients arrive already summed over the axis, are not
            floating point, or hold no elements; if params of another structure are
            given.
        NameError: if the axis is not mapped where ``update`` is called.

    Communication:
        For each bucket one all-gather of the payload; one all-reduce where payloads may
        be summed.

    State:
        A tree like params for the worker's shift and one, equal on all workers, for
        their mean. Checkpoint both. On another number of workers
        :func:`bagua_jax.resize` keeps the mean tracker, from which every tracker goes
        on.

    Theory:
        Unbiased at every step. On strongly convex f with exact local gradients it comes
        to the optimum itself at a constant step of order 1/(L (1 + 6 omega/n)), where
        compressed gradients stall at a floor. With a mask that is common to all
        workers, noises do not average out over them.

    References:
        Mishchenko et al., `Distributed Learning with Compressed Gradient Differences`,
        2019 (arXiv 1901.09269).

    Example:
        >>> from bagua_jax.compressors import identity
        >>> tx = diana(identity(), axis_name="workers")
        >>> step = lambda g: tx.update(g, tx.init(g))[0]
        >>> jax.vmap(step, axis_name="workers")(jnp.array([1.0, 2.0, 6.0])).tolist()
        [3.0, 3.0, 3.0]
    """
    caller = "diana"
    compatibility.require_compressor(caller, compressor, compatibility.LEARNED)
    if alpha is not None:
        checks.require_within(caller, "alpha", alpha, 0, open_below=True)
        if not isinstance(alpha, jax.core.Tracer) and alpha > 1:
            raise ValueError(
                f"diana: alpha must be at most 1, got {alpha!r}: shifts would "
                "overshoot what they learn. Leave it out for 1/(1 + omega)."
            )

    omega = compressor.facts.omega
    if alpha is None and omega is None:
        raise ValueError(
            f"diana: alpha is 1/(1 + omega), and the facts of {compressor.facts.name} "
            "state no omega. Pass alpha."
        )

    def rate(d: int) -> Any:
        return 1 / (1 + omega(d)) if alpha is None and omega else alpha

    return difference_coding(
        caller, compressor, rate, axis_name, bucket_bytes=bucket_bytes, seed=seed
    )


def difference_coding(
    caller: str,
    compressor: Compressor,
    rate: Callable[[int], float],
    axis_name: AxisName,
    *,
    bucket_bytes: int,
    seed: int,
    check: Callable[[int], None] = lambda d: None,
) -> optax.GradientTransformationExtraArgs:
    """Build a gradient-side transform that sends differences to trackers.

    Args:
        caller: the algorithm, for errors.
        compressor: stateless.
        rate: by how much of the sent difference trackers of d elements move.
        axis_name: as in :func:`diana`.
        bucket_bytes: as in :func:`diana`.
        seed: as in :func:`diana`.
        check: refuses a length of the vectors that are compressed.
    """
    checks.require_at_least(caller, "bucket_bytes", bucket_bytes, 1, "It is in bytes.")
    padding = compressor.facts.padding

    def init_fn(params):
        checks.require_floats(params, caller)
        return TrackerState(
            count=jnp.zeros([], jnp.int32),
            key=jax.random.key(seed),
            tracker=primitives.worker_local(precision.zeros(params), axis_name),
            mean_tracker=precision.zeros(params),
        )

    def update_fn(updates, state, params=None, **extra_args):
        del extra_args
        checks.require_gradients(updates, params, axis_name, caller)
        key = jax.random.fold_in(state.key, state.count)

        def exchange(g, tracker, mean_tracker, key):
            shard = primitives.node_shard(g, axis_name, caller, padding)
            check(shard.value.shape[0])
            mean, own = primitives.mean_and_own(
                shard.value.astype(tracker.dtype) - shard.take(tracker),
                compressor,
                axis_name=primitives.peer_axis(axis_name),
                key=key,
            )
            alpha, mean = rate(own.shape[0]), shard.gather(mean)
            return (
                (mean_tracker + mean).astype(g.dtype),
                tracker + alpha * shard.put(own),
                mean_tracker + alpha * mean,
            )

        plan = buckets.plan(updates, bucket_bytes, axis_name)
        estimate, tracker, mean_tracker = plan.map(
            exchange, updates, state.tracker, state.mean_tracker, keys=key
        )
        count = schedules.increment(state.count)
        return estimate, TrackerState(count, state.key, tracker, mean_tracker)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
