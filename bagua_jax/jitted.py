"""Relaxations in a train step that was written for ``jax.jit`` and shardings."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from bagua_jax import loops
from bagua_jax.primitives import AxisName
from bagua_jax.workers import Workers

__all__ = ["data_parallel"]


def data_parallel(
    mesh: Mesh,
    *,
    axis: AxisName,
    init: Callable[..., Any] | None = None,
    in_specs: Any = None,
    donate: bool = False,
) -> Callable[[Callable[..., Any]], Any]:
    """Run a jitted train step as one program for each worker along a mesh axis.

    For the style without ``shard_map``: parameters and global batches [B, ...] are
    placed by ``NamedSharding``, and ``jax.jit`` of a step has XLA add up gradients,
    where no transform of ours could come between. Put this decorator in the place of
    ``@jax.jit``, take the gradient with :func:`bagua_jax.value_and_grad`, and chain a
    transform: each worker runs the step on its part of the batch.

    Built on ``Workers.on(mesh, axis).loop(..., flat=True)``, at the first call.

    Args:
        mesh: the user's own; further axes are left to XLA, as before.
        axis: the axis of the workers, which batches are sharded over; or two.
        init: makes the state, such as ``lambda params: (params, tx.init(params))``;
            adds ``init`` to the step. Needed where an eager ``tx.init`` lacks what
            ``tx`` declares as each worker's own (the error says so), and to resume.
        in_specs: of the arguments after the state, as in ``Workers.loop``. By default
            what has an axis is a batch, all of one length, and the rest is equal on all
            workers.
        donate: whether a step may write over the state that it is given.

    Returns:
        A decorator of ``step(state, *inputs)``, which returns the new state, or a tuple
        with it first. State and outputs keep the user's mesh and shardings; a worker's
        floating number, such as its loss, becomes the mean over the workers, its arrays
        are joined along their first axis. Where a leaf of the state becomes each
        worker's own it has a leading axis of workers from the first step on:
        ``step.loop.promoted`` names those, ``step.loop.average(state)`` averages them.
        ``step.workers`` and ``step.lower`` are there, too.

    Raises:
        ValueError: if the axis is not in the mesh; when called, what ``Workers.loop``
            refuses.

    Communication:
        That of the step, and an all-reduce of each number that it returns.

    Example:
        >>> import jax, jax.numpy as jnp, optax
        >>> from bagua_jax import value_and_grad
        >>> from bagua_jax.algorithms import gradient_allreduce
        >>> mesh = jax.make_mesh((2,), ("data",))
        >>> tx = optax.chain(gradient_allreduce(axis_name="data"), optax.sgd(0.5))
        >>> @data_parallel(mesh, axis="data")  # was: jax.jit
        ... def train_step(state, x):
        ...     params, opt_state = state
        ...     loss_fn = lambda p: jnp.mean((p - x) ** 2)
        ...     loss, grads = value_and_grad(loss_fn, "data")(params)
        ...     updates, opt_state = tx.update(grads, opt_state, params)
        ...     return (optax.apply_updates(params, updates), opt_state), loss
        >>> params = jnp.zeros(())
        >>> state, loss = train_step((params, tx.init(params)), jnp.arange(4.0))
        >>> float(state[0]), float(loss)
        (1.5, 3.5)
    """
    workers = Workers.on(mesh, axis)

    def decorate(step: Callable[..., Any]) -> Any:
        made: list[loops.Loop] = []
        started: list[tuple] = []  # what init was called with

        def loop_for(state, inputs) -> loops.Loop:
            if not made:
                begin = (lambda state: state) if init is None else init
                args = started[0] if started else (state,)
                if init is not None and not started:
                    raise ValueError(
                        "data_parallel: an init is given, so the state must be made by "
                        f"{step.__name__}.init(...)."
                    )
                try:
                    made.append(_make(workers, begin, step, args, inputs))
                except TypeError as error:
                    if init is not None:
                        raise
                    raise ValueError(
                        "data_parallel: the step does not trace with a state of which "
                        "every leaf is equal on all workers, as tx.init makes it "
                        "outside of the step. Pass data_parallel(mesh, axis=..., "
                        "init=lambda params: (params, tx.init(params))), and make the "
                        f"state by {step.__name__}.init(params). JAX says: {error}"
                    ) from error
                run.loop = made[0]
            return made[0]

        def entered(state, loop: loops.Loop):
            """Add the axis of workers where an eagerly made state lacks it."""
            types = jax.tree.leaves(loop.types)
            leaves = jax.tree.leaves(state)
            own = [s != loops.SHARED for s in loops.spec_leaves(loop.specs)]
            if len(leaves) != len(own):
                return state  # the step names what is wrong
            lacks = any(
                is_own and np.ndim(leaf) == leaf_type.ndim
                for is_own, leaf, leaf_type in zip(own, leaves, types, strict=True)
            )
            return loop.stack(state) if lacks else state

        def _make(workers, begin, step, args, inputs):
            return loops.make(
                workers,
                begin,
                step,
                args,
                inputs,
                in_specs,
                flat=True,
                donate=donate,
                caller="data_parallel",
            )

        def run_step(state, *inputs):
            loop = loop_for(state, inputs)
            if loop.promoted:
                state = entered(state, loop)
            return loop.step(state, *inputs)

        run: Any = run_step  # a function with attributes

        def lower(state, *inputs):
            loop = loop_for(state, inputs)
            return loop.step.lower(entered(state, loop), *inputs)

        if init is not None:
            start = workers.spmd(init)

            def begin(*args):
                started[:] = [jax.tree.map(loops.shape_of, args)]
                return start(*args)

            run.init = begin
        run.lower, run.workers = lower, workers
        functools.update_wrapper(run, step)
        return run

    return decorate
