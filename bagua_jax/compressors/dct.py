"""Discrete cosine transforms of blocks, and their sparsification, as in DeMo."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from bagua_jax.compressors.base import (
    Compressor,
    CompressorFacts,
    require_integer,
    stateless,
)
from bagua_jax.compressors.numerics import as_rows, row_shape, saturate, unit_scale
from bagua_jax.compressors.packing import index_dtype
from bagua_jax.compressors.topk import largest_of_rows, rows_of_sparse

__all__ = [
    "block_dct",
    "block_sides",
    "dct_matrix",
    "dct_topk",
    "join_blocks",
    "split_blocks",
]


@functools.cache
def dct_matrix(size: int) -> np.ndarray:
    r"""Return the orthonormal DCT-II of a length: [size, size] float32, y = T x.

    .. math:: T_{kj} = \sqrt{\tfrac{2 - [k = 0]}{s}}
              \cos\frac{\pi k (2j + 1)}{2 s}

    Example:
        >>> T = dct_matrix(8)
        >>> bool(np.abs(T @ T.T - np.eye(8)).max() < 1e-6)
        True
    """
    k, j = np.arange(size)[:, None], np.arange(size)[None]
    matrix = np.cos(np.pi * k * (2 * j + 1) / (2 * size)) * np.sqrt(2 / size)
    matrix[0] /= np.sqrt(2)
    matrix = matrix.astype(np.float32)
    matrix.flags.writeable = False
    return matrix


# --- blocks of an array --------------------------------------------------------------


def block_sides(shape: tuple[int, ...], chunk: int) -> tuple[int, int]:
    """Return the sides of an array's blocks: its sizes' largest divisors to ``chunk``.

    Args:
        shape: of the array. Its last two dimensions are cut into blocks, for each index
            of the others; a vector's blocks are pieces of it.
        chunk: at least 1.

    Example:
        >>> block_sides((3, 96, 10), 64), block_sides((90,), 64), block_sides((), 64)
        ((48, 10), (1, 45), (1, 1))
    """
    _, height, width = _matrices(shape)
    return _largest_divisor(height, chunk), _largest_divisor(width, chunk)


def _matrices(shape: tuple[int, ...]) -> tuple[int, int, int]:
    """See an array as [count, height, width]."""
    height, width = (1, 1, *shape)[-2:]
    return math.prod(shape[:-2]), height, width


def _largest_divisor(size: int, most: int) -> int:
    return next(d for d in range(min(max(size, 1), most), 0, -1) if size % d == 0)


def split_blocks(x: jax.Array, chunk: int) -> jax.Array:
    """Cut an array into blocks: [blocks, elements of one]."""
    (count, height, width), (h, w) = _matrices(x.shape), block_sides(x.shape, chunk)
    blocks = x.reshape(count, height // h, h, width // w, w).swapaxes(2, 3)
    return blocks.reshape(count * (height // h) * (width // w), h * w)


def join_blocks(rows: jax.Array, shape: tuple[int, ...], chunk: int) -> jax.Array:
    """Put blocks back into an array of this shape: inverse of :func:`split_blocks`."""
    (count, height, width), (h, w) = _matrices(shape), block_sides(shape, chunk)
    blocks = rows.reshape(count, height // h, width // w, h, w).swapaxes(2, 3)
    return blocks.reshape(shape)


def block_dct(x: jax.Array, chunk: int, *, inverse: bool = False) -> jax.Array:
    r"""Transform every block of an array where it stands: :math:`T_h B T_w^\top`.

    T is :func:`dct_matrix`, so that norms stay and blocks do not mix.

    Args:
        x: float32 of any shape; see :func:`block_sides`.
        chunk: largest side of a block, at least 1; static.
        inverse: whether to come back, :math:`T_h^\top B T_w`; static.

    Returns:
        The coefficients, of x's shape; element k, l of a block's stands where element
        k, l of the block stood.

    Example:
        >>> x = jnp.arange(24.0).reshape(4, 6)
        >>> y = block_dct(x, 3)  # blocks of 2 x 3
        >>> round(float(y[0, 0]), 3) == round(float(x[:2, :3].sum()) / 6**0.5, 3)
        True
        >>> bool(jnp.allclose(block_dct(y, 3, inverse=True), x, atol=1e-5))
        True
    """
    (count, height, width), (h, w) = _matrices(x.shape), block_sides(x.shape, chunk)
    blocks = x.reshape(count, height // h, h, width // w, w)
    spec = "cyixj,ik,jl->cykxl" if inverse else "cyixj,ki,lj->cykxl"
    turned = jnp.einsum(
        spec, blocks, dct_matrix(h), dct_matrix(w), precision=lax.Precision.HIGHEST
    )
    return turned.reshape(x.shape)


# --- the compressor ------------------------------------------------------------------


def dct_topk(chunk: int = 64, k: int = 8) -> Compressor:
    r"""Keep the k largest coefficients of each chunk's cosine transform.

    .. math:: C(x) = T^\top \mathrm{top}_k(T x)

    for each chunk of s elements, T the orthonormal DCT-II.

    Args:
        chunk: s, 1 .. 4096; static. A shorter vector is one chunk of its own length (k
            is lowered to it); the last chunk of a longer one is filled up with zeros.
        k: coefficients kept of each chunk, 1 .. chunk; static.

    Returns:
        A biased, deterministic compressor. Payload: k coefficients (float32) and k
        indices inside the chunk (uint8 for s <= 256, else uint16) of each chunk: 5 or 6
        bytes a coefficient.

    Raises:
        ValueError: for an argument out of range.

    Notes:
        delta = k/s as for ``block_topk``, because T keeps norms; attained by a chunk
        whose coefficients are all equal. Exact to rounding for k = s. A NaN or infinity
        makes its whole chunk NaN.

    Differences from the original:
        Chunks of a flat vector instead of blocks of a matrix, which the optimizer
        ``demo`` has; indices of one or two bytes instead of eight.

    References:
        Peng et al., `DeMo: Decoupled Momentum Optimization`, 2024 (arXiv 2411.19870).

    Example:
        >>> import jax.numpy as jnp
        >>> c = dct_topk(chunk=4, k=1)
        >>> x = jnp.array([2.0, 2.0, 2.0, 2.0, 1.0, 1.0, -1.0, -1.0])
        >>> payload, _ = c.compress(None, x, ())
        >>> payload.indices.tolist(), c.facts.payload_bytes(x)
        ([0, 1], 10)
        >>> [round(v, 3) for v in c.decompress(payload, x).tolist()]
        [2.0, 2.0, 2.0, 2.0, 1.207, 0.5, -0.5, -1.207]
    """
    require_integer("dct_topk", "chunk", chunk, 1, 4096, "DeMo's is 64.")
    require_integer("dct_topk", "k", k, 1, chunk, "At most chunk can be kept.")

    def shape(like) -> tuple[int, int, int]:
        rows, width = row_shape(math.prod(like.shape), chunk)
        return rows, width, min(k, width)

    def turn(rows, matrix):
        unit, scale = unit_scale(rows)
        return jnp.matmul(unit, matrix, precision=lax.Precision.HIGHEST) * scale

    def compress(key, x, state):
        del key
        _, width, count = shape(x)
        spectrum = turn(as_rows(x.astype(jnp.float32), width), dct_matrix(width).T)
        return largest_of_rows(saturate(spectrum, jnp.float32), count), state

    def decompress(payload, like):
        rows, width, _ = shape(like)
        full = turn(rows_of_sparse(payload, rows, width), dct_matrix(width)).reshape(-1)
        return saturate(full[: math.prod(like.shape)], like.dtype)

    def payload_bytes(like):
        rows, width, count = shape(like)
        return rows * count * (4 + index_dtype(width).itemsize)

    def delta(d: int) -> float:
        return min(k, d) / min(chunk, d)

    def attained(d: int) -> np.ndarray:
        x, width = np.zeros(d), min(chunk, d)
        x[:width] = dct_matrix(width).sum(axis=0)
        return x

    facts = CompressorFacts(
        name=f"dct_topk(chunk={chunk}, k={k})",
        unbiased=False,
        delta=delta,
        payload_bytes=payload_bytes,
        source="derived; sharp",
        attained=attained,
    )
    return Compressor(stateless, compress, decompress, facts)
