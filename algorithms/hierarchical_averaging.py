"""Hierarchical averaging: small groups average often, larger ones more rarely."""

import functools
import itertools
import math
from collections.abc import Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from bagua_jax import buckets, checks, primitives, schedules
from bagua_jax.algorithms import weights
from bagua_jax.primitives import AxisName

__all__ = ["HierarchicalAveragingState", "hierarchical_averaging"]


class HierarchicalAveragingState(NamedTuple):
    """State of :func:`hierarchical_averaging`."""

    count: jax.Array  # [] int32, steps taken; equal on all workers


def hierarchical_averaging(
    *,
    axis_name: AxisName,
    periods: Mapping[int, int | None],
    bucket_bytes: int = buckets.DEFAULT_BUCKET_BYTES,
) -> optax.GradientTransformationExtraArgs:
    r"""Average models in nested groups, each size with a period of its own.

    Placement: weight side, last in the chain. Receives the optimizer's update u_i with
    ``params``, returns ``new_params - params`` of this worker, varying. The optimizer's
    own state is neither reset nor averaged.

    Every step :math:`x_i \leftarrow x_i + u_i`. After step t, with G the largest group
    of i whose period divides t, if there is one:

    .. math:: x_i \leftarrow \frac{1}{|G|} \sum_{j \in G} x_j

    Args:
        axis_name: the workers' axis, or ``("node", "local")``: then groups are of
            nodes, and any averaging also averages the devices of a node.
        periods: for each period in steps the size of the groups of consecutive workers
            that average then; ``{2: 4, 16: None}`` averages fours after every second
            step and everybody, ``None``, after every 16th. The longer the period the
            larger the group, of a whole number of smaller ones; the longest is of all
            workers, given as ``None`` or by their number. Static.
        bucket_bytes: target message size in bytes (static).

    Returns:
        A transform of updates of any floating dtype; shapes and dtypes are kept.

    Raises:
        ValueError: if an argument is out of range, groups do not nest, or the largest
            is not of all workers; if params are missing, of another structure, not
            floating point, or hold no elements.
        NameError: if the axis is not mapped where ``update`` is called.

    Communication:
        For each bucket, when a group of size g averages, one reduce-scatter and one
        all-gather within it, 2(g-1)/g N elements of float32 sent per worker: what an
        all-reduce sends. One all-reduce when it is all workers.

    State: a counter, equal on all workers.

    Theory:
        The mean model moves by the mean update. ``{H: None}`` is
        ``local_sgd(local_steps=H)``; ``{1: g, H: None}`` is local SGD of workers that
        are g times as large.

    References:
        Lin et al., `Don't Use Large Mini-Batches, Use Local SGD`, 2020 (arXiv
        1808.07217), hierarchical local SGD. PyTorch's ``HierarchicalModelAverager``,
        which takes such periods, without its warm-up. Its counter starts at 0, so that
        it averages after steps 1, p + 1, 2p + 1, ..., where ours averages after p, 2p,
        ...; ``averager.step = 1`` at the start makes it average when ours does.

    Example:
        Pairs average after odd steps here, everybody after even ones.

        >>> tx = hierarchical_averaging(axis_name="workers", periods={1: 2, 2: None})
        >>> def two_steps(x):
        ...     state, seen = tx.init(x), []
        ...     for _ in range(2):
        ...         updates, state = tx.update(jnp.zeros_like(x), state, x)
        ...         x = x + updates
        ...         seen.append(x)
        ...     return seen
        >>> x = jnp.array([0.0, 2.0, 4.0, 10.0])
        >>> [x.tolist() for x in jax.vmap(two_steps, axis_name="workers")(x)]
        [[1.0, 1.0, 7.0, 7.0], [4.0, 4.0, 4.0, 4.0]]
    """
    caller = "hierarchical_averaging"
    if not isinstance(periods, Mapping) or not periods:
        raise ValueError(
            f"{caller}: periods must map periods in steps to sizes of groups, got "
            f"{periods!r}. {{16: None}} averages all workers after every 16th step."
        )
    for period, size in periods.items():
        checks.require_at_least(caller, "a period", period, 1, "It is in steps.")
        if size is not None:
            why = "It is in workers; None means all."
            checks.require_at_least(caller, "the size of a group", size, 1, why)
    due, sizes = zip(*sorted(periods.items()), strict=True)
    if None in sizes[:-1]:
        raise ValueError(
            f"{caller}: only the longest period may be of all workers, got {periods}. "
            "Leave out what is longer than its period."
        )
    _require_nested(sizes if sizes[-1] else sizes[:-1], periods, caller)
    checks.require_at_least(caller, "bucket_bytes", bucket_bytes, 1, "It is in bytes.")

    def init_fn(params):
        checks.require_floats(params, caller)
        return HierarchicalAveragingState(count=jnp.zeros([], jnp.int32))

    def update_fn(updates, state, params=None, **extra_args):
        del extra_args
        checks.require_weights(updates, params, axis_name, caller)
        n = primitives.num_peers(axis_name, caller)
        groups = [n if size is None else size for size in sizes]
        _require_nested(groups, periods, caller)
        if groups[-1] != n:
            raise ValueError(
                f"{caller}: the largest group must be all {n} workers of the axis, or "
                f"groups never hear of one another; got {periods}. Give the longest "
                "period None for them."
            )
        plan = buckets.plan(params, bucket_bytes, axis_name)

        def average(x, size: int):
            means = [
                primitives.group_mean(v, size, axis_name=axis_name)
                for v in plan.pack(x)
            ]
            return plan.unpack(means)

        count = schedules.increment(state.count)
        levels = [level for level, period in enumerate(due, start=1)]
        x = schedules.switch(
            jnp.max(jnp.where(count % jnp.array(due) == 0, jnp.array(levels), 0)),
            [lambda x: x, *(functools.partial(average, size=g) for g in groups)],
            weights.adapt(params, updates, axis_name),
            shares=_shares(due),
        )
        new_updates = weights.updates_to(x, params, updates)
        return new_updates, HierarchicalAveragingState(count)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _shares(periods: tuple[int, ...]) -> tuple[float, ...]:
    """Return the shares of steps that average nothing, and each level: see `periods`.

    A level acts where its period divides the step and no longer period does.
    """

    def none_of(periods: tuple[int, ...]) -> float:
        """Share of numbers that no period divides, by inclusion and exclusion."""
        return math.fsum(
            (-1) ** k / math.lcm(*chosen)
            for k in range(len(periods) + 1)
            for chosen in itertools.combinations(periods, k)
        )

    left = [none_of(periods[level:]) for level in range(len(periods) + 1)]
    return left[0], *(b - a for a, b in itertools.pairwise(left))


def _require_nested(sizes, periods: Mapping[int, int | None], caller: str) -> None:
    for smaller, larger in itertools.pairwise(sizes):
        if larger % smaller:
            raise ValueError(
                f"{caller}: groups must nest, each of a whole number of the smaller "
                f"ones, the larger the longer the period; got {larger} workers over "
                f"{smaller} in {dict(sorted(periods.items()))}. Use divisors of the "
                "number of workers, such as {2: 2, 8: None}."
            )
