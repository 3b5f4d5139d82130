"""Random rounding to a grid between zero and a bucket's norm: the common part."""

import math
from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp

from bagua_jax.compressors.base import (
    Compressor,
    CompressorFacts,
    require_choice,
    require_integer,
    require_key,
    stateless,
)
from bagua_jax.compressors.numerics import (
    as_rows,
    largest_magnitude,
    over_power,
    randomly_up,
    row_shape,
    saturate,
    unit_scale,
)
from bagua_jax.compressors.packing import pack, packed_bytes, unpack

__all__ = ["DitheredPayload", "Grid", "Norm", "dithering"]

Norm = Literal["l2", "max"]


class DitheredPayload(NamedTuple):
    """What ``qsgd``, ``terngrad`` and ``natural_dithering`` send."""

    codes: jax.Array  # packed uint8, or [d] uint16; level with sign, from zero up
    scales: jax.Array  # [buckets] float32, largest magnitude or root mean square


class Grid(NamedTuple):
    """Levels 0 = v_0 < v_1 < ... < v_top = 1.

    Attributes:
        top: index of the highest level.
        locate: u in [0, 1] -> the index of the level below, as float32, and how far u
            is from there to the next, in [0, 1).
        value: index as float32 -> v.
    """

    top: int
    locate: Callable[[jax.Array], tuple[jax.Array, jax.Array]]
    value: Callable[[jax.Array], jax.Array]


def dithering(
    name: str,
    grid: Grid,
    norm: Norm,
    bucket: int | None,
    facts: Callable[..., CompressorFacts],
) -> Compressor:
    r"""Round each magnitude, relative to its bucket's norm, to a level at random.

    .. math:: C(x)_j = \|x\|\, \mathrm{sign}(x_j)\, v_{l_j},\quad
              \mathbb E\, v_{l_j} = |x_j| / \|x\|

    Args:
        name: named in errors: the factory.
        grid: the levels.
        norm: ``"l2"`` or ``"max"``, of a bucket.
        bucket: elements that share a norm; ``None`` for the whole vector.
        facts: makes the facts when given ``payload_bytes``.

    Returns:
        The compressor. An L2 norm travels divided by the square root of the bucket's
        length: as the root mean square, which cannot overflow. Decoded values that
        overflow saturate. A NaN or infinity makes its whole bucket NaN.

    Raises:
        ValueError: for an unknown norm or a bucket that is no positive integer; when
            compressing without a key.
    """
    caller = name.partition("(")[0]
    require_choice(
        caller, "norm", norm, ("l2", "max"), "The largest magnitude adds less noise."
    )
    if bucket is not None:
        require_integer(
            caller, "bucket", bucket, 1, 2**31 - 1, "None: one for the whole vector."
        )
    top = grid.top
    alphabet = 2 * top + 1

    def width(count: int) -> int:
        return count if bucket is None else bucket

    def compress(key, x, state):
        key = require_key(name, key)
        rows = as_rows(x.astype(jnp.float32), width(x.shape[0]))
        largest = largest_magnitude(rows)
        unit, scale = unit_scale(rows, largest)
        unit = jnp.abs(unit)
        if norm == "l2":
            mean = jnp.sqrt(jnp.mean(unit**2, axis=-1, keepdims=True))
            length = mean * math.sqrt(rows.shape[1])
        else:
            mean = length = over_power(largest, scale)
        scale = saturate(scale * mean, jnp.float32)
        # A length is at least 1 unless all elements are zero.
        length = jnp.maximum(length, 1)
        below, fraction = grid.locate(jnp.minimum(unit / length, 1))
        level = jnp.minimum(below + randomly_up(key, fraction), top)
        codes = jnp.where(rows < 0, top - level, top + level).astype(jnp.uint16)
        codes = pack(codes.reshape(-1)[: x.shape[0]], alphabet)
        return DitheredPayload(codes, scale[:, 0]), state

    def decompress(payload, like):
        count = math.prod(like.shape)
        level = unpack(payload.codes, alphabet, count).astype(jnp.float32) - top
        rows = as_rows(level, width(count))
        factor = math.sqrt(rows.shape[1]) if norm == "l2" else 1.0
        value = jnp.sign(rows) * grid.value(jnp.abs(rows)) * factor
        # The select keeps XLA from joining the two factors: an L2 norm may overflow.
        rows = jnp.where(rows == 0, 0, value) * payload.scales[:, None]
        return saturate(rows.reshape(-1)[:count], like.dtype)

    def payload_bytes(like):
        count = math.prod(like.shape)
        buckets, _ = row_shape(count, width(count))
        return packed_bytes(alphabet, count) + 4 * buckets

    return Compressor(stateless, compress, decompress, facts(payload_bytes))
