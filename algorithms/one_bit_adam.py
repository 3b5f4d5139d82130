"""1-bit Adam: Adam, then a preconditioned momentum averaged in one bit an element."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from bagua_jax import buckets, checks, compatibility, precision, primitives, schedules
from bagua_jax.algorithms import moments
from bagua_jax.algorithms.feedback import init_errors, scatter_reduce
from bagua_jax.compressors import Compressor, sign
from bagua_jax.primitives import AxisName, Errors

__all__ = ["OneBitAdamState", "one_bit_adam"]


class OneBitAdamState(NamedTuple):
    """State of :func:`one_bit_adam`."""

    count: jax.Array  # [] int32, steps taken; equal on all workers
    key: jax.Array  # [] typed PRNG key; equal on all workers
    mu: optax.Updates  # like params, float32; mean momentum
    nu: optax.Updates  # like params, float32; second moment, frozen after the warm-up
    error: Errors  # each like params in float32 and worker-local


def one_bit_adam(
    learning_rate: optax.ScalarOrSchedule,
    compressor: Compressor = sign("l2"),  # noqa: B008  (immutable)
    *,
    axis_name: AxisName,
    warmup_steps: int = 100,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    bucket_bytes: int = buckets.DEFAULT_BUCKET_BYTES,
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Adam first, then momentum in one bit an element over a frozen variance.

    Placement: optimizer, alone. Receives this worker's own gradient, returns a
    finished update, invariant over ``axis_name``.

    For t = 1, ..., W (``warmup_steps``), Adam on the exact mean gradient:

    .. math::
        m_t = \beta_1 m_{t-1} + (1 - \beta_1) g_t,\quad
        v_t = \beta_2 v_{t-1} + (1 - \beta_2) g_t^2,\quad
        u_t = -\gamma_t \frac{m_t / (1 - \beta_1^t)}
        {\sqrt{v_t / (1 - \beta_2^t)} + \epsilon}

    and for t > W, with :math:`C(x) = \frac{\|x\|_2}{\sqrt d}\,\mathrm{sign}(x)` and
    error feedback at the worker (d) and at the owner of each part (e):

    .. math::
        p^i = \beta_1 m_{t-1} + (1 - \beta_1) g_t^i + d^i_{t-1},\quad
        c^i = C(p^i),\quad d^i_t = p^i - c^i

        q = \tfrac1n \sum_i c^i + e_{t-1},\quad m_t = C(q),\quad e_t = q - m_t,\quad
        u_t = -\gamma_t \frac{m_t}{\sqrt{v_W} + \epsilon}

    Args:
        learning_rate: gamma; a number, or a schedule of steps already taken.
        compressor: C, stateless; a contraction, or the paper's ``sign("l2")``, which is
            none on vectors of few large elements. ``sign("l1")`` always is one.
        axis_name: the workers' axis, or ``("node", "local")``.
        warmup_steps: W, at least 1; static. 15 to 25 % of the run in the paper; below
            a few times 1/(1 - b2) the frozen variance is small, as it is not corrected
            for its start at zero, and the step grows by 1/sqrt(1 - b2^W).
        b1: beta_1, decay of the momentum, in [0, 1).
        b2: beta_2, decay of the second moment, in [0, 1).
        eps: added to the denominator, > 0.
        bucket_bytes: target bucket size in bytes, counted in the updates' dtype;
            static. Every part of a bucket has one scale.
        seed: of the key that a stochastic compressor draws from.

    Returns:
        A transform of updates of any floating dtype; shapes and dtypes are kept,
        moments are float32.

    Raises:
        ValueError: if an argument is out of range; if gradients arrive already summed
            over the axis, are not floating point, or hold no elements; if params of
            another structure are given; if the compressor keeps state, or feedback
            would make its error grow.
        NameError: if the axis is not mapped where ``update`` is called.

    Warns:
        UserWarning: once, at construction, for another compressor without a known
            contraction.

    Communication:
        During warm-up one all-reduce of float32 for each bucket; afterwards one
        all-to-all and one all-gather of packed signs and a scale for each: about
        2(n-1)/n bits per element and worker.

    State:
        Two trees like params, equal on all workers, and two of errors, worker-local. On
        another number of workers :func:`bagua_jax.resize` keeps the mean of what
        workers, and all of what owners, have not sent.

    Theory:
        With C the identity, heavy ball over a fixed preconditioner. Feedback at both
        ends loses nothing of the momentum: q summed over time is the sum of the exact
        means less what the errors hold. C has the norm of x, not the least error: on
        vectors with few large elements its error exceeds the vector.

    Differences from the paper:
        Entries whose gradient was exactly zero during the whole warm-up (v = 0) are not
        moved: their momentum is compression error, and eps its denominator. DeepSpeed's
        program has one scale for a whole buffer, ours one for each owner's part of a
        bucket; and it never corrects moments for their start at zero.

    References:
        Tang et al., `1-bit Adam: Communication Efficient Large-Scale Training with
        Adam's Convergence Speed`, 2021 (arXiv 2102.02888).

    Example:
        >>> tx = one_bit_adam(0.1, axis_name="workers", warmup_steps=2)
        >>> grads = jnp.array([[1.0], [3.0]])
        >>> step = lambda g: tx.update(g, tx.init(g))[0]
        >>> first, second = jax.vmap(step, axis_name="workers")(grads)
        >>> round(float(first[0]), 4), round(float(second[0]), 4)
        (-0.1, -0.1)
    """
    caller = "one_bit_adam"
    checks.require_at_least(
        caller, "warmup_steps", warmup_steps, 1, "The variance is frozen after it."
    )
    checks.require_at_least(caller, "bucket_bytes", bucket_bytes, 1, "It is in bytes.")
    checks.require_within(caller, "b1", b1, 0, 1)
    checks.require_within(caller, "b2", b2, 0, 1)
    checks.require_within(caller, "eps", eps, 0, open_below=True)
    check = compatibility.require_compressor(
        caller, compressor, compatibility.FED_BACK, published="sign(l2)"
    )

    def init_fn(params) -> Any:
        checks.require_floats(params, caller)
        return OneBitAdamState(
            count=jnp.zeros([], jnp.int32),
            key=jax.random.key(seed),
            mu=precision.zeros(params),
            nu=precision.zeros(params),
            error=init_errors(params, "both", axis_name),
        )

    def update_fn(updates, state, params=None, **extra_args) -> Any:
        del extra_args
        checks.require_gradients(updates, params, axis_name, caller)
        plan = buckets.plan(updates, bucket_bytes, axis_name)
        step = schedules.increment(state.count)

        def warm_up():
            vectors = plan.pack(updates)
            mean = plan.unpack(
                [primitives.c_fp_s(g, axis_name=axis_name) for g in vectors]
            )
            mean = precision.wide(mean)
            mu = optax.tree.update_moment(mean, state.mu, b1, 1)
            nu = optax.tree.update_moment(mean, state.nu, b2, 2)
            mu_hat = moments.unbiased(mu, b1, step)
            nu_hat = moments.unbiased(nu, b2, step)
            return mu, nu, state.error, mu_hat, nu_hat

        def compressed():
            grads = precision.wide(updates)
            local = optax.tree.update_moment(grads, state.mu, b1, 1)
            mu, error = scatter_reduce(
                local,
                state.error,
                plan,
                compressor,
                axis_name=axis_name,
                key=jax.random.fold_in(state.key, step),
                check=check,
            )
            mu = primitives.vary_like(mu, state.mu)
            return mu, state.nu, error, mu, state.nu

        mu, nu, error, mu_hat, nu_hat = schedules.switch(
            (step > warmup_steps).astype(jnp.int32),
            [warm_up, compressed],
            shares=(0, 1),
        )
        direction = moments.precondition(mu_hat, nu_hat, eps)
        rate = learning_rate(state.count) if callable(learning_rate) else learning_rate
        new_updates = optax.tree.cast_like(
            optax.tree.scale(jnp.negative(rate), direction), updates
        )
        return new_updates, OneBitAdamState(step, state.key, mu, nu, error)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
