"""A state's leaves as arrays by path, for files that know neither trees nor keys."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

__all__ = ["from_arrays", "to_arrays"]


def _is_key(x: Any) -> bool:
    return jnp.issubdtype(x.dtype, jax.dtypes.prng_key)


def _stored(x: Any) -> Any:
    if _is_key(x):
        return jax.random.key_data(x)
    if x.dtype == jnp.float8_e5m2:  # NumPy writes a name that it cannot read
        return lax.bitcast_convert_type(x, jnp.uint8)
    return x


def _typed(x: Any, like: jax.Array | None) -> Any:
    """Read an array of bytes, as NumPy's files have bfloat16, as it was written."""
    x = x if hasattr(x, "dtype") else np.asarray(x)
    if like is None or np.dtype(x.dtype).kind != "V":
        return x
    is_one = np.dtype(x.dtype).name.startswith("void")  # ml_dtypes' own are "V", too
    return x.view(like.dtype) if is_one and x.itemsize == like.dtype.itemsize else x


def to_arrays(state: Any) -> dict[str, jax.Array]:
    """List a tree's leaves by path; typed keys by their words, float8_e5m2 by its bits.

    For ``np.savez(file, **to_arrays(state))`` or
    ``flax.serialization.to_bytes(to_arrays(state))``, which cannot hold typed keys;
    orbax and ``pickle`` can.

    Args:
        state: tree of arrays.

    Returns:
        Arrays by path, where they were, without those that hold no elements.

    Example:
        >>> to_arrays({"key": jax.random.key(7), "x": jnp.ones(2)})["['key']"].tolist()
        [0, 7]
    """
    leaves = {
        jax.tree_util.keystr(path): _stored(x)
        for path, x in jax.tree_util.tree_leaves_with_path(state)
    }
    return {path: x for path, x in leaves.items() if np.size(x)}


def from_arrays(arrays: Mapping[str, Any], like: Any) -> Any:
    """Undo :func:`to_arrays`.

    Args:
        arrays: by path; of NumPy or JAX, and placed as they are given.
        like: tree of arrays with the structure, shapes and dtypes to restore, such as a
            fresh ``tx.init(params)`` or ``loop.init(key)``.

    Returns:
        A tree like ``like``, with keys of the same generator.

    Raises:
        ValueError: if a leaf is missing, left over, or of another shape or dtype.

    Example:
        >>> state = {"key": jax.random.key(7), "x": jnp.ones(2)}
        >>> like = {"key": jax.random.key(0), "x": jnp.zeros(2)}
        >>> back = from_arrays(to_arrays(state), like)
        >>> bool(back["key"] == state["key"]), back["x"].tolist()
        (True, [1.0, 1.0])
    """
    describe = lambda x: (np.shape(x), np.dtype(x.dtype).name)  # noqa: E731
    likes = to_arrays(like)
    arrays = {path: _typed(x, likes.get(path)) for path, x in arrays.items()}
    wanted = {path: describe(x) for path, x in likes.items()}
    found = {path: describe(x) for path, x in arrays.items()}
    for path in sorted({*wanted, *found}):
        if wanted.get(path) != found.get(path):
            raise ValueError(
                f"from_arrays: leaf {path} is {wanted.get(path, 'not there')} in like, "
                f"and {found.get(path, 'not there')} in arrays. Make `like` as the "
                "state was made: the same transform, parameters and number of workers."
            )

    def leaf(path, x):
        stored = arrays.get(jax.tree_util.keystr(path))
        if stored is None:  # no elements, nothing stored
            return x
        if _is_key(x):
            data = jnp.asarray(stored)
            return jax.random.wrap_key_data(data, impl=jax.random.key_impl(x))
        if x.dtype == jnp.float8_e5m2:
            return lax.bitcast_convert_type(jnp.asarray(stored), x.dtype)
        return jnp.asarray(stored)

    return jax.tree_util.tree_map_with_path(leaf, like)
