"""Streaming DiLoCo: outer steps fragment by fragment, merged into training late."""

import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bagua_jax import buckets, checks, compatibility, schedules
from bagua_jax.algorithms import weights
from bagua_jax.algorithms.feedback import init_errors
from bagua_jax.compressors import Compressor
from bagua_jax.primitives import AxisName, Errors

__all__ = ["StreamingDiLoCoState", "streaming_diloco"]


class StreamingDiLoCoState(NamedTuple):
    """State of :func:`streaming_diloco`; trees like params in float32, varying."""

    count: jax.Array  # [] int32, steps taken; equal on all workers
    key: jax.Array  # [] typed PRNG key; equal on all workers
    anchor: optax.Params  # theta, the outer model; equal on all workers
    outer_velocity: optax.Updates  # v; equal on all workers
    error: Errors  # each None, or unsent outer gradient; worker-local


def streaming_diloco(
    compressor: Compressor | None = None,
    *,
    axis_name: AxisName,
    local_steps: int,
    fragments: int,
    staleness: int = 1,
    mixing: float = 0.5,
    outer_learning_rate: float = 0.7,
    outer_momentum: float = 0.9,
    bucket_bytes: int = buckets.DEFAULT_BUCKET_BYTES,
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Synchronize a fragment at a time, late and softly (Streaming DiLoCo).

    Placement: weight side, last in the chain. Receives the optimizer's update u_i with
    ``params``, returns ``new_params - params`` of this worker, varying. The inner
    optimizer (AdamW in the paper) keeps its own state on each worker.

    Every step :math:`\theta_i \leftarrow \theta_i + u_i`. Leaf l of the parameters
    belongs to fragment :math:`p = l \bmod P`, whose turn is after the steps t with
    :math:`t \equiv \lfloor (p + 1) H / P \rfloor \pmod H`:

    .. math::
        D_p = \tfrac1n \sum_i (\theta_p - \theta_{i,p});\qquad
        v_p \leftarrow \beta v_p + D_p;\qquad
        \theta_p \leftarrow \theta_p - \eta (D_p + \beta v_p)

    and tau steps later, when that has crossed the network,

    .. math:: \theta_{i,p} \leftarrow \alpha\, \theta_{i,p} + (1 - \alpha)\, \theta_p

    With a compressor D is the mean by ScatterReduce of compressed outer gradients, with
    error feedback at the worker and at the owner of each part.
    An error that waits acts like more momentum: the coarser the compressor, the smaller
    eta and beta must be, else models grow without end.

    Args:
        compressor: of outer gradients, stateless, a contraction, such as
            ``blockwise(bits=4)``; ``None`` averages them exactly.
        axis_name: the workers' axis, or ``("node", "local")``.
        local_steps: H, at least 1, between two turns of a fragment; static.
        fragments: P, 1 .. H, so that no two have a turn at once; those beyond the
            number of leaves are empty; static.
        staleness: tau, 0 .. H-1, steps from a turn to its merging; static.
        mixing: alpha in [0, 1), the share of one's own model that outlives a merging.
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
        At a fragment's turn, for each of its buckets one all-reduce of float32; with a
        compressor one all-to-all and one all-gather of payloads of N/n, added up in
        float32. In H steps that is what ``diloco`` sends at once: on average as much,
        at the peak of a step the largest fragment, 1/P if leaves are alike.

    State:
        Two trees like params in float32, equal on all workers, and with a compressor
        two of errors, worker-local. On another number of workers
        :func:`bagua_jax.resize` keeps the mean of what workers, and all of what owners,
        have not sent.

    Theory:
        Each fragment follows DiLoCo by itself: ``fragments=1, staleness=0, mixing=0``
        is ``diloco``. Nothing reads the outer model between a turn and its merging, so
        that it may be moved at the turn, and no message need be kept in the state.

    Differences from the paper:
        Outer gradients are measured from the outer model. Fragments are leaves, not
        layers, and have their turns evenly spread. Lateness is simulated: in a lockstep
        program the exchange ends within its step, and its result waits. A compressor
        with error feedback in place of a 4-bit float without.

    References:
        Douillard et al., `Streaming DiLoCo with Overlapping Communication: Towards a
        Distributed Free Lunch`, 2025 (arXiv 2501.18512).

    Example:
        Two leaves take turns, and half of the mean reaches the workers at once.

        >>> tx = streaming_diloco(axis_name="workers", local_steps=2, fragments=2,
        ...                       staleness=0, outer_learning_rate=1.0,
        ...                       outer_momentum=0.0)
        >>> x, u = (jnp.zeros(2), jnp.zeros(2)), jnp.array([8.0, 0.0])
        >>> step = lambda x, u: tx.update((u, u), tx.init(x), x)[0]
        >>> moves = jax.vmap(step, axis_name="workers")(x, u)
        >>> [leaf.tolist() for leaf in moves]
        [[6.0, 2.0], [8.0, 0.0]]
    """
    caller = "streaming_diloco"
    checks.require_at_least(caller, "local_steps", local_steps, 1, "It is H, in steps.")
    checks.require_at_least(caller, "fragments", fragments, 1, "It is P.")
    checks.require_at_least(caller, "staleness", staleness, 0, "It is in steps.")
    if fragments > local_steps:
        raise ValueError(
            f"{caller}: fragments must be at most local_steps={local_steps}, got "
            f"{fragments}: each has a step of its own for its turn. Take fewer."
        )
    if staleness >= local_steps:
        raise ValueError(
            f"{caller}: staleness must be less than local_steps={local_steps}, got "
            f"{staleness}: a fragment is merged before its next turn. Take more local "
            "steps, or be less late."
        )
    checks.require_within(caller, "mixing", mixing, 0, 1)
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
    turns = np.array([(p + 1) * local_steps // fragments for p in range(fragments)])

    def init_fn(params) -> Any:
        checks.require_floats(params, caller)
        anchor = weights.private(params, axis_name)
        return StreamingDiLoCoState(
            count=jnp.zeros([], jnp.int32),
            key=jax.random.key(seed),
            anchor=anchor,
            outer_velocity=optax.tree.zeros_like(anchor),
            error=init_errors(params, feedback, axis_name),
        )

    def update_fn(updates, state, params=None, **extra_args) -> Any:
        del extra_args
        checks.require_weights(updates, params, axis_name, caller)
        key = jax.random.fold_in(state.key, state.count)
        count = schedules.increment(state.count)

        def outer_step(plan, x, anchor, velocity, *errors):
            gradient, errors = weights.compressed_average(
                optax.tree.sub(anchor, x),
                Errors(*errors),
                plan,
                compressor,
                key,
                axis_name,
                check,
            )
            anchor, velocity = weights.outer_step(
                anchor, velocity, gradient, outer_learning_rate, outer_momentum
            )
            return anchor, velocity, *errors

        def turn_of(fragment: slice):
            plan = buckets.plan(_take(params, fragment), bucket_bytes, axis_name)

            def turn(x, *outer):
                taken = [_take(tree, fragment) for tree in (x, *outer)]
                moved = outer_step(plan, *taken)
                return tuple(
                    _put(tree, fragment, new)
                    for tree, new in zip(outer, moved, strict=True)
                )

            return turn

        number = min(fragments, len(jax.tree.leaves(params)))
        branches = [turn_of(slice(p, None, fragments)) for p in range(number)]
        shares = [1 / local_steps] * number
        if number < local_steps:
            branches.append(lambda x, *outer: outer)
            shares.append(1 - number / local_steps)
        has_turn = [(count - turn) % local_steps == 0 for turn in turns[:number]]
        x = weights.adapt(params, updates, axis_name)
        anchor, velocity, *errors = schedules.switch(
            jnp.argmax(jnp.stack([*has_turn, jnp.array(True)])),  # the first true one
            branches,
            x,
            state.anchor,
            state.outer_velocity,
            *state.error,
            shares=shares,
        )

        since = [count - turn - staleness for turn in turns]
        merges = [(steps >= 0) & (steps % local_steps == 0) for steps in since]
        leaves, structure = jax.tree.flatten(x)
        merged = [
            jnp.where(merge, mixing * own + (1 - mixing) * outer, own)
            for merge, own, outer in zip(
                itertools.cycle(merges), leaves, jax.tree.leaves(anchor)
            )
        ]
        x = jax.tree.unflatten(structure, merged)
        new_updates = weights.updates_to(x, params, updates)
        return new_updates, StreamingDiLoCoState(
            count, state.key, anchor, velocity, Errors(*errors)
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _take(tree: Any, fragment: slice) -> list[jax.Array] | None:
    """List the leaves of a fragment; ``None`` of nothing."""
    return None if tree is None else jax.tree.leaves(tree)[fragment]


def _put(tree: Any, fragment: slice, values: Any) -> Any:
    """Exchange the leaves of a fragment for others."""
    if tree is None:
        return None
    leaves, structure = jax.tree.flatten(tree)
    leaves[fragment] = values
    return jax.tree.unflatten(structure, leaves)
