r"""BAGUA's communication primitives over flat vectors, and types of workers' values.

The only file that calls ``jax.lax`` collectives. Every primitive runs inside
``jax.shard_map`` or under ``jax.vmap(..., axis_name=...)`` and takes ``axis_name``:

- a name: all workers are equal and far from one another;
- a pair ``("node", "local")``: a hierarchy without leaders. The vector is averaged in
  full precision inside the node by a reduce-scatter, each device exchanges its shard
  with its peers on the other nodes, and the node gathers the shards. "Worker" below
  then means a node.

Inside ``shard_map`` JAX knows which values may differ between workers (*varying*) and
which are equal (*invariant*); the helpers here mark, prove and check it.
"""

import contextlib
import functools
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from bagua_jax import resizing, schedules
from bagua_jax.compressors import Compressor, Payload
from bagua_jax.marks import mark
from bagua_jax.topologies import MixingStep, Topology

__all__ = [
    "AxisName",
    "Errors",
    "axis_index",
    "axis_size",
    "c_fp_s",
    "c_lp_s",
    "compressed_neighbours",
    "d_fp_s",
    "d_lp_s",
    "gather_mean",
    "gather_payloads",
    "gather_rows",
    "group_mean",
    "is_invariant",
    "is_typed",
    "leaf_types",
    "linear_mean",
    "mean_and_own",
    "mix",
    "neighbours",
    "node_shard",
    "num_peers",
    "on_nodes",
    "part_length",
    "peer_axis",
    "refuse_graphs",
    "require_local",
    "require_own_updates",
    "ring_mean",
    "scatter_rows",
    "shard_length",
    "true_everywhere",
    "vary_like",
    "varying_axes",
    "worker_key",
    "worker_local",
    "worker_share",
]

AxisName = str | tuple[str, ...]

_LONGEST_UNROLLED = 32  # what is longer takes long to compile
_ROUNDED = 1 + 1 / 16  # how far codes of 8 bits may land beyond the largest value


# --- axes and types ---------------------------------------------------------------


def _axes(axis_name: AxisName) -> tuple[str, ...]:
    return (axis_name,) if isinstance(axis_name, str) else tuple(axis_name)


def peer_axis(axis_name: AxisName) -> str:
    """Name the axis between workers: the first of a hierarchy."""
    axes = _axes(axis_name) if isinstance(axis_name, str | tuple | list) else ()
    if len(axes) > 2 or not axes or not all(isinstance(a, str) for a in axes):
        raise ValueError(
            "axis_name must be a mapped axis's name or a pair of names "
            f"('node', 'local'), got {axis_name!r}."
        )
    return axes[0]


def axis_size(axis_name: AxisName, caller: str = "axis_size") -> int:
    """Return the number of workers on an axis, as a Python int.

    Args:
        axis_name: one name, or several; then the product.
        caller: named in the error.

    Returns:
        The size; known while tracing, nothing is communicated.

    Raises:
        NameError: if no axis of that name is mapped where this is traced.
    """
    size = 1
    for axis in _axes(axis_name):
        try:
            size *= lax.axis_size(axis)
        except NameError:
            raise NameError(
                f"{caller}: no mapped axis is named {axis!r} here. Call `update` "
                f"inside jax.shard_map over a mesh with the axis {axis!r} "
                f"(Workers.spmd does it), or under jax.vmap(..., axis_name={axis!r}). "
                "A train step for jax.jit and sharded arrays: decorate it with "
                f"@bagua_jax.data_parallel(mesh, axis={axis!r}) in place of @jax.jit."
            ) from None
    return size


def axis_index(axis_name: AxisName, caller: str = "axis_index") -> jax.Array:
    """Return this worker's index on the axis, [] int32; row-major over more names."""
    axis_size(axis_name, caller)
    return lax.axis_index(_axes(axis_name))


def num_peers(axis_name: AxisName, caller: str) -> int:
    """Count who takes part in the relaxation: workers, or the nodes of a hierarchy."""
    return axis_size(peer_axis(axis_name), caller)


