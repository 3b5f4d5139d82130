"""PowerSGD: gradients of matrices averaged through their low-rank factors."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from bagua_jax import buckets, checks, precision, primitives, schedules
from bagua_jax.primitives import AxisName
from bagua_jax.renamed import takes_old_names

__all__ = ["PowerSGDState", "powersgd"]


class PowerSGDState(NamedTuple):
    """State of :func:`powersgd`."""

    count: jax.Array  # [] int32, steps taken; equal on all workers
    basis: optax.Updates  # Q [c, r] float32 for a matrix, else [0, r]; equal
    error: optax.Updates  # like params, float32, worker-local; zero where sent exactly


@takes_old_names
def powersgd(
    *,
    axis_name: AxisName,
    rank: int = 2,
    warmup_steps: int = 0,
    min_compression: float = 2.0,
    seed: int = 0,
) -> optax.GradientTransformationExtraArgs:
    r"""Replace gradients by a low-rank approximation of their mean.

    Placement: gradient side, before the optimizer. Updates out are invariant over
    ``axis_name``.

    For each matrix, one power iteration a step, which starts where the last one ended:

    .. math::
        M^i = g_t^i + e_t^i,\quad
        P = \mathrm{orth}\Big(\tfrac1n \sum_i M^i Q\Big),\quad
        Q' = \tfrac1n \sum_i {M^i}^\top P

        u_t = P {Q'}^\top,\quad e_{t+1}^i = M^i - u_t

    A leaf of two or more dimensions is a matrix of c = (last dimension) columns and
    m = (all others) rows: a kernel's outputs stand last in JAX. It is compressed if
    that pays: if (m + c) r times ``min_compression`` is below m c. All other leaves are
    averaged exactly.

    Args:
        axis_name: the workers' axis, or ``("node", "local")``. The method is linear, so
            that a hierarchy changes how factors are added up, and nothing else.
        rank: r, at least 1; static.
        warmup_steps: steps that average exactly first, at least 0; static. Early
            gradients change fast; 10 % of the run is common.
        min_compression: by how much factors must be smaller than a matrix, at least 1;
            static.
        seed: of the Q of the first step, drawn from N(0, 1), equal on all workers.

    Returns:
        A transform of updates of any floating dtype; shapes and dtypes are kept.

    Raises:
        ValueError: if an argument is out of range; if gradients arrive already summed
            over the axis, are not floating point, or hold no elements; if params of
            another structure are given.
        NameError: if the axis is not mapped where ``update`` is called.

    Communication:
        Two all-reduces of float32: of all P and all exact leaves, then of all Q', (m +
        c) r elements for a matrix. Before ``warmup_steps`` one of everything.

    State:
        Q of each matrix, equal on all workers, and a tree of errors like params,
        worker-local. Checkpoint both. On another number of workers
        :func:`bagua_jax.resize` keeps the mean of the errors.

    Theory:
        u is an orthogonal projection of the mean matrix M: the squared norms of u and
        M - u add up to that of M. It is exact in one step if M has rank r or less. On a
        fixed M the angle to its leading singular subspace shrinks by
        (sigma_{r+1}/sigma_r)^2 a step. No mass is lost: the sum of all updates is the
        sum of all mean gradients less the mean error.

    Differences from the paper:
        Rows and columns as above, where its kernels have outputs first.
        QR instead of Gram-Schmidt; matrices of one shape are orthogonalised together.
        The columns of Q are scaled to length 1 between steps, which changes nothing but
        keeps small gradients from vanishing in products. Momentum is left to the
        optimizer behind it.

    References:
        Vogels et al., `PowerSGD: Practical Low-Rank Gradient Compression for
        Distributed Optimization`, 2019 (arXiv 1905.13727).

    Example:
        >>> tx = powersgd(axis_name="workers", rank=1)
        >>> low = jnp.outer(jnp.arange(1.0, 9.0), jnp.linspace(-1, 1, 8))
        >>> step = lambda g: tx.update(g, tx.init(g))[0]
        >>> mean = jax.vmap(step, axis_name="workers")(jnp.stack([low, 3 * low]))
        >>> bool(jnp.allclose(mean[0], 2 * low, atol=1e-5))
        True
    """
    caller = "powersgd"
    checks.require_at_least(caller, "rank", rank, 1, "1, 2 and 4 are common.")
    checks.require_at_least(caller, "warmup_steps", warmup_steps, 0, "It counts steps.")
    checks.require_within(caller, "min_compression", min_compression, 1)

    def is_compressed(leaf) -> bool:
        rows, columns = _matrix_shape(leaf)
        return (rows + columns) * rank * min_compression < rows * columns

    def init_fn(params):
        checks.require_floats(params, caller)
        leaves, structure = jax.tree.flatten(params)

        def first_basis(index, leaf):
            columns = _matrix_shape(leaf)[1] if is_compressed(leaf) else 0
            own = jax.random.fold_in(jax.random.key(seed), index)
            basis = jax.random.normal(own, (columns, rank), precision.wide_dtype(leaf))
            return primitives.vary_like(basis, leaf)

        bases = [first_basis(index, leaf) for index, leaf in enumerate(leaves)]
        error = precision.zeros(params)
        return PowerSGDState(
            count=jnp.zeros([], jnp.int32),
            basis=jax.tree.unflatten(structure, bases),
            error=primitives.worker_local(error, axis_name),
        )

    def update_fn(updates, state, params=None, **extra_args):
        del extra_args
        checks.require_gradients(updates, params, axis_name, caller)
        leaves, structure = jax.tree.flatten(updates)
        bases = jax.tree.leaves(state.basis)
        errors = jax.tree.leaves(state.error)
        types = primitives.leaf_types(updates, axis_name)
        groups: dict[Any, list[int]] = {}  # matrices of one shape and varying type
        for i, leaf in enumerate(leaves):
            if is_compressed(leaf):
                groups.setdefault((_matrix_shape(leaf), types[i]), []).append(i)
        compressed = {i for group in groups.values() for i in group}

        def mean_of(arrays):
            """Average arrays, in one message if they are of one varying type."""
            plan = buckets.plan(arrays, math.inf, axis_name)
            flat = plan.pack(precision.wide(arrays))
            return plan.unpack(
                [primitives.c_fp_s(v, axis_name=axis_name) for v in flat]
            )

        def exact():
            return mean_of(leaves), bases, errors

        def low_rank():
            corrected = [
                jnp.stack([(leaves[i] + errors[i]).reshape(shape) for i in group])
                for (shape, _), group in groups.items()
            ]
            old = [jnp.stack([bases[i] for i in group]) for group in groups.values()]
            rest = [i for i in range(len(leaves)) if i not in compressed]
            products = [_matmul(m, q) for m, q in zip(corrected, old, strict=True)]
            sums = mean_of([*products, *(leaves[i] for i in rest)])
            means = dict(zip(rest, sums[len(groups) :], strict=True))
            lefts = [jnp.linalg.qr(p)[0] for p in sums[: len(groups)]]
            backs = [_matmul(m.mT, p) for m, p in zip(corrected, lefts, strict=True)]
            rights = mean_of(backs) if groups else []

            new_bases, new_errors = list(bases), list(errors)
            for g, group in enumerate(groups.values()):
                estimate = _matmul(lefts[g], rights[g].mT)
                length = jnp.linalg.norm(rights[g], axis=1, keepdims=True)
                unit = rights[g] / jnp.where(length == 0, 1, length)
                basis = jnp.where(length == 0, old[g], unit)
                for k, i in enumerate(group):
                    shape = leaves[i].shape
                    means[i] = estimate[k].reshape(shape)
                    new_bases[i] = primitives.vary_like(basis[k], bases[i])
                    new_errors[i] = (corrected[g][k] - estimate[k]).reshape(shape)
            return [means[i] for i in range(len(leaves))], new_bases, new_errors

        if warmup_steps and groups:
            mean, bases, errors = schedules.switch(
                (state.count >= warmup_steps).astype(jnp.int32),
                [exact, low_rank],
                shares=(0, 1),
            )
        else:
            mean, bases, errors = low_rank()
        tree = lambda values: jax.tree.unflatten(structure, values)  # noqa: E731
        return optax.tree.cast_like(tree(mean), updates), PowerSGDState(
            schedules.increment(state.count), tree(bases), tree(errors)
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _matrix_shape(leaf: jax.Array) -> tuple[int, int]:
    """Return the rows and columns of a leaf as a matrix; a vector is one column."""
    shape = jnp.shape(leaf)
    columns = shape[-1] if len(shape) > 1 else 1
    return math.prod(shape) // max(columns, 1), columns


def _matmul(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.matmul(a, b, precision=lax.Precision.HIGHEST)
