"""SlowMo: local SGD whose averaged moves pass through a slow heavy ball."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from bagua_jax import buckets, checks, schedules
from bagua_jax.algorithms import weights
from bagua_jax.primitives import AxisName
from bagua_jax.renamed import takes_old_names

__all__ = ["SlowMoState", "slowmo"]


class SlowMoState(NamedTuple):
    """State of :func:`slowmo`; trees like params in float32, equal on all workers."""

    count: jax.Array  # [] int32, steps taken
    anchor: optax.Params  # where the last averaging left every worker; typed varying
    slow_velocity: optax.Updates  # u, in units of a gradient; typed varying


@takes_old_names
def slowmo(
    learning_rate: optax.ScalarOrSchedule,
    *,
    axis_name: AxisName,
    local_steps: int,
    outer_learning_rate: float = 1.0,
    outer_momentum: float = 0.5,
    bucket_bytes: int = buckets.DEFAULT_BUCKET_BYTES,
) -> optax.GradientTransformationExtraArgs:
    r"""Average every H steps, with momentum on the averaged move (SlowMo).

    Placement: weight side, last in the chain. Receives the optimizer's update u_i with
    ``params``, returns ``new_params - params`` of this worker, varying. The optimizer's
    own state is neither reset nor averaged.

    Every step :math:`x_i \leftarrow x_i + u_i`. After every H-th, with :math:`\hat x`
    where the last averaging left all workers (at first x_0):

    .. math::
        v \leftarrow \beta v + \frac{\hat x - \tfrac1n \sum_j x_j}{\gamma};\qquad
        x_i, \hat x \leftarrow \hat x - \alpha \gamma v

    Args:
        learning_rate: gamma of the optimizer before it, a number or a schedule of steps
            already taken; v is kept in units of gradients, so that it outlives a fall.
        axis_name: the workers' axis, or ``("node", "local")``.
        local_steps: H, at least 1; static.
        outer_learning_rate: alpha > 0.
        outer_momentum: beta in [0, 1); the paper tunes it from 0.4 to 0.8.
        bucket_bytes: target message size in bytes (static).

    Returns:
        A transform of updates of any floating dtype; shapes and dtypes are kept. All
        workers must start from equal params.

    Raises:
        ValueError: if an argument is out of range; if params are missing, of another
            structure, not floating point, or hold no elements.
        NameError: if the axis is not mapped where ``update`` is called.

    Communication:
        One all-reduce of the parameters for each bucket, every H steps.

    State:
        Two trees like params in float32, equal on all workers.

    Theory:
        ``outer_momentum=0, outer_learning_rate=1`` is ``local_sgd``. On a quadratic of
        curvature h, with :math:`s = 1 - (1 - \gamma h)^H`, the outer iteration has the
        polynomial :math:`z^2 - (1 + \beta - \alpha s) z + \beta`: stable where
        :math:`\alpha s < 2 (1 + \beta)`.

    Differences from the paper:
        Of its choices for the optimizer's own state this is "maintain". The base
        algorithm is local SGD, and alpha and beta do not change with time.

    References:
        Wang et al., `SlowMo: Improving Communication-Efficient Distributed SGD with
        Slow Momentum`, 2020.

    Example:
        >>> tx = slowmo(axis_name="workers", local_steps=1, learning_rate=1.0,
        ...             outer_learning_rate=0.5)
        >>> params, updates = jnp.array([[4.0], [4.0]]), jnp.array([[4.0], [0.0]])
        >>> step = lambda u, x: x + tx.update(u, tx.init(x), x)[0]
        >>> jax.vmap(step, axis_name="workers")(updates, params).ravel().tolist()
        [5.0, 5.0]
    """
    caller = "slowmo"
    checks.require_at_least(caller, "local_steps", local_steps, 1, "It is H, in steps.")
    checks.require_within(caller, "outer_momentum", outer_momentum, 0, 1)
    checks.require_within(
        caller, "outer_learning_rate", outer_learning_rate, 0, open_below=True
    )
    if not callable(learning_rate):
        checks.require_within(
            caller, "learning_rate", learning_rate, 0, open_below=True
        )
    checks.require_at_least(caller, "bucket_bytes", bucket_bytes, 1, "It is in bytes.")

    def init_fn(params):
        checks.require_floats(params, caller)
        anchor = weights.private(params, axis_name)
        return SlowMoState(
            count=jnp.zeros([], jnp.int32),
            anchor=anchor,
            slow_velocity=optax.tree.zeros_like(anchor),
        )

    def update_fn(updates, state, params=None, **extra_args):
        del extra_args
        checks.require_weights(updates, params, axis_name, caller)
        plan = buckets.plan(params, bucket_bytes, axis_name)
        rate = learning_rate(state.count) if callable(learning_rate) else learning_rate

        def step_slowly(x, anchor, velocity):
            mean = weights.average(x, plan, axis_name)
            velocity = jax.tree.map(
                lambda v, a, m: outer_momentum * v + (a - m) / rate,
                velocity,
                anchor,
                mean,
            )
            anchor = jax.tree.map(
                lambda a, v: a - outer_learning_rate * rate * v, anchor, velocity
            )
            return anchor, anchor, velocity

        x, anchor, velocity = schedules.every(
            (state.count + 1) % local_steps == 0,
            local_steps,
            step_slowly,
            lambda *carry: carry,
            weights.adapt(params, updates, axis_name),
            state.anchor,
            state.slow_velocity,
        )
        new_updates = weights.updates_to(x, params, updates)
        count = schedules.increment(state.count)
        return new_updates, SlowMoState(count, anchor, velocity)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
