"""Dynamic loss scaling: gradients in float16 that neither vanish nor overflow."""

import math
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from bagua_jax import checks, guards, schedules
from bagua_jax.primitives import AxisName

__all__ = ["LossScaleState", "dynamic_loss_scale", "scale_gradient"]

_BOUND = 2.0**126  # the largest power of two whose inverse is a normal float32


@jax.custom_jvp
def scale_gradient(loss: jax.Array, scale: ArrayLike) -> jax.Array:
    r"""Return the loss as it is, with gradients that are ``scale`` times as large.

    .. math:: y = \ell,\qquad \nabla y = s\, \nabla \ell

    Put it around the loss inside the function that is differentiated. The value stays
    in true units, and cannot overflow; the usual product ``scale * loss`` does both.

    Args:
        loss: any shape, floating: best float32, as its dtype has to hold the scale.
        scale: [], that of :class:`LossScaleState`; no gradient flows into it.

    Returns:
        The loss.

    Example:
        >>> loss, grad = jax.value_and_grad(lambda x: scale_gradient(x**2, 8.0))(3.0)
        >>> float(loss), float(grad)
        (9.0, 48.0)
    """
    del scale
    return loss


@scale_gradient.defjvp
def _scale_gradient_jvp(primals, tangents):
    loss, scale = primals
    return loss, tangents[0] * jnp.asarray(scale).astype(loss.dtype)


class LossScaleState(NamedTuple):
    """State of :func:`dynamic_loss_scale`; all but the inner state is invariant."""

    scale: jax.Array  # [] float32, a power of two: that of the next step's gradients
    good_steps: jax.Array  # [] int32, since the scale changed or a step was skipped
    inner_state: Any  # SkipNotFiniteState, with the counts of skipped steps


def dynamic_loss_scale(
    tx: optax.GradientTransformation,
    axis_name: AxisName,
    *,
    initial: float = 2.0**15,
    growth_interval: int = 2000,
    max_consecutive: int | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Divide gradients by a scale that adapts, and skip the steps that it spoils.

    .. math:: u = \mathrm{tx}(g / s),\qquad s \leftarrow
        \begin{cases} s / 2 & \text{after a step that is not finite} \\
                      2 s & \text{after } N \text{ finite ones} \\
                      s & \text{else} \end{cases}

    Gradients computed in float16 vanish below 6e-8 and overflow above 65,504. Compute
    them of ``scale_gradient(loss, state.scale)``, and stand this around the whole
    chain, with :func:`bagua_jax.skip_not_finite` inside, which it brings along. So all
    workers see one scale, the algorithm compresses and remembers gradients in true
    units whatever the scale is, and a step that overflows leaves no trace in its state.
    bfloat16 has the range of float32 and needs no scale.

    Args:
        tx: a chain with our transforms in it, or any other.
        axis_name: the axis, or axes, of the workers; all of them.
        initial: scale of the first step: a power of two, by which dividing is exact.
        growth_interval: N, finite steps in a row after which the scale doubles.
        max_consecutive: that of :func:`bagua_jax.skip_not_finite`. The first scale may
            cost some skipped steps in a row, one for each halving.

    Returns:
        The transform, with a :class:`LossScaleState`. ``tx`` receives gradients in
        float32 or wider, because divided ones would vanish in float16.

    Communication:
        That of ``skip_not_finite(tx)``: at most one all-reduce of 4 bytes per step.

    Raises:
        ValueError: if initial is no power of two in [2^-126, 2^126], or growth_interval
            no integer >= 1, or max_consecutive no integer >= 0.
        NameError: in ``update``, if the axis is not mapped.

    Example:
        >>> tx = dynamic_loss_scale(optax.sgd(1.0), "workers")
        >>> def train(x):
        ...     state, scales = tx.init(x), []
        ...     for _ in range(3):
        ...         def loss(x):
        ...             error = (x.astype(jnp.float16) - 1) / 2
        ...             loss = error.astype(jnp.float32) ** 2
        ...             return scale_gradient(loss, state.scale)
        ...         update, state = tx.update(jax.grad(loss)(x), state)
        ...         x = x + update
        ...         scales.append(state.scale)
        ...     return x, jnp.stack(scales)
        >>> x, scales = jax.vmap(train, axis_name="workers")(jnp.full(2, 5.0))
        >>> x.tolist(), scales[0].tolist()  # 2^15 and 2^14 overflow
        ([3.0, 3.0], [16384.0, 8192.0, 8192.0])

    References:
        Micikevicius et al., `Mixed Precision Training
        <https://arxiv.org/abs/1710.03740>`_, 2018, section 3.2.
    """
    if not _is_power_of_two(initial):
        raise ValueError(
            "dynamic_loss_scale: initial must be a power of two in [2^-126, 2^126], by "
            f"which dividing is exact; got {initial!r}."
        )
    checks.require_at_least(
        "dynamic_loss_scale",
        "growth_interval",
        growth_interval,
        1,
        "The scale doubles after so many finite steps.",
    )
    guarded = guards.skip_not_finite(tx, axis_name, max_consecutive)

    def init_fn(params):
        return LossScaleState(
            scale=jnp.full([], initial, jnp.float32),
            good_steps=jnp.zeros([], jnp.int32),
            inner_state=guarded.init(params),
        )

    def update_fn(updates, state, params=None, **extra_args):
        def unscale(g):
            dtype = jnp.promote_types(g.dtype, jnp.float32)
            return g.astype(dtype) * (1 / state.scale).astype(dtype)

        updates, inner_state = guarded.update(
            jax.tree.map(unscale, updates), state.inner_state, params, **extra_args
        )
        finite = cast(guards.SkipNotFiniteState, inner_state).last_finite
        good_steps = jnp.where(finite, schedules.increment(state.good_steps), 0)
        grows = good_steps >= growth_interval
        change = jnp.where(finite, jnp.where(grows, 2.0, 1.0), 0.5)
        return updates, LossScaleState(
            scale=jnp.clip(state.scale * change, 1 / _BOUND, _BOUND),
            good_steps=jnp.where(grows, 0, good_steps),
            inner_state=inner_state,
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _is_power_of_two(value: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return 1 / _BOUND <= value <= _BOUND and math.frexp(value)[0] == 0.5
