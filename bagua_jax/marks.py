"""Places where a step is better cut in two programs; see :mod:`bagua_jax.parts`."""

from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name

__all__ = ["is_mark", "mark"]

_NAME = "bagua_jax.mark"


def mark(x: jax.Array) -> jax.Array:
    """Say that what follows is faster in a program of its own on CPU.

    XLA fuses what makes a vector into everything that reads it, and so makes it again
    for each reader. Only :func:`bagua_jax.parts.split` looks at marks. Otherwise this
    is the identity, and leaves nothing in a compiled program.
    """
    return checkpoint_name(x, _NAME)


def is_mark(equation: Any) -> bool:
    """Tell whether an equation of a jaxpr is a mark."""
    return equation.primitive.name == "name" and equation.params["name"] == _NAME
