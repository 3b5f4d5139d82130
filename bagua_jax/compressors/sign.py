"""Scaled signs: one bit an element."""

import math
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bagua_jax.compressors.base import (
    Compressor,
    CompressorFacts,
    require_choice,
    stateless,
)
from bagua_jax.compressors.numerics import saturate, unit_scale
from bagua_jax.compressors.packing import pack, packed_bytes, unpack

__all__ = ["SignPayload", "sign"]


class SignPayload(NamedTuple):
    """What :func:`sign` sends."""

    signs: jax.Array  # [ceil(d/8)] uint8, a bit for each element that is not negative
    scale: jax.Array  # [] float32


def sign(scale: Literal["l1", "l2"] = "l1") -> Compressor:
    r"""Send the signs and the mean magnitude.

    .. math:: C(x) = \frac{\|x\|_1}{d}\,\mathrm{sign}(x)
              \quad\text{or}\quad \frac{\|x\|_2}{\sqrt d}\,\mathrm{sign}(x),
              \qquad \mathrm{sign}(0) = +1

    Args:
        scale: ``"l1"``, the mean magnitude, which makes the error least; or ``"l2"``,
            the root mean square, which keeps the norm. Static.

    Returns:
        A biased, deterministic compressor. Payload: eight signs a byte and the scale,
        ceil(d/8) + 4 bytes. A single element is exact.

    Raises:
        ValueError: for another scale.

    Notes:
        The relative error is exactly :math:`1 - \|x\|_1^2/(d \|x\|_2^2)` with
        ``"l1"``, hence delta = 1/d, and :math:`2 (1 - \|x\|_1/(\sqrt d \|x\|_2))` with
        ``"l2"``, hence 1 - delta = 2 (1 - 1/sqrt(d)), which is no contraction for
        d >= 4. One element other than zero attains either. Zeros that fill a vector up
        to whole partitions lower the scale. A NaN or infinity makes everything NaN.
        Because sign(0) = +1, an entry whose gradient is always zero (an unused row of
        an embedding, a masked weight) is moved by +scale; error feedback takes that
        back a step later. Mask such leaves (``optax.masked``) where it matters.

    References:
        Karimireddy et al., `Error Feedback Fixes SignSGD and other Gradient Compression
        Schemes`, 2019 (arXiv 1901.09847), for ``"l1"``; ``"l2"`` as in implementations
        of 1-bit Adam (Tang et al., 2021, arXiv 2102.02888).

    Example:
        >>> import jax.numpy as jnp
        >>> c = sign()
        >>> x = jnp.array([3.0, -1.0, 0.0, -4.0])
        >>> payload, _ = c.compress(None, x, ())
        >>> c.decompress(payload, x).tolist(), c.facts.payload_bytes(x)
        ([2.0, -2.0, 2.0, -2.0], 5)
    """
    require_choice(
        "sign", "scale", scale, ("l1", "l2"), "l1 is the one with a contraction."
    )

    def compress(key, x, state):
        del key
        x = x.astype(jnp.float32)
        unit, power = unit_scale(x)
        mean = jnp.mean(jnp.abs(unit)) if scale == "l1" else jnp.sqrt(jnp.mean(unit**2))
        return SignPayload(pack(x >= 0, 2), power[0] * mean), state

    def decompress(payload, like):
        positive = unpack(payload.signs, 2, math.prod(like.shape)) > 0
        value = jnp.where(positive, payload.scale, -payload.scale)
        return saturate(value, like.dtype)

    def delta(d: int) -> float:
        return 1 / d if scale == "l1" else 2 / math.sqrt(d) - 1

    facts = CompressorFacts(
        name=f"sign({scale})",
        unbiased=False,
        delta=delta,
        payload_bytes=lambda like: packed_bytes(2, math.prod(like.shape)) + 4,
        source="exact error formula; sharp",
        attained=lambda d: np.eye(1, d)[0],
    )
    return Compressor(stateless, compress, decompress, facts)
