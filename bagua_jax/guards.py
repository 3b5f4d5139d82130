"""Steps with values that are not finite: left out on all workers, or none."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from bagua_jax import checks, primitives, schedules
from bagua_jax.compressors import numerics
from bagua_jax.primitives import AxisName

__all__ = ["SkipNotFiniteState", "skip_not_finite"]


class SkipNotFiniteState(NamedTuple):
    """State of :func:`skip_not_finite`; all but the inner state is invariant."""

    inner_state: Any  # that of tx after its last step that was taken
    last_finite: jax.Array  # [] bool, whether the last step was finite on all workers
    skipped: jax.Array  # [] int32, steps that were not, since init
    consecutive: jax.Array  # [] int32, the newest of them that follow one another
    gave_up: jax.Array  # [] bool, more than max_consecutive did: updates are NaN


def skip_not_finite(
    tx: optax.GradientTransformation,
    axis_name: AxisName,
    max_consecutive: int | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Leave a step out, on all workers, if a value of one worker is not finite.

    .. math:: (u_i, s_i) = \mathrm{tx}(g_i, s_i^{old}),\quad
        (u_i, s_i) \leftarrow (0, s_i^{old}) \text{ on every } i
        \text{ if any } g_j \text{ or } u_j \text{ is not finite}

    Stands around the whole chain. The exchange takes place, since workers that branch
    by themselves wait for one another for ever; then its outcome is thrown away. *All*
    of the state is that before the step: errors, replicas, moments, keys, counters.
    Training goes on as if the step had not been, bit for bit, which no guard before or
    after the exchange can do: it leaves the algorithm's memory not finite for ever.

    Gradients and updates decide, the state does not: optimizers keep infinities there
    on purpose. A worker whose *loss* alone is not finite takes the step.

    Args:
        tx: a chain with our transforms in it, or any other.
        axis_name: the axis, or axes, of the workers; all of them.
        max_consecutive: maximum number of skipped steps in a row. After one more,
            ``gave_up`` is true and updates are NaN from then on, so that no loop can
            miss it; the inner state stays that of the last step taken. ``None`` skips
            without end.

    Returns:
        The transform, with a :class:`SkipNotFiniteState`. Updates that ``tx`` types as
        invariant stay so.

    Communication:
        One all-reduce of 4 bytes per step, beside that of ``tx``; none where JAX knows
        gradients and updates to be equal on all workers. Micro-batches: around
        :func:`bagua_jax.accumulate` it drops a bad micro-batch, for 4 bytes on each;
        inside, it drops the step that a bad micro-batch belongs to.

    Raises:
        ValueError: if max_consecutive is no integer >= 0.
        NameError: in ``update``, if the axis is not mapped.

    Example:
        >>> tx = skip_not_finite(optax.sgd(0.5, momentum=0.9), "workers")
        >>> def two_steps(gradient):
        ...     _, state = tx.update(gradient, tx.init(0.0))
        ...     update, state = tx.update(jnp.float32(1), state)
        ...     return update, state.skipped
        >>> gradients = jnp.array([1.0, jnp.nan])  # of two workers, on the first step
        >>> updates, skipped = jax.vmap(two_steps, axis_name="workers")(gradients)
        >>> updates.tolist(), skipped.tolist()
        ([-0.5, -0.5], [1, 1])
    """
    if max_consecutive is not None:
        checks.require_at_least(
            "skip_not_finite",
            "max_consecutive",
            max_consecutive,
            0,
            "0 bears no bad step, None bears any number.",
        )
    tx = optax.with_extra_args_support(tx)

    def init_fn(params):
        return SkipNotFiniteState(
            inner_state=tx.init(params),
            last_finite=jnp.ones([], bool),
            skipped=jnp.zeros([], jnp.int32),
            consecutive=jnp.zeros([], jnp.int32),
            gave_up=jnp.zeros([], bool),
        )

    def update_fn(updates, state, params=None, **extra_args):
        outcome, inner_state = tx.update(
            updates, state.inner_state, params, **extra_args
        )
        finite = primitives.true_everywhere(
            [*_finite(updates), *_finite(outcome)], axis_name=axis_name
        )
        consecutive = jnp.where(finite, 0, schedules.increment(state.consecutive))
        gave_up = state.gave_up
        if max_consecutive is not None:
            gave_up = gave_up | (consecutive > max_consecutive)
        taken = finite & ~gave_up

        def instead(u):
            zero = jnp.zeros_like(u)
            if not jnp.issubdtype(u.dtype, jnp.inexact):
                return jnp.where(taken, u, zero)
            return jnp.where(taken, u, jnp.where(gave_up, jnp.nan, zero))

        # A select, no branch: types need not be equal, and nobody can be left waiting.
        select = lambda new, old: jnp.where(taken, new, old)  # noqa: E731
        skipped = schedules.increment(state.skipped)
        return jax.tree.map(instead, outcome), SkipNotFiniteState(
            inner_state=jax.tree.map(select, inner_state, state.inner_state),
            last_finite=finite,
            skipped=jnp.where(finite, state.skipped, skipped),
            consecutive=consecutive,
            gave_up=gave_up,
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _finite(tree: Any) -> list[jax.Array]:
    """Return for each floating leaf whether all of it is finite."""
    leaves = map(jnp.asarray, jax.tree.leaves(tree))
    return [
        numerics.all_finite(x) for x in leaves if jnp.issubdtype(x.dtype, jnp.inexact)
    ]
