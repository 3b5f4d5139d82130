"""Arithmetic that compressors share: extrema, scales, random rounding, blocks.

The only place that decides whether a value is finite, and the only one that reduces
floats by max or min. XLA's CPU compiler drops NaN there (from 4,096 elements on, and in
fused reductions of far fewer): a NaN among ones has the maximum 1. So a reduction here
carries the bits of the magnitudes along as integers, whose maximum no compiler may
change, in the same pass over the data.
"""

import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import DTypeLike

__all__ = [
    "all_finite",
    "as_rows",
    "divide",
    "draw_places",
    "extrema",
    "is_finite",
    "kept",
    "largest_magnitude",
    "largest_places",
    "over_power",
    "poisoned",
    "randomly_up",
    "row_shape",
    "saturate",
    "seeded",
    "unit_scale",
]

_TINY = float(jnp.finfo(jnp.float32).tiny)
_LARGEST = float(jnp.finfo(jnp.float32).max)


# --- what is finite ------------------------------------------------------------------


def _magnitude_bits(x: jax.Array) -> tuple[jax.Array, jax.Array, Any]:
    """View magnitudes as integers of the same order.

    Returns:
        x, in float32 if it was narrower; the bits without the sign; and those of
        infinity. Those of a NaN are larger.
    """
    x = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    kind = np.dtype(f"int{8 * x.dtype.itemsize}").type
    bits = lax.bitcast_convert_type(x, kind) & kind(np.iinfo(kind).max)
    return x, bits, np.array(np.inf, x.dtype).view(kind)[()]


def _both_larger(a, b):
    return jnp.maximum(a[0], b[0]), jnp.maximum(a[1], b[1])


def _smaller_and_both_larger(a, b):
    return (jnp.minimum(a[0], b[0]), *_both_larger(a[1:], b[1:]))


def is_finite(x: jax.Array) -> jax.Array:
    """Return for each element whether it is neither infinite nor NaN."""
    if jnp.iscomplexobj(x):
        return is_finite(x.real) & is_finite(x.imag)
    _, bits, infinity = _magnitude_bits(x)
    return bits < infinity


def largest_magnitude(x: jax.Array, axis: int | None = -1) -> jax.Array:
    """Return the largest magnitude along an axis, or NaN if an element is not finite.

    Args:
        x: floating.
        axis: reduced, and kept with length 1; ``None``: all axes, into a scalar.

    Returns:
        In float32, or x's dtype if that is wider; 0 where there are no elements.

    Example:
        >>> x = jnp.ones(4096).at[7].set(jnp.nan)
        >>> largest_magnitude(x).tolist(), largest_magnitude(-2 * x[:7]).tolist()
        ([nan], [2.0])
    """
    x, bits, infinity = _magnitude_bits(x)
    axes = tuple(range(x.ndim)) if axis is None else (axis % x.ndim,)
    # One operand alone, or twice the same, is compiled to several passes.
    largest, top = lax.reduce(
        (jnp.abs(x), bits), (x.dtype.type(0), infinity * 0), _both_larger, axes
    )
    largest = jnp.where(top < infinity, largest, jnp.nan)
    return largest if axis is None else jnp.expand_dims(largest, axis)


