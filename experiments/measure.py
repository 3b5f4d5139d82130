"""Measure algorithms as theory sees them: many replicas of simulated workers at once.

One program trains all workers (a ``vmap`` with the workers' axis) of all replicas (a
second ``vmap``), each with noise, keys and hyperparameters of its own, and records
every worker's parameters at every step. Statistics are taken in NumPy, in float64.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

__all__ = ["AXIS", "Estimate", "average", "growth", "simulate"]

AXIS = "workers"


class Estimate(NamedTuple):
    """A measured number, or several.

    Attributes:
        value: mean over replicas.
        error: standard error of that mean; 0 where nothing is random.
    """

    value: np.ndarray
    error: np.ndarray | float = 0.0


def average(samples: np.ndarray) -> Estimate:
    """Estimate a mean from independent replicas.

    Args:
        samples: [R, ...], of one replica each.

    Example:
        >>> average(np.array([1.0, 2.0, 3.0])).value.item()
        2.0
    """
    samples = np.asarray(samples, np.float64)
    error = samples.std(0, ddof=1) / np.sqrt(len(samples)) if len(samples) > 1 else 0.0
    return Estimate(samples.mean(0), error)


def growth(path: np.ndarray, last: int) -> np.ndarray:
    """Factor a step by which a path grew over its last steps.

    Args:
        path: [..., T], positive.
        last: how many steps.
    """
    path = np.asarray(path, np.float64)
    return (path[..., -1] / path[..., -1 - last]) ** (1 / last)


def simulate(
    make: Callable[..., optax.GradientTransformationExtraArgs],
    *,
    steps: int,
    start: Any,
    curvature: Any = 1.0,
    target: Any = 0.0,
    sigma: Any = 0.0,
    knobs: tuple[Any, ...] = (),
    replicas: int = 1,
    observe: Callable[[Any, Any], Any] | None = None,
    seed: int = 0,
) -> Any:
    r"""Train on quadratics, and record.

    Worker i of a replica sees the gradients :math:`h_i (x_i - b_i) + \sigma \xi`, with
    fresh :math:`\xi \sim N(0, I)`.

    Args:
        make: knobs -> transform of the axis ``AXIS``, the optimizer included. Programs
            are kept by its identity: pass one and the same object, not a new lambda.
        steps: T.
        start: x_0, [n, d] or [R, n, d]: fixes n and d.
        curvature: h; broadcast to the shape of ``start``.
        target: b; likewise.
        sigma: [] or [R].
        knobs: numbers or arrays [R], the hyperparameters of each replica.
        replicas: R.
        observe: (params, state) -> tree of arrays to record; the params where ``None``.
        seed: of noise and keys.

    Returns:
        What was observed before each step and after the last, [R, T + 1, n, ...].
    """
    start = np.asarray(start, np.float32)
    shape = (replicas, *start.shape[-2:])
    whole = [
        np.broadcast_to(np.asarray(a, np.float32), shape)
        for a in (curvature, target, start)
    ]
    each = [np.broadcast_to(np.asarray(k, np.float32), (replicas,)) for k in knobs]
    rng = np.random.default_rng([seed, replicas, steps])
    scale = np.broadcast_to(np.asarray(sigma, np.float32), (replicas,))
    noise = np.zeros((replicas, steps, *shape[1:]), np.float32)
    loud = scale > 0
    noise[loud] = rng.standard_normal((loud.sum(), *noise.shape[1:]), np.float32)
    noise *= scale[:, None, None, None]
    keys = jax.random.split(jax.random.key(seed), replicas)
    seen = _run(make, observe or _params, tuple(each), *whole, noise, keys)
    return jax.tree.map(lambda a: np.moveaxis(np.asarray(a), 1, 2), seen)


def _params(params, state):
    del state
    return params


@functools.partial(jax.jit, static_argnums=(0, 1))
def _run(make, observe, knobs, curvature, target, start, noise, keys):
    def worker(knobs, h, b, x, noise, key):
        tx = make(*knobs)
        state = tx.init(x)
        if optax.tree.get_all_with_path(state, "key"):
            state = optax.tree.set(state, key=key)

        def step(carry, xi):
            x, state = carry
            updates, new_state = tx.update(h * (x - b) + xi, state, x)
            return (optax.apply_updates(x, updates), new_state), observe(x, state)

        last, path = jax.lax.scan(step, (x, state), noise)
        return jax.tree.map(
            lambda p, end: jnp.concatenate([p, end[None]]), path, observe(*last)
        )

    everyone = jax.vmap(worker, in_axes=(None, 0, 0, 0, 1, None), axis_name=AXIS)
    return jax.vmap(everyone)(knobs, curvature, target, start, noise, keys)
