"""Local SGD: workers step on their own and average their models every few steps."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from bagua_jax import buckets, checks, schedules
from bagua_jax.algorithms import weights
from bagua_jax.primitives import AxisName
from bagua_jax.renamed import takes_old_names

__all__ = ["LocalSGDState", "local_sgd"]


class LocalSGDState(NamedTuple):
    """State of :func:`local_sgd`."""

    count: jax.Array  # [] int32, steps taken; equal on all workers


@takes_old_names
def local_sgd(
    *,
    axis_name: AxisName,
    local_steps: int,
    warmup_steps: int = 0,
    bucket_bytes: int = buckets.DEFAULT_BUCKET_BYTES,
) -> optax.GradientTransformationExtraArgs:
    r"""Average the models every H steps (local SGD; post-local with a start).

    Placement: weight side, last in the chain. Receives the optimizer's update u_i with
    ``params``, returns ``new_params - params`` of this worker, varying. The optimizer's
    own state is neither reset nor averaged.

    .. math::
        x_i \leftarrow x_i + u_i;\qquad
        x_i \leftarrow \tfrac1n \sum_j x_j \ \text{ after every H-th step}

    Before ``warmup_steps`` H is 1: models are averaged after every step. Post-local SGD
    starts at the first fall of the learning rate.

    Args:
        axis_name: the workers' axis, or ``("node", "local")``.
        local_steps: H, at least 1; static.
        warmup_steps: steps before the first local one, at least 0; static.
        bucket_bytes: target message size in bytes (static).

    Returns:
        A transform of updates of any floating dtype; shapes and dtypes are kept.

    Raises:
        ValueError: if an argument is out of range; if params are missing, of another
            structure, not floating point, or hold no elements.
        NameError: if the axis is not mapped where ``update`` is called.

    Communication:
        One all-reduce of the parameters for each bucket, every H steps; every step
        before ``warmup_steps``.

    State: a counter, equal on all workers.

    Theory:
        The mean model moves by the mean update. On quadratics of curvature h_i with
        optima b_i its fixed point is :math:`\sum q_i b_i / \sum q_i` with
        :math:`q_i = 1 - (1 - \gamma h_i)^H`: no bias where all h_i are equal.

    Differences from the papers:
        Post-local SGD's first phase averages models instead of gradients. That is the
        same for optimizers that are linear in the gradient, as long as their states are
        equal: until the first local phase, in which momentum buffers come apart.
        ``async_model_average`` with ``staleness=0`` is the same algorithm under BAGUA's
        name.

    References:
        Stich, `Local SGD Converges Fast and Communicates Little`, 2019. Lin et al.,
        `Don't Use Large Mini-Batches, Use Local SGD`, 2020, for ``warmup_steps``.

    Example:
        >>> tx = local_sgd(axis_name="workers", local_steps=1)
        >>> params, updates = jnp.array([[0.0], [4.0]]), jnp.array([[2.0], [0.0]])
        >>> step = lambda u, x: x + tx.update(u, tx.init(x), x)[0]
        >>> jax.vmap(step, axis_name="workers")(updates, params).ravel().tolist()
        [3.0, 3.0]
    """
    caller = "local_sgd"
    checks.require_at_least(caller, "local_steps", local_steps, 1, "It is H, in steps.")
    checks.require_at_least(caller, "warmup_steps", warmup_steps, 0, "It is in steps.")
    checks.require_at_least(caller, "bucket_bytes", bucket_bytes, 1, "It is in bytes.")

    def init_fn(params):
        checks.require_floats(params, caller)
        return LocalSGDState(count=jnp.zeros([], jnp.int32))

    def update_fn(updates, state, params=None, **extra_args):
        del extra_args
        checks.require_weights(updates, params, axis_name, caller)
        plan = buckets.plan(params, bucket_bytes, axis_name)
        step = state.count - warmup_steps

        def average(x):
            return weights.average(x, plan, axis_name)

        x = schedules.every(
            (step < 0) | ((step + 1) % local_steps == 0),  # in the long run the latter
            local_steps,
            average,
            lambda x: x,
            weights.adapt(params, updates, axis_name),
        )
        new_updates = weights.updates_to(x, params, updates)
        return new_updates, LocalSGDState(schedules.increment(state.count))

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
