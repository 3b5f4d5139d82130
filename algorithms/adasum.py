"""Adasum: gradients that agree are averaged, orthogonal ones are added."""

import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
import optax

from bagua_jax import buckets, checks, precision, primitives
from bagua_jax.primitives import AxisName

__all__ = ["adasum"]


def adasum(
    *,
    axis_name: AxisName,
    scope: Literal["leaf", "whole"] = "leaf",
    bucket_bytes: int = buckets.DEFAULT_BUCKET_BYTES,
) -> optax.GradientTransformationExtraArgs:
    r"""Replace each worker's gradient by a sum that does not count agreement twice.

    Placement: gradient side, before the optimizer. Updates out are invariant over
    ``axis_name``. Behind an optimizer, last in the chain, it combines steps instead of
    gradients: it commutes with a change of sign.

    .. math::
        a \oplus b = \Big(1 - \frac{a \cdot b}{2 |a|^2}\Big) a
                   + \Big(1 - \frac{a \cdot b}{2 |b|^2}\Big) b

        u_t = \big((g^1 \oplus g^2) \oplus (g^3 \oplus g^4)\big) \oplus \cdots

    on a tree of pairs. The rule is not associative: the tree is part of the method.

    Args:
        axis_name: the workers' axis, or ``("node", "local")``: then gradients are
            averaged in full precision inside the node and nodes are the workers. Their
            number must be a power of two.
        scope: what a and b are: ``"leaf"`` combines every leaf by its own angle,
            ``"whole"`` the gradient as one vector; static.
        bucket_bytes: target message size in bytes (static). It changes nothing
            else.

    Returns:
        A transform of updates of any floating dtype; shapes and dtypes are kept.

    Raises:
        ValueError: if an argument is out of range; if the number of workers is not a
            power of two; if gradients arrive already summed over the axis, are not
            floating point, or hold no elements; if params of another structure are
            given.
        NameError: if the axis is not mapped where ``update`` is called.

    Communication:
        The bytes of an all-reduce: every worker owns an n-th of each leaf, and combines
        everybody's. For each bucket one all-to-all and one all-gather of N/n elements
        (each leaf filled up to whole n-ths), and on each of the log2 n levels one
        all-reduce of three products for each pair and leaf: 3 (n-1) numbers a leaf.

    State: none.

    Theory:
        Parallel vectors are averaged, orthogonal ones are added, both exactly. Between,
        with rho the cosine of the angle,

        .. math::
            |a \oplus b|^2 = \big(1 - \tfrac34 \rho^2\big) (|a|^2 + |b|^2)
                           + \tfrac12 \rho^3 |a| |b| \le |a|^2 + |b|^2

        n workers take a step up to n times that of the mean: a learning rate tuned for
        one worker stays, it is not scaled by n. Where workers' objectives differ, a
        point at which the mean gradient is 0 need not be fixed.

    Differences from the paper:
        Products and sums are in float32; between workers the gradients' dtype travels.
        Owners hold all versions of their part, so that products of a level need one
        all-reduce, where recursive halving exchanges halves, quarters, ...: the bytes
        are the same. A vector of zeros leaves its partner as it is.

    References:
        Maleki et al., `Scaling Distributed Training with Adaptive Summation`, 2020
        (arXiv 2006.02924). The norm follows from the rule.

    Example:
        >>> tx = adasum(axis_name="workers")
        >>> grads = jnp.array([[1.0, 0.0], [3.0, 0.0], [0.0, 2.0], [0.0, 2.0]])
        >>> step = lambda g: tx.update(g, tx.init(g))[0]
        >>> jax.vmap(step, axis_name="workers")(grads)[0].tolist()
        [2.0, 2.0]
    """
    caller = "adasum"
    checks.require_choice(caller, "scope", scope, ("leaf", "whole"))
    checks.require_at_least(caller, "bucket_bytes", bucket_bytes, 1, "It is in bytes.")

    def init_fn(params):
        checks.require_floats(params, caller)
        return optax.EmptyState()

    def update_fn(updates, state, params=None, **extra_args):
        del extra_args
        checks.require_gradients(updates, params, axis_name, caller)
        if scope == "whole":
            what, cure = "the angle of all leaves", "Use scope='leaf'."
            checks.require_one_type(updates, axis_name, caller, what, cure)
        devices = primitives.axis_size(axis_name, caller)
        peers = primitives.peer_axis(axis_name)
        n = _power_of_two(primitives.num_peers(axis_name, caller))

        # A row of every leaf for each device: owners' parts end where leaves do.
        rows = jax.tree.map(lambda g: _in_rows(g, devices), updates)
        one_row = jax.tree.map(lambda x: x[0], rows)
        plan = buckets.plan(one_row, max(1, bucket_bytes // devices), axis_name)
        shards = [
            primitives.node_shard(x.reshape(-1), axis_name, caller, "zero")
            for x in jax.vmap(plan.pack)(rows)
        ]
        owned = [
            primitives.scatter_rows(shard.value.reshape(n, -1), axis_name=peers)
            for shard in shards
        ]
        versions = precision.wide(jax.vmap(plan.unpack)(owned))
        while n > 1:
            versions = _combine_pairs(versions, scope, axis_name)
            n //= 2
        combined = jax.tree.map(lambda x, like: x[0].astype(like.dtype), versions, rows)
        gathered = [
            shard.gather(primitives.gather_rows(x, axis_name=peers).reshape(-1))
            for shard, x in zip(shards, plan.pack(combined), strict=True)
        ]
        full = jax.vmap(plan.unpack)([x.reshape(devices, -1) for x in gathered])
        return jax.tree.map(_out_of_rows, full, updates), state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _combine_pairs(versions: Any, scope: str, axis_name: AxisName) -> Any:
    """Combine versions 0 and 1, 2 and 3, ... of a part: [k, m] leaves to [k/2, m]."""
    leaves, structure = jax.tree.flatten(versions)
    pairs = [(x[0::2], x[1::2]) for x in leaves]
    products = [_products(a, b) for a, b in pairs]  # [3, k/2] each
    if scope == "whole":
        products = [jnp.sum(jnp.stack(products), axis=0)]
    # A mean over the parts serves as well as their sum: only ratios count.
    plan = buckets.plan(products, math.inf, axis_name)
    vectors = plan.pack(products)
    means = plan.unpack([primitives.c_fp_s(v, axis_name=axis_name) for v in vectors])

    def combine(pair, mean):
        ab, *own = mean[..., None]
        of_a, of_b = (1 - ab / (2 * jnp.where(x == 0, 1, x)) for x in own)
        return of_a * pair[0] + of_b * pair[1]

    each = means if scope == "leaf" else means * len(pairs)
    return jax.tree.unflatten(structure, map(combine, pairs, each))


def _products(a: jax.Array, b: jax.Array) -> jax.Array:
    """Multiply [pairs, m] into a.b, a.a and b.b: [3, pairs]."""
    return jnp.stack([jnp.sum(x * y, axis=1) for x, y in ((a, b), (a, a), (b, b))])


def _in_rows(x: jax.Array, count: int) -> jax.Array:
    """Cut a leaf into rows of equal length, [count, m], filled up with zeros."""
    return jnp.pad(x.reshape(-1), (0, -x.size % count)).reshape(count, -1)


def _out_of_rows(rows: jax.Array, like: jax.Array) -> jax.Array:
    return rows.reshape(-1)[: like.size].reshape(like.shape)


def _power_of_two(n: int) -> int:
    if n & (n - 1):
        raise ValueError(
            f"adasum: the number of workers must be a power of two, got n={n}: its "
            "tree of pairs would leave somebody without a partner, and the rule is not "
            "associative. Use such a number, or 'gradient_allreduce'."
        )
    return n
