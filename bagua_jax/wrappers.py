"""Wrappers of any optax transform: types of its values, or one step in k batches."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from bagua_jax import checks, precision, primitives, schedules
from bagua_jax.primitives import AxisName

__all__ = ["AccumulateState", "accumulate", "local", "varying"]


def varying(
    tx: optax.GradientTransformation, axis_name: AxisName
) -> optax.GradientTransformationExtraArgs:
    """Make any transform return values typed as varying between workers.

    Wrappers with ``lax.cond`` inside (``conditionally_transform``, ``MultiSteps`` of
    optax) need branches of equal types: one branch returns the local update, the other
    our invariant one. This makes both varying. Values do not change and nothing is
    communicated.

    It does not make a per-worker predicate safe: workers that branch differently
    around a collective wait for one another for ever. The guard for values that are not
    finite is :func:`bagua_jax.skip_not_finite`, and :func:`accumulate` is the wrapper
    for micro-batches.

    Args:
        tx: any transform.
        axis_name: the axis, or axes, of the workers.

    Returns:
        The same transform with varying updates; its state is that of ``tx``.

    Example:
        >>> tx = varying(optax.sgd(0.5), "workers")
        >>> updates, _ = tx.update(jnp.ones(2), tx.init(jnp.ones(2)))
        >>> updates.tolist()
        [-0.5, -0.5]
    """
    tx = optax.with_extra_args_support(tx)

    def update_fn(updates, state, params=None, **extra_args):
        updates, state = tx.update(updates, state, params, **extra_args)
        return primitives.worker_local(updates, axis_name), state

    return optax.GradientTransformationExtraArgs(tx.init, update_fn)


def local(
    tx: optax.GradientTransformation, axis_name: AxisName
) -> optax.GradientTransformationExtraArgs:
    r"""Run a transform of optax on each worker's own gradient, before an exchange.

    .. math:: (u_i, s_i) \leftarrow \mathrm{tx}(g_i, s_i)

    For transforms with a state, such as a momentum (``optax.trace``), ``scale_by_lion``
    or ``optax.ema``, in front of one of ours. Their state starts equal and becomes each
    worker's own on the first step, which ``lax.scan``, ``lax.cond`` and a
    ``shard_map``'s ``out_specs`` refuse under JAX's types; here it is worker-local from
    ``init`` on. ``Workers.loop`` finds that by itself, and needs no ``local``.

    Args:
        tx: any transform without collectives. What draws random numbers draws the same
            on all workers.
        axis_name: the axis, or axes, of the workers.

    Returns:
        The transform; its state is that of ``tx``, all of it worker-local, counters
        and keys included. Updates are worker-local.

    Communication:
        None.

    Raises:
        ValueError: in ``update``, if the gradients are known to be equal on all
            workers: summed by JAX, averaged, or behind an exchange, where a transform
            keeps one state for all and needs no wrapper.
        NameError: in ``update``, if the axis is not mapped.

    Example:
        >>> from bagua_jax.algorithms import gradient_allreduce
        >>> momentum = local(optax.trace(0.5), "workers")
        >>> tx = optax.chain(momentum, gradient_allreduce(axis_name="workers"))
        >>> def two_steps(g):
        ...     _, state = tx.update(g, tx.init(g))
        ...     return tx.update(g, state)[0]
        >>> two_steps = jax.vmap(two_steps, axis_name="workers")
        >>> two_steps(jnp.array([1.0, 3.0])).tolist()  # 2 and 1/2 of 2
        [3.0, 3.0]
    """
    tx = optax.with_extra_args_support(tx)

    def init_fn(params):
        own = primitives.worker_local(params, axis_name)
        return primitives.worker_local(tx.init(own), axis_name)

    def update_fn(updates, state, params=None, **extra_args):
        primitives.axis_size(axis_name, "local")
        for axis in (axis_name,) if isinstance(axis_name, str) else axis_name:
            if any(primitives.is_invariant(g, axis) for g in jax.tree.leaves(updates)):
                raise ValueError(
                    f"local: the gradients are equal on all workers of {axis!r}: "
                    "averaged by an exchange or a lax.pmean before it, or summed by "
                    "JAX. Put local(tx, axis_name) in front of the exchange, and what "
                    "stands behind it without local; each worker's own gradients are "
                    f"bagua_jax.value_and_grad(loss_fn, {axis_name!r})(params, ...)."
                )
        own = primitives.worker_local((updates, state, params), axis_name)
        return primitives.worker_local(tx.update(*own, **extra_args), axis_name)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


class AccumulateState(NamedTuple):
    """State of :func:`accumulate`."""

    micro_step: jax.Array  # [] int32, micro-batches seen since the last step
    accumulated: optax.Updates  # like params, float32; their mean, worker-local
    inner_state: Any


def accumulate(
    tx: optax.GradientTransformation, every_k: int
) -> optax.GradientTransformationExtraArgs:
    r"""Average gradients over k micro-batches and step, and communicate, once.

    .. math:: a \leftarrow a + \frac{g - a}{m},\quad m = 1..k;\qquad
              u = \mathrm{tx}(a) \text{ at } m = k,\quad u = 0 \text{ before}

    ``optax.MultiSteps`` runs the inner update at every micro-batch and masks the
    result, so that it communicates k times, and feeds error feedback with partial
    sums. Here the inner update runs under a branch on a counter that is equal on all
    workers.

    Args:
        tx: a chain with one of our transforms in it, or any other.
        every_k: micro-batches per optimizer step, at least 1; static.

    Returns:
        A transform whose updates are zero on all but every k-th call. Gradients are
        averaged in float32. The steps of schedules and of inner counters are
        optimizer steps.

    Communication:
        That of ``tx``, once every k calls.

    Raises:
        ValueError: if every_k < 1; in ``update``, what ``tx`` refuses, gradients that
            are already summed over the workers among it.

    Example:
        >>> tx = accumulate(optax.sgd(1.0), every_k=2)
        >>> state = tx.init(jnp.zeros(1))
        >>> first, state = tx.update(jnp.array([1.0]), state)
        >>> second, state = tx.update(jnp.array([3.0]), state)
        >>> first.tolist(), second.tolist()
        ([0.0], [-2.0])
    """
    checks.require_at_least(
        "accumulate", "every_k", every_k, 1, "1 accumulates nothing."
    )
    tx = optax.with_extra_args_support(tx)

    def init_fn(params):
        zeros = precision.zeros(params)
        return AccumulateState(
            micro_step=jnp.zeros([], jnp.int32),
            accumulated=primitives.worker_local(zeros, _mapped_axes()),
            inner_state=tx.init(params),
        )

    def update_fn(updates, state, params=None, **extra_args):
        # The accumulator is worker-local, and would make a sum look like one's own: let
        # the inner transform see, and refuse, the gradients as they arrive.
        jax.eval_shape(
            lambda: tx.update(updates, state.inner_state, params, **extra_args)
        )
        seen = state.micro_step + 1
        mean = jax.tree.map(
            lambda a, g: a + (g.astype(a.dtype) - a) / seen.astype(a.dtype),
            state.accumulated,
            updates,
        )

        def step():
            # Gradients keep their dtype, for the inner transform and the wire.
            averaged = optax.tree.cast_like(mean, updates)
            return tx.update(averaged, state.inner_state, params, **extra_args)

        types = jax.eval_shape(step)[0]

        def wait():
            zeros = jax.tree.map(lambda t: jnp.zeros(t.shape, t.dtype), types)
            return primitives.vary_like(zeros, types), state.inner_state

        boundary = seen == every_k
        new_updates, inner_state = schedules.every(boundary, every_k, step, wait)
        mean = jax.tree.map(lambda a: jnp.where(boundary, jnp.zeros_like(a), a), mean)
        return new_updates, AccumulateState(
            micro_step=jnp.where(boundary, 0, seen),
            accumulated=mean,
            inner_state=inner_state,
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _mapped_axes() -> tuple[str, ...]:
    """Name the axes of the shard_map around us: those that gradients vary over."""
    return tuple(jax.sharding.get_abstract_mesh().manual_axes)
