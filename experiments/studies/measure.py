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

from bagua_jax.theory.problems import quadratic_gradient

__all__ = ["AXIS", "Estimate", "average", "mean_square_rate", "simulate"]

AXIS = "workers"
_WARM = 8


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
    gradient: Callable[[Any, Any, Any, Any], Any] = quadratic_gradient,
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
        gradient: (x, curvature, target, noise) -> gradient of one worker.
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
    seen = _run(make, observe or _params, gradient, tuple(each), *whole, noise, keys)
    return jax.tree.map(lambda a: np.moveaxis(np.asarray(a), 1, 2), seen)


def _params(params, state):
    del state
    return params


def _keyed(state, key):
    """Draw a key for a replica's state, where it has one."""
    if optax.tree.get_all_with_path(state, "key"):
        return optax.tree.set(state, key=key)
    return state


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _run(make, observe, gradient, knobs, curvature, target, start, noise, keys):
    def worker(knobs, h, b, x, noise, key):
        tx = make(*knobs)
        state = _keyed(tx.init(x), key)

        def step(carry, xi):
            x, state = carry
            updates, new_state = tx.update(gradient(x, h, b, xi), state, x)
            return (optax.apply_updates(x, updates), new_state), observe(x, state)

        last, path = jax.lax.scan(step, (x, state), noise)
        return jax.tree.map(
            lambda p, end: jnp.concatenate([p, end[None]]), path, observe(*last)
        )

    everyone = jax.vmap(worker, in_axes=(None, 0, 0, 0, 1, None), axis_name=AXIS)
    return jax.vmap(everyone)(knobs, curvature, target, start, noise, keys)


def mean_square_rate(
    make: Callable[..., optax.GradientTransformationExtraArgs],
    *,
    n: int,
    knobs: tuple[Any, ...],
    curvature: float = 1.0,
    d: int = 16,
    replicas: int = 128,
    populations: int = 8,
    steps: int = 40,
    burn: int = 10,
    conserved: bool = False,
    seed: int = 0,
) -> Estimate:
    r"""Measure the factor a step of the second moment of a linear random algorithm.

    A plain mean over replicas fails: products of random factors are so heavy-tailed
    that after some steps the mean is that of events which no sample holds. But a
    linear step does not know the scale of its state. So every element of every replica
    is a particle; after each step particles are drawn anew in proportion to their
    energy, and scaled to energy 1 (population Monte Carlo). The mean energy after a
    step is then its growth, and its error stays small.

    An algorithm may hold a number twice, such as a public copy and a neighbour's
    replica of it, and never correct their difference: a rounding error in it stays
    while all else shrinks and is scaled up, until it is all there is. So particles are
    kept in the span of the first eight steps' states, which rounding is too small to
    widen.

    Args:
        make: knobs -> transform of the axis ``AXIS``, the optimizer included; linear in
            its state, element by element.
        n: workers.
        knobs: numbers, or arrays of one for each of several settings.
        curvature: h; gradients are h x.
        d: elements of a replica.
        replicas: of a population.
        populations: independent ones, from which the error is taken.
        steps: of each.
        burn: first steps, at least 8, which are not counted: until the part of the
            state that shrinks slowest is all that is left.
        conserved: whether the mean model stays, as under gossip without gradients. It
            is then subtracted from all models and all copies of them in the state.
        seed: of the keys.

    Returns:
        The rate for each setting.

    Example:
        >>> def descent(learning_rate):
        ...     return optax.sgd(learning_rate)
        >>> found = mean_square_rate(descent, n=2, knobs=(0.5,), replicas=2, steps=20)
        >>> round(found.value.item(), 6)
        0.25
    """
    if burn < _WARM:
        raise ValueError(
            f"mean_square_rate: burn must be at least {_WARM}, the steps whose states "
            f"say what is rounding; got {burn}."
        )
    settings = np.broadcast_arrays(*[np.atleast_1d(np.float32(k)) for k in knobs])
    count = len(settings[0])
    groups = tuple(np.repeat(k, populations) for k in settings)
    keys = jax.random.split(jax.random.key(seed), (count * populations, replicas + 1))
    sizes = n, d, steps, conserved
    logs = _grow(make, sizes, groups, np.float32(curvature), keys)
    logs = np.asarray(logs, np.float64)[:, burn:].mean(1).reshape(count, populations)
    found = average(np.exp(logs).T)
    return found


@functools.partial(jax.jit, static_argnums=(0, 1))
def _grow(make, sizes, knobs, curvature, keys):
    n, d, steps, conserved = sizes

    def population(knobs, keys):
        tx = make(*knobs)

        def init(key):
            x = jnp.ones(d)
            return x, _keyed(tx.init(x), key)

        def step(carry, push: Any = 0.0):
            x, state = carry
            updates, state = tx.update(curvature * x + push, state, x)
            return optax.apply_updates(x, updates), state

        workers = {"axis_size": n, "axis_name": AXIS}
        carry = jax.vmap(jax.vmap(init, in_axes=None, **workers))(keys[1:])
        if conserved:  # make models unlike, by gradients; copies know how they began
            push = jax.random.normal(keys[0], (len(keys) - 1, n, d))
            carry = jax.vmap(jax.vmap(step, **workers))(carry, push)
        step = jax.vmap(jax.vmap(step, **workers))

        def advance(span, carry, t):
            leaves, structure = jax.tree.flatten(step(carry))
            moving = [leaf.ndim == 3 and leaf.shape[-1] == d for leaf in leaves]
            particles = [  # [replicas * d, n] each
                jnp.swapaxes(leaf, 1, 2).reshape(-1, n)
                for leaf, moves in zip(leaves, moving, strict=True)
                if moves
            ]
            particles = jnp.concatenate(particles, 1)  # models first
            if conserved:
                particles -= particles[:, :n].mean(1, keepdims=True)
            particles = particles if span is None else particles @ span.T @ span
            energy = (particles**2).sum(1)
            upto = jnp.cumsum(energy) / jnp.sum(energy)
            start = jax.random.uniform(jax.random.fold_in(keys[0], t))
            at = (start + jnp.arange(energy.size)) / energy.size
            drawn = jnp.minimum(jnp.searchsorted(upto, at), energy.size - 1)
            fresh = particles[drawn] * jax.lax.rsqrt(energy[drawn])[:, None]
            parts = iter(jnp.split(fresh, fresh.shape[1] // n, 1))
            leaves = [
                jnp.swapaxes(next(parts).reshape(-1, d, n), 1, 2) if moves else leaf
                for leaf, moves in zip(leaves, moving, strict=True)
            ]
            carry = jax.tree.unflatten(structure, leaves)
            return carry, (jnp.log(jnp.mean(energy)), fresh)

        warm, rest = jnp.split(jnp.arange(steps), [_WARM])
        carry, (early, seen) = jax.lax.scan(
            functools.partial(advance, None), carry, warm
        )
        seen = seen[:, :: max(1, seen.shape[1] // 128)].reshape(-1, seen.shape[-1])
        _, size, directions = jnp.linalg.svd(seen, full_matrices=False)
        span = jnp.where((size > 1e-5 * size[0])[:, None], directions, 0)

        def late(carry, t):
            carry, (log, _) = advance(span, carry, t)
            return carry, log

        return jnp.concatenate([early, jax.lax.scan(late, carry, rest)[1]])

    return jax.vmap(population)(knobs, keys)
