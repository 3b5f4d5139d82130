"""Sparsification by magnitude: of the whole vector, of blocks, above a threshold."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bagua_jax.compressors.base import (
    Compressor,
    CompressorFacts,
    require_integer,
    require_number,
    stateless,
)
from bagua_jax.compressors.numerics import (
    as_rows,
    kept,
    largest_places,
    row_shape,
)
from bagua_jax.compressors.packing import index_dtype

__all__ = [
    "SparsePayload",
    "block_topk",
    "largest_of_rows",
    "rows_of_sparse",
    "threshold",
    "topk",
]


class SparsePayload(NamedTuple):
    """What sparsifiers by magnitude send: k elements of each row, largest first."""

    values: jax.Array  # [rows * k] float32
    indices: jax.Array  # [rows * k] uint8, uint16 or uint32, inside the row


def largest_of_rows(rows: jax.Array, k: int) -> SparsePayload:
    """Select the k elements of largest magnitude in each row.

    Among equals the first ones are taken; NaN counts as infinite.

    Args:
        rows: [rows, width].
        k: 1 .. width.
    """
    indices = largest_places(rows, k)
    values = jnp.take_along_axis(rows, indices, axis=-1)
    narrow = indices.astype(index_dtype(rows.shape[1]))
    return SparsePayload(values.reshape(-1), narrow.reshape(-1))


def rows_of_sparse(payload: SparsePayload, rows: int, width: int) -> jax.Array:
    """Put the elements back into [rows, width]; zero elsewhere."""
    first = np.arange(rows, dtype=np.int32)[:, None] * width
    place = payload.indices.reshape(rows, -1).astype(jnp.int32) + first
    full = jnp.zeros((rows * width,), payload.values.dtype)
    full = full.at[place.reshape(-1)].set(
        payload.values, mode="promise_in_bounds", unique_indices=True
    )
    return full.reshape(rows, width)


def _sparse_bytes(width: int, count: int) -> int:
    return count * (4 + index_dtype(width).itemsize)


def topk(ratio: float = 0.01) -> Compressor:
    r"""Keep the elements of largest magnitude.

    .. math:: C(x)_j = x_j \text{ for the } k = \lceil \rho d \rceil
              \text{ largest } |x_j|,\quad 0 \text{ otherwise}

    Args:
        ratio: rho, the kept fraction, in (0, 1]; at least one element is kept. Static.

    Returns:
        A biased, deterministic compressor. Payload: k values (float32) and k indices
        (uint8 for d <= 256, uint16 for d <= 65536, else uint32): 5, 6 or 8 bytes each.

    Raises:
        ValueError: for a ratio outside (0, 1].

    Notes:
        delta = k/d, attained by elements of equal magnitude. What is kept is exact. A
        NaN counts as the largest magnitude, so that it is always sent. It sorts the
        whole vector; ``block_topk`` is cheaper and has smaller indices.

    References:
        Stich et al., `Sparsified SGD with Memory`, 2018 (arXiv 1809.07599). delta: the
        k largest of d squares have at least the k/d-th part of their sum.

    Example:
        >>> import jax.numpy as jnp
        >>> c = topk(0.5)
        >>> x = jnp.array([3.0, -1.0, 0.5, -4.0])
        >>> payload, _ = c.compress(None, x, ())
        >>> payload.indices.tolist(), str(payload.indices.dtype)
        ([3, 0], 'uint8')
        >>> c.decompress(payload, x).tolist(), c.facts.payload_bytes(x)
        ([3.0, 0.0, 0.0, -4.0], 10)
    """
    require_number("topk", "ratio", ratio, 1, "0.01 keeps one element of a hundred.")
    return _topk(f"topk({ratio})", ratio, None)


def block_topk(ratio: float = 0.01, block: int = 4096) -> Compressor:
    r"""Keep the elements of largest magnitude of each block.

    .. math:: C(x)_j = x_j \text{ for the } k = \lceil \rho b \rceil
              \text{ largest } |x_j| \text{ of its block},\quad 0 \text{ otherwise}

    Args:
        ratio: rho, the kept fraction, in (0, 1]; at least one element of each block is
            kept. Static.
        block: b, elements in a block; static. A shorter vector is one block; the last
            block of a longer one is filled up with zeros and sends as much as others.

    Returns:
        A biased, deterministic compressor. Payload: k values (float32) and k indices
        inside the block (uint8 for b <= 256, uint16 for b <= 65536, else uint32) of
        each block.

    Raises:
        ValueError: for an argument out of range.

    Notes:
        delta = k/min(d, b), attained by one block of elements of equal magnitude. A NaN
        is always sent.

    References:
        As ``topk``, for each block.

    Example:
        >>> import jax.numpy as jnp
        >>> c = block_topk(0.5, block=2)
        >>> x = jnp.array([3.0, -1.0, 0.5, -4.0, 2.0])
        >>> payload, _ = c.compress(None, x, ())
        >>> payload.indices.tolist(), c.facts.payload_bytes(x)
        ([0, 1, 0], 15)
        >>> c.decompress(payload, x).tolist()
        [3.0, 0.0, 0.0, -4.0, 2.0]
    """
    require_number(
        "block_topk", "ratio", ratio, 1, "0.01 keeps one element of a hundred."
    )
    require_integer(
        "block_topk", "block", block, 1, 2**31 - 1, "Up to 256, indices are one byte."
    )
    return _topk(f"block_topk({ratio}, block={block})", ratio, block)


def _topk(name: str, ratio: float, block: int | None) -> Compressor:
    def shape(like) -> tuple[int, int, int]:
        count = math.prod(like.shape)
        rows, width = row_shape(count, block or count)
        return rows, width, kept(ratio, width)

    def compress(key, x, state):
        del key
        _, width, k = shape(x)
        return largest_of_rows(as_rows(x.astype(jnp.float32), width), k), state

    def decompress(payload, like):
        rows, width, _ = shape(like)
        full = rows_of_sparse(payload, rows, width).reshape(-1)
        return full[: math.prod(like.shape)].astype(like.dtype)

    def payload_bytes(like):
        rows, width, k = shape(like)
        return _sparse_bytes(width, rows * k)

    def delta(d: int) -> float:
        width = min(d, block or d)
        return kept(ratio, width) / width

    def attained(d: int) -> np.ndarray:
        return np.where(np.arange(d) < (block or d), 1.0, 0.0)

    facts = CompressorFacts(
        name=name,
        unbiased=False,
        delta=delta,
        payload_bytes=payload_bytes,
        source="derived; sharp",
        attained=attained,
    )
    return Compressor(stateless, compress, decompress, facts)


def threshold(value: float = 1e-3, capacity_ratio: float = 0.05) -> Compressor:
    r"""Keep the elements whose magnitude reaches a threshold, up to a fixed number.

    .. math:: C(x)_j = x_j \text{ if } |x_j| \ge \theta
              \text{ and } j \text{ is among the } K = \lceil \rho d \rceil
              \text{ largest},\quad 0 \text{ otherwise}

    Args:
        value: theta, positive and absolute: it does not scale with the vector. Static.
        capacity_ratio: rho, room for elements as a fraction of all, in (0, 1]. Static.

    Returns:
        A biased, deterministic compressor. Payload: K values (float32) and K indices
        (uint8 for d <= 256, uint16 for d <= 65536, else uint32), K * 5, 6 or 8 bytes,
        however many elements reach the threshold: shapes are static. Places without
        one carry zero.

    Raises:
        ValueError: for an argument out of range.

    Notes:
        Where more than K elements reach the threshold the K largest are sent, and the
        rest stays for error feedback. Where no element reaches it nothing is sent, so
        that delta = 0: no contraction of its own. Without overflow the squared error is
        below d theta^2 whatever x is. A NaN is always sent.

    References:
        Threshold sparsification as in Strom, `Scalable Distributed DNN Training using
        Commodity GPU Cloud Computing`, 2015, which sends plus or minus theta instead.

    Example:
        >>> import jax.numpy as jnp
        >>> c = threshold(1.0, capacity_ratio=0.5)
        >>> x = jnp.array([3.0, -0.5, 0.5, 0.9])
        >>> payload, _ = c.compress(None, x, ())
        >>> payload.values.tolist(), c.facts.payload_bytes(x)
        ([3.0, 0.0], 10)
        >>> c.decompress(payload, x).tolist()
        [3.0, 0.0, 0.0, 0.0]
    """
    require_number(
        "threshold",
        "value",
        value,
        float("inf"),
        "To keep a fraction of the elements use topk().",
    )
    require_number(
        "threshold", "capacity_ratio", capacity_ratio, 1, "1.0 always has room."
    )
    name = f"threshold({value}, capacity_ratio={capacity_ratio})"
    widest = _topk(name, capacity_ratio, None)

    def compress(key, x, state):
        payload, _ = widest.compress(key, x, ())
        below = jnp.abs(payload.values) < value
        return payload._replace(values=jnp.where(below, 0, payload.values)), state

    facts = widest.facts._replace(
        delta=lambda d: 0.0,
        attained=lambda d: np.full(d, value / 2),
    )
    return widest._replace(compress=compress, facts=facts)
