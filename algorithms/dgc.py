"""Deep gradient compression: top-k messages, with momentum kept right locally."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from bagua_jax import buckets, checks, precision, primitives
from bagua_jax.compressors import topk
from bagua_jax.compressors.numerics import is_finite
from bagua_jax.primitives import AxisName
from bagua_jax.renamed import takes_old_names

__all__ = ["DGCState", "dgc"]


class DGCState(NamedTuple):
    """State of :func:`dgc`."""

    velocity: optax.Updates  # like params, float32, worker-local; momentum u
    error: optax.Updates  # like params, float32, worker-local; v, what was not sent


@takes_old_names
def dgc(
    *,
    axis_name: AxisName,
    ratio: float = 0.001,
    momentum: float = 0.9,
    clip: float | None = None,
    bucket_bytes: int = buckets.DEFAULT_BUCKET_BYTES,
) -> optax.GradientTransformationExtraArgs:
    r"""Average the largest entries of accumulated, momentum-corrected gradients.

    Placement: gradient side, before plain SGD: the momentum is in here. Updates out are
    invariant over ``axis_name``.

    .. math::
        u^i = m\, u^i + g_t^i,\quad v^i = v^i + u^i,\quad
        M^i = \text{the } k \text{ largest of } |v^i|

        \text{update: } \tfrac1n \sum_i M^i v^i;\qquad
        u^i = (1 - M^i)\, u^i,\quad v^i = (1 - M^i)\, v^i

    Momentum correction: u is accumulated, not g, so that an entry which waits in v has
    its momentum when it is sent. Factor masking: what was sent loses its momentum,
    which would drag it by old gradients.

    Args:
        axis_name: the workers' axis, or ``("node", "local")``: then gradients are
            averaged in full precision inside the node and nodes are the workers.
        ratio: k over the elements of a bucket, in (0, 1]; at least one element is
            sent. Static.
        momentum: m, in [0, 1).
        clip: largest norm of the whole gradient, > 0: every worker clips its own at
            clip/sqrt(n) before it is accumulated. ``None`` for no clipping.
        bucket_bytes: target bucket size in bytes (static). 1 selects in every leaf.

    Returns:
        A transform of updates of any floating dtype; shapes and dtypes are kept.

    Raises:
        ValueError: if an argument is out of range; if gradients arrive already summed
            over the axis, are not floating point, or hold no elements; if params of
            another structure are given.
        NameError: if the axis is not mapped where ``update`` is called.

    Communication:
        For each bucket one all-gather of k values (float32) and k indices.

    State:
        Two trees like params, worker-local. Checkpoint both: v is unsent gradient mass.
        On another number of workers :func:`bagua_jax.resize` keeps the means of both
        trees.

    Theory:
        Nothing is lost: what was sent over time and v add up to the sum of all u. With
        m = 0 it is error feedback with top-k; at ratio 1 masking empties u at every
        step and plain SGD is left, whatever m.

    Differences from the paper:
        k is fixed, not found by a threshold on a sample. The k largest are those of a
        bucket, not of a layer, and small layers are not sent densely. The ratio has
        no warm-up; chain runs of several densities for that. No Nesterov momentum.

    References:
        Lin et al., `Deep Gradient Compression: Reducing the Communication Bandwidth for
        Distributed Training`, 2018 (arXiv 1712.01887).

    Example:
        >>> tx = dgc(axis_name="workers", ratio=0.5)
        >>> grads = jnp.array([[1.0, 2.0], [3.0, 1.0]])
        >>> step = lambda g: tx.update(g, tx.init(g))[0]
        >>> jax.vmap(step, axis_name="workers")(grads)[0].tolist()
        [1.5, 1.0]
    """
    caller = "dgc"
    checks.require_within(caller, "momentum", momentum, 0, 1)
    checks.require_at_least(caller, "bucket_bytes", bucket_bytes, 1, "It is in bytes.")
    if clip is not None:
        checks.require_within(caller, "clip", clip, 0, open_below=True)
    if isinstance(ratio, bool) or not 0 < ratio <= 1:
        raise ValueError(
            f"dgc: ratio must be in (0, 1], got {ratio!r}. 0.001 sends one element "
            "of a thousand."
        )
    compressor = topk(ratio)

    def init_fn(params):
        checks.require_floats(params, caller)
        velocity, error = precision.zeros(params), precision.zeros(params)
        return DGCState(*primitives.worker_local((velocity, error), axis_name))

    def update_fn(updates, state, params=None, **extra_args):
        del extra_args
        checks.require_gradients(updates, params, axis_name, caller)
        grads = updates
        if clip is not None:
            what, cure = "the norm that clip bounds", "Leave clip out."
            checks.require_one_type(updates, axis_name, caller, what, cure)
            limit = clip / primitives.axis_size(axis_name, caller) ** 0.5
            norm = optax.tree.norm(precision.wide(updates))
            scale = jnp.where(norm > limit, limit / norm, 1.0)
            # Squares that overflow would scale finite gradients to nothing.
            scale = jnp.where(is_finite(norm), scale, jnp.nan)
            grads = jax.tree.map(lambda g: (g * scale).astype(g.dtype), updates)

        def exchange(g, velocity, error):
            shard = primitives.node_shard(g, axis_name, caller, "zero")
            u = momentum * shard.take(velocity) + shard.value
            v = shard.take(error) + u
            mean, sent = primitives.mean_and_own(
                v, compressor, axis_name=primitives.peer_axis(axis_name)
            )
            velocity = shard.put(jnp.where(sent == 0, u, 0))
            return shard.gather(mean).astype(g.dtype), velocity, shard.put(v - sent)

        plan = buckets.plan(updates, bucket_bytes, axis_name)
        mean, velocity, error = plan.map(exchange, grads, state.velocity, state.error)
        return mean, DGCState(velocity, error)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
