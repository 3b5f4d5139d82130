"""Rounding to a narrower floating-point format."""

import math

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike

from bagua_jax.compressors.base import Compressor, CompressorFacts, stateless

__all__ = ["cast"]

_FORMATS = ("bfloat16", "float16", "float8_e4m3fn", "float8_e5m2")


def cast(dtype: DTypeLike) -> Compressor:
    r"""Round every element to the nearest value of a narrower format.

    .. math:: C(x)_j = \mathrm{RN}_p(x_j)

    with p significand bits, ties to even.

    Args:
        dtype: ``"bfloat16"``, ``"float16"``, ``"float8_e4m3fn"`` or ``"float8_e5m2"``;
            static.

    Returns:
        A biased compressor. Its payload is the rounded vector with its bits carried as
        u16 or u8, because backends without native support widen bfloat16 and fp8 on
        the wire.

    Raises:
        ValueError: for any other dtype.

    Notes:
        Values beyond the format's range become infinite (NaN in e4m3fn, which has no
        infinity), so that an overflow is seen and never silently clipped. Values below
        half its smallest one become zero: nothing is scaled. ``facts.range`` states
        both ends, by :func:`jax.numpy.finfo`:

        =============  ========  =======
        format         smallest  largest
        =============  ========  =======
        float8_e4m3fn  2.0e-3    448
        float8_e5m2    1.5e-5    57344
        float16        6.0e-8    65504
        bfloat16       9.2e-41   3.4e38
        =============  ========  =======

        Gradients of large models, of 1e-4 and less, vanish in the 8-bit formats. Codes
        of 8 bits with a scale for each block are ``blockwise(8, 256)``.

    References:
        delta is 1 - (u/(1+u))^2 with u = 2^-p for values in the format's normal range:
        the rounding error of x is at most u/(1+u) |x|, attained at 1+u times a power
        of two. Below the normal range the bound does not hold: there an error is at
        most half the smallest value.

    Example:
        >>> import jax.numpy as jnp
        >>> c = cast("bfloat16")
        >>> x = jnp.array([1.0, 1.01])
        >>> payload, _ = c.compress(None, x, ())
        >>> str(payload.dtype), c.decompress(payload, x).tolist()
        ('uint16', [1.0, 1.0078125])
    """
    name = getattr(dtype, "__name__", None) or str(dtype)
    if name not in _FORMATS:
        raise ValueError(
            f"cast: dtype must be one of {', '.join(_FORMATS)}, got {name!r}. "
            "To send vectors as they are use identity()."
        )
    target = jnp.dtype(name)
    wire = jnp.dtype(f"uint{8 * target.itemsize}")
    info = jnp.finfo(target)
    unit = float(info.eps) / 2

    def compress(key, x, state):
        del key
        return lax.bitcast_convert_type(x.astype(target), wire), state

    def decompress(payload, like):
        return lax.bitcast_convert_type(payload, target).astype(like.dtype)

    facts = CompressorFacts(
        name=f"cast({name})",
        unbiased=False,
        delta=lambda d: 1 - (unit / (1 + unit)) ** 2,
        payload_bytes=lambda like: math.prod(like.shape) * np.dtype(wire).itemsize,
        source="round to nearest even, normal range",
        padding="edge",
        assumes="magnitudes in the format's normal range",
        range=(float(info.smallest_subnormal), float(info.max)),
    )
    return Compressor(stateless, compress, decompress, facts)
