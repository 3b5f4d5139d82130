"""Delayed gradients: the mean gradient of some steps ago, as a pipeline delivers it."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bagua_jax import buckets, checks, precision, primitives, schedules
from bagua_jax.primitives import AxisName

__all__ = ["DelayedGradientsState", "delayed_gradients"]


class DelayedGradientsState(NamedTuple):
    """State of :func:`delayed_gradients`."""

    count: jax.Array  # [] int32, steps taken; equal on all workers
    pending: tuple[optax.Updates, ...]  # the last gradients, oldest first, float32:
    # means, equal on all workers; each worker's own where delays differ between them


def delayed_gradients(
    *,
    axis_name: AxisName,
    staleness: int | Sequence[int] | Sequence[Sequence[int]] | np.ndarray = 1,
    bucket_bytes: int = buckets.DEFAULT_BUCKET_BYTES,
) -> optax.GradientTransformationExtraArgs:
    r"""Replace each worker's gradient by the exact mean of some steps ago.

    Placement: gradient side, before the optimizer. Updates out are invariant over
    ``axis_name``.

    .. math::
        u_t = \tfrac1n \sum_i g^i_{t-\tau_i(t)}(x_{t-\tau_i(t)}),\qquad
        g^i_s = 0 \text{ for } s < 0

    A deterministic model of pipelined and asynchronous training: ``staleness=1`` is the
    all-reduce that overlaps the whole next step, a trace of delays repeats, run for
    run, what workers of different speed did once. With one delay for all, parameters
    stand at x_0 until the first mean arrives: the trajectory is that of delayed SGD
    which reuses x_0 in its early steps, tau steps later.

    Args:
        axis_name: the workers' axis, or ``("node", "local")``.
        staleness: tau, steps between a gradient and its use, integers of at least 0;
            static. One number; a sequence [period], the delay of all workers on each
            step, repeated; or rows [period, n], one delay for each worker, devices of
            a hierarchy in row-major order. 0 is ``gradient_allreduce``.
        bucket_bytes: target message size in bytes (static).

    Returns:
        A transform of updates of any floating dtype; shapes and dtypes are kept.

    Raises:
        ValueError: if an argument is out of range, or rows of delays are made for
            another number of workers; if gradients arrive already summed over the axis,
            are not floating point, or hold no elements; if params of another structure
            are given.
        NameError: if the axis is not mapped where ``update`` is called.

    Communication:
        One all-reduce for each bucket: 2(n-1)/n of the gradient's bytes per worker. Of
        a gradient as soon as it is there, or, where delays differ between workers, of
        those that are used.

    State:
        As many trees like params in float32 as the largest delay, equal on all workers,
        or worker-local where delays differ between them. Checkpoint them: they are
        gradients that have not been used. On another number of workers
        :func:`bagua_jax.resize` keeps the gradients under way, or their means.

    Theory:
        A trace may use a gradient twice, or never. For one fixed tau, on a quadratic
        with largest curvature lambda, plain gradient descent is stable if and only if

        .. math:: \gamma \lambda < 2 \sin \frac{\pi}{2 (2 \tau + 1)},

        2 for tau = 0, 1 for tau = 1, about pi/(2 tau) for large tau.

    Differences from the papers:
        Delays are given, not drawn, and the mean is exact. What a worker has not yet
        computed counts as zero, also in an optimizer behind it, whose bias corrections
        count those steps.

    References:
        Agarwal and Duchi, `Distributed Delayed Stochastic Optimization`, 2011 (arXiv
        1104.5525); Stich and Karimireddy, `The Error-Feedback Framework`, 2019 (arXiv
        1909.05350). The limit: characteristic roots of x' = x - gamma lambda x_{t-tau}.

    Example:
        >>> import jax
        >>> tx = delayed_gradients(axis_name="workers", staleness=1)
        >>> def two_steps(g):
        ...     first, state = tx.update(g, tx.init(g))
        ...     second, _ = tx.update(10 * g, state)
        ...     return first, second
        >>> g = jnp.array([1.0, 5.0])
        >>> first, second = jax.vmap(two_steps, axis_name="workers")(g)
        >>> first.tolist(), second.tolist()
        ([0.0, 0.0], [3.0, 3.0])
    """
    caller = "delayed_gradients"
    trace = _read_trace(staleness)
    longest, own_delays = int(trace.max()), trace.ndim == 2
    checks.require_at_least(caller, "bucket_bytes", bucket_bytes, 1, "It is in bytes.")

    def init_fn(params):
        checks.require_floats(params, caller)
        pending = tuple(precision.zeros(params) for _ in range(longest))
        if own_delays:
            pending = primitives.worker_local(pending, axis_name)
        return DelayedGradientsState(jnp.zeros([], jnp.int32), pending)

    def update_fn(updates, state, params=None, **extra_args):
        del extra_args
        checks.require_gradients(updates, params, axis_name, caller)
        plan = buckets.plan(updates, bucket_bytes, axis_name)

        def mean(grads):
            vectors = plan.pack(grads)
            return plan.unpack(
                [primitives.c_fp_s(g, axis_name=axis_name) for g in vectors]
            )

        def due(history):  # the latest first
            if (trace == longest).all():
                return history[longest]
            delay = jnp.asarray(trace, jnp.int32)[state.count % len(trace)]
            if own_delays:
                delay = delay[primitives.axis_index(axis_name, caller)]
            return jax.tree.map(lambda *g: jax.lax.select_n(delay, *g), *history)

        if own_delays:
            _require_columns(trace, primitives.axis_size(axis_name, caller), axis_name)
        latest = precision.wide(updates if own_delays else mean(updates))
        if longest:
            latest = primitives.vary_like(latest, state.pending[-1])
        pending = (*state.pending, latest)
        used = optax.tree.cast_like(due(pending[::-1]), updates)
        return mean(used) if own_delays else used, DelayedGradientsState(
            schedules.increment(state.count), pending[1:]
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _read_trace(staleness: Any) -> np.ndarray:
    """Return the delays as integers [period] or [period, n]."""
    try:
        trace = np.atleast_1d(np.asarray(staleness))
    except ValueError:  # rows of different lengths
        trace = np.zeros(0)
    whole = np.issubdtype(trace.dtype, np.integer)
    if not (whole and trace.size and trace.ndim <= 2 and trace.min() >= 0):
        raise ValueError(
            f"delayed_gradients: staleness must be integers >= 0, got {staleness!r}. "
            "Give one, a sequence with one for each step, or rows with one for each "
            "worker."
        )
    return trace


def _require_columns(trace: np.ndarray, n: int, axis_name: AxisName) -> None:
    if trace.shape[1] != n:
        raise ValueError(
            f"delayed_gradients: rows of delays have {trace.shape[1]} entries, and the "
            f"axis {axis_name!r} has {n} workers. Give each worker its delay, or one "
            "for all."
        )
