"""QAdam: Adam whose momentum is averaged in 8 bits after a warm-up."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from bagua_jax import buckets, checks, compatibility, precision, primitives, schedules
from bagua_jax.algorithms import moments
from bagua_jax.algorithms.feedback import ErrorFeedback, init_errors, scatter_reduce
from bagua_jax.compressors import Compressor, minmax_uint8
from bagua_jax.primitives import AxisName, Errors

__all__ = ["QAdamState", "qadam"]


class QAdamState(NamedTuple):
    """State of :func:`qadam`."""

    count: jax.Array  # [] int32, steps taken; equal on all workers
    key: jax.Array  # [] typed PRNG key; equal on all workers
    mu: optax.Updates  # like params, float32; mean momentum
    nu: optax.Updates  # like params, float32; second moment, then its frozen estimate
    error: Errors  # each None, or like params in float32 and worker-local


def qadam(
    learning_rate: optax.ScalarOrSchedule,
    compressor: Compressor = minmax_uint8(),  # noqa: B008  (immutable)
    *,
    axis_name: AxisName,
    warmup_steps: int = 100,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    error_feedback: ErrorFeedback = "none",
    bucket_bytes: int = buckets.DEFAULT_BUCKET_BYTES,
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Adam with exact steps first, then a frozen variance and compressed momentum.

    Placement: optimizer, alone. Receives this worker's own gradient, returns a
    finished update, invariant over ``axis_name``.

    For t = 1, ..., W (``warmup_steps``), Adam on the exact mean gradient:

    .. math::
        g_t = \tfrac1n \sum_i g_t^i,\quad
        m_t = \beta_1 m_{t-1} + (1 - \beta_1) g_t,\quad
        v_t = \beta_2 v_{t-1} + (1 - \beta_2) g_t^2,\quad
        \hat v_t = \frac{v_t}{1 - \beta_2^t}

    and for t > W, with the variance estimate frozen at :math:`\hat v = \hat v_W`:

    .. math::
        m_t^i = \beta_1 m_{t-1} + (1 - \beta_1) g_t^i,\quad
        m_t = \mathrm{C\_LP\_S}(m_t^1, \dots, m_t^n)

    Always:

    .. math::
        u_t = -\gamma_t \Big( \frac{m_t / (1 - \beta_1^t)}{\sqrt{\hat v} + \epsilon}
        + \lambda x_t \Big)

    Args:
        learning_rate: gamma; a number, or a schedule of steps already taken.
        compressor: stateless; of the momentum. A contraction with error feedback; of
            small error without.
        axis_name: the workers' axis, or ``("node", "local")``.
        warmup_steps: W, at least 2; static.
        b1: beta_1, decay of the momentum, in [0, 1).
        b2: beta_2, decay of the second moment, in [0, 1).
        eps: added to the denominator, > 0. Where gradients were tiny during the whole
            warm-up, the frozen variance stays tiny and the momentum's compression error
            weighs heavily: then warm up longer or choose a larger eps.
        weight_decay: lambda, decoupled; needs params where it is not 0.
        error_feedback: ``"none"``, ``"worker"``, ``"owner"`` or ``"both"``; static.
        bucket_bytes: target bucket size in bytes (static).
        seed: of the key that a stochastic compressor draws from.

    Returns:
        A transform of updates of any floating dtype; shapes and dtypes are kept,
        moments are float32.

    Raises:
        ValueError: if an argument is out of range; if the compressor keeps state, or
            feedback would make its error grow; if gradients arrive already summed over
            the axis, are not floating point, or hold no elements; if params of another
            structure are given, or none where weight_decay is not 0.
        NameError: if the axis is not mapped where ``update`` is called.

    Warns:
        UserWarning: once, at construction, for a compressor without the guarantee that
            theory needs (:mod:`bagua_jax.compatibility`).

    Communication:
        During warm-up one all-reduce of float32 for each bucket; afterwards one
        all-to-all and one all-gather of payloads for each.

    State:
        Two trees like params, equal on all workers, and the errors, worker-local. On
        another number of workers :func:`bagua_jax.resize` keeps the mean of what
        workers, and all of what owners, have not sent.

    Differences from the original:
        Exactly W steps update both moments (it loses the gradient of step W). The
        bias-corrected variance is frozen (it freezes v and goes on correcting, so that
        its step grows by 1/sqrt(1 - b2^W)). Entries whose gradient was exactly zero
        during the whole warm-up are not moved by the momentum (it divides compression
        error by eps). Weight decay is decoupled and kept after
        the warm-up. Error feedback is available. W = 1 is refused: the variance would
        be that of one gradient.

    References:
        Gan et al., BAGUA, 2021 (arXiv 2107.01499), algorithm ``qadam``; Tang et al.,
        `1-bit Adam`, 2021.

    Example:
        >>> tx = qadam(0.1, axis_name="workers", warmup_steps=2)
        >>> grads = jnp.array([[1.0], [3.0]])
        >>> def step(g):
        ...     updates, state = tx.update(g, tx.init(g))
        ...     return updates
        >>> out = jax.vmap(step, axis_name="workers")(grads)
        >>> [round(float(u), 3) for u in out.ravel()]
        [-0.1, -0.1]
    """
    caller = "qadam"
    checks.require_at_least(
        caller, "warmup_steps", warmup_steps, 2, "The variance is frozen after it."
    )
    checks.require_at_least(caller, "bucket_bytes", bucket_bytes, 1, "It is in bytes.")
    checks.require_choice(
        caller, "error_feedback", error_feedback, ("none", "worker", "owner", "both")
    )
    checks.require_within(caller, "b1", b1, 0, 1)
    checks.require_within(caller, "b2", b2, 0, 1)
    checks.require_within(caller, "eps", eps, 0, open_below=True)
    checks.require_within(caller, "weight_decay", weight_decay, 0)
    check = compatibility.require_compressor(
        caller,
        compressor,
        compatibility.CARRIED if error_feedback == "none" else compatibility.FED_BACK,
        cure="Use more levels or smaller blocks, or a contraction with "
        "error_feedback='both'.",
    )

    def init_fn(params) -> Any:
        checks.require_floats(params, caller)
        return QAdamState(
            count=jnp.zeros([], jnp.int32),
            key=jax.random.key(seed),
            mu=precision.zeros(params),
            nu=precision.zeros(params),
            error=init_errors(params, error_feedback, axis_name),
        )

    def update_fn(updates, state, params=None, **extra_args) -> Any:
        del extra_args
        checks.require_gradients(updates, params, axis_name, caller)
        plan = buckets.plan(updates, bucket_bytes, axis_name)
        step = schedules.increment(state.count)
        grads = precision.wide(updates)

        def warm_up():
            vectors = plan.pack(updates)
            mean = plan.unpack(
                [primitives.c_fp_s(g, axis_name=axis_name) for g in vectors]
            )
            mean = precision.wide(mean)
            mu = optax.tree.update_moment(mean, state.mu, b1, 1)
            nu = optax.tree.update_moment(mean, state.nu, b2, 2)
            nu_hat = moments.unbiased(nu, b2, step)
            # The last warm-up step leaves the estimate behind that is kept.
            kept = jax.tree.map(
                lambda hat, raw: jnp.where(step == warmup_steps, hat, raw), nu_hat, nu
            )
            return mu, nu_hat, kept, state.error

        def compressed():
            local = optax.tree.update_moment(grads, state.mu, b1, 1)
            key = jax.random.fold_in(state.key, step)
            mu, error = scatter_reduce(
                local,
                state.error,
                plan,
                compressor,
                axis_name=axis_name,
                key=key,
                check=check,
            )
            mu = primitives.vary_like(mu, state.mu)
            return mu, state.nu, state.nu, error

        mu, nu_hat, nu, error = schedules.switch(
            (step > warmup_steps).astype(jnp.int32),
            [warm_up, compressed],
            shares=(0, 1),
        )
        mu_hat = moments.unbiased(mu, b1, step)
        direction = moments.precondition(mu_hat, nu_hat, eps)
        if isinstance(weight_decay, jax.Array) or weight_decay:
            if params is None:
                raise ValueError(
                    "qadam: weight decay works on the parameters, and params is None. "
                    "Call tx.update(updates, state, params)."
                )
            direction = jax.tree.map(
                lambda d, x: d + weight_decay * x.astype(d.dtype), direction, params
            )
        rate = learning_rate(state.count) if callable(learning_rate) else learning_rate
        new_updates = optax.tree.cast_like(
            optax.tree.scale(jnp.negative(rate), direction), updates
        )
        return new_updates, QAdamState(step, state.key, mu, nu, error)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
