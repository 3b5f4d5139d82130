"""A tree's leaves as arrays by path, for files that know nothing of trees."""

from typing import Any

import jax
import jax.numpy as jnp

__all__ = ["pack", "unpack"]


def _is_key(x: Any) -> bool:
    return jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def pack(state: Any) -> dict[str, jax.Array]:
    """List a tree's leaves by path; typed keys by their words.

    Args:
        state: tree of arrays.

    Returns:
        Arrays by path, where they were, without those that hold no elements.
    """
    leaves = {
        jax.tree_util.keystr(path): jax.random.key_data(x) if _is_key(x) else x
        for path, x in jax.tree_util.tree_leaves_with_path(state)
    }
    return {path: x for path, x in leaves.items() if x.size}


def unpack(arrays: dict[str, jax.Array], like: Any) -> Any:
    """Undo :func:`pack`.

    Args:
        arrays: by path, placed as in ``pack(like)``.
        like: tree of arrays with the wished structure and dtypes.

    Returns:
        A tree like ``like``.
    """

    def leaf(path, x):
        stored = arrays.get(jax.tree_util.keystr(path))
        if stored is None:  # no elements, nothing stored
            return x
        if _is_key(x):
            return jax.random.wrap_key_data(stored, impl=jax.random.key_impl(x))
        return stored

    return jax.tree_util.tree_map_with_path(leaf, like)
