"""Another number of workers: a training state of n goes on with m."""

from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec as P

__all__ = ["Leaf", "agreed", "by_mass", "mean", "resize", "total", "walk"]


@dataclass(frozen=True)
class Leaf:
    """An array of a state at the boundary, as rules of algorithms see it."""

    value: jax.Array  # [n, ...] where each worker has its own, else what all have
    stacked: bool
    name: str


def resize(state: tuple[Any, ...], specs: Any, like: Any, *, workers: int) -> Any:
    r"""Carry a training state from n workers to m.

    What stands for a mean over the workers keeps it, and every new worker starts from
    the same:

    .. math::
        x_k = \tfrac1n \sum_i x_i,\qquad d_k = \tfrac1n \sum_i d_i,\qquad
        e_k = \sum_i e_i \text{ on the part that } k \text{ owns},\qquad k = 1..m

    with parameters and moments x, what workers have not sent d, and what owners of
    parts have not sent e. Push-sum keeps its mass: :math:`x_k = \sum_i w_i x_i / \sum_i
    w_i` and :math:`w_k = 1`, with all that is under way. Copies of neighbours' models
    become the new model. Leaves that are equal on all workers stay, bit for bit. The
    spread of the workers' models is lost. Every algorithm says under "State" what else
    is kept, and what begins anew.

    Args:
        state: at the boundary, of n workers: a tuple of the parameters, the optimizer's
            state, and whatever else the loop carries.
        specs: of its leaves, such as ``loop.specs``.
        like: a state of m workers, such as the new loop's ``init(...)``. Its shapes are
            those of the result: the neighbours of a graph are others with m. Where a
            part begins anew, it is taken from here.
        workers: m.

    Returns:
        A tuple like ``like``, not placed on devices: the new loop's ``step`` takes it.

    Raises:
        ValueError: if the state is no such tuple; if workers sit in nodes, whose
            devices hold parts of what stands for the node; if numbers of workers that
            cannot be averaged, such as counts or keys, differ between them; if a leaf
            would have another shape or dtype than in ``like``.

    Example:
        >>> import optax
        >>> from bagua_jax import Workers, algorithms, value_and_grad, worker_local
        >>> def loop_of(n):
        ...     workers = Workers.simulate(n)
        ...     average = algorithms.local_sgd(axis_name="workers", local_steps=9)
        ...     tx = optax.chain(optax.sgd(0.5), average)
        ...     def init():
        ...         x = worker_local(jnp.zeros(2), "workers")
        ...         return x, tx.init(x)
        ...     def step(state, target):
        ...         x, opt = state
        ...         updates, opt = tx.update(x - target, opt, x)
        ...         return optax.apply_updates(x, updates), opt
        ...     return workers.loop(init, step, inputs=(jnp.zeros((n, 2)),))
        >>> two, three = loop_of(2), loop_of(3)
        >>> state = two.step(two.init(), jnp.array([[2.0, 4.0], [4.0, 0.0]]))
        >>> state = resize(state, two.specs, three.init(), workers=3)
        >>> state[0].tolist()
        [[1.5, 1.0], [1.5, 1.0], [1.5, 1.0]]

    References:
        The rules are this project's own; each keeps what its algorithm's invariant is
        about, and is tested to.
    """
    if isinstance(workers, bool) or not isinstance(workers, int) or workers < 1:
        raise ValueError(
            f"resize: workers must be an integer >= 1, got {workers!r}. It is how many "
            "go on."
        )
    if not isinstance(state, tuple) or len(state) < 2 or len(state) != len(like):
        raise ValueError(
            "resize: state and like must be tuples of the parameters, the optimizer's "
            f"state and the rest, of one length; got {type(state).__name__} and "
            f"{type(like).__name__}. Put them into one tuple."
        )
    params, *rest = _leaves_of(state, specs)
    old_model = next((m for m in map(_model_of, rest) if m is not None), None)
    model = params if old_model is None else old_model(params)
    new_params = mean(model, workers)
    resized = (
        new_params,
        *(
            walk(part, part_like, new_params, workers)
            for part, part_like in zip(rest, like[1:], strict=True)
        ),
    )
    _require_like(resized, like)
    return resized


def walk(tree: Any, like: Any, params: Any, workers: int) -> Any:
    """Resize a tree of :class:`Leaf`: by a state's own rule where it has one.

    A state's rule is its method ``resized(like, params, workers)``, of its own part of
    ``like``, and of the new parameters.
    """
    parts, structure = jax.tree.flatten(tree, is_leaf=lambda x: hasattr(x, "resized"))
    likes = structure.flatten_up_to(like)
    return structure.unflatten(
        mean(part, workers)
        if isinstance(part, Leaf)
        else part.resized(part_like, params, workers)
        for part, part_like in zip(parts, likes, strict=True)
    )