def extrema(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return the smallest and the largest element of each row in one pass.

    Args:
        x: [..., d] floating, d >= 1.

    Returns:
        Two arrays [..., 1] in float32, or x's dtype if that is wider; both NaN where an
        element of the row is not finite.

    Example:
        >>> [v.tolist() for v in extrema(jnp.array([[1.0, -3.0], [2.0, jnp.inf]]))]
        [[[-3.0], [nan]], [[1.0], [nan]]]
    """
    x, bits, infinity = _magnitude_bits(x)
    low, high, top = lax.reduce(
        (x, x, bits),
        (x.dtype.type(np.inf), x.dtype.type(-np.inf), infinity * 0),
        _smaller_and_both_larger,
        (x.ndim - 1,),
    )
    low, high = (jnp.where(top < infinity, v, jnp.nan) for v in (low, high))
    return low[..., None], high[..., None]


def all_finite(x: jax.Array) -> jax.Array:
    """Return whether all elements are finite, as a scalar.

    Args:
        x: floating or complex.

    Example:
        >>> bool(all_finite(jnp.ones(5000))), bool(all_finite(jnp.array([1, jnp.inf])))
        (True, False)
    """
    if jnp.iscomplexobj(x):
        return all_finite(x.real) & all_finite(x.imag)
    return is_finite(largest_magnitude(x, axis=None))


def poisoned(values: jax.Array, x: jax.Array) -> jax.Array:
    """Make all values NaN if any element of x is not finite."""
    return jnp.where(all_finite(x), values, jnp.nan)


def largest_places(x: jax.Array, k: int) -> jax.Array:
    """Return the places of the k elements of largest magnitude in each row.

    Args:
        x: [..., d] floating.
        k: 1 .. d.

    Returns:
        [..., k] int32, largest first, and the first ones among equals. NaN and infinity
        are equals, and larger than everything else.

    Example:
        >>> largest_places(jnp.array([0.0, -3.0, jnp.nan, 2.0]), 2).tolist()
        [2, 1]
    """
    wide, bits, infinity = _magnitude_bits(x)
    # As floats, without NaN: XLA:CPU sorts integers whole, at ten times the time.
    size = lax.bitcast_convert_type(jnp.minimum(bits, infinity), wide.dtype)
    return lax.top_k(size, k)[1]


# --- rows ----------------------------------------------------------------------------


def row_shape(count: int, width: int) -> tuple[int, int]:
    """Return the rows and the row length that ``count`` elements are cut into."""
    width = max(1, min(width, count))
    return -(-count // width), width


def as_rows(
    x: jax.Array, width: int, mode: Literal["constant", "edge"] = "constant"
) -> jax.Array:
    """Cut a vector into rows; fill the last one with zeros, or with the last element.

    A vector shorter than a row becomes one row of its own length.
    """
    rows, width = row_shape(x.shape[0], width)
    return jnp.pad(x, (0, rows * width - x.shape[0]), mode).reshape(rows, width)


def kept(ratio: float, count: int) -> int:
    """Count the elements that a ratio keeps: at least one, rounded up.

    Example:
        >>> kept(0.1, 30), kept(0.1, 31), kept(0.001, 5), kept(1.0, 7)
        (3, 4, 1, 7)
    """
    return min(count, max(1, math.ceil(ratio * count * (1 - 1e-12))))


# --- scales --------------------------------------------------------------------------


def unit_scale(
    x: jax.Array, largest: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """Take a power of two out of each row, so that no square or sum overflows.

    Args:
        x: [..., d] float32.
        largest: [..., 1] its :func:`largest_magnitude`, where it is known already.

    Returns:
        The quotient y, and the divisor s [..., 1]: x = s y exactly, and the largest
        magnitude of y is in [1, 4). Both are zero where the largest magnitude of x is
        below the normal numbers, and NaN where an element is not finite.
    """
    largest = largest_magnitude(x) if largest is None else largest
    bits = lax.bitcast_convert_type(largest, jnp.uint32) & 0x7F800000
    # At most 2^126: the inverse of 2^127 is subnormal, and may be taken for zero.
    power = lax.bitcast_convert_type(jnp.minimum(bits, 253 << 23), jnp.float32)
    power = jnp.where(is_finite(largest), power, jnp.nan)
    power = jnp.where(largest < _TINY, 0, power)
    return over_power(x, power), power


def divide(x: jax.Array, by: jax.Array) -> jax.Array:
    """Return x / by, rounded once, so that every program has the same bits.

    XLA multiplies by the reciprocal where it sees that ``by`` is one number, as it does
    on devices and not under ``vmap``, and makes x * c / b of x / (b / c).

    Args:
        x: [...] floating.
        by: of x's dtype; its shape broadcasts to that of x.

    Returns:
        The correctly rounded quotient, like x.

    Example:
        >>> quotient = jax.jit(divide)(jnp.full(4, 7.0), jnp.float32(3))
        >>> quotient.tolist() == [float(np.float32(7) / np.float32(3))] * 4
        True
    """
    return x / lax.optimization_barrier(jnp.broadcast_to(by, x.shape))


def over_power(x: jax.Array, power: jax.Array) -> jax.Array:
    """Divide by the divisor of :func:`unit_scale`; zero where that is zero."""
    return jnp.where(power == 0, 0, x / jnp.where(power == 0, 1, power))


def saturate(x: jax.Array, dtype: DTypeLike) -> jax.Array:
    """Convert, with the largest finite value for what lies beyond it; keep NaN."""
    limit = min(float(jnp.finfo(dtype).max), _LARGEST)
    return jnp.clip(x, -limit, limit).astype(dtype)


# --- randomness ----------------------------------------------------------------------


def randomly_up(key: jax.Array, fraction: jax.Array) -> jax.Array:
    """Draw 1 with probability ``fraction`` in [0, 1), in steps of 2^-32; else 0."""
    bits = jax.random.bits(key, fraction.shape, jnp.uint32)
    return (bits < (fraction * 2.0**32).astype(jnp.uint32)).astype(fraction.dtype)


def seeded(seed: jax.Array) -> jax.Array:
    """Make a key of a seed that came over the wire; [2] uint32.

    Always of the same generator, whatever the caller's key is of.
    """
    return jax.random.wrap_key_data(seed, impl="threefry2x32")


def draw_places(key: jax.Array, d: int, k: int) -> jax.Array:
    """Draw k of d places: those of the k largest among d random numbers.

    Returns:
        [k] int32 without repetition; all places, in their order, if k = d.
    """
    if k == d:
        return jnp.arange(d, dtype=jnp.int32)
    return lax.top_k(jax.random.bits(key, (d,), jnp.uint32), k)[1]
