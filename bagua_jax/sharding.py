"""Relaxations over workers whose parameters are sharded over a further mesh axis."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import PartitionSpec as P

from bagua_jax import checks
from bagua_jax.renamed import takes_old_names

__all__ = ["ShardedState", "sharded"]


class ShardedState(NamedTuple):
    """State of :func:`sharded`."""

    shards: Any  # of the leaves that are sharded: each shard's state, stacked [m, ...]
    whole: Any  # of the leaves that every device of the worker holds whole


@takes_old_names
def sharded(
    tx: optax.GradientTransformation,
    specs: Any,
    *,
    shard_axis: str = "model",
    num_shards: int,
) -> optax.GradientTransformationExtraArgs:
    r"""Exchange each shard of the parameters among the devices that hold it.

    A worker may be a group of m devices that share its parameters (tensor or fully
    sharded parallelism): a mesh with the workers' axis and ``shard_axis``, which
    ``shard_map(axis_names={"workers"})`` leaves to GSPMD. A relaxation that flattens
    parameters into vectors would make GSPMD gather them first. Here the transform runs
    in a nested ``shard_map`` over ``shard_axis``, with the parameters' own specs: each
    device exchanges its shard with its peers in the other workers, and nothing is
    gathered.

    .. math::
        u^{(k)} = \mathrm{tx}\big(g^{(k)}\big),\quad k = 1..m,\qquad
        u^{\mathrm{whole}} = \mathrm{tx}\big(g^{\mathrm{whole}}\big)

    Shard k is a tree of its own to ``tx``, and so are the leaves that are not sharded.
    Where the axis is not in the mesh (in simulation, or without sharding) the same
    shards are taken one after the other, with equal results.

    Args:
        tx: any of our transforms, with the workers' ``axis_name``, or a chain of them.
            What needs the whole tree, such as a clip by global norm, stands outside.
        specs: the parameters' ``PartitionSpec``s, a tree or a prefix of one; each
            names ``shard_axis`` at one dimension at most, and no other axis.
        shard_axis: the mesh axis over which a worker's parameters are sharded.
        num_shards: m, its size; divides each sharded dimension; static.

    Returns:
        A transform whose updates are sharded as the parameters are.

    Raises:
        ValueError: if a spec names another axis or ``shard_axis`` twice, a dimension is
            not divisible by m, or the mesh's axis has another size.

    Communication:
        That of ``tx`` on a tree 1/m the size, from each device, and that of ``tx`` on
        the leaves that are not sharded, which each device of a worker repeats. Nothing
        over ``shard_axis``.

    State:
        That of ``tx``, once for each shard and once for what is not sharded.

    Theory:
        Equal to ``tx`` without sharding where it works element by element
        (``gradient_allreduce``, ``local_sgd``, gossip in full precision). A compressor
        sees each shard as a vector, or matrix, of its own: its constants hold with d/m
        elements. ``powersgd`` approximates each shard of a matrix; without this wrapper
        GSPMD keeps its numbers, and adds up the small factors over ``shard_axis``.

    Example (in simulation: two shards of a matrix, exchanged apart):
        >>> from bagua_jax.algorithms import gradient_allreduce
        >>> tx = sharded(gradient_allreduce(axis_name="workers"),
        ...              {"w": P(None, "model"), "b": P()}, num_shards=2)
        >>> grads = {"w": jnp.arange(8.0).reshape(2, 1, 4), "b": jnp.ones((2, 3))}
        >>> step = lambda g: tx.update(g, tx.init(g))[0]
        >>> jax.vmap(step, axis_name="workers")(grads)["w"][0].tolist()
        [[2.0, 3.0, 4.0, 5.0]]
    """
    checks.require_at_least("sharded", "num_shards", num_shards, 1, "It is m.")
    tx = optax.with_extra_args_support(tx)

    def dimensions(tree) -> list[int | None]:
        """The sharded dimension of each leaf."""
        full = jax.tree.broadcast(specs, tree, is_leaf=lambda s: isinstance(s, P))
        flat = jax.tree.leaves(full, is_leaf=lambda s: isinstance(s, P))
        leaves = jax.tree_util.tree_leaves_with_path(tree)
        return [
            dimension_of(jax.tree_util.keystr(path), jnp.shape(leaf), spec)
            for (path, leaf), spec in zip(leaves, flat, strict=True)
        ]

    def dimension_of(name: str, shape: tuple[int, ...], spec: P) -> int | None:
        named = [d for d, axis in enumerate(spec) if axis is not None]
        if not named:
            return None
        legal = len(named) == 1 and spec[named[0]] in (shard_axis, (shard_axis,))
        if not legal or len(spec) > len(shape) or shape[named[0]] % num_shards:
            raise ValueError(
                f"sharded: a spec must name {shard_axis!r} once, at a dimension that "
                f"{num_shards} divides; got {spec} for '{name}' of shape {shape}. Keep "
                "that leaf whole (P()), or pad it."
            )
        return named[0]

    def group(tree, wanted: bool):
        """Leave out (None) the leaves that are not, or are, sharded."""
        leaves, structure = jax.tree.flatten(tree)
        kept = [
            leaf if (dim is not None) == wanted else None
            for leaf, dim in zip(leaves, dimensions(tree), strict=True)
        ]
        return jax.tree.unflatten(structure, kept)

    def on_shards(fn, tree):
        """Apply fn(leaf, dimension) to what is sharded, and leave the rest out."""
        leaves, structure = jax.tree.flatten(tree)
        found = dimensions(tree)
        pairs = zip(leaves, found, strict=True)
        return jax.tree.unflatten(
            structure, [None if d is None else fn(x, d) for x, d in pairs]
        )

    def shard(tree, k: int):
        def take(x, dim):
            size = x.shape[dim] // num_shards
            return jax.lax.slice_in_dim(x, k * size, (k + 1) * size, axis=dim)

        return on_shards(take, tree)

    def init_fn(params):
        states = [tx.init(shard(params, k)) for k in range(num_shards)]
        return ShardedState(_stack(states), tx.init(group(params, False)))

    def update_fn(updates, state, params=None, **extra_args):
        del extra_args  # they may hold whole trees
        whole, whole_state = group(updates, False), state.whole
        if jax.tree.leaves(whole):
            own = None if params is None else group(params, False)
            whole, whole_state = tx.update(whole, whole_state, own)

        parts, shard_states = group(updates, True), state.shards
        if jax.tree.leaves(parts):
            own = None if params is None else group(params, True)
            parts, shard_states = _each_shard(parts, shard_states, own, updates)

        merged = jax.tree.map(
            lambda _, a, b: a if b is None else b, updates, whole, parts
        )
        return merged, ShardedState(shard_states, whole_state)

    def _each_shard(parts, states, params, like):
        sizes = dict(jax.sharding.get_abstract_mesh().shape)
        if shard_axis not in sizes:
            done = []
            for k in range(num_shards):
                state = jax.tree.map(lambda x, k=k: x[k], states)
                own = None if params is None else shard(params, k)
                done.append(tx.update(shard(parts, k), state, own))
            news = [new for new, _ in done]
            join = lambda dim, *pieces: jnp.concatenate(pieces, axis=dim)  # noqa: E731
            dims = on_shards(lambda _, dim: dim, like)
            return jax.tree.map(join, dims, *news), _stack([s for _, s in done])
        if sizes[shard_axis] != num_shards:
            raise ValueError(
                f"sharded: num_shards must be the size of the mesh's axis "
                f"{shard_axis!r}, which is {sizes[shard_axis]}; got {num_shards}."
            )

        def body(parts, states, params):
            new, states = tx.update(parts, jax.tree.map(lambda x: x[0], states), params)
            return new, jax.tree.map(lambda x: x[None], states)

        placed = on_shards(lambda _, dim: P(*(None,) * dim, shard_axis), like)
        stacked = jax.tree.map(lambda _: P(shard_axis), states)
        return jax.shard_map(
            body,
            in_specs=(placed, stacked, None if params is None else placed),
            out_specs=(placed, stacked),
            axis_names={shard_axis},
        )(parts, states, params)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _stack(states: list[Any]) -> Any:
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *states)
