"""EF21: error feedback by sending differences to a running copy of the gradient."""

import optax

from bagua_jax import buckets, compatibility
from bagua_jax.algorithms.diana import difference_coding
from bagua_jax.compressors import Compressor
from bagua_jax.primitives import AxisName

__all__ = ["ef21"]


def ef21(
    compressor: Compressor,
    *,
    axis_name: AxisName,
    bucket_bytes: int = buckets.DEFAULT_BUCKET_BYTES,
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Average running copies of the gradients, moved by compressed differences.

    Placement: gradient side, before the optimizer. Updates out are invariant over
    ``axis_name``.

    .. math::
        c^i = C\big(\nabla f_i(x_t) - h_{t-1}^i\big),\quad h_t^i = h_{t-1}^i + c^i,\quad
        u_t = h_t = h_{t-1} + \tfrac1n \sum_i c^i,\quad h_{-1}^i = 0

    Args:
        compressor: C, contractive and stateless; ``topk`` in the paper.
        axis_name: the workers' axis, or ``("node", "local")``: then gradients are
            averaged in full precision inside the node and nodes are the workers.
        bucket_bytes: target bucket size in bytes (static).
        seed: of the key that a stochastic compressor draws from.

    Returns:
        A transform of updates of any floating dtype; shapes and dtypes are kept.

    Raises:
        ValueError: if an argument is out of range; if the compressor's error can exceed
            the vector (unbiased, omega >= 1), or it keeps state; if gradients arrive
            already summed over the axis, are not floating point, or hold no elements;
            if params of another structure are given.
        NameError: if the axis is not mapped where ``update`` is called.

    Warns:
        UserWarning: once, at construction, for a compressor without a known
            contraction.

    Communication:
        For each bucket one all-gather of the payload; one all-reduce where payloads may
        be summed.

    State:
        As ``diana``: ``tracker`` holds this worker's h^i, ``mean_tracker`` their mean,
        which is updated by increments: a run that resumes needs both. On another number
        of workers :func:`bagua_jax.resize` keeps the mean tracker, from which every
        tracker goes on.

    Theory:
        With theta = 1 - sqrt(1 - delta), beta = (1 - delta)/theta and a step gamma
        of at most 1/(L + L' sqrt(beta/theta)), L'^2 the mean of L_i^2, the Lyapunov
        function f - f* + gamma/theta mean|h^i - grad f_i|^2 falls by 1 - gamma mu at
        every step for mu-strongly convex f, deterministic C and exact local gradients:
        it comes to the optimum itself. Noise in the gradients is sent and kept: feed it
        a momentum of them (EF21-SGDM) where they are stochastic.

    Differences from the paper:
        The first message is C of the first gradient, the paper's second choice of
        initial values.

    References:
        Richtarik et al., `EF21: A New, Simpler, Theoretically Better, and Practically
        Faster Error Feedback`, 2021 (arXiv 2106.05203).

    Example:
        >>> import jax, jax.numpy as jnp
        >>> from bagua_jax.compressors import topk
        >>> tx = ef21(topk(0.5), axis_name="workers")
        >>> def two_steps(g):
        ...     first, state = tx.update(g, tx.init(g))
        ...     return first, tx.update(g, state)[0]
        >>> g = jnp.array([[1.0, 2.0], [3.0, 4.0]])
        >>> first, second = jax.vmap(two_steps, axis_name="workers")(g)
        >>> first[0].tolist(), second[0].tolist()
        ([0.0, 3.0], [2.0, 3.0])
    """
    check = compatibility.require_compressor(
        "ef21",
        compressor,
        compatibility.FED_BACK,
        cure="Use diana for an unbiased one, or a contraction such as topk.",
    )
    return difference_coding(
        "ef21",
        compressor,
        lambda d: 1,
        axis_name,
        bucket_bytes=bucket_bytes,
        seed=seed,
        check=check,
    )
