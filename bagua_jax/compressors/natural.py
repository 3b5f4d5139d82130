"""Natural compression: random rounding to powers of two."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from bagua_jax.compressors.base import (
    Compressor,
    CompressorFacts,
    require_integer,
    require_key,
    stateless,
)
from bagua_jax.compressors.dithering import Grid, Norm, dithering
from bagua_jax.compressors.numerics import is_finite, saturate
from bagua_jax.compressors.packing import pack, packed_bytes, unpack

__all__ = ["NaturalPayload", "natural", "natural_dithering"]


class NaturalPayload(NamedTuple):
    """What :func:`natural` sends."""

    exponents: jax.Array  # [d] uint8, of float32; 0 stands for zero
    signs: jax.Array  # [ceil(d/8)] uint8, a bit for each negative element


def natural() -> Compressor:
    r"""Round each element at random to one of the two powers of two around it.

    .. math:: C(x)_j = \mathrm{sign}(x_j)\,2^{k + B_j},\quad
              k = \lfloor \log_2 |x_j| \rfloor,\quad
              B_j \sim \mathrm{Bernoulli}(|x_j|/2^k - 1)

    by integer arithmetic on the bits of float32: 23 random bits are added to the
    mantissa, and what is left of it is dropped. Powers of two are exact.

    Returns:
        An unbiased compressor; needs a key. Payload: the exponents, and the signs eight
        a byte: 9 bits an element, d + ceil(d/8) bytes.

    Raises:
        ValueError: when compressing without a key.

    Notes:
        omega is 1/8 for every d, attained where all magnitudes are 4/3 of a power of
        two. Subnormal numbers are rounded without bias to 0 or 2^-126, with a larger
        variance; magnitudes from 2^127 on are rounded down, as 2^128 is no float32. A
        NaN or infinity decodes to an infinity, other elements as ever.

    References:
        Horvath et al., `Natural Compression for Distributed Deep Learning`, 2019
        (arXiv 1905.10988). omega: (x - a)(2a - x)/x^2 is largest at x = 4a/3.

    Example:
        >>> import jax, jax.numpy as jnp
        >>> c = natural()
        >>> x = jnp.array([0.25, -8.0, 0.0])
        >>> payload, _ = c.compress(jax.random.key(0), x, ())
        >>> payload.exponents.tolist(), c.decompress(payload, x).tolist()
        ([125, 130, 0], [0.25, -8.0, 0.0])
        >>> c.facts.payload_bytes(x)
        4
    """

    def compress(key, x, state):
        key = require_key("natural", key)
        bits = lax.bitcast_convert_type(x.astype(jnp.float32), jnp.uint32)
        magnitude = bits & 0x7FFFFFFF
        noise = jax.random.bits(key, x.shape, jnp.uint32) >> 9
        room = (magnitude >> 23) < 254  # the next power is a finite float32
        rounded = (magnitude + jnp.where(room, noise, 0)) >> 23
        signs = pack((bits >> 31).astype(jnp.uint8), 2)
        return NaturalPayload(rounded.astype(jnp.uint8), signs), state

    def decompress(payload, like):
        signs = unpack(payload.signs, 2, math.prod(like.shape)).astype(jnp.uint32)
        bits = (signs << 31) | (payload.exponents.astype(jnp.uint32) << 23)
        value = lax.bitcast_convert_type(bits, jnp.float32)
        narrow = saturate(value, like.dtype)
        return jnp.where(is_finite(value), narrow, value.astype(like.dtype))

    def payload_bytes(like):
        count = math.prod(like.shape)
        return count + packed_bytes(2, count)

    facts = CompressorFacts(
        name="natural",
        unbiased=True,
        omega=lambda d: 1 / 8,
        payload_bytes=payload_bytes,
        source="derived; sharp",
        padding="edge",
        attained=lambda d: np.full(d, 4 / 3),
        assumes="magnitudes below 2^127",
    )
    return Compressor(stateless, compress, decompress, facts)


def natural_dithering(
    levels: int = 7, norm: Norm = "l2", bucket: int | None = None
) -> Compressor:
    r"""Round each magnitude at random to a binary fraction of the norm.

    .. math:: C(x)_j = \|x\|\,\mathrm{sign}(x_j)\, v_j,\quad
              v_j \in \{0, 2^{1-s}, 2^{2-s}, \dots, \tfrac12, 1\},\quad
              \mathbb E\, v_j = |x_j| / \|x\|

    Its levels lie where small elements are; ``qsgd`` has them equidistant.

    Args:
        levels: s, 1 .. 126; static. A code is one of 2s + 1.
        norm: ``"l2"``, or ``"max"`` for the largest magnitude; of a bucket.
        bucket: elements that share a norm; ``None`` for the whole vector.

    Returns:
        An unbiased compressor; needs a key. Payload: codes, packed to 4 bits for
        s <= 7, 5 bits for s <= 15, and so on, five codes a byte for s = 1 and three a
        byte for s = 2; and 4 bytes a bucket.

    Raises:
        ValueError: for an argument out of range; when compressing without a key.

    Notes:
        With d the vector's or the bucket's length and e = 2^(1-s), omega is

        - L2 norm: :math:`e \sqrt d - 1` if :math:`4 e \sqrt d \ge 9 - 4 e^2`, attained
          by equal elements; otherwise at most
          :math:`(1 - 4e^2)/8 + 2 e^2 d/(9 - 4e^2)`, and
          :math:`\tfrac32\sqrt d - 1 - d/2` if :math:`6 \sqrt d \le 9 - 4 e^2` (one
          element, and two if s > 2), attained by equal elements;
        - max norm: the larger one of :math:`(\sqrt{1 + (d-1) e^2} - 1)/2` and, for
          s > 1, the root of :math:`\lambda^2 + \lambda (d+1)/2 = (d-1)/16`, below 1/8;
          attained by (1, t, ..., t).

        NaN, infinities, tiny and huge values: as in ``qsgd``.

    References:
        Horvath et al., `Natural Compression for Distributed Deep Learning`, 2019
        (arXiv 1905.10988), whose bound is larger. Constants derived: the concave
        envelope of a coordinate's variance as a function of its square (L2), and the
        maximum of variance - lambda u^2 over a coordinate u (max).

    Example:
        >>> import jax, jax.numpy as jnp
        >>> c = natural_dithering(levels=4, norm="max")
        >>> x = jnp.array([0.5, -1.0, 0.0, 0.125])
        >>> payload, _ = c.compress(jax.random.key(0), x, ())
        >>> c.decompress(payload, x).tolist()  # on the grid: exact
        [0.5, -1.0, 0.0, 0.125]
        >>> c.facts.payload_bytes(x)
        6
    """
    require_integer(
        "natural_dithering", "levels", levels, 1, 126, "7 levels make codes of 4 bits."
    )
    name = f"natural_dithering(levels={levels}, norm={norm}, bucket={bucket})"
    least = 2.0 ** (1 - levels)

    def locate(u):
        bits = lax.bitcast_convert_type(u, jnp.uint32)
        exponent = (bits >> 23).astype(jnp.float32) - 127
        mantissa = (bits & 0x7FFFFF).astype(jnp.float32) / 2**23
        inside = u >= least
        below = jnp.where(inside, exponent + levels, 0)
        return below, jnp.where(inside, mantissa, u / least)

    def value(index):
        exponent = index.astype(jnp.int32) - levels
        power = lax.bitcast_convert_type((exponent + 127) << 23, jnp.float32)
        return jnp.where(index > 0, power, 0)

    def omega(d: int) -> float:
        d = min(d, bucket or d)
        return _omega_l2(levels, d) if norm == "l2" else _omega_max(levels, d)[0]

    def attained(d: int) -> np.ndarray | None:
        x, width = np.zeros(d), min(d, bucket or d)
        x[0], x[:width] = 1, 1
        if norm == "max":
            x[1:width] = _omega_max(levels, width)[1]
        else:
            relative = 1 / math.sqrt(width) - np.array(_hull(levels))
            if levels > 1 and relative[0] > 0 > relative[1]:
                return None
        return x

    return dithering(
        name,
        Grid(top=levels, locate=locate, value=value),
        norm,
        bucket,
        lambda payload_bytes: CompressorFacts(
            name=name,
            unbiased=True,
            omega=omega,
            payload_bytes=payload_bytes,
            source="derived; sharp, but an upper bound between the cases of l2",
            attained=attained,
        ),
    )


def _hull(levels: int) -> tuple[float, float]:
    """Where the chord of the envelope touches the variance, as u; for s > 1."""
    least = 2.0 ** (1 - levels)
    return 4 * least / (9 - 4 * least**2), 6 / (9 - 4 * least**2)


def _omega_l2(levels: int, d: int) -> float:
    least, root = 2.0 ** (1 - levels), math.sqrt(d)
    low, high = _hull(levels)
    if levels == 1 or root * low >= 1:
        return least * root - 1
    if root * high <= 1:
        return 1.5 * root - 1 - d / 2
    return (1 - 4 * least**2) / 8 + 2 * least**2 * d / (9 - 4 * least**2)


def _omega_max(levels: int, d: int) -> tuple[float, float]:
    """Return omega, and the size of the elements beside a 1 that attain it."""
    least, others = 2.0 ** (1 - levels), d - 1
    lowest = (math.sqrt(1 + others * least**2) - 1) / 2
    below = (lowest, least / (2 * (1 + lowest)))
    if levels == 1:
        return below
    half = (1 + others / 2) / 2
    between = math.sqrt(half**2 + others / 16) - half
    return max(below, (between, 3 / (4 * (1 + between))))
