"""Block-quantised codes of two to eight bits between each block's ends."""

import math
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

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
    extrema,
    is_finite,
    over_power,
    randomly_up,
    row_shape,
    saturate,
    unit_scale,
)
from bagua_jax.compressors.packing import pack, packed_bytes, unpack

__all__ = ["BlockwisePayload", "blockwise"]


class BlockwisePayload(NamedTuple):
    """What :func:`blockwise` sends."""

    codes: jax.Array  # packed uint8
    ranges: jax.Array  # [blocks, 2] float32, smallest and largest element


def blockwise(
    bits: int = 8,
    block: int = 512,
    rounding: Literal["nearest", "stochastic"] = "nearest",
) -> Compressor:
    r"""Round to 2^bits levels between the ends of each block of elements.

    .. math::
        \Delta = \frac{\max x - \min x}{2^b - 1},\quad
        c_j = \mathrm{round}\Big(\frac{x_j - \min x}{\Delta}\Big),\quad
        C(x)_j = \min x + c_j \Delta

    over the elements of one block, in float32. An element is wrong by at most half a
    level (a whole one with stochastic rounding); both ends and blocks of equal
    elements are exact. Zero is a level only by chance: see ``minmax_uint8`` for that.

    Args:
        bits: 2 .. 8, of a code; static.
        block: elements that share a range, at least 2; static. A vector's last block
            may be shorter, and nothing that fills it up takes part in its range.
        rounding: ``"nearest"`` (ties to even), or ``"stochastic"``, which rounds up
            with the probability that makes it unbiased, and needs a key.

    Returns:
        A compressor; unbiased if rounding is stochastic. Payload: packed codes, d bytes
        for 8 bits, ceil(d/2) for 4, ceil(d/4) for 2, and one such term for each one in
        the binary form of ``bits`` otherwise; and 8 bytes a block.

    Raises:
        ValueError: for an argument out of range; when compressing without a key if
            rounding is stochastic.

    Notes:
        With D = min(d, block) the relative error is at most (D - 2) / (2 (2^b - 1)^2),
        for either rounding: no contraction at all if D > 2 + 2 (2^b - 1)^2, which is 20
        for 2 bits and 100 for 3. Make blocks smaller there, or rotate the vector first
        (``hadamard``). No element is wrong by more than 1 / (2^b - 1) of the largest (2
        with stochastic rounding), so that the error may be fed back all the same.
        A NaN or infinity makes its whole block NaN.

    References:
        Block quantisation as in CGX (Markov et al., 2021, arXiv 2111.08617). ZeRO++
        (Wang et al., 2023, arXiv 2306.10209) quantises blocks, too, but on a symmetric
        grid that is clamped. The constant is derived: two elements reach the range R,
        so that \|x\|^2 >= R^2/2, and D - 2 are wrong by half a level at most (or have
        variance Delta^2/4). (1, -1, 0, ...) attains it.

    Example:
        >>> import jax.numpy as jnp
        >>> c = blockwise(bits=2, block=4)
        >>> x = jnp.array([0.0, 1.1, 1.9, 3.0, -5.0, -5.0])
        >>> payload, _ = c.compress(None, x, ())
        >>> payload.ranges.tolist(), payload.codes.nbytes, c.facts.payload_bytes(x)
        ([[0.0, 3.0], [-5.0, -5.0]], 2, 18)
        >>> c.decompress(payload, x).tolist()
        [0.0, 1.0, 2.0, 3.0, -5.0, -5.0]
    """
    require_integer(
        "blockwise", "bits", bits, 2, 8, "For one bit an element use sign()."
    )
    require_integer(
        "blockwise", "block", block, 2, 2**31 - 1, "512 is a common choice."
    )
    require_choice(
        "blockwise",
        "rounding",
        rounding,
        ("nearest", "stochastic"),
        "Nearest is biased and more precise, stochastic is unbiased and needs a key.",
    )
    name = f"blockwise(bits={bits}, block={block}, rounding={rounding})"
    top = 2**bits - 1
    stochastic = rounding == "stochastic"

    def compress(key, x, state):
        rows = as_rows(x.astype(jnp.float32), block, "edge")
        low, high = extrema(rows)
        ranges = jnp.concatenate([low, high], axis=-1)
        unit, power = unit_scale(rows, jnp.maximum(-low, high))
        least = over_power(low, power)
        span = over_power(high, power) - least
        step = jnp.where(span > 0, span, 1) / top
        level = jnp.clip((unit - least) / step, 0, top)
        if stochastic:
            below = jnp.floor(level)
            up = randomly_up(require_key(name, key), level - below)
            level = below + up
        codes = jnp.rint(level).astype(jnp.uint8).reshape(-1)[: x.shape[0]]
        return BlockwisePayload(pack(codes, top + 1), ranges), state

    def decompress(payload, like):
        count = math.prod(like.shape)
        levels = unpack(payload.codes, top + 1, count).astype(jnp.float32)
        low, high = payload.ranges[:, :1], payload.ranges[:, 1:]
        finite = is_finite(low) & is_finite(high)
        half = low / 2 + (high / 2 - low / 2) * (as_rows(levels, block) / top)
        rows = jnp.where(finite, half + half, jnp.nan)
        return saturate(rows.reshape(-1)[:count], like.dtype)

    def payload_bytes(like):
        count = math.prod(like.shape)
        return packed_bytes(top + 1, count) + 8 * row_shape(count, block)[0]

    def error(d: int) -> float:
        return max(min(d, block) - 2, 0) / (2 * top**2)

    def attained(d: int) -> np.ndarray:
        x = np.zeros(d)
        x[:2] = (1, -1)[:d]
        return x

    facts = CompressorFacts(
        name=name,
        unbiased=stochastic,
        omega=error if stochastic else None,
        delta=None if stochastic else lambda d: 1 - error(d),
        payload_bytes=payload_bytes,
        padding="edge",
        source="derived; sharp",
        attained=attained,
        max_error=(2 if stochastic else 1) / top,
    )
    return Compressor(stateless, compress, decompress, facts)
