"""What a task is, and how its parameters are drawn."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bagua_jax.experiments.tasks.data import Data

__all__ = ["Task", "normal_init"]


class Task(NamedTuple):
    """What is trained, as pure functions.

    Attributes:
        title: what plots and tables call it.
        init: ``key -> params``, a tree of floating arrays.
        loss: ``(params, batch) -> []`` scalar, a mean over the batch; ``batch`` is the
            tree of ``Data.train`` with one worker's samples of a step.
        data: ``(seed, workers) -> Data``; most tasks need not know the workers.
        evaluate: ``(params, test) -> {name: [] scalar}``, jit-compiled; ``test`` is
            ``Data.test``. The first entry is the one that tables show.
    """

    title: str
    init: Callable[[jax.Array], Any]
    loss: Callable[[Any, Any], jax.Array]
    data: Callable[[int, int], Data]
    evaluate: Callable[[Any, Any], dict[str, jax.Array]]


def normal_init(key: jax.Array, shapes: Any, *, gain: float) -> Any:
    """Draw kernels from N(0, gain / fan-in); biases are zero.

    One draw for all kernels: every draw of its own costs a second of compilation.

    Args:
        key: PRNG key.
        shapes: tree of arrays or their shapes; leaves of two or more dimensions are
            kernels, and the last dimension is the output.
        gain: 2 before rectifiers, else 1.

    Returns:
        A tree like ``shapes``, float32.
    """
    leaves, structure = jax.tree.flatten(shapes)
    sizes = [x.size if x.ndim > 1 else 0 for x in leaves]
    numbers = jnp.split(jax.random.normal(key, (sum(sizes),)), np.cumsum(sizes)[:-1])
    params = [
        part.reshape(x.shape) * math.sqrt(gain / math.prod(x.shape[:-1]))
        if x.ndim > 1
        else jnp.zeros(x.shape)
        for x, part in zip(leaves, numbers, strict=True)
    ]
    return jax.tree.unflatten(structure, params)
