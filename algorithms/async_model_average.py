"""Asynchronous model averaging, in its deterministic form: a mean that arrives late."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from bagua_jax import buckets, checks, precision, primitives, resizing, schedules
from bagua_jax.algorithms import weights
from bagua_jax.primitives import AxisName
from bagua_jax.renamed import takes_old_names

__all__ = ["AsyncModelAverageState", "async_model_average"]


class AsyncModelAverageState(NamedTuple):
    """State of :func:`async_model_average`."""

    count: jax.Array  # [] int32, steps taken; equal on all workers
    correction: optax.Params | None  # mean - snapshot under way, like params in float32
    # and worker-local; None where staleness is 0

    def resized(self, like, params, workers):
        """The correction under way, whose mean is 0, is 0."""
        del params
        (count,) = resizing.mean((self.count,), workers)
        zeros = jax.tree.map(jnp.zeros_like, like.correction)
        return AsyncModelAverageState(count, zeros)


@takes_old_names
def async_model_average(
    *,
    axis_name: AxisName,
    local_steps: int,
    staleness: int = 0,
    warmup_steps: int = 0,
    bucket_bytes: int = buckets.DEFAULT_BUCKET_BYTES,
) -> optax.GradientTransformationExtraArgs:
    r"""Average the models every few steps, with a mean that arrives late.

    Placement: weight side, last in the chain. Receives the optimizer's update u_i with
    ``params``, returns ``new_params - params`` of this worker, varying.

    Workers step on their own. Every H steps each takes a snapshot y_i of its
    model; the mean of the snapshots arrives ``staleness`` steps later and is added as a
    correction, so that no progress made in between is lost:

    .. math::
        x_i \leftarrow x_i + u_i;\qquad
        x_i \leftarrow x_i + \tfrac1n \sum_j y_j - y_i \ \text{ when a mean arrives}

    With ``staleness=0`` the snapshot's mean is used at once: periodic averaging (local
    SGD). A mean that arrives on a step with a snapshot is added
    before the snapshot is taken.

    It is the arithmetic of asynchronous training inside a lockstep program: every
    worker is equally late, so that runs can be repeated and analysed. It waits for
    slow workers as any XLA program does.

    Args:
        axis_name: the workers' axis, or ``("node", "local")``.
        local_steps: H, steps between snapshots, at least 1; static.
        staleness: steps from a snapshot to its use, from 0 to H; static.
        warmup_steps: first steps, on which models are averaged at every step; at least
            0; static.
        bucket_bytes: target message size in bytes (static).

    Returns:
        A transform of updates of any floating dtype; shapes and dtypes are kept.

    Raises:
        ValueError: if an argument is out of range; if params are missing, of another
            structure, not floating point, or hold no elements.
        NameError: if the axis is not mapped where ``update`` is called.

    Communication:
        One all-reduce of the parameters for each bucket, every H steps; every
        step during the warm-up.

    State:
        With staleness one tree like params, worker-local: a mean under way. On another
        number of workers :func:`bagua_jax.resize` keeps that corrections add up to 0:
        all are 0.

    Theory:
        Corrections add up to zero over the workers: the mean model moves by the mean
        update alone.

    Differences from the original:
        Deterministic, with a stated staleness, where the original runs a thread on a
        timer. The warm-up averages models, where the original averages gradients: the
        same for optimizers that are linear in the gradient, such as SGD with momentum,
        because their states are equal until the first local phase.

    References:
        Gan et al., BAGUA, 2021 (arXiv 2107.01499), algorithm ``async``. Stich, `Local
        SGD Converges Fast and Communicates Little`, 2019, for staleness 0.

    Example:
        >>> tx = async_model_average(axis_name="workers", local_steps=1)
        >>> params, updates = jnp.array([[0.0], [4.0]]), jnp.array([[2.0], [0.0]])
        >>> step = lambda u, x: x + tx.update(u, tx.init(x), x)[0]
        >>> jax.vmap(step, axis_name="workers")(updates, params).ravel().tolist()
        [3.0, 3.0]
    """
    caller = "async_model_average"
    checks.require_at_least(caller, "local_steps", local_steps, 1, "It is in steps.")
    checks.require_at_least(caller, "staleness", staleness, 0, "It is in steps.")
    if staleness > local_steps:
        raise ValueError(
            f"{caller}: staleness must be at most local_steps={local_steps}, got "
            f"{staleness}: one mean is under way at a time. Raise local_steps."
        )
    checks.require_at_least(caller, "warmup_steps", warmup_steps, 0, "It is in steps.")
    checks.require_at_least(caller, "bucket_bytes", bucket_bytes, 1, "It is in bytes.")

    def init_fn(params) -> Any:
        checks.require_floats(params, caller)
        zeros = primitives.worker_local(precision.zeros(params), axis_name)
        return AsyncModelAverageState(
            count=jnp.zeros([], jnp.int32),
            correction=zeros if staleness else None,
        )

    def update_fn(updates, state, params=None, **extra_args) -> Any:
        del extra_args
        checks.require_weights(updates, params, axis_name, caller)
        plan = buckets.plan(params, bucket_bytes, axis_name)
        step = state.count - warmup_steps

        def mean(x):
            means = [primitives.c_fp_s(v, axis_name=axis_name) for v in plan.pack(x)]
            return primitives.worker_local(plan.unpack(means), axis_name)

        def average(x, correction):
            return mean(x), correction

        def take_snapshot(x, correction):
            del correction
            return x, optax.tree.sub(mean(x), x)

        def go_on(x, correction):
            return x, correction

        x = weights.adapt(params, updates, axis_name)
        if staleness:
            arrives = (step - staleness + 1) % local_steps == 0
            x = jax.tree.map(
                lambda x, c: x + jnp.where(arrives, c, 0), x, state.correction
            )

        branches = [go_on, take_snapshot if staleness else average, average]
        shares = [1 - 1 / local_steps, 1 / local_steps, 0]
        due = ((step + 1) % local_steps == 0).astype(jnp.int32)
        index = jnp.where(step < 0, 2, due)
        if not warmup_steps:
            branches, shares = branches[:2], shares[:2]
        x, correction = schedules.switch(
            index, branches, x, state.correction, shares=shares
        )
        new_updates = weights.updates_to(x, params, updates)
        count = schedules.increment(state.count)
        return new_updates, AsyncModelAverageState(count, correction)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
