"""Trees in float32 or wider: what algorithms compute in, and keep between steps.

float32 in the docstrings of algorithms means this: of parameters in float64 it is
float64, so that nothing is rounded, and no state changes its dtype.
"""

from typing import Any

import jax
import jax.numpy as jnp

__all__ = ["copy", "wide", "wide_dtype", "zeros"]


def wide_dtype(*trees: Any) -> jnp.dtype:
    """Return the dtype that holds all leaves: float32, or wider.

    Example:
        >>> wide_dtype({"a": jnp.zeros(2, jnp.bfloat16)}).name
        'float32'
    """
    leaves = jax.tree.leaves(trees)
    return jnp.result_type(jnp.float32, *(jnp.result_type(leaf) for leaf in leaves))


def wide(tree: Any) -> Any:
    """Cast every leaf to float32, unless it is wider."""
    return jax.tree.map(lambda x: jnp.asarray(x).astype(wide_dtype(x)), tree)


def zeros(tree: Any) -> Any:
    """Make zeros like a tree, in float32 or wider, and typed as varying alike."""
    return jax.tree.map(lambda x: jnp.zeros_like(x, wide_dtype(x)), tree)


def copy(tree: Any) -> Any:
    """Cast to float32 or wider, into buffers of its own.

    For states that start from the parameters: whoever makes a state outside of
    ``jax.jit`` may donate it with the parameters, and no buffer is donated twice.
    """
    return jax.tree.map(lambda x: jnp.array(x, wide_dtype(x), copy=True), tree)
