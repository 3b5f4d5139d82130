"""1-bit LAMB: LAMB, then momentum averaged in one bit and a rate for each layer."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from bagua_jax import buckets, checks, compatibility, precision, primitives, schedules
from bagua_jax.algorithms import moments
from bagua_jax.algorithms.feedback import init_errors, scatter_reduce
from bagua_jax.compressors import Compressor, sign
from bagua_jax.compressors.numerics import largest_magnitude
from bagua_jax.primitives import AxisName, Errors

__all__ = ["OneBitLambState", "one_bit_lamb"]


class OneBitLambState(NamedTuple):
    """State of :func:`one_bit_lamb`; all but the errors equal on all workers."""

    count: jax.Array  # [] int32, steps taken
    key: jax.Array  # [] typed PRNG key
    mu: optax.Updates  # like params, float32; mean momentum
    nu: (
        optax.Updates
    )  # like params, float32; second moment of what gradients seem to be
    frozen: optax.Updates  # like params, float32; its estimate when the warm-up ended
    scale: optax.Updates  # [] float32 a leaf, root mean square of mu after the warm-up
    ratio: optax.Updates  # [] float32 a leaf, moving average of warm-up's trust ratios
    factor: optax.Updates  # [] float32 a leaf, by which that changed since then
    error: Errors  # each like params in float32 and worker-local


def one_bit_lamb(
    learning_rate: optax.ScalarOrSchedule,
    compressor: Compressor = sign("l2"),  # noqa: B008  (immutable)
    *,
    axis_name: AxisName,
    warmup_steps: int = 100,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    max_coeff: float = 10.0,
    min_coeff: float = 0.01,
    coeff_beta: float = 0.9,
    factor_max: float = 4.0,
    factor_min: float = 0.5,
    factor_threshold: float = 0.1,
    bucket_bytes: int = buckets.DEFAULT_BUCKET_BYTES,
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""LAMB first, then momentum in one bit an element, with a rate for each layer.

    Placement: optimizer, alone. Receives this worker's own gradient with ``params``,
    returns a finished update, invariant over ``axis_name``.

    Every leaf is a layer l. Always, with :math:`\hat v` and c as below:

    .. math::
        a_t = \frac{m_t / (1 - \beta_1^t)}{\sqrt{\hat v} + \epsilon},\quad
        d_t = a_t + \lambda x_t,\quad u_t^l = -\gamma_t\, c_t^l\, d_t^l

    For t = 1, ..., W (``warmup_steps``) this is LAMB on the exact mean gradient:

    .. math::
        m_t = \beta_1 m_{t-1} + (1 - \beta_1) g_t,\quad
        v_t = \beta_2 v_{t-1} + (1 - \beta_2) g_t^2,\quad
        \hat v = \frac{v_t}{1 - \beta_2^t},\quad
        c_t^l = \Big[\frac{\|x_t^l\|}{\|d_t^l\|}\Big]_{c_{\min}}^{c_{\max}}

    For t > W, with :math:`\hat v = \hat v_W`, with :math:`\rho^l` the root mean square
    of :math:`m_W^l`, and with :math:`\bar c^l` the moving average of the warm-up's c:

    .. math::
        m_t = \rho\,\mathrm{C\_LP\_S}_i\Big(\frac{\beta_1 m_{t-1} + (1 - \beta_1)
        g_t^i}{\rho}\Big),\quad
        \tilde g_t = \frac{m_t - \beta_1 m_{t-1}}{1 - \beta_1},\quad
        v_t = \beta_2 v_{t-1} + (1 - \beta_2) \tilde g_t^2

        r_t^l = \Big[\Big[1 + s\Big(\max\frac{\sqrt{\hat v_W} + \epsilon}
        {\sqrt{v_t / (1 - \beta_2^t)} + \epsilon} - 1\Big)\Big]_{r_{\min}}^{r_{\max}}
        \Big]_{r_{t-1} (1 - \theta)}^{r_{t-1} (1 + \theta)},\quad
        s = \min\Big(1, \frac{\|a_t^l\|}{\|d_t^l\|}\Big),\quad
        c_t^l = r_t^l\,\bar c^l

    Args:
        learning_rate: gamma; a number, or a schedule of steps already taken.
        compressor: C, stateless; a contraction, or the paper's ``sign("l2")``, which is
            none on vectors of few large elements. ``sign("l1")`` always is one.
        axis_name: the workers' axis, or ``("node", "local")``.
        warmup_steps: W, at least 1; static. Several times 1/(1 - coeff_beta), over
            which the layers' ratios are averaged.
        b1: beta_1, decay of the momentum, in [0, 1).
        b2: beta_2, decay of the second moment, in [0, 1).
        eps: added to the denominator, > 0.
        weight_decay: lambda, inside the trust ratio as in LAMB; 0 or more.
        max_coeff: largest trust ratio, > 0.
        min_coeff: smallest trust ratio, 0 or more.
        coeff_beta: decay of the ratios' moving average, in [0, 1).
        factor_max: largest r, 1 or more.
        factor_min: smallest r, in (0, 1).
        factor_threshold: theta, by which share r may change in a step, in [0, 1).
        bucket_bytes: target bucket size in bytes, counted in the updates' dtype;
            static. Every part of a bucket has one scale.
        seed: of the key that a stochastic compressor draws from.

    Returns:
        A transform of updates of any floating dtype; shapes and dtypes are kept,
        moments are float32.

    Raises:
        ValueError: if an argument is out of range; if gradients arrive already summed
            over the axis, are not floating point, or hold no elements; if params are
            missing or of another structure; if the compressor keeps state, or feedback
            would make its error grow.
        NameError: if the axis is not mapped where ``update`` is called.

    Warns:
        UserWarning: once, at construction, for another compressor without a known
            contraction.

    Communication:
        During warm-up one all-reduce of float32 for each bucket; afterwards one
        all-to-all and one all-gather of packed signs and a scale for each: about
        2(n-1)/n bits per element and worker. Leaves travel together, and dividing by
        rho lets one scale fit them all.

    State:
        Three trees like params and three numbers a leaf, equal on all workers, and two
        trees of errors, worker-local. On another number of workers
        :func:`bagua_jax.resize` keeps the mean of what workers, and all of what owners,
        have not sent.

    Theory:
        The update of a layer has the norm of its weights times gamma during the
        warm-up, whatever the gradient's scale. Afterwards it shrinks with the momentum:
        heavy ball over a fixed preconditioner with a rate for each layer, which follows
        the gradients' size by r. Feedback at both ends loses nothing of the momentum.

    Differences from the paper:
        What is frozen, scaled, reconstructed and clipped, and all defaults, follow the
        published implementation (DeepSpeed). Ours: moments are corrected for their
        start at zero, as in LAMB, and so is the ratios' average; without that a short
        warm-up freezes too small a variance; a compressor's scale belongs to each
        owner's part of a bucket, where DeepSpeed has one for a buffer. rho is not
        divided by its mean over layers, a common factor that a homogeneous C does not
        see. A ratio with a norm of zero is 1 and is left out of the average. Entries
        whose gradient was exactly zero during the whole warm-up (v = 0) are not moved
        by the momentum.

    References:
        Li et al., `1-bit LAMB: Communication Efficient Large-Scale Large-Batch Training
        with LAMB's Convergence Speed`, 2021 (arXiv 2104.06069). You et al., `Large
        Batch Optimization for Deep Learning`, 2020, for LAMB.

    Example:
        >>> tx = one_bit_lamb(0.1, axis_name="workers", warmup_steps=2)
        >>> params, grads = jnp.array([[3.0, 4.0]] * 2), jnp.array([[1.0, 0], [3.0, 0]])
        >>> step = lambda g, x: tx.update(g, tx.init(x), x)[0]
        >>> first, second = jax.vmap(step, axis_name="workers")(grads, params)
        >>> [round(float(u), 4) for u in first], bool((first == second).all())
        ([-0.5, -0.0], True)
    """
    caller = "one_bit_lamb"
    checks.require_at_least(
        caller, "warmup_steps", warmup_steps, 1, "The variance is frozen after it."
    )
    checks.require_at_least(caller, "bucket_bytes", bucket_bytes, 1, "It is in bytes.")
    for name, value in (("b1", b1), ("b2", b2), ("coeff_beta", coeff_beta)):
        checks.require_within(caller, name, value, 0, 1)
    for name, value in (("eps", eps), ("max_coeff", max_coeff)):
        checks.require_within(caller, name, value, 0, open_below=True)
    for name, value in (("weight_decay", weight_decay), ("min_coeff", min_coeff)):
        checks.require_within(caller, name, value, 0)
    checks.require_within(caller, "factor_max", factor_max, 1)
    checks.require_within(caller, "factor_min", factor_min, 0, 1, open_below=True)
    checks.require_within(caller, "factor_threshold", factor_threshold, 0, 1)
    check = compatibility.require_compressor(
        caller, compressor, compatibility.FED_BACK, published="sign(l2)"
    )

    def init_fn(params) -> Any:
        checks.require_floats(params, caller)
        zeros = lambda: precision.zeros(params)  # noqa: E731

        def numbers(value):
            def of(x):
                number = jnp.full([], value, precision.wide_dtype(x))
                return primitives.vary_like(number, x)

            return jax.tree.map(of, params)

        return OneBitLambState(
            count=jnp.zeros([], jnp.int32),
            key=jax.random.key(seed),
            mu=zeros(),
            nu=zeros(),
            frozen=zeros(),
            scale=numbers(0),
            ratio=numbers(0),
            factor=numbers(1),
            error=init_errors(params, "both", axis_name),
        )

    def update_fn(updates, state, params: Any = None, **extra_args) -> Any:
        del extra_args
        checks.require_gradients(updates, params, axis_name, caller)
        if params is None:
            raise ValueError(
                f"{caller}: a layer's rate follows from its parameters, and params is "
                "None. Call tx.update(updates, state, params)."
            )
        plan = buckets.plan(updates, bucket_bytes, axis_name)
        step = schedules.increment(state.count)
        warm = step <= warmup_steps

        def warm_up():
            vectors = plan.pack(updates)
            mean = plan.unpack(
                [primitives.c_fp_s(g, axis_name=axis_name) for g in vectors]
            )
            mean = primitives.vary_like(precision.wide(mean), state.mu)
            return optax.tree.update_moment(mean, state.mu, b1, 1), mean, state.error

        def compressed():
            grads = precision.wide(updates)
            local = optax.tree.update_moment(grads, state.mu, b1, 1)
            scale = jax.tree.map(lambda s: jnp.where(s == 0, 1, s), state.scale)
            mu, error = scatter_reduce(
                jax.tree.map(lambda m, s: m / s, local, scale),
                state.error,
                plan,
                compressor,
                axis_name=axis_name,
                key=jax.random.fold_in(state.key, step),
                check=check,
            )
            mu = optax.tree.mul(primitives.vary_like(mu, state.mu), scale)
            rebuilt = jax.tree.map(lambda m, o: (m - b1 * o) / (1 - b1), mu, state.mu)
            return mu, rebuilt, error

        mu, grads, error = schedules.switch(
            1 - warm.astype(jnp.int32), [warm_up, compressed], shares=(0, 1)
        )
        nu = optax.tree.update_moment(grads, state.nu, b2, 2)
        fresh = moments.unbiased(nu, b2, step)
        frozen = jax.tree.map(lambda v, w: jnp.where(warm, v, w), fresh, state.frozen)
        scale = jax.tree.map(
            lambda m, old: jnp.where(warm, _rms(m), old), mu, state.scale
        )

        mu_hat = moments.unbiased(mu, b1, step)
        adam = moments.precondition(mu_hat, frozen, eps)
        rate = learning_rate(state.count) if callable(learning_rate) else learning_rate

        def layer(u, x, a, v, w, ratio, factor):
            """Update a leaf: a is Adam's step, v frozen, w fresh."""
            x = precision.wide(x)
            direction = a + weight_decay * x
            size, length = optax.tree.norm(x), optax.tree.norm(direction)
            zero = (size == 0) | (length == 0)
            divisor = jnp.where(length == 0, 1, length)

            trust = jnp.where(zero, 1, jnp.clip(size / divisor, min_coeff, max_coeff))
            average = coeff_beta * ratio + (1 - coeff_beta) * trust
            ratio = jnp.where(warm & ~zero, average, ratio)

            share = jnp.minimum(optax.tree.norm(a) / divisor, 1)
            growth = _largest_ratio(v, w, eps)
            now = jnp.clip(1 + share * (growth - 1), factor_min, factor_max)
            factor = jnp.clip(
                now, factor * (1 - factor_threshold), factor * (1 + factor_threshold)
            )
            kept = factor * ratio / (1 - coeff_beta**warmup_steps)
            move = direction * (jnp.negative(rate) * jnp.where(warm, trust, kept))
            return move.astype(u.dtype), ratio, factor

        trees = (updates, params, adam, frozen, fresh, state.ratio, state.factor)
        layers = jax.tree.map(layer, *trees)
        new_updates, ratio, factor = jax.tree.transpose(
            jax.tree.structure(updates), jax.tree.structure((0, 0, 0)), layers
        )
        return new_updates, OneBitLambState(
            step, state.key, mu, nu, frozen, scale, ratio, factor, error
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _rms(x: jax.Array) -> jax.Array:
    return optax.tree.norm(x) / max(x.size, 1) ** 0.5


def _largest_ratio(v: jax.Array, w: jax.Array, eps: float) -> jax.Array:
    """Find the largest quotient of two denominators; 0 of an empty leaf."""
    return largest_magnitude((jnp.sqrt(v) + eps) / (jnp.sqrt(w) + eps), axis=None)