def shard_length(x: jax.Array, axis_name: AxisName) -> int:
    """Count the elements of :func:`node_shard` of a vector."""
    return -(-x.shape[0] // axis_size(_axes(axis_name)[1:]))


def part_length(x: jax.Array, axis_name: AxisName) -> int:
    """Count the elements of the parts in which :func:`c_lp_s` compresses a vector."""
    return -(-shard_length(x, axis_name) // axis_size(peer_axis(axis_name)))


_NODES: ContextVar[tuple[int, ...]] = ContextVar("nodes", default=())


@contextlib.contextmanager
def on_nodes(nodes: Sequence[int] | np.ndarray) -> Iterator[None]:
    """Say where the workers of the program that is traced inside will stand.

    Args:
        nodes: the node of each worker of a flat axis.
    """
    token = _NODES.set(tuple(int(node) for node in nodes))
    try:
        yield
    finally:
        _NODES.reset(token)


def _warn_of_flat(n: int, elements: int, itemsize: int, nbytes: int, name: str) -> None:
    """Warn where compressing saves nothing between nodes; ``nbytes`` of one part.

    All-to-all sends a part to each device of other nodes; a ring enters and leaves a
    node once, and a node's devices share what crosses.
    """
    nodes = len(set(_NODES.get()))
    is_small = (
        elements < 2**16
    )  # ranges weigh as much as codes, and bytes do not matter
    if is_small or nodes < 2 or len(_NODES.get()) != n or n % nodes:
        return
    local = n // nodes
    flat = ((n - local) + (n - 1) / local) * nbytes / elements
    ring = 2 * (n - 1) / n * itemsize / local
    if flat >= ring:
        _warn_once(
            nodes,
            local,
            name,
            f"{flat:.2f}",
            f"{ring:.2f}",
            f"{2 * (nodes - 1) * nbytes / elements:.2f}",
        )


@functools.cache
def _warn_once(nodes, local, name, flat, ring, hierarchical):
    warnings.warn(
        f"c_lp_s: the axis spans {nodes} nodes of {local} devices. There a flat "
        f"exchange of {name} sends {flat} bytes per element through each device's "
        f"network card, no less than a ring all-reduce, {ring}. Between nodes only it "
        f"would send {hierarchical}: Workers.devices(({nodes}, {local})) and "
        "axis_name=('node', 'local').",
        stacklevel=4,
    )


def _inside_shard_map(axis: str) -> bool:
    return axis in jax.sharding.get_abstract_mesh().manual_axes


def varying_axes(x: Any) -> frozenset[str]:
    """Name the axes over which JAX knows a value to vary; none outside shard_map."""
    if isinstance(x, jax.ShapeDtypeStruct):
        kind = x.manual_axis_type
        return frozenset(kind.varying if kind else ())
    return frozenset(jax.typeof(x).mat.varying)


def is_typed(axis_name: AxisName) -> bool:
    """Return whether JAX tracks what varies over the axes: ``check_vma=True``."""
    return all(
        _inside_shard_map(axis) and axis in varying_axes(lax.axis_index(axis))
        for axis in _axes(axis_name)
    )


def leaf_types(tree: Any, axis_name: AxisName) -> list[Any]:
    """Tell leaves apart that one vector must not hold.

    A vector varies over every axis over which one of its leaves varies, and a codec of
    a vector mixes its elements: a leaf that is equal along an axis of experts would
    come apart next to one that is not.

    Args:
        tree: of arrays or ``jax.ShapeDtypeStruct``.
        axis_name: the axis, or axes, of the workers.

    Returns:
        For each leaf in flattening order the axes over which it varies; or its own
        number, where JAX does not track that over other axes than the workers'
        (``shard_map`` with ``check_vma=False``).
    """
    leaves, mesh = jax.tree.leaves(tree), jax.sharding.get_abstract_mesh()
    others = tuple(
        axis
        for axis in mesh.manual_axes
        if axis not in _axes(axis_name) and mesh.shape[axis] > 1
    )
    if not is_typed(others):
        return list(range(len(leaves)))
    return [varying_axes(leaf) for leaf in leaves]


def is_invariant(x: Any, axis_name: AxisName) -> bool:
    """Return whether JAX knows a value to be equal on all workers of the axes."""
    return is_typed(axis_name) and not varying_axes(x) & set(_axes(axis_name))


def worker_local(tree: Any, axis_name: AxisName) -> Any:
    """Declare that a tree's values belong to each worker and may differ.

    Args:
        tree: any pytree; leaves that are no arrays pass through.
        axis_name: the axis, or axes, of the workers.

    Returns:
        The same values; inside ``shard_map`` typed as varying over the axis, elsewhere
        untouched. Nothing is communicated.

    Raises:
        ValueError: if the tree holds an object of ``flax.nnx`` that is changed in
            place, such as a module.

    Example:
        Declare in ``init`` which state is each worker's own::

            params = bagua_jax.worker_local(params, "workers")  # before a gossip

        For gradients use ``bagua_jax.value_and_grad``, which differentiates at
        worker-local parameters, or JAX would sum the gradients over the workers before
        a compressor sees them. ``jax.value_and_grad`` at worker-local parameters is
        right only while the loss holds no collective: one that ends in ``lax.pmean``
        or ``lax.psum`` has gradients n times too small under ``shard_map``, which no
        transform can see.
    """
    refuse_graphs(tree, "worker_local")
    axes = [axis for axis in _axes(axis_name) if _inside_shard_map(axis)]

    def mark(x):
        if isinstance(x, np.ndarray | np.generic):
            x = jnp.asarray(x)
        if not isinstance(x, jax.Array):
            return x
        missing = tuple(axis for axis in axes if axis not in varying_axes(x))
        return lax.pcast(x, missing, to="varying") if missing else x

    return jax.tree.map(mark, tree) if axes else tree


def refuse_graphs(tree: Any, caller: str) -> None:
    """Refuse modules of ``flax.nnx``, of which mapping over a tree makes a copy.

    Raises:
        ValueError: naming the class. States and variables of ``flax.nnx`` pass.
    """
    nnx = sys.modules.get("flax.nnx")  # who has no flax has no modules of it
    kinds = getattr(nnx, "Pytree", None) or getattr(nnx, "Module", None)
    if kinds is None:
        return
    for node in jax.tree.leaves(tree, is_leaf=lambda x: isinstance(x, kinds)):
        if isinstance(node, kinds):
            raise ValueError(
                f"{caller}: {type(node).__name__} is an object of flax.nnx that is "
                "changed in place, and only a copy of it could be typed: what a "
                "forward pass writes there (running means, counts of random draws) "
                "would be lost. Take loss, grads = bagua_jax.nnx_value_and_grad("
                "loss_fn, axis_name)(model, ...); or pass its state, "
                "nnx.split(model, nnx.Param, ...)."
            )


def vary_like(tree: Any, like: Any) -> Any:
    """Type a tree as varying over the axes that another's leaves vary over.

    For branches, whose results need equal types. Values do not change.

    Args:
        tree: of arrays.
        like: of the same structure: arrays, or what ``jax.eval_shape`` gives.

    Returns:
        The tree; a leaf that varies over more axes already is left as it is.
    """

    def mark(x, y):
        return worker_local(x, tuple(sorted(varying_axes(y))))

    return jax.tree.map(mark, tree, like)


def require_local(updates: Any, axis_name: AxisName, caller: str) -> None:
    """Refuse gradients that JAX has already summed over the workers.

    Under ``shard_map`` the gradient with respect to replicated parameters is the sum
    over the axis: compressing it is meaningless and a later mean is n times too large.
    After a ``lax.pmean`` of the user's own there is nothing left to relax.

    Args:
        updates: what the transform received.
        axis_name: the axis, or axes, of the workers.
        caller: named in the error.

    Raises:
        ValueError: if a leaf is invariant over the axis where types are checked
            (``shard_map`` with ``check_vma=True``). Under ``vmap`` or
            ``check_vma=False`` gradients are local and nothing is refused.
    """
    for axis in _axes(axis_name):
        if not is_typed(axis):
            continue
        for path, leaf in jax.tree_util.tree_leaves_with_path(updates):
            if axis not in varying_axes(leaf):
                raise ValueError(
                    f"{caller}: the gradients are already summed over {axis!r} (JAX "
                    "adds them up when params are replicated), or averaged (by a "
                    "lax.pmean or psum of your own, or a transform that stands before "
                    f"this one); seen at leaf '{jax.tree_util.keystr(path)}'. Pass "
                    "each worker's own gradients, which this transform averages: loss, "
                    f"grads = bagua_jax.value_and_grad(loss_fn, {axis_name!r})(params, "
                    "...), and no average after it."
                )


def true_everywhere(flags: Sequence[jax.Array], *, axis_name: AxisName) -> jax.Array:
    """Return whether all flags are true on all workers.

    Args:
        flags: each [] bool, this worker's.
        axis_name: the axis, or axes, of the workers.

    Returns:
        [] bool, invariant: a predicate on which every worker may branch.

    Communication:
        One all-reduce of a float32, which XLA may join with others of that dtype; none
        where JAX knows the flags to be equal on all workers.

    Raises:
        NameError: if the axis is not mapped here.
    """
    axis_size(axis_name, "true_everywhere")
    shared = [flag for flag in flags if is_invariant(flag, axis_name)]
    own = [flag for flag in flags if not is_invariant(flag, axis_name)]
    verdict = functools.reduce(jnp.logical_and, shared, jnp.asarray(True))
    if not own:
        return verdict
    failed = 1.0 - functools.reduce(jnp.logical_and, own).astype(jnp.float32)
    axes = tuple(a for a in _axes(axis_name) if not is_invariant(failed, a))
    return verdict & (lax.psum(failed, axes) == 0)


def require_own_updates(updates: Any, axis_name: AxisName, caller: str) -> None:
    """Refuse updates of a weight-side transform that were averaged before it.

    Leaves that are frozen have updates that are equal on all workers, so that only a
    tree without a single varying leaf tells.

    Args:
        updates: what the transform received.
        axis_name: the axis, or axes, of the workers.
        caller: named in the error.

    Raises:
        ValueError: if all leaves are invariant over the axis where types are checked.
    """
    for axis in _axes(axis_name):
        if not is_typed(axis):
            continue
        if not any(axis in varying_axes(leaf) for leaf in jax.tree.leaves(updates)):
            raise ValueError(
                f"{caller}: the updates are equal on all workers of {axis!r}: the "
                "gradients were averaged (lax.pmean, psum or a gradient-side "
                "transform), or summed by JAX (params are replicated). This transform "
                "exchanges parameters after each worker's own step. Remove the "
                "average, and take loss, grads = bagua_jax.value_and_grad(loss_fn, "
                f"{axis_name!r})(params, ...). (Updates that are meant to be equal: "
                f"bagua_jax.worker_local(updates, {axis_name!r}).)"
            )


def worker_share(
    weight: Any, axis_name: AxisName, caller: str = "worker_share"
) -> jax.Array:
    r"""Weigh this worker's mean, so that means over workers are means over samples.

    .. math:: c_i = \frac{n w_i}{\sum_k w_k},\qquad c_i = 0 \text{ if all } w_k = 0

    Args:
        weight: w_i, this worker's number of samples or tokens; a scalar, at least 0.
        axis_name: the axis, or axes, of the workers.
        caller: named in the errors.

    Returns:
        [] float32 (float64 if JAX has it enabled), varying; NaN if a weight is.

    Communication:
        One all-reduce of a number.

    Raises:
        NameError: if the axis is not mapped here.
        ValueError: if the weight is no scalar.
    """
    n = axis_size(axis_name, caller)
    weight = jnp.asarray(weight).astype(jnp.result_type(float))
    if weight.ndim:
        raise ValueError(
            f"{caller}: weight must be a scalar, this worker's number of samples or "
            f"tokens; got shape {weight.shape}. Return its sum."
        )
    weight = worker_local(weight, axis_name)
    total = lax.psum(weight, _axes(axis_name))
    return jnp.where(total == 0, 0, n * weight / jnp.where(total == 0, 1, total))


def worker_key(key: jax.Array, axis_name: AxisName) -> jax.Array:
    """Derive this worker's own key from one that is equal on all workers."""
    return jax.random.fold_in(key, axis_index(axis_name, "worker_key"))


def _all_gather_invariant(x: jax.Array, axis: str, *, tiled: bool = False) -> jax.Array:
    """Gather so that the result is known to be equal on all workers."""
    if _inside_shard_map(axis):
        return lax.all_gather(x, axis, tiled=tiled, to="invarying")
    return lax.all_gather(x, axis, tiled=tiled)


# --- parts of a vector ------------------------------------------------------------


def _pad(x: jax.Array, length: int, padding: str = "edge") -> jax.Array:
    """Fill a vector's tail up to ``length``."""
    missing = length - x.shape[0]
    if missing == 0:
        return x
    mode = "edge" if padding == "edge" else "constant"
    return jnp.pad(x, (0, missing), mode=mode)


def _clear_filling(part: jax.Array, index, n: int, total: int, padding: str):
    """Make zero again what fills up part ``index`` of n of a vector of ``total``."""
    length = part.shape[0]
    if padding != "zero" or n * length == total:
        return part
    return jnp.where(index * length + jnp.arange(length) < total, part, 0)


def _take_part(full: jax.Array, index: jax.Array, length: int, n: int, padding: str):
    """Slice part ``index`` of n parts of ``length`` out of a vector."""
    padded = _pad(full, n * length, padding)
    return lax.dynamic_slice_in_dim(padded, index * length, length)


def _put_part(part: jax.Array, index: jax.Array, total: int, n: int) -> jax.Array:
    """Stand a part where it belongs in a vector of zeros."""
    length = part.shape[0]
    full = jnp.zeros((n * length,), part.dtype)
    full = lax.dynamic_update_slice_in_dim(full, part, index * length, 0)
    return full[:total]


class NodeShard(NamedTuple):
    """What a worker handles of a vector; see :func:`node_shard`."""

    value: jax.Array  # [s] the node's mean over this device's shard
    take: Any  # full [N] -> this device's shard [s] of it, no communication
    put: Any  # shard [s] -> [N], zero elsewhere, no communication
    gather: Any  # shard [s] -> full [N], gathered inside the node


def node_shard(
    x: jax.Array, axis_name: AxisName, caller: str, padding: str = "edge"
) -> NodeShard:
    """Average inside the node and keep this device's shard of the result.

    Args:
        x: [N] vector of this device.
        axis_name: a name (then there is no node, and the shard is x), or a pair.
        caller: named in errors.
        padding: see ``CompressorFacts.padding``.

    Returns:
        The shard of ceil(N / devices per node) elements, and the ways there and back.

    Communication:
        A pair: one reduce-scatter inside the node in x's dtype; ``gather`` is one
        all-gather inside the node.
    """
    peer_axis(axis_name)
    axis_size(axis_name, caller)
    if len(_axes(axis_name)) == 1:
        return NodeShard(x, lambda v: v, lambda v: v, lambda v: v)
    if x.size == 0:
        return NodeShard(x, lambda v: v, lambda v: v, _nothing)
    local = _axes(axis_name)[1]
    total, size = x.shape[0], axis_size(local)
    length = -(-total // size)
    index = lax.axis_index(local)
    padded = _pad(x, size * length, padding)
    mean = lax.psum_scatter(padded / size, local, scatter_dimension=0, tiled=True)
    return NodeShard(
        value=mean,
        take=lambda full: _take_part(full, index, length, size, padding),
        put=lambda part: _put_part(part, index, total, size),
        gather=lambda part: _all_gather_invariant(part, local, tiled=True)[:total],
    )


# --- payloads ---------------------------------------------------------------------


def _pack(payload: Payload) -> jax.Array:
    """Make one message of a payload [k, ...]: bytes [k, b], or its only leaf."""
    leaves = jax.tree.leaves(payload)
    if len(leaves) == 1:
        return leaves[0]

    def as_bytes(leaf):
        return lax.bitcast_convert_type(leaf, jnp.uint8).reshape(leaf.shape[0], -1)

    return jnp.concatenate([as_bytes(leaf) for leaf in leaves], axis=1)


def _unpack(message: jax.Array, like: Payload) -> Payload:
    """Invert :func:`_pack`; ``like`` gives the shapes of one row's payload."""
    leaves, structure = jax.tree.flatten(like)
    rows = message.shape[0]
    if len(leaves) == 1:
        return jax.tree.unflatten(structure, [message])
    out, start = [], 0
    for leaf in leaves:
        width = leaf.dtype.itemsize
        size = int(np.prod(leaf.shape)) * width
        raw = message[:, start : start + size]
        start += size
        raw = raw.reshape(rows, *leaf.shape, *((width,) if width > 1 else ()))
        out.append(lax.bitcast_convert_type(raw, leaf.dtype))
    return jax.tree.unflatten(structure, out)


def _narrow(x: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Cast to the vector's own dtype; a decoded level may lie above its largest value.

    What rounding explains becomes that value. What is further beyond is an overflow,
    and becomes infinite; what is not finite stays so.
    """
    limit, widest = float(jnp.finfo(dtype).max), float(jnp.finfo(x.dtype).max)
    if limit < widest:
        overflows = jnp.abs(x) > min(limit * _ROUNDED, widest)
        x = jnp.where(overflows, x, jnp.clip(x, -limit, limit))
    return x.astype(dtype)


def _all_to_all(message: jax.Array, axis: str) -> jax.Array:
    """Send row k to worker k: [n, ...] -> [n, ...], a row from each."""
    if not _inside_shard_map(axis):
        # vmap's rule fails for a message that it knows to be equal on all workers.
        message = message + (0 * lax.axis_index(axis)).astype(message.dtype)
    return lax.all_to_all(message, axis, 0, 0, tiled=True)


def _nothing(x: jax.Array) -> jax.Array:
    """Make the mean of empty vectors: equal on all workers by its type."""
    return jnp.zeros((0,), x.dtype)


def _mean_of_rows(rows: jax.Array) -> jax.Array:
    """Average [n, ...] over n: a chain of additions where n is small.

    XLA's sum over the slow axis is not vectorized on CPU, and 50 times slower there.
    """
    n = rows.shape[0]
    if n > _LONGEST_UNROLLED:
        return jnp.mean(rows, axis=0)
    return functools.reduce(jnp.add, [rows[k] for k in range(n)]) / n


def _accumulator(x: jax.Array) -> jnp.dtype:
    return jnp.promote_types(x.dtype, jnp.float32)


def _require_stateless(compressor: Compressor, like: Any, caller: str) -> None:
    if jax.tree.leaves(jax.eval_shape(compressor.init, like)):
        raise ValueError(
            f"{caller}: {compressor.facts.name} keeps state between steps, and "
            f"{caller} exchanges stateless payloads. Use gather_mean or linear_mean."
        )


def gather_payloads(payload: Payload, *, axis_name: AxisName) -> Payload:
    """Gather the payloads of all workers, for means that are not over all of them.

    Args:
        payload: a pytree of arrays in their wire dtypes, this worker's.
        axis_name: a name, or ``("node", "local")``: then the payload is the node's,
            equal on all its devices.

    Returns:
        The same pytree of [n, ...], row j from worker j; invariant.

    Communication:
        One all-gather: n-1 payloads sent per worker; payloads of several leaves travel
        as one byte vector. In a hierarchy each device sends its part between nodes, and
        the node gathers the parts.

    Raises:
        NameError: if the axis is not mapped here.
    """
    axis = peer_axis(axis_name)
    axis_size(axis_name, "gather_payloads")
    like = jax.eval_shape(lambda p: p, payload)
    message = _pack(jax.tree.map(lambda a: a[None], payload))[0]
    if len(_axes(axis_name)) == 1:
        return _unpack(_all_gather_invariant(message, axis), like)
    local = _axes(axis_name)[1]
    size, flat = axis_size(local), message.reshape(-1)
    length = -(-flat.shape[0] // size)
    part = _take_part(flat, lax.axis_index(local), length, size, "zero")
    parts = _all_gather_invariant(_all_gather_invariant(part, axis), local)
    rows = parts.swapaxes(0, 1).reshape(-1, size * length)[:, : flat.shape[0]]
    return _unpack(rows.reshape(-1, *message.shape), like)


def _split(key: jax.Array | None, count: int) -> jax.Array | None:
    return None if key is None else jax.random.split(key, count)


# --- centralized ------------------------------------------------------------------


def _mean(x: jax.Array, axis: str) -> jax.Array:
    """Average over one axis; float16 is divided first, as a sum may overflow it."""
    if x.dtype == jnp.float16:
        return lax.psum(x / axis_size(axis), axis)
    return lax.pmean(x, axis)


def c_fp_s(x: jax.Array, *, axis_name: AxisName) -> jax.Array:
    r"""Average in full precision (C_FP_S): :math:`\bar x = \frac1n \sum_j x_j`.

    Args:
        x: [N] this worker's vector.
        axis_name: a name, or ``("node", "local")``.

    Returns:
        [N], dtype of x, invariant.

    Communication:
        One all-reduce: 2(n-1)/n N elements sent per worker. In a hierarchy a
        reduce-scatter and an all-gather inside the node, and an all-reduce of the
        shard between nodes.

    Raises:
        NameError: if the axis is not mapped here.

    References:
        Gan et al., BAGUA, 2021, section on communication primitives.
    """
    if x.size == 0:
        return _nothing(x)
    shard = node_shard(x, axis_name, "c_fp_s")
    return shard.gather(_mean(shard.value, peer_axis(axis_name)))


def group_mean(x: jax.Array, size: int, *, axis_name: AxisName) -> jax.Array:
    r"""Average in full precision within groups of consecutive workers.

    Args:
        x: [N] this worker's vector.
        size: of a group, a divisor of the number of workers; static.
        axis_name: a name, or ``("node", "local")``: then nodes average their means.

    Returns:
        [N], dtype of x, varying.

    Communication:
        One reduce-scatter and one all-gather within the groups: 2(size-1)/size N
        elements sent per worker. One all-reduce where a group is everybody.

    Raises:
        NameError: if the axis is not mapped here.
        ValueError: if groups of that size do not divide the workers.
    """
    n = num_peers(axis_name, "group_mean")
    if n % size:
        raise ValueError(
            f"group_mean: groups of size={size} must divide the {n} workers of the "
            f"axis {axis_name!r}. Take a divisor of {n}."
        )
    if size == n or x.size == 0:
        return worker_local(c_fp_s(x, axis_name=axis_name), axis_name)
    shard, axis = node_shard(x, axis_name, "group_mean"), peer_axis(axis_name)
    mean = _group_mean(shard.value, size, n, axis)
    return worker_local(shard.gather(mean), axis_name)


def _group_mean(x: jax.Array, size: int, n: int, axis: str) -> jax.Array:
    part = x / size
    if not _inside_shard_map(axis):  # vmap knows no groups: a row for each, of all
        group = lax.axis_index(axis) // size
        rows = jnp.zeros((n // size, *x.shape), x.dtype).at[group].set(part)
        return lax.psum(rows, axis)[group]
    # An all-reduce within groups is missing where shard_map checks types.
    groups = np.arange(n).reshape(-1, size).tolist()
    part = _pad(part, -(-part.size // size) * size, "zero")
    part = lax.psum_scatter(part, axis, axis_index_groups=groups, tiled=True)
    return lax.all_gather(part, axis, axis_index_groups=groups, tiled=True)[: x.size]


class Errors(NamedTuple):
    """What error feedback remembers of one vector; ``None`` where there is none.

    Both have the vector's length, so that they can be made before the number of workers
    is known, and are zero outside the part that this worker handles.
    """

    worker: jax.Array | None = None  # [N] not yet sent by this worker; varying
    owner: jax.Array | None = None  # [N] not yet sent by the owner of the part; varying

    def resized(self, like: "Errors", params: Any, workers: int) -> "Errors":
        """Keep the mean of what workers, and all of what owners, have not sent."""
        del like, params
        return Errors(
            resizing.mean(self.worker, workers), resizing.total(self.owner, workers)
        )


def c_lp_s(
    x: jax.Array,
    compressor: Compressor,
    errors: Errors = Errors(),  # noqa: B008  (immutable)
    *,
    axis_name: AxisName,
    key: jax.Array | None = None,
) -> tuple[jax.Array, Errors]:
    r"""Average compressed vectors by ScatterReduce (C_LP_S).

    The vector is split into n parts of ceil(N/n); worker k owns part k.

    .. math::
        \text{worker } j:\quad & v = x_j + d_j,\quad c_j = C(v),\quad d_j' = v - c_j

        \text{owner}:\quad & v = \tfrac1n \sum_j c_j + e,\quad
        \bar x = C(v),\quad e' = v - \bar x

    Every part has its own range or norm. Owners add up in float32. Everybody, the
    owner too, decompresses the same bytes, so that results are equal bit for bit.

    Args:
        x: [N] floating, this worker's vector.
        compressor: stateless.
        errors: d and e above, float32 [N] each; ``None`` for no feedback there.
        axis_name: a name, or ``("node", "local")``: then x is first averaged inside
            the node in full precision and d, e belong to this device's shard.
        key: PRNG key, equal on all workers; ``None`` for deterministic compressors.

    Returns:
        The mean [N], dtype of x, invariant; and the new errors.

    Communication:
        One all-to-all and one all-gather of payloads; payloads of several leaves
        travel as one byte vector. Sent per worker: 2(n-1) payloads of ceil(N/n). In a
        hierarchy, before it a reduce-scatter inside the node in x's dtype, and after it
        an all-gather of all payloads inside the node.

    Raises:
        NameError: if the axis is not mapped here.
        ValueError: if the compressor keeps state.

    Warns:
        UserWarning: once, with the bytes, where a flat axis spans nodes (``Workers``
            says so) and a ring all-reduce sends no more between them.

    References:
        Gan et al., BAGUA, 2021, C_LP_S and ScatterReduce; Tang et al.,
        `DoubleSqueeze`, 2019, for feedback at both ends.

    Differences from the original:
        Filling at the end of the vector never takes part in a range.
    """
    if x.size == 0:
        return _nothing(x), errors
    shard = node_shard(x, axis_name, "c_lp_s", compressor.facts.padding)
    take = lambda d: None if d is None else shard.take(d)  # noqa: E731
    put = lambda d: None if d is None else shard.put(d)  # noqa: E731
    parts, local = _scatter_reduce(
        shard.value, compressor, Errors(*map(take, errors)), axis_name, key
    )
    mean = parts.reshape(-1)[: x.shape[0]]
    return _narrow(mean, x.dtype), Errors(*map(put, local))


def _scatter_reduce(x, compressor, errors, axis_name, key):
    """Run both phases of :func:`c_lp_s` between peers; give each device's shard."""
    axis, padding = peer_axis(axis_name), compressor.facts.padding
    n, total = axis_size(axis), x.shape[0]
    length = -(-total // n)
    part = jax.ShapeDtypeStruct((length,), _accumulator(x))
    _require_stateless(compressor, part, "c_lp_s")
    index = lax.axis_index(axis)
    if key is not None:
        to_owners, to_all = jax.random.split(worker_key(key, axis))
    else:
        to_owners = to_all = None

    def encode(parts, key):
        keys = _split(key, parts.shape[0])
        compress = lambda k, v: compressor.compress(k, v, ())[0]  # noqa: E731
        return jax.vmap(compress, in_axes=(None if keys is None else 0, 0))(keys, parts)

    def decode(payload):
        return jax.vmap(lambda p: compressor.decompress(p, part))(payload)

    corrected = x.astype(part.dtype)
    if errors.worker is not None:
        corrected = corrected + errors.worker
    filled = corrected
    if n * length != total:
        filled = mark(_pad(corrected, n * length, padding))
    payload = encode(filled.reshape(n, length), to_owners)
    one = jax.eval_shape(lambda p: jax.tree.map(lambda a: a[0], p), payload)
    if errors.worker is not None:
        sent = decode(payload).reshape(-1)[:total]
        errors = errors._replace(worker=corrected - sent)

    message = _pack(payload)
    if len(_axes(axis_name)) == 1:
        nbytes = message[0].size * message.dtype.itemsize
        _warn_of_flat(n, total, x.dtype.itemsize, nbytes, compressor.facts.name)
    received = _all_to_all(message, axis)
    mean = _mean_of_rows(decode(_unpack(received, one)))
    if errors.owner is not None:
        mean = mean + _take_part(errors.owner, index, length, n, padding)
    mean = mark(_clear_filling(mean, index, n, total, padding))
    payload = encode(mean[None], to_all)
    if errors.owner is not None:
        unsent = mean - decode(payload)[0]
        errors = errors._replace(owner=_put_part(unsent, index, total, n))

    decoded = decode(_gather_parts(payload, one, axis_name))
    return mark(decoded).reshape(-1, n * length)[:, :total], errors


def _gather_parts(payload: Payload, one: Payload, axis_name: AxisName) -> Payload:
    """Gather the payload [1, ...] of every part; one has a row's shapes."""
    gathered = _pack(payload)
    for each in _axes(axis_name):  # inside the node, too, codes and not numbers
        gathered = _all_gather_invariant(gathered, each, tiled=True)
    return _unpack(gathered, one)


def ring_mean(
    x: jax.Array,
    compressor: Compressor,
    error: jax.Array | None = None,
    *,
    axis_name: AxisName,
    key: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array | None]:
    r"""Average vectors in a ring all-reduce whose sums are compressed at every hop.

    The vector is filled up and cut into n parts of ceil(N/n). Part k sets out at worker
    k+1 and comes around to worker k, its owner; j = 1..n are the workers in that order.

    .. math::
        v_j = c_{j-1} + \tfrac1n (x_j + d_j),\quad c_j = C(v_j),\quad
        d_j' = n (v_j - c_j),\quad c_0 = 0,\quad \bar x = c_n

    Each worker sends as many bytes as in :func:`c_lp_s`, to its next neighbour only.
    But there every entry is compressed twice and here n times, so that the error of an
    unbiased C grows with n.

    Args:
        x: [N] floating, this worker's vector.
        compressor: stateless.
        error: d above, float32 [N], or ``None`` for no feedback.
        axis_name: a name, or ``("node", "local")``: then x is first averaged inside
            the node in full precision and d belongs to this device's shard.
        key: PRNG key, equal on all workers (each draws its own); or ``None``.

    Returns:
        The mean [N], dtype of x, invariant; and the new error.

    Communication:
        n-1 messages to the next worker and one all-gather, all of a payload of
        ceil(N/n): 2(n-1) of them sent per worker.

    Raises:
        NameError: if the axis is not mapped here.
        ValueError: if the compressor keeps state.

    References:
        Patarasuk and Yuan, `Bandwidth Optimal All-reduce Algorithms for Clusters of
        Workstations`, 2009, for the ring.

    Differences from the original:
        Sums are compressed on their way.

    Example:
        >>> from bagua_jax.compressors import cast
        >>> mean = lambda x: ring_mean(x, cast("float16"), axis_name="workers")[0]
        >>> x = jnp.array([[1.0, 2.0], [3.0, 8.0]])
        >>> jax.vmap(mean, axis_name="workers")(x).tolist()
        [[2.0, 5.0], [2.0, 5.0]]
    """
    if x.size == 0:
        return _nothing(x), error
    axis, padding = peer_axis(axis_name), compressor.facts.padding
    shard = node_shard(x, axis_name, "ring_mean", padding)
    value = shard.value.astype(_accumulator(x))
    if error is not None:
        value = value + shard.take(error)
    n, total = axis_size(axis), value.shape[0]
    length = -(-total // n)
    part = jax.ShapeDtypeStruct((length,), value.dtype)
    _require_stateless(compressor, part, "ring_mean")
    index = lax.axis_index(axis)
    keys = None if key is None else jax.random.split(worker_key(key, axis), n)
    around = tuple((worker, (worker + 1) % n) for worker in range(n))
    if n * length != total:
        value = mark(_pad(value, n * length, padding))

    def add_own(k, arrived, unsent):
        number = (index - 1 - k) % n
        v = lax.dynamic_slice_in_dim(value, number * length, length) / n
        v = v if arrived is None else decode(arrived) + v
        v = _clear_filling(v, number, n, total, padding)
        payload, _ = compressor.compress(None if keys is None else keys[k], v, ())
        if unsent is not None:
            unsent = unsent.at[number].set(n * (v - decode(payload)))
        return payload, unsent

    def hop(k, carry):
        payload, unsent = carry
        arrived = _unpack(_permute(_pack(row(payload)), axis, around), payload)
        return add_own(k, jax.tree.map(lambda a: a[0], arrived), unsent)

    def decode(payload):
        return compressor.decompress(payload, part)

    def row(payload):
        return jax.tree.map(lambda a: a[None], payload)

    unsent = None
    if error is not None:
        unsent = vary_like(jnp.zeros((n, length), value.dtype), value)
    carry = add_own(0, None, unsent)
    if n <= _LONGEST_UNROLLED:
        for k in range(1, n):
            carry = hop(k, carry)
    else:
        carry = lax.fori_loop(1, n, hop, carry)
    payload, unsent = carry
    decoded = mark(jax.vmap(decode)(_gather_parts(row(payload), payload, axis_name)))
    mean = decoded.reshape(-1, n * length)[:, :total].reshape(-1)[: x.shape[0]]
    if unsent is not None:
        error = shard.put(unsent.reshape(-1)[:total])
    return _narrow(mean, x.dtype), error


def gather_mean(
    x: jax.Array,
    compressor: Compressor,
    error: jax.Array | None = None,
    *,
    axis_name: AxisName,
    key: jax.Array | None = None,
    state: Any = (),
) -> tuple[jax.Array, jax.Array | None, Any]:
    r"""Average compressed vectors whose payloads cannot be summed.

    .. math:: v = x_j + d_j,\quad c_j = C(v),\quad d_j' = v - c_j,\quad
              \bar x = \tfrac1n \sum_j c_j

    Args:
        x: [N] floating, this worker's vector.
        compressor: any.
        error: d above, float32 [N], or ``None`` for no feedback.
        axis_name: a name, or ``("node", "local")``.
        key: PRNG key, equal on all workers (each draws its own); or ``None``.
        state: the compressor's state for this vector (for the shard in a hierarchy).

    Returns:
        The mean [N], dtype of x, invariant; the new error; the new compressor state.

    Communication:
        One all-gather of the payload: n-1 payloads sent per worker. Fits payloads much
        smaller than N/n.

    Raises:
        NameError: if the axis is not mapped here.
    """
    if x.size == 0:
        return _nothing(x), error, state
    axis = peer_axis(axis_name)
    shard = node_shard(x, axis_name, "gather_mean", compressor.facts.padding)
    own = None if key is None else worker_key(key, axis)
    payload, corrected, error, state = _correct_and_compress(
        shard, x, compressor, error, own, state
    )
    received = gather_payloads(payload, axis_name=axis)
    decode = lambda p: compressor.decompress(p, corrected)  # noqa: E731
    mean = _mean_of_rows(jax.vmap(decode)(received))
    return _narrow(shard.gather(mean), x.dtype), error, state


def linear_mean(
    x: jax.Array,
    compressor: Compressor,
    error: jax.Array | None = None,
    *,
    axis_name: AxisName,
    key: jax.Array | None = None,
    state: Any = (),
) -> tuple[jax.Array, jax.Array | None, Any]:
    r"""Average compressed vectors whose payloads may be summed.

    .. math:: v = x_j + d_j,\quad p_j = C(v),\quad d_j' = v - D(p_j),\quad
              \bar x = D\big(\tfrac1n \sum_j p_j\big)

    Args:
        x: [N] floating, this worker's vector.
        compressor: one with ``facts.linear``.
        error: d above, float32 [N], or ``None`` for no feedback.
        axis_name: a name, or ``("node", "local")``.
        key: PRNG key, equal on all workers, used as it is: a mask drawn from it is
            common to all, as a sum requires.
        state: the compressor's state for this vector (for the shard in a hierarchy).

    Returns:
        The mean [N], dtype of x, invariant; the new error; the new compressor state.

    Communication:
        One all-reduce of the payload.

    Raises:
        NameError: if the axis is not mapped here.
        ValueError: if payloads of the compressor cannot be summed.
    """
    if not compressor.facts.linear:
        raise ValueError(
            f"linear_mean: payloads of {compressor.facts.name} cannot be summed "
            "(facts.linear is False). Use gather_mean or c_lp_s."
        )
    if x.size == 0:
        return _nothing(x), error, state
    axis = peer_axis(axis_name)
    shard = node_shard(x, axis_name, "linear_mean", compressor.facts.padding)
    payload, corrected, error, state = _correct_and_compress(
        shard, x, compressor, error, key, state
    )
    mean = compressor.decompress(lax.pmean(payload, axis), corrected)
    return _narrow(shard.gather(mean), x.dtype), error, state


def _correct_and_compress(shard, x, compressor, error, key, state):
    """Add what was not sent before, compress, and keep what is not sent now."""
    corrected = shard.value.astype(_accumulator(x))
    if error is not None:
        corrected = corrected + shard.take(error)
    payload, state = compressor.compress(key, corrected, state)
    if error is not None:
        error = shard.put(corrected - compressor.decompress(payload, corrected))
    return payload, corrected, error, state


def mean_and_own(
    x: jax.Array,
    compressor: Compressor,
    *,
    axis_name: str,
    key: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    r"""Average compressed vectors, and give this worker's own part of the mean.

    .. math:: c_j = C(x_j),\quad \bar x = \tfrac1n \sum_j c_j

    For difference coding, which moves a replica by exactly what was sent.

    Args:
        x: [N] floating, this worker's vector.
        compressor: stateless.
        axis_name: the axis between the workers that exchange; in a hierarchy the first
            name, and x the shard of :func:`node_shard`.
        key: PRNG key, equal on all workers; each draws its own, or all the same where
            payloads are summed. ``None`` for deterministic compressors.

    Returns:
        The mean [N] in float32 or wider, invariant; and C(x_j) of this worker, varying.

    Communication:
        One all-gather of the payload; one all-reduce where payloads may be summed.

    Raises:
        NameError: if the axis is not mapped here.
        ValueError: if the compressor keeps state.
    """
    axis_size(axis_name, "mean_and_own")
    _require_stateless(compressor, x, "mean_and_own")
    x = x.astype(_accumulator(x))
    if x.size == 0:
        return _nothing(x), worker_local(_nothing(x), axis_name)
    if compressor.facts.linear:
        payload, _ = compressor.compress(key, x, ())
        mean = compressor.decompress(lax.pmean(payload, axis_name), x)
        return mean, compressor.decompress(payload, x)
    own = None if key is None else worker_key(key, axis_name)
    payload, _ = compressor.compress(own, x, ())
    received = gather_payloads(payload, axis_name=axis_name)
    decoded = jax.vmap(lambda p: compressor.decompress(p, x))(received)
    return _mean_of_rows(decoded), decoded[lax.axis_index(axis_name)]


def scatter_rows(rows: jax.Array, *, axis_name: str) -> jax.Array:
    """Send row k to worker k, and receive one row from each.

    For means that are none: an owner sees everybody's version of its part of a vector.

    Args:
        rows: [n, ...] this worker's rows, one for each worker.
        axis_name: the axis between the workers that exchange; in a hierarchy the first
            name, and rows of the shard of :func:`node_shard`.

    Returns:
        [n, ...], row j from worker j; dtype of rows, varying.

    Communication:
        One all-to-all: n-1 rows sent per worker.

    Raises:
        NameError: if the axis is not mapped here.
    """
    axis_size(axis_name, "scatter_rows")
    if rows.size == 0:
        return worker_local(rows, axis_name)
    return _all_to_all(rows, axis_name)


def gather_rows(row: jax.Array, *, axis_name: str) -> jax.Array:
    """Gather the rows of all workers: the way back from :func:`scatter_rows`.

    Args:
        row: [...] this worker's.
        axis_name: that of ``scatter_rows``.

    Returns:
        [n, ...], row j of worker j; dtype of row, invariant.

    Communication:
        One all-gather: n-1 rows sent per worker.

    Raises:
        NameError: if the axis is not mapped here.
    """
    n = axis_size(axis_name, "gather_rows")
    if row.size == 0:
        return jnp.zeros((n, *row.shape), row.dtype)
    return _all_gather_invariant(row, axis_name)


# --- decentralized ----------------------------------------------------------------


def neighbours(
    x: jax.Array, mixing: MixingStep, *, axis_name: AxisName
) -> tuple[jax.Array, ...]:
    """Receive one array from every in-neighbour.

    Args:
        x: what this worker sends; any shape.
        mixing: one step of a topology.
        axis_name: a name, or ``("node", "local")``, where nodes are the neighbours.

    Returns:
        One array like x for each send of the step, in its order; zeros where this
        worker has no neighbour in that send. Varying.

    Communication:
        One collective-permute for each send.
    """
    axis = peer_axis(axis_name)
    return tuple(_permute(x, axis, send.pairs) for send in mixing.sends)


def _permute(x: jax.Array, axis: str, pairs: tuple[tuple[int, int], ...]) -> jax.Array:
    """Send along a partial permutation; zeros where nothing arrives."""
    n = axis_size(axis)
    if len(pairs) == n or _inside_shard_map(axis):
        return lax.ppermute(x, axis, list(pairs))
    # vmap takes whole permutations only: complete it, and drop what nobody sent.
    sources, destinations = map(set, zip(*pairs, strict=True))
    idle = [i for i in range(n) if i not in sources]
    unreached = [i for i in range(n) if i not in destinations]
    received = lax.ppermute(x, axis, [*pairs, *zip(idle, unreached, strict=True)])
    heard = jnp.asarray(np.isin(range(n), [*destinations]))[lax.axis_index(axis)]
    return jnp.where(heard, received, jnp.zeros_like(received))


def mix(
    own: jax.Array,
    received: tuple[jax.Array, ...],
    mixing: MixingStep,
    *,
    axis_name: AxisName,
) -> jax.Array:
    r"""Weigh one's own vector and the neighbours': :math:`\sum_j W_{ij} x_j`.

    Args:
        own: [N] x_i.
        received: x_j for each send of the step, as :func:`neighbours` gives them.
        mixing: the step whose weights are used.
        axis_name: that of :func:`neighbours`.

    Returns:
        [N] the mixed vector in float32 or wider. Nothing is communicated.
    """
    index = lax.axis_index(peer_axis(axis_name))

    def weight(weights: tuple[float, ...]):
        if len(set(weights)) == 1:
            return weights[0]
        return jnp.asarray(weights, _accumulator(own))[index]

    total = weight(mixing.self_weights) * own.astype(_accumulator(own))
    for send, x in zip(mixing.sends, received, strict=True):
        total = total + weight(send.weights) * x.astype(total.dtype)
    return total


def _at_step(topology: Topology, step, mix_with, x):
    """Mix with the step's graph; a rotating one is a switch over its period."""
    branches = [lambda v, m=m: mix_with(v, m) for m in topology.steps]
    period = topology.period
    index = 0 if period == 1 else jnp.asarray(step, jnp.int32) % period
    return schedules.switch(index, branches, x, shares=(1 / period,) * period)


def _require_size(topology: Topology, axis_name: AxisName, caller: str) -> None:
    n = num_peers(axis_name, caller)
    if topology.n != n:
        raise ValueError(
            f"{caller}: the topology {topology.name!r} was made for n={topology.n} "
            f"workers, and the axis {axis_name!r} has {n}. Make it for {n}."
        )


def d_fp_s(
    x: jax.Array, topology: Topology, *, axis_name: AxisName, step: Any = 0
) -> jax.Array:
    r"""Mix with neighbours in full precision (D_FP_S): :math:`\sum_j W_{ij} x_j`.

    Args:
        x: [N] this worker's vector.
        topology: for as many workers as the axis has (nodes in a hierarchy).
        axis_name: a name, or ``("node", "local")``: then nodes mix their means.
        step: [] int, equal on all workers; picks the graph of a rotating topology.

    Returns:
        [N], dtype of x, varying.

    Communication:
        One collective-permute of N elements for each neighbour of the step; one
        all-reduce where W is 11'/n.

    Raises:
        NameError: if the axis is not mapped here.
        ValueError: if the topology's n differs from the axis's.

    References:
        Gan et al., BAGUA, 2021, D_FP_S; Lian et al., `Can Decentralized Algorithms
        Outperform Centralized Algorithms?`, 2017.
    """
    _require_size(topology, axis_name, "d_fp_s")
    if x.size == 0:
        return worker_local(x, axis_name)
    shard = node_shard(x, axis_name, "d_fp_s")
    axis = peer_axis(axis_name)

    def mix_with(v, mixing: MixingStep):
        if mixing.is_mean:
            mixed = _mean(v, axis).astype(_accumulator(v))
        else:
            received = neighbours(v, mixing, axis_name=axis)
            mixed = mix(v, received, mixing, axis_name=axis)
        return worker_local(mixed, axis)

    mixed = _at_step(topology, step, mix_with, shard.value)
    return worker_local(shard.gather(mixed.astype(x.dtype)), axis_name)


def d_lp_s(
    x: jax.Array,
    compressor: Compressor,
    topology: Topology,
    *,
    axis_name: AxisName,
    step: Any = 0,
    key: jax.Array | None = None,
) -> jax.Array:
    r"""Mix compressed vectors with neighbours (D_LP_S): :math:`\sum_j W_{ij} C(x_j)`.

    On its own it does not converge: algorithms send compressed *differences*
    (``low_precision_decentralized``).

    Args:
        x: [N] floating, this worker's vector.
        compressor: stateless.
        topology: for as many workers as the axis has (nodes in a hierarchy).
        axis_name: a name, or ``("node", "local")``: then nodes mix their means.
        step: [] int, equal on all workers; picks the graph of a rotating topology.
        key: PRNG key, equal on all workers; ``None`` for deterministic compressors.

    Returns:
        [N], dtype of x, varying; W's diagonal multiplies the compressed own vector.

    Communication:
        One collective-permute of the payload for each neighbour of the step.

    Raises:
        NameError: if the axis is not mapped here.
        ValueError: if the topology's n differs from the axis's, or the compressor
            keeps state.

    References:
        Gan et al., BAGUA, 2021, D_LP_S.
    """
    _require_size(topology, axis_name, "d_lp_s")
    if x.size == 0:
        return worker_local(x, axis_name)
    axis = peer_axis(axis_name)
    shard = node_shard(x, axis_name, "d_lp_s", compressor.facts.padding)

    def mix_with(v, mixing: MixingStep):
        sent = compressed_neighbours(v, compressor, mixing, axis_name=axis, key=key)
        mixed = mix(sent[0], tuple(sent[1:]), mixing, axis_name=axis)
        return worker_local(mixed, axis)

    value = shard.value.astype(_accumulator(x))
    mixed = _at_step(topology, step, mix_with, value)
    return worker_local(_narrow(shard.gather(mixed), x.dtype), axis_name)


def compressed_neighbours(
    x: jax.Array,
    compressor: Compressor,
    mixing: MixingStep,
    *,
    axis_name: str,
    key: jax.Array | None = None,
) -> jax.Array:
    """Send one's compressed vector to every out-neighbour; decode it and theirs.

    Args:
        x: [N] float32, this worker's vector.
        compressor: stateless.
        mixing: one step of a topology.
        axis_name: the axis between the workers that exchange.
        key: PRNG key, equal on all workers; each draws its own.

    Returns:
        [1 + sends, N]: row 0 is C(x_i), the others C(x_j) in the order of the sends,
        zero where this worker has no neighbour. All rows are decoded by one operation,
        so that a worker's row equals, bit for bit, what its neighbours hold of it.

    Communication:
        One collective-permute of the payload for each send.
    """
    _require_stateless(compressor, x, "compressed_neighbours")
    if x.size == 0:
        return worker_local(jnp.zeros((1 + len(mixing.sends), 0), x.dtype), axis_name)
    own = None if key is None else worker_key(key, axis_name)
    payload, _ = compressor.compress(own, x, ())
    like = jax.eval_shape(lambda p: p, payload)
    message = _pack(jax.tree.map(lambda a: a[None], payload))
    received = neighbours(message, mixing, axis_name=axis_name)
    rows = _unpack(jnp.concatenate([worker_local(message, axis_name), *received]), like)
    decoded = jax.vmap(lambda p: compressor.decompress(p, x))(rows)
    if all(len(send.pairs) == len(mixing.self_weights) for send in mixing.sends):
        return decoded
    heard = np.ones((len(mixing.self_weights), 1 + len(mixing.sends)), bool)
    for column, send in enumerate(mixing.sends, start=1):
        heard[:, column] = np.isin(range(len(heard)), [d for _, d in send.pairs])
    return jnp.where(jnp.asarray(heard)[lax.axis_index(axis_name)][:, None], decoded, 0)
