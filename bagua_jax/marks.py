"""Places where a step is better cut in two programs; see :mod:`bagua_jax.parts`."""

from typing import Any

import jax
from jax.ad_checkpoint import checkpoint_name

__all__ = ["group_of", "mark"]

_NAME = "bagua_jax.mark"


def mark(x: jax.Array, group: str = "") -> jax.Array:
    """Say that what follows is faster in a program of its own on CPU.

    XLA fuses what makes a vector into everything that reads it, and so makes it again
    for each reader. Only :func:`bagua_jax.parts.split` looks at marks. Otherwise this
    is the identity, and leaves nothing in a compiled program. If two ungrouped marks
    are separated by a single operation, only the second one cuts.

    Args:
        x: any array.
        group: values that are needed together and marked alike are made together;
            without a name, each by itself.
    """
    return checkpoint_name(x, _NAME + group)


def group_of(equation: Any) -> str | None:
    """Return the group of a jaxpr's equation; ``None`` if it is no mark."""
    if equation.primitive.name != "name":
        return None
    name = equation.params["name"]
    return name[len(_NAME) :] if name.startswith(_NAME) else None
