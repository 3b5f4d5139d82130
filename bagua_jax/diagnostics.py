"""What to watch: disagreement, equality of replicas, compression error, the average."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from bagua_jax import buckets, primitives
from bagua_jax.compressors import Compressor
from bagua_jax.compressors.numerics import largest_magnitude
from bagua_jax.primitives import AxisName

__all__ = [
    "averaged_params",
    "compression_error",
    "consensus_distance_sq",
    "differing_replicas",
    "replica_checksum",
]


def averaged_params(params: Any, *, axis_name: AxisName) -> Any:
    r"""Average the workers' parameters: the model to evaluate and to export.

    Args:
        params: this worker's parameters.
        axis_name: the axis, or axes, of the workers.

    Returns:
        :math:`\bar x = \frac1n \sum_i x_i`, like params, invariant.

    Communication:
        One all-reduce for each bucket of parameters.
    """
    plan = buckets.plan(params, axis_name=axis_name)
    return plan.unpack(
        [primitives.c_fp_s(v, axis_name=axis_name) for v in plan.pack(params)]
    )


def consensus_distance_sq(params: Any, *, axis_name: AxisName) -> jax.Array:
    r"""Measure how far workers are apart: :math:`\frac1n \sum_i \|x_i - \bar x\|^2`.

    Args:
        params: this worker's parameters.
        axis_name: the axis, or axes, of the workers.

    Returns:
        [] float32, invariant; 0 where all replicas are equal.

    Communication:
        One all-reduce for each bucket of parameters, and one of a scalar.
    """
    wide = optax.tree.cast(params, jnp.float32)  # a narrow mean would be rounded
    mean = averaged_params(wide, axis_name=axis_name)
    difference = optax.tree.sub(wide, mean)
    own = optax.tree.norm(difference, squared=True)
    own = primitives.worker_local(jnp.asarray(own, jnp.float32), axis_name)
    return primitives.c_fp_s(own[None], axis_name=axis_name)[0]


def differing_replicas(tree: Any) -> tuple[str, ...]:
    """Name the leaves that say they are replicated, and differ between devices.

    ``jax.shard_map(..., check_vma=False)`` believes ``out_specs=P()``: what each worker
    has of its own (error feedback, parameters of a gossip) leaves it as one array whose
    copies differ, of which a print, a checkpoint or a new layout takes one. Nothing
    refuses that; ``assert not differing_replicas(state)`` after a step finds it.

    Args:
        tree: of concrete arrays, outside of ``jax.jit``.

    Returns:
        Names of leaves of which two devices hold the same part with other bits; of
        several processes each sees its own devices.

    Communication:
        None; the copies are read by the host.

    Example:
        >>> differing_replicas({"x": jnp.ones(3), "key": jax.random.key(0)})
        ()
    """
    names = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        if not isinstance(leaf, jax.Array):
            continue
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        copies: dict[str, bytes] = {}
        for shard in leaf.addressable_shards:
            bits = np.asarray(shard.data).tobytes()
            if copies.setdefault(str(shard.index), bits) != bits:
                names.append(jax.tree_util.keystr(path))
                break
    return tuple(names)


def replica_checksum(tree: Any) -> jax.Array:
    """Fold the bits of this worker's tree into one number.

    Two workers with equal bits have equal checksums; workers with different bits
    almost surely do not. NaNs count by their bits, and 0.0 differs from -0.0.

    Args:
        tree: any tree of arrays.

    Returns:
        [] uint32, of the same varying type as the tree. Nothing is communicated:
        compare the values of the workers at the boundary.

    Example:
        >>> a, b = jnp.array([1.0, 2.0]), jnp.array([2.0, 1.0])
        >>> bool(replica_checksum(a) == replica_checksum(b))
        False
    """
    total = jnp.uint32(2166136261)
    for leaf in jax.tree.leaves(tree):
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        if jnp.iscomplexobj(leaf):
            leaf = jnp.stack([jnp.real(leaf), jnp.imag(leaf)])
        if leaf.dtype in (jnp.bool_, jnp.int4, jnp.uint4):
            leaf = leaf.astype(jnp.int8)
        raw = jnp.ravel(lax.bitcast_convert_type(leaf, jnp.uint8)).astype(jnp.uint32)
        # Position-dependent odd weights, so that permuted values differ.
        weights = jnp.arange(raw.size, dtype=jnp.uint32) * jnp.uint32(2654435761) | 1
        total = total * jnp.uint32(16777619) + jnp.sum(raw * weights, dtype=jnp.uint32)
    return total


def compression_error(
    compressor: Compressor, x: jax.Array, key: jax.Array | None = None
) -> jax.Array:
    r"""Measure the relative error :math:`\|C(x) - x\|^2 / \|x\|^2` on one vector.

    Args:
        compressor: any; a fresh state is used.
        x: [d] floating.
        key: PRNG key; ``None`` for deterministic compressors.

    Returns:
        [] float32; 0 for a zero vector that is sent as it is.

    Example:
        >>> from bagua_jax.compressors import minmax_uint8
        >>> float(compression_error(minmax_uint8(), jnp.arange(4.0))) < 1e-5
        True
    """
    payload, _ = compressor.compress(key, x, compressor.init(x))
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    decoded = compressor.decompress(payload, x).astype(wide.dtype)
    largest = largest_magnitude(wide, axis=None)  # squares of extremes would overflow
    scale = jnp.where(largest > 0, largest, 1.0)
    error = jnp.sum((decoded / scale - wide / scale) ** 2)
    size = jnp.sum((wide / scale) ** 2)
    return jnp.where(error == 0, 0.0, error / size).astype(jnp.float32)
