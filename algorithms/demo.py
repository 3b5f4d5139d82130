"""DeMo: momenta stay with their workers, who send only its fastest components."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from bagua_jax import buckets, checks, precision, primitives, schedules
from bagua_jax.compressors import SparsePayload
from bagua_jax.compressors.dct import block_dct, join_blocks, split_blocks
from bagua_jax.compressors.numerics import is_finite
from bagua_jax.compressors.topk import largest_of_rows, rows_of_sparse
from bagua_jax.primitives import AxisName

__all__ = ["DeMoState", "demo"]


class DeMoState(NamedTuple):
    """State of :func:`demo`."""

    count: jax.Array  # [] int32, steps taken; equal on all workers
    momentum: optax.Updates  # cosine coefficients of what was not sent, each where its
    # block stands in the params; like params, float32, worker-local


def demo(
    learning_rate: optax.ScalarOrSchedule,
    *,
    axis_name: AxisName,
    decay: float = 0.999,
    topk: int = 32,
    chunk: int = 64,
    weight_decay: float = 0.0,
) -> optax.GradientTransformationExtraArgs:
    r"""Step by the signs of the momenta's largest cosine coefficients (DeMo).

    Placement: optimizer, alone. Receives this worker's own gradient, returns a
    finished update, invariant over ``axis_name``.

    With T the orthonormal cosine transform of every block of every leaf:

    .. math::
        \delta_i \leftarrow \beta \delta_i + \gamma_t g_i,\quad
        q_i = \mathrm{top}_k(T \delta_i),\quad
        \delta_i \leftarrow \delta_i - T^{-1} q_i

        u_t = -\gamma_t \big(\mathrm{sign}(T^{-1} \bar q) + \lambda x_t\big)

    where each coefficient of :math:`\bar q` is the mean over the workers that sent it,
    and zero if nobody did. Here sign(0) = 0.

    Args:
        learning_rate: gamma; a number, or a schedule of steps already taken.
        axis_name: the workers' axis, or ``("node", "local")``: then gradients are
            averaged in full precision inside the node, and nodes are the workers.
        decay: beta, of the momentum that stays, in [0, 1).
        topk: k, coefficients sent of each block, at least 1; static. A block with fewer
            elements is sent whole.
        chunk: largest side of a block, at least 1; static. The sides are the largest
            divisors of a leaf's last two dimensions (of a vector's length) up to it. A
            large dimension without such divisors makes many small blocks, and those
            messages large: pad it.
        weight_decay: lambda, decoupled; needs params where it is not 0.

    Returns:
        A transform of updates of any floating dtype; shapes and dtypes are kept, the
        momentum is float32.

    Raises:
        ValueError: if an argument is out of range; if gradients arrive already summed
            over the axis, are not floating point, or hold no elements; if params of
            another structure are given, or none where weight_decay is not 0.
        NameError: if the axis is not mapped where ``update`` is called.

    Communication:
        One all-gather of all leaves' coefficients: k float32 values and k indices
        (uint8 in blocks of up to 256 elements, uint16 of up to 65536) of each block. In
        a hierarchy each device sends its part of the node's message.

    State:
        One tree like params, worker-local. On another number of workers
        :func:`bagua_jax.resize` keeps the mean of the momenta.

    Theory:
        T keeps norms, so that what stays of a block has at most the share 1 - k/(its
        elements) of its squared norm. Senders are added up one after the other, in the
        same order everywhere: replicas stay equal bit for bit. With k the whole block
        no momentum stays, and it is the sign of the mean gradient.

    Differences from the original:
        The momentum is kept as coefficients, which is the same as T is orthonormal.
        Indices of one or two bytes instead of eight; float32 values. Leaves of more
        than two dimensions are stacks of matrices.

    References:
        Peng et al., `DeMo: Decoupled Momentum Optimization`, 2024 (arXiv 2411.19870).

    Example:
        >>> tx = demo(0.5, axis_name="workers", topk=1)
        >>> grads = jnp.array([[5.0, 3.0], [1.0, -2.0]])  # sums stay, then differences
        >>> step = lambda g: tx.update(g, tx.init(g))[0]
        >>> jax.vmap(step, axis_name="workers")(grads).tolist()
        [[-0.5, -0.5], [-0.5, -0.5]]
    """
    caller = "demo"
    checks.require_within(caller, "decay", decay, 0, 1)
    checks.require_at_least(caller, "topk", topk, 1, "It counts coefficients.")
    checks.require_at_least(caller, "chunk", chunk, 1, "The paper's is 64.")
    checks.require_within(caller, "weight_decay", weight_decay, 0)

    def init_fn(params):
        checks.require_floats(params, caller)
        zeros = precision.zeros(params)
        return DeMoState(
            count=jnp.zeros([], jnp.int32),
            momentum=primitives.worker_local(zeros, axis_name),
        )

    def update_fn(updates, state, params: Any = None, **extra_args):
        del extra_args
        checks.require_gradients(updates, params, axis_name, caller)
        rate = learning_rate(state.count) if callable(learning_rate) else learning_rate

        grads = _mean_inside_node(precision.wide(updates), axis_name)
        momentum = jax.tree.map(
            lambda m, g: decay * m + rate * block_dct(g, chunk), state.momentum, grads
        )
        kept, structure = jax.tree.flatten(momentum)
        signs = [jnp.zeros(m.shape, m.dtype) for m in kept]
        filled = [i for i, m in enumerate(kept) if m.size]

        rows = [split_blocks(kept[i], chunk) for i in filled]
        fastest = [largest_of_rows(r, min(topk, r.shape[1])) for r in rows]
        received = _gather(fastest, axis_name)

        for i, r, own, sent in zip(filled, rows, fastest, received, strict=True):
            shape = kept[i].shape
            kept[i] -= join_blocks(rows_of_sparse(own, *r.shape), shape, chunk)
            mean = join_blocks(_mean_over_senders(sent, *r.shape), shape, chunk)
            step = block_dct(mean, chunk, inverse=True)
            # The sign of an infinity would look like any other.
            signs[i] = jnp.where(is_finite(step), jnp.sign(step), jnp.nan)
        direction = jax.tree.unflatten(structure, signs)
        if isinstance(weight_decay, jax.Array) or weight_decay:
            if params is None:
                raise ValueError(
                    "demo: weight decay works on the parameters, and params is None. "
                    "Call tx.update(updates, state, params)."
                )
            direction = jax.tree.map(
                lambda d, x: d + weight_decay * x.astype(d.dtype), direction, params
            )
        new_updates = optax.tree.cast_like(
            optax.tree.scale(jnp.negative(rate), direction), updates
        )
        return new_updates, DeMoState(
            schedules.increment(state.count), jax.tree.unflatten(structure, kept)
        )

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def _mean_inside_node(tree: Any, axis_name: AxisName) -> Any:
    """Average over the second axis of a hierarchy; without one give the tree back."""
    if isinstance(axis_name, str):
        return tree
    plan = buckets.plan(tree, axis_name=axis_name)
    shards = [primitives.node_shard(v, axis_name, "demo") for v in plan.pack(tree)]
    return plan.unpack([shard.gather(shard.value) for shard in shards])


def _gather(payloads: list[SparsePayload], axis_name: AxisName) -> list[SparsePayload]:
    """Gather payloads in one message for each of their varying types."""
    types = primitives.leaf_types([p.values for p in payloads], axis_name)
    received: list[Any] = [None] * len(payloads)
    for kind in dict.fromkeys(types):
        chosen = [i for i, own in enumerate(types) if own == kind]
        together = primitives.gather_payloads(
            [payloads[i] for i in chosen], axis_name=axis_name
        )
        for i, payload in zip(chosen, together, strict=True):
            received[i] = payload
    return received


def _mean_over_senders(payload: SparsePayload, rows: int, width: int) -> jax.Array:
    """Average each coefficient over those that sent it: [rows, width].

    One sender after the other, so that no two additions meet: a scatter of all at once
    adds in whatever order it likes, and replicas would drift apart.
    """
    first = np.arange(rows, dtype=np.int32)[:, None] * width

    def add(carry, sender: SparsePayload):
        place = (sender.indices.reshape(rows, -1).astype(jnp.int32) + first).reshape(-1)
        total, count = (
            array.at[place].add(values, mode="promise_in_bounds", unique_indices=True)
            for array, values in zip(carry, (sender.values, 1), strict=True)
        )
        return (total, count), None

    zeros = jnp.zeros((rows * width,), payload.values.dtype)
    zeros = primitives.vary_like(zeros, payload.values)
    (total, count), _ = lax.scan(add, (zeros, zeros), payload)
    return (total / jnp.maximum(count, 1)).reshape(rows, width)
