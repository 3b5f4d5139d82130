"""ByteGrad: gradients averaged in 8 bits."""

from typing import Any, NamedTuple

import optax

from bagua_jax import buckets, checks
from bagua_jax.algorithms.feedback import ErrorFeedback, init_errors, scatter_reduce
from bagua_jax.compressors import minmax_uint8
from bagua_jax.primitives import AxisName, Errors

__all__ = ["ByteGradState", "bytegrad"]


class ByteGradState(NamedTuple):
    """State of :func:`bytegrad`."""

    error: Errors  # each None, or like params in float32 and worker-local; unsent mass


def bytegrad(
    *,
    axis_name: AxisName,
    error_feedback: ErrorFeedback = "none",
    bucket_bytes: int = buckets.DEFAULT_BUCKET_BYTES,
) -> optax.GradientTransformationExtraArgs:
    r"""Replace each worker's gradient by the mean, exchanged in 8 bits.

    Placement: gradient side, before the optimizer. Updates out are invariant over
    ``axis_name``.

    For each bucket, with C = :func:`~bagua_jax.compressors.minmax_uint8` and the
    bucket split into n parts, each with an owner:

    .. math::
        \text{worker } i:\quad & v^i = g_t^i + d_t^i,\quad c^i = C(v^i),\quad
        d_{t+1}^i = v^i - c^i

        \text{owner}:\quad & v = \tfrac1n \sum_i c^i + e_t,\quad u_t = C(v),\quad
        e_{t+1} = v - u_t

    Args:
        axis_name: the workers' axis, or ``("node", "local")``: then gradients are
            averaged in full precision inside the node and nodes are the workers.
        error_feedback: where the errors d (``"worker"``) and e (``"owner"``) are kept:
            there, at ``"both"`` ends, or at ``"none"``, as the original; static.
        bucket_bytes: target bucket size in bytes (static).

    Returns:
        A transform of updates of any floating dtype; shapes and dtypes are kept.

    Raises:
        ValueError: if an argument is out of range; if gradients arrive already summed
            over the axis, are not floating point, or hold no elements; if params of
            another structure are given.
        NameError: if the axis is not mapped where ``update`` is called.

    Communication:
        For each bucket one all-to-all and one all-gather of N/n codes and a range:
        about 2(n-1)/n bytes per element and worker, a quarter of float32 all-reduce.

    State:
        With error feedback, one or two trees like params in float32. Checkpoint them:
        dropping them loses gradient mass. On another number of workers
        :func:`bagua_jax.resize` keeps the mean of what workers, and all of what owners,
        have not sent.

    Theory:
        With feedback at both ends no mass is lost: the sum of all updates equals the
        sum of all mean gradients less what the errors hold at the end.

    Differences from the original:
        Error feedback, which it does not have. Filling takes no part in a range, and
        the codec is right where the original's breaks (see ``minmax_uint8``).
        Hierarchy is asked for, not the default, and has no leaders.

    References:
        Gan et al., BAGUA, 2021 (arXiv 2107.01499), C_LP_S and algorithm ``bytegrad``.
        Tang et al., `DoubleSqueeze`, 2019, for feedback at both ends.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> tx = bytegrad(axis_name="workers")
        >>> grads = jnp.array([[1.0, 0.0], [2.0, 0.0], [6.0, 0.0]])
        >>> step = lambda g: tx.update(g, tx.init(g))[0]
        >>> jax.vmap(step, axis_name="workers")(grads).round(6).tolist()
        [[3.0, 0.0], [3.0, 0.0], [3.0, 0.0]]
    """
    caller = "bytegrad"
    checks.require_at_least(caller, "bucket_bytes", bucket_bytes, 1, "It is in bytes.")
    choices = ("none", "worker", "owner", "both")
    checks.require_choice(caller, "error_feedback", error_feedback, choices)
    compressor = minmax_uint8()

    def init_fn(params) -> Any:
        checks.require_floats(params, caller)
        return ByteGradState(init_errors(params, error_feedback, axis_name))

    def update_fn(updates, state, params=None, **extra_args) -> Any:
        del extra_args
        checks.require_gradients(updates, params, axis_name, caller)
        plan = buckets.plan(updates, bucket_bytes, axis_name)
        mean, error = scatter_reduce(
            updates, state.error, plan, compressor, axis_name=axis_name
        )
        return mean, ByteGradState(error)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