def mean(tree: Any, workers: int) -> Any:
    """Give every new worker the mean of the old ones'; integers must be equal."""

    def average(leaf: Leaf):
        if not leaf.stacked:
            return leaf.value
        same = _same(leaf.value)
        if not jnp.issubdtype(leaf.value.dtype, jnp.inexact):
            if not np.all(same):
                raise ValueError(
                    f"resize: leaf {leaf.name} differs between workers and is no "
                    "number to average. Make it equal on all workers before, or leave "
                    "it out of the state and begin it anew."
                )
            return _to_all(leaf.value[0], workers)
        wide = jnp.promote_types(leaf.value.dtype, jnp.float32)
        middle = jnp.mean(leaf.value, 0, dtype=wide).astype(leaf.value.dtype)
        # Where workers agree nothing is rounded.
        return _to_all(jnp.where(same, leaf.value[0], middle), workers)

    return jax.tree.map(average, tree)


def total(tree: Any, workers: int) -> Any:
    """Give every new worker the sum of disjoint parts: each reads the part it owns.

    Bit for bit. A vector that all workers have whole, as this leaves it, stays.
    """

    def whole(leaf: Leaf):
        if not leaf.stacked:
            return leaf.value
        same = _same(leaf.value)
        return _to_all(jnp.where(same, leaf.value[0], leaf.value.sum(0)), workers)

    return jax.tree.map(whole, tree)


def by_mass(params: Any, masses: Any, *under_way: Any) -> Any:
    r"""Average models by their mass: :math:`\sum (w x + y) / \sum (w + m)`.

    Args:
        params: tree of :class:`Leaf`, x.
        masses: a list of them: w, and the mass m of each tree that is under way.
        *under_way: trees like ``params``, y, which hold models times their mass.

    Returns:
        A tree of :class:`Leaf`, as of one worker.
    """
    mass = sum(m.value.sum() for m in masses)
    alone = not sum(np.sum(m.value) for m in masses[1:])

    def average(leaf, *parts):
        held = masses[0].value.reshape(-1, *(1,) * (leaf.value.ndim - 1)) * leaf.value
        whole = held.sum(0) + sum(x.value.sum(0) for x in parts)
        middle = (whole / mass).astype(leaf.value.dtype)
        kept = jnp.where(_same(leaf.value) & alone, leaf.value[0], middle)
        return replace(leaf, value=kept[None])

    return jax.tree.map(average, params, *under_way)


def agreed(tree: Any, like: Any, workers: int) -> Any:
    """Keep what is equal on all workers; where a leaf is not, begin anew from ``like``.

    For states of compressors, of which nothing is known.
    """

    def keep(leaf: Leaf, new: Any):
        if leaf.stacked and not np.all(_same(leaf.value)):
            return new
        return _to_all(leaf.value[0], workers) if leaf.stacked else leaf.value

    return jax.tree.map(keep, tree, like)


def _same(rows: jax.Array) -> Any:
    """Tell for each element whether all rows have it alike."""
    if jnp.issubdtype(rows.dtype, jax.dtypes.prng_key):
        rows = jax.random.key_data(rows)
        return (rows == rows[:1]).all(0).all(-1)
    return (rows == rows[:1]).all(0)


def _to_all(x: jax.Array, workers: int) -> jax.Array:
    return jnp.broadcast_to(x, (workers, *x.shape))


def _leaves_of(state: tuple[Any, ...], specs: Any) -> tuple[Any, ...]:
    """Put a :class:`Leaf` in the place of every array."""
    paths, structure = jax.tree_util.tree_flatten_with_path(state)
    kinds = jax.tree.leaves(specs, is_leaf=lambda x: isinstance(x, P))
    if len(kinds) != len(paths):
        raise ValueError(
            f"resize: specs must have a spec for each of the {len(paths)} leaves of "
            f"the state, got {len(kinds)}. Pass the specs of its own loop: loop.specs."
        )
    leaves = []
    for (path, value), spec in zip(paths, kinds, strict=True):
        name = jax.tree_util.keystr(path)
        if any(isinstance(entry, tuple) and len(entry) > 1 for entry in spec):
            raise ValueError(
                f"resize: leaf {name} is of workers in nodes ({spec}), each device of "
                "which holds a part of what stands for its node. Resize a state of one "
                "axis of workers, or begin the optimizer's state anew from "
                "loop.average(state)."
            )
        leaves.append(Leaf(jnp.asarray(value), spec != P(), name))
    sizes = {leaf.name: leaf.value.shape[0] for leaf in leaves if leaf.stacked}
    if len(set(sizes.values())) > 1:
        raise ValueError(f"resize: leaves are of several numbers of workers: {sizes}.")
    return structure.unflatten(leaves)


def _model_of(tree: Any) -> Any:
    """Find the rule of a state for what the workers' parameters stand for."""
    parts = jax.tree.leaves(tree, is_leaf=lambda x: hasattr(x, "common_model"))
    return next(
        (part.common_model for part in parts if hasattr(part, "common_model")), None
    )


def _require_like(found: Any, like: Any) -> None:
    def described(tree):
        return {
            jax.tree_util.keystr(path): (jnp.shape(x), jnp.result_type(x).name)
            for path, x in jax.tree_util.tree_leaves_with_path(tree)
        }

    have, want = described(found), described(like)
    for name in want | have:
        if have.get(name) != want.get(name):
            raise ValueError(
                f"resize: leaf {name} would be {have.get(name, 'left out')}, and is "
                f"{want.get(name, 'not there')} in like. Make `like` by the same "
                "transform and parameters, for the new number of workers."
            )
