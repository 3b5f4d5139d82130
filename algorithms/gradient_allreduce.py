"""Gradient allreduce: synchronous data-parallel training, the baseline."""

import optax

from bagua_jax import buckets, checks, primitives
from bagua_jax.primitives import AxisName

__all__ = ["gradient_allreduce"]


def gradient_allreduce(
    *, axis_name: AxisName, bucket_bytes: int = buckets.DEFAULT_BUCKET_BYTES
) -> optax.GradientTransformationExtraArgs:
    r"""Replace each worker's gradient by the exact mean over the workers.

    Placement: gradient side, before the optimizer. Updates out are invariant over
    ``axis_name``.

    .. math:: u_t = \tfrac1n \sum_i g_t^i

    Args:
        axis_name: the workers' axis, or ``("node", "local")``: then a reduce-scatter
            inside the node, an all-reduce of shards between nodes, a gather inside.
        bucket_bytes: target message size in bytes (static).

    Returns:
        A transform of updates of any floating dtype; shapes and dtypes are kept.

    Raises:
        ValueError: if gradients arrive already summed over the axis, are not floating
            point, or hold no elements; if params of another structure are given.
        NameError: if the axis is not mapped where ``update`` is called.

    Communication:
        One all-reduce for each bucket: 2(n-1)/n of the gradient's bytes per worker.

    State: none.

    Half precision, as PyTorch's ``fp16_compress_hook`` and Horovod's
    ``Compression.fp16`` have it, is this transform between two casts (below): messages
    of half the size, whose sums are rounded to float16. ``compressed_mean`` sends as
    many bytes and adds up in float32. On CPU XLA adds float16 slowly, so that this pays
    on slow networks only, and bfloat16 travels as float32; there ``compressed_mean``
    with ``plan="ring"`` does the same quickly.

    References:
        Gan et al., BAGUA, 2021 (arXiv 2107.01499), algorithm ``gradient_allreduce``.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> tx = optax.chain(gradient_allreduce(axis_name="workers"), optax.sgd(0.5))
        >>> grads = jnp.array([[1.0], [2.0], [6.0]])
        >>> step = lambda g: tx.update(g, tx.init(g))[0]
        >>> jax.vmap(step, axis_name="workers")(grads).ravel().tolist()
        [-1.5, -1.5, -1.5]
        >>> def cast(dtype):
        ...     return optax.stateless_with_tree_map(lambda g, _: g.astype(dtype))
        >>> half = gradient_allreduce(axis_name="workers")
        >>> tx = optax.chain(cast("float16"), half, cast("float32"), optax.sgd(0.5))
        >>> jax.vmap(step, axis_name="workers")(grads).ravel().tolist()
        [-1.5, -1.5, -1.5]
    """
    caller = "gradient_allreduce"
    checks.require_at_least(caller, "bucket_bytes", bucket_bytes, 1, "It is in bytes.")

    def init_fn(params):
        checks.require_floats(params, caller)
        return optax.EmptyState()

    def update_fn(updates, state, params=None, **extra_args):
        del extra_args
        checks.require_gradients(updates, params, axis_name, caller)
        plan = buckets.plan(updates, bucket_bytes, axis_name)
        vectors = plan.pack(updates)
        means = [primitives.c_fp_s(g, axis_name=axis_name) for g in vectors]
        return plan.unpack(means), state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
