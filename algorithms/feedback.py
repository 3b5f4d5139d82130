"""Error feedback of trees: the errors, and the exchange that reads and writes them."""

from collections.abc import Callable
from typing import Any, Literal

import jax

from bagua_jax import precision, primitives
from bagua_jax.buckets import Plan
from bagua_jax.compressors import Compressor
from bagua_jax.primitives import AxisName, Errors

__all__ = ["ErrorFeedback", "init_errors", "scatter_reduce"]

ErrorFeedback = Literal["none", "worker", "owner", "both"]


def init_errors(params: Any, where: ErrorFeedback, axis_name: AxisName) -> Errors:
    """Make the zero errors of a tree: like params, float32, worker-local."""

    def zeros(wanted: bool):
        if not wanted:
            return None
        error = precision.zeros(params)
        return primitives.worker_local(error, axis_name)

    return Errors(zeros(where in ("worker", "both")), zeros(where in ("owner", "both")))


def scatter_reduce(
    tree: Any,
    errors: Errors,
    plan: Plan,
    compressor: Compressor,
    *,
    axis_name: AxisName,
    key: jax.Array | None = None,
    check: Callable[[int], None] = lambda d: None,
) -> tuple[Any, Errors]:
    """Average every bucket of a tree by C_LP_S, with error feedback.

    Args:
        tree: this worker's.
        errors: what earlier messages left unsent, trees like ``tree`` or ``None``.
        plan: of the tree.
        compressor: stateless.
        axis_name: the workers' axis.
        key: equal on all workers, of this step; every bucket draws from its own.
        check: refuses a length of the vectors that are compressed.

    Returns:
        The mean, invariant, and the new errors, varying.

    Communication:
        For each bucket that of :func:`bagua_jax.primitives.c_lp_s`.
    """

    def exchange(x, worker, owner, key=None):
        check(primitives.part_length(x, axis_name))
        mean, left = primitives.c_lp_s(
            x, compressor, Errors(worker, owner), axis_name=axis_name, key=key
        )
        return mean, *left

    mean, *left = plan.map(exchange, tree, *errors, keys=key)
    return mean, Errors(*left)
