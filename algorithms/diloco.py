"""DiLoCo: an outer Nesterov step on the mean move of many local steps."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from bagua_jax import buckets, checks, compatibility, schedules
from bagua_jax.algorithms import weights
from bagua_jax.algorithms.feedback import init_errors
from bagua_jax.compressors import Compressor
from bagua_jax.primitives import AxisName, Errors

__all__ = ["DiLoCoState", "diloco"]


class DiLoCoState(NamedTuple):
    """State of :func:`diloco`; trees like params in float32, typed varying."""

    count: jax.Array  # [] int32, steps taken; equal on all workers
    key: jax.Array  # [] typed PRNG key; equal on all workers
    anchor: optax.Params  # theta, the outer model; equal on all workers
    outer_velocity: optax.Updates  # v; equal on all workers
    error: Errors  # each None, or unsent outer gradient; worker-local


def diloco(
    compressor: Compressor | None = None,
    *,
    axis_name: AxisName,
    local_steps: int,
    outer_learning_rate: float = 0.7,
    outer_momentum: float = 0.9,
    bucket_bytes: int = buckets.DEFAULT_BUCKET_BYTES,
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Step on the mean move of H local steps with Nesterov momentum (DiLoCo).

    Placement: weight side, last in the chain. Receives the optimizer's update u_i with
    ``params``, returns ``new_params - params`` of this worker, varying. The inner
    optimizer (AdamW in the paper) keeps its own state on each worker.

    Every step :math:`\theta_i \leftarrow \theta_i + u_i`. After every H-th:

    .. math::
        D = \tfrac1n \sum_i (\theta - \theta_i);\qquad v \leftarrow \beta v + D;\qquad
        \theta_i, \theta \leftarrow \theta - \eta (D + \beta v)

    With a compressor D is the mean by ScatterReduce of compressed outer gradients,
    with error feedback at the worker and at the owner of each part.
    An error that waits acts like more momentum: the coarser the compressor, the smaller
    eta and beta must be, else models grow without end.

    Args:
        compressor: of outer gradients, stateless, a contraction; ``None`` averages them
            exactly.
        axis_name: the workers' axis, or ``("node", "local")``.
        local_steps: H, at least 1; 500 in the paper; static.
        outer_learning_rate: eta > 0.
        outer_momentum: beta in [0, 1).
        bucket_bytes: target message size in bytes (static).
        seed: of the key that a stochastic compressor draws from.

    Returns:
        A transform of updates of any floating dtype; shapes and dtypes are kept. All
        workers must start from equal params.

    Raises:
        ValueError: if an argument is out of range; if the compressor keeps state, or
            feedback would make its error grow; if params are missing, of another
            structure, not floating point, or hold no elements.
        NameError: if the axis is not mapped where ``update`` is called.

    Warns:
        UserWarning: once, at construction, for a compressor without a known
            contraction.

    Communication:
        Every H steps, for each bucket one all-reduce of float32; with a compressor one
        all-to-all and one all-gather of payloads of N/n.

    State:
        Two trees like params in float32, equal on all workers, and with a compressor
        two of errors, worker-local. On another number of workers
        :func:`bagua_jax.resize` keeps the mean of what workers, and all of what owners,
        have not sent.

    Theory:
        ``outer_momentum=0, outer_learning_rate=1`` is ``local_sgd``. On a quadratic of
        curvature h the outer iteration is stable where
        :math:`\eta s < (2 + 2\beta)/(1 + 2\beta)`, :math:`s = 1 - (1 - \gamma h)^H`.

    Differences from the paper:
        A compressor with error feedback, which it does not have. The whole model is
        exchanged at once, not in fragments that overlap with training.

    References:
        Douillard et al., `DiLoCo: Distributed Low-Communication Training of Language
        Models`, 2023 (arXiv 2311.08105).

    Example:
        >>> tx = diloco(axis_name="workers", local_steps=1, outer_learning_rate=0.5,
        ...             outer_momentum=0.5)
        >>> params, updates = jnp.array([[4.0], [4.0]]), jnp.array([[4.0], [0.0]])
        >>> step = lambda u, x: x + tx.update(u, tx.init(x), x)[0]
        >>> jax.vmap(step, axis_name="workers")(updates, params).ravel().tolist()
        [5.5, 5.5]
    """
    caller = "diloco"
    checks.require_at_least(caller, "local_steps", local_steps, 1, "It is H, in steps.")
    checks.require_within(
        caller, "outer_learning_rate", outer_learning_rate, 0, open_below=True
    )
    checks.require_within(caller, "outer_momentum", outer_momentum, 0, 1)
    checks.require_at_least(caller, "bucket_bytes", bucket_bytes, 1, "It is in bytes.")
    feedback = "none" if compressor is None else "both"
    check = lambda d: None  # noqa: E731
    if compressor is not None:
        check = compatibility.require_compressor(
            caller, compressor, compatibility.FED_BACK
        )

    def init_fn(params) -> Any:
        checks.require_floats(params, caller)
        anchor = weights.private(params, axis_name)
        return DiLoCoState(
            count=jnp.zeros([], jnp.int32),
            key=jax.random.key(seed),
            anchor=anchor,
            outer_velocity=optax.tree.zeros_like(anchor),
            error=init_errors(params, feedback, axis_name),
        )

    def update_fn(updates, state, params=None, **extra_args) -> Any:
        del extra_args
        checks.require_weights(updates, params, axis_name, caller)
        plan = buckets.plan(params, bucket_bytes, axis_name)
        key = jax.random.fold_in(state.key, state.count)

        def outer_step(x, anchor, velocity, error):
            move = optax.tree.sub(anchor, x)
            gradient, error = weights.compressed_average(
                move, error, plan, compressor, key, axis_name, check
            )
            anchor, velocity = weights.outer_step(
                anchor, velocity, gradient, outer_learning_rate, outer_momentum
            )
            return anchor, anchor, velocity, error

        x, anchor, velocity, error = schedules.every(
            (state.count + 1) % local_steps == 0,
            local_steps,
            outer_step,
            lambda *carry: carry,
            weights.adapt(params, updates, axis_name),
            state.anchor,
            state.outer_velocity,
            state.error,
        )
        new_updates = weights.updates_to(x, params, updates)
        count = schedules.increment(state.count)
        return new_updates, DiLoCoState(count, state.key, anchor, velocity, error)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
