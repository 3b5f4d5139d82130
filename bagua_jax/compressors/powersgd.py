"""Low-rank approximation by one power iteration a step."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from bagua_jax.compressors.base import Compressor, CompressorFacts, require_integer
from bagua_jax.compressors.numerics import saturate, unit_scale

__all__ = ["PowerSGDPayload", "powersgd"]


class PowerSGDPayload(NamedTuple):
    """What :func:`powersgd` sends."""

    left: jax.Array  # [m, r] float32, orthonormal columns
    right: jax.Array  # [c, r] float32, divided by sqrt(m)


def powersgd(rank: int = 2, seed: int = 0) -> Compressor:
    r"""Approximate the vector, seen as a matrix, by one of low rank.

    .. math::
        P = \mathrm{orth}(M Q),\quad Q' = M^\top P,\quad C(M) = P Q'^\top

    M is the vector in m rows of c = ceil(sqrt(d)), filled up with zeros. Q' is where
    the next step's iteration starts (warm start), so that on a slowly changing M it
    finds the leading singular vectors.

    Args:
        rank: r, 1 .. 4096; static.
        seed: of the Q of the first step, drawn from N(0, 1); static.

    Returns:
        A biased compressor; it needs no key. State: Q [c, r] float32 with columns of
        length 1. Payload: P and Q', 4 r (m + c) bytes. Where that is no less than the
        vector's 4 d bytes, the vector itself is sent, exactly, and there is no state.

    Raises:
        ValueError: for a rank or a seed out of range.

    Notes:
        C(M) is an orthogonal projection: \|M - C(M)\|^2 = \|M\|^2 - \|P^T M\|^2. It is
        exact in one step if the rank of M is at most r, and on a fixed M the angle to
        the leading singular subspace shrinks by (sigma_{r+1}/sigma_r)^2 a step.
        delta = r/m in the mean over the first Q; with equal singular values it is
        attained for every Q. For one given Q there is none: an M with M Q = 0 exists.
        Payloads of workers cannot be summed: C is linear only for a common P. A NaN or
        infinity makes everything NaN and leaves the state as it was.

    Differences from the original:
        One message with both factors instead of two all-reduces with a common P; a
        flat vector instead of each layer's matrix; QR instead of Gram-Schmidt.

    References:
        Vogels et al., `PowerSGD: Practical Low-Rank Gradient Compression for
        Distributed Optimization`, 2019 (arXiv 1905.13727). delta derived: a random
        subspace holds at least as much of the larger singular directions as of the
        smaller ones, and r of m dimensions in all.

    Example:
        >>> import jax.numpy as jnp
        >>> c = powersgd(rank=1)
        >>> x = jnp.outer(jnp.arange(1.0, 9.0), jnp.linspace(-1, 1, 8)).reshape(-1)
        >>> payload, state = c.compress(None, x, c.init(x))
        >>> bool(jnp.allclose(c.decompress(payload, x), x, atol=1e-5))
        True
        >>> c.facts.payload_bytes(x), c.facts.delta(64)
        (64, 0.125)
    """
    require_integer("powersgd", "rank", rank, 1, 4096, "1, 2 and 4 are common.")
    require_integer("powersgd", "seed", seed, 0, 2**32 - 1, "Any fixed number will do.")
    exact = lax.Precision.HIGHEST

    def low_rank(d: int) -> bool:
        return rank * sum(_matrix_shape(d)) < d

    def init(x):
        d = math.prod(x.shape)
        if not low_rank(d):
            return ()
        q = jax.random.normal(jax.random.key(seed), (_matrix_shape(d)[1], rank))
        return q.astype(jnp.float32)

    def compress(key, x, state):
        del key
        d, x = x.shape[0], x.astype(jnp.float32)
        if not low_rank(d):
            return x, state
        rows, columns = _matrix_shape(d)
        unit, scale = unit_scale(x)
        matrix = jnp.pad(unit, (0, rows * columns - d)).reshape(rows, columns)
        left, _ = jnp.linalg.qr(jnp.matmul(matrix, state, precision=exact))
        right = jnp.matmul(matrix.T, left / math.sqrt(rows), precision=exact)
        length = jnp.linalg.norm(right, axis=0, keepdims=True)
        # A column that found nothing, or nothing finite, starts from where it was.
        state = jnp.where(length > 0, right / jnp.where(length > 0, length, 1), state)
        return PowerSGDPayload(left, right * scale[0]), state

    def decompress(payload, like):
        d = math.prod(like.shape)
        if not low_rank(d):
            return payload.astype(like.dtype)
        rows, _ = _matrix_shape(d)
        flat, scale = unit_scale(payload.right.reshape(-1))
        right = flat.reshape(payload.right.shape) * math.sqrt(rows)
        matrix = jnp.matmul(payload.left, right.T, precision=exact)
        return saturate(matrix.reshape(-1)[:d] * scale, like.dtype)

    def payload_bytes(like):
        d = math.prod(like.shape)
        return 4 * (rank * sum(_matrix_shape(d)) if low_rank(d) else d)

    def delta(d: int) -> float:
        return rank / _matrix_shape(d)[0] if low_rank(d) else 1.0

    def attained(d: int) -> np.ndarray | None:
        rows, columns = _matrix_shape(d)
        return np.eye(rows, columns).reshape(-1) if rows * columns == d else None

    facts = CompressorFacts(
        name=f"powersgd(rank={rank})",
        unbiased=False,
        delta=delta,
        payload_bytes=payload_bytes,
        source="derived; sharp",
        attained=attained,
        assumes="a first Q drawn independently of the vector, and the mean over it",
    )
    return Compressor(init, compress, decompress, facts)


def _matrix_shape(d: int) -> tuple[int, int]:
    """Return the rows and columns of the nearly square matrix of d elements."""
    columns = max(1, math.isqrt(d - 1) + 1) if d > 0 else 1
    return -(-d // columns), columns
