"""BAGUA's 8-bit min-max codec, made right where the original breaks."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from bagua_jax.compressors.base import Compressor, CompressorFacts, stateless
from bagua_jax.compressors.numerics import divide, extrema, is_finite

__all__ = ["MinMaxPayload", "minmax_uint8"]


class MinMaxPayload(NamedTuple):
    """What :func:`minmax_uint8` sends."""

    codes: jax.Array  # [d] uint8
    range: jax.Array  # [2] float32, smallest and largest element


class _Grid(NamedTuple):
    """The 256 levels that a range stands for; sender and receiver derive the same."""

    aligned: jax.Array  # [] bool, levels are multiples of 1/scale
    scale: jax.Array  # [] float32, levels per unit
    upper: jax.Array  # [] float32, index of the highest level
    low: jax.Array  # [] float32, half the smallest element
    half: jax.Array  # [] float32, half the range; halves do not overflow
    finite: jax.Array  # [] bool


def _grid(low: jax.Array, high: jax.Array) -> _Grid:
    scale = 255.0 / (high - low + 1e-7)
    reach = jnp.maximum(jnp.abs(low), jnp.abs(high)) * scale
    return _Grid(
        # Beyond 2^24 float32 holds no exact integers, and the multiples degrade. A
        # range that overflows gives scale 0: then, too, the levels start at `low`.
        aligned=(reach <= 2.0**24) & (scale > 0),
        scale=scale,
        upper=jnp.rint(high * scale),
        low=low / 2,
        half=high / 2 - low / 2,
        finite=is_finite(low) & is_finite(high),
    )


def _encode(x: jax.Array, grid: _Grid) -> jax.Array:
    multiple = jnp.minimum(jnp.rint(x * grid.scale), grid.upper) - (grid.upper - 255)
    step = jnp.where(grid.half > 0, grid.half, 1.0) / 255
    offset = jnp.rint(divide(x / 2 - grid.low, step))
    code = jnp.where(grid.aligned, multiple, offset)
    return jnp.clip(code, 0, 255).astype(jnp.uint8)


def _decode(codes: jax.Array, grid: _Grid, dtype: jnp.dtype) -> jax.Array:
    level = codes.astype(jnp.float32)
    multiple = divide(level + (grid.upper - 255), grid.scale)
    fraction = grid.half * (level / 255)
    offset = (grid.low + fraction) + (grid.low + fraction)
    value = jnp.where(grid.aligned, multiple, offset)
    # The highest level may lie above the largest element, and so above the dtype's.
    limit = float(jnp.finfo(dtype).max)
    value = jnp.clip(value, -limit, limit).astype(dtype)
    return jnp.where(grid.finite, value, jnp.nan).astype(dtype)


def minmax_uint8() -> Compressor:
    r"""Round to 256 levels between the smallest and the largest element.

    BAGUA's codec: levels are integer multiples of 1/s, so that zero is a level
    whenever the range holds it, and decodes to exactly zero.

    .. math::
        s = \frac{255}{\max x - \min x + 10^{-7}},\quad
        u = \mathrm{RN}(s \max x),\quad l = u - 255

        c_j = \mathrm{clip}(\min(\mathrm{RN}(s x_j), u) - l,\ 0,\ 255),\quad
        C(x)_j = (c_j + l) / s

    in float32, ties to even. The error of an element is at most 1/(2s), and half a
    step more where rounding moved the lowest or the highest level inwards.

    Returns:
        A biased, deterministic compressor of one range for the whole vector. Payload:
        d codes (uint8) and the range (2 float32), d + 8 bytes.

    Differences from the original:
        Codes are clamped at both ends (the original wraps below zero for symmetric
        ranges and above 255 for constant ones). Where max|x| s exceeds 2^24 (a range
        below about 1.5e-5 of the offset, among them all large constants) or the range
        overflows float32, multiples of 1/s are not exact: there the levels are
        ``min + c (max - min) / 255``, a constant vector is exact, and zero is no level.
        A NaN or infinity anywhere makes every decoded element NaN; the original's
        result is undefined. The range travels as float32 whatever the input.

    References:
        Gan et al., `BAGUA: Scaling up Distributed Learning with System Relaxations`,
        2021 (arXiv 2107.01499); its MinMaxUInt8 codec. delta: each error is at most
        min(\|x_j\|, D/2) with D = range/255, and two elements reach the range, hence
        1 - delta <= d/(d - 2 + 2*255^2); for ranges well above 1e-7, below which
        everything decodes to multiples of 1e-7/255.

    Example:
        >>> import jax.numpy as jnp
        >>> c = minmax_uint8()
        >>> x = jnp.array([-0.5, 0.0, 0.5])
        >>> payload, _ = c.compress(None, x, ())
        >>> payload.codes.tolist()
        [1, 128, 255]
        >>> [round(v, 6) for v in c.decompress(payload, x).tolist()]
        [-0.498039, 0.0, 0.498039]
    """

    def compress(key, x, state):
        del key
        x = x.astype(jnp.float32)
        bounds = jnp.concatenate(extrema(x))
        return MinMaxPayload(_encode(x, _grid(*bounds)), bounds), state

    def decompress(payload, like):
        return _decode(payload.codes, _grid(*payload.range), jnp.dtype(like.dtype))

    facts = CompressorFacts(
        name="minmax_uint8",
        unbiased=False,
        delta=lambda d: max(0.0, 1 - d / (max(d, 2) - 2 + 2 * 255**2)),
        payload_bytes=lambda like: math.prod(like.shape) + 8,
        padding="edge",
        source="zero-aligned grid, ranges well above 1e-7 (see the docstring)",
    )
    return Compressor(stateless, compress, decompress, facts)
