"""A rotation around another compressor, which spreads large elements over a chunk."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bagua_jax.compressors.base import (
    Compressor,
    CompressorFacts,
    Payload,
    require_integer,
    require_key,
)
from bagua_jax.compressors.numerics import as_rows, saturate, seeded, unit_scale
from bagua_jax.compressors.sign import sign

__all__ = ["HadamardPayload", "hadamard"]


class HadamardPayload(NamedTuple):
    """What :func:`hadamard` sends."""

    inner: Payload  # of the rotated vector
    seed: jax.Array | tuple[()]  # [2] uint32, of the signs; () without


def hadamard(
    inner: Compressor = sign(),  # noqa: B008  (immutable)
    randomized: bool = True,
    chunk: int = 1024,
) -> Compressor:
    r"""Rotate each chunk by a Walsh-Hadamard matrix, compress, and rotate back.

    .. math:: C(x) = R^\top\, C_0(R x),\quad R = H_p D / \sqrt p

    with H_p the p x p matrix of signs, and D random signs, or the identity. After a
    random rotation the elements of a chunk are nearly Gaussian, whatever they were:
    good for ``sign`` and ``blockwise``, and no use to sparsifiers.

    Args:
        inner: any compressor; it sees one vector of whole chunks.
        randomized: draw D from the key, anew in each call; its seed travels. Static.
        chunk: p, a power of two up to 2^20; static. A shorter vector is filled up with
            zeros to one chunk of the next power of two, a longer one to whole chunks.

    Returns:
        A compressor, unbiased if ``inner`` is. It needs a key if randomized, or if
        ``inner`` does. Payload: that of ``inner`` for the filled-up length, and 8
        bytes if randomized. Linear only if ``inner`` is and nothing is randomized.

    Raises:
        ValueError: for an argument out of range; when compressing without a key if
            randomized.

    Notes:
        omega or delta is that of ``inner`` at the filled-up length, because R keeps
        norms. The rotation mixes real elements with what fills up the last chunk, so
        that a chunk should not be much longer than the vector. A NaN or infinity makes
        its whole chunk NaN before ``inner`` sees it.

    References:
        Suresh et al., `Distributed Mean Estimation with Limited Communication`, 2017
        (arXiv 1611.00429); Vargaftik et al., `DRIVE: One-bit Distributed Mean
        Estimation`, 2021 (arXiv 2105.08339).

    Example:
        >>> import jax.numpy as jnp
        >>> c = hadamard(sign(), randomized=False)
        >>> x = jnp.array([8.0, 0.0, 0.0, 0.0])
        >>> payload, _ = c.compress(None, x, ())
        >>> c.decompress(payload, x).tolist()  # sign() alone: 2.0 everywhere
        [8.0, 0.0, 0.0, 0.0]
        >>> c.facts.name, c.facts.payload_bytes(x)
        ('hadamard(sign(l1), randomized=False, chunk=1024)', 5)
    """
    if not isinstance(inner, Compressor):
        raise ValueError(
            f"hadamard: inner must be a Compressor, got {inner!r}. Call its factory, "
            "as in hadamard(sign())."
        )
    if not isinstance(randomized, bool):
        raise ValueError(
            f"hadamard: randomized must be True or False, got {randomized!r}. True "
            "needs a key and costs 8 bytes."
        )
    require_integer("hadamard", "chunk", chunk, 1, 2**20, "1024 is a good choice.")
    if chunk & (chunk - 1):
        raise ValueError(
            f"hadamard: chunk must be a power of two, got {chunk}. The next one is "
            f"{1 << chunk.bit_length()}."
        )
    facts = inner.facts
    name = f"hadamard({facts.name}, randomized={randomized}, chunk={chunk})"

    def width(count: int) -> int:
        return min(chunk, 1 << (count - 1).bit_length())

    def filled(d: int) -> int:
        return -(-d // width(d)) * width(d)

    def rotated(like):
        return jax.ShapeDtypeStruct((filled(math.prod(like.shape)),), jnp.float32)

    def signs(seed, shape):
        if not randomized:
            return np.float32(1)
        bits = jax.random.bits(seeded(seed), shape, jnp.uint8) >> 7
        return 1 - 2 * bits.astype(jnp.float32)

    def compress(key, x, state):
        seed = ()
        if randomized:
            own, key = jax.random.split(require_key(name, key))
            seed = jax.random.bits(own, (2,), jnp.uint32)
        x = x.astype(jnp.float32)
        rows = jnp.pad(x, (0, filled(x.shape[0]) - x.shape[0]))
        rows = as_rows(rows, width(x.shape[0]))
        turned = _walsh(rows * signs(seed, rows.shape)).reshape(-1)
        payload, state = inner.compress(key, turned, state)
        return HadamardPayload(payload, seed), state

    def decompress(payload, like):
        count = math.prod(like.shape)
        turned = inner.decompress(payload.inner, rotated(like))
        rows = _walsh(as_rows(turned, width(count)))
        rows = rows * signs(payload.seed, rows.shape)
        return saturate(rows.reshape(-1)[:count], like.dtype)

    def attained(d: int) -> np.ndarray | None:
        if randomized or facts.attained is None or filled(d) != d:
            return None
        turned = facts.attained(d)
        if turned is None:
            return None
        rows = turned.reshape(-1, width(d))
        return (rows @ _hadamard_matrix(width(d))).reshape(-1)

    omega, delta = facts.omega, facts.delta
    outer = CompressorFacts(
        name=name,
        unbiased=facts.unbiased,
        omega=None if omega is None else lambda d: omega(filled(d)),
        delta=None if delta is None else lambda d: delta(filled(d)),
        payload_bytes=lambda like: (
            facts.payload_bytes(rotated(like)) + (8 if randomized else 0)
        ),
        linear=facts.linear and not randomized,
        source=f"a rotation keeps norms; {facts.source}",
        attained=attained,
        assumes=facts.assumes,
        range=facts.range,
    )
    return Compressor(lambda x: inner.init(rotated(x)), compress, decompress, outer)


def _walsh(rows: jax.Array) -> jax.Array:
    """Multiply each row by H_p / sqrt(p), as a Kronecker product of small factors."""
    values, scale = unit_scale(rows)
    done, size = 1, rows.shape[1]
    while done < size:
        factor = min(64, size // done)
        groups = values.reshape(-1, factor, done)
        matrix = _hadamard_matrix(factor)
        values = jnp.einsum("ij,rjk->rik", matrix, groups, precision="highest")
        done *= factor
    return saturate(values.reshape(rows.shape) * scale, jnp.float32)


def _hadamard_matrix(size: int) -> np.ndarray:
    """Return Sylvester's matrix, divided by the root of its size."""
    matrix = np.ones((1, 1), np.float32)
    while len(matrix) < size:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return matrix / np.float32(math.sqrt(size))
