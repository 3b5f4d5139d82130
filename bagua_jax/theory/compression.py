"""What compression costs: constants of compressors, read off their facts, and rules.

No constant of a compressor is written down here: ``Compressor.facts`` has them. Here is
what follows from them.
"""

import math
from typing import Any, NamedTuple

import numpy as np

from bagua_jax.compressors import Compressor

__all__ = [
    "EXACT",
    "Constants",
    "Message",
    "averaged",
    "composed",
    "constants",
    "induced",
    "interval_omega",
    "message",
    "payload_bytes",
    "scaled_delta",
    "subspace_contraction",
]


class Constants(NamedTuple):
    r"""What is known of a compressor of d elements.

    Attributes:
        omega: :math:`E\|C(x) - x\|^2 \le \omega \|x\|^2`, unbiased; else ``None``.
        delta: :math:`E\|C(x) - x\|^2 \le (1 - \delta) \|x\|^2`; of an unbiased one
            scaled by 1/(1 + omega); ``None`` where no bound is known.
        bits_per_element: of the payload.
        assumes: what the constants need beyond ordinary numbers.
        source: where they come from.
    """

    omega: float | None
    delta: float | None
    bits_per_element: float
    assumes: str
    source: str


def payload_bytes(compressor: Compressor, d: int) -> int:
    """Count the bytes of the payload of d float32 elements."""
    return compressor.facts.payload_bytes(_Like((d,)))


class _Like(NamedTuple):
    shape: tuple[int, ...]
    dtype: Any = np.dtype(np.float32)


def constants(compressor: Compressor, d: int) -> Constants:
    """Evaluate a compressor's facts at a length.

    Args:
        compressor: any.
        d: elements of the vector.

    Example:
        >>> from bagua_jax import compressors
        >>> constants(compressors.randk(0.25), 100)[:2]
        (3.0, 0.25)
    """
    facts = compressor.facts
    omega = facts.omega(d) if facts.unbiased and facts.omega else None
    omega = 0.0 if facts.unbiased and facts.omega is None else omega
    delta = facts.delta(d) if facts.delta else None
    if delta is None and omega is not None:
        delta = scaled_delta(omega)
    bits = 8 * payload_bytes(compressor, d) / d
    return Constants(omega, delta, bits, facts.assumes, facts.source)


# --- rules ----------------------------------------------------------------------------


def scaled_delta(omega: float) -> float:
    """Contraction of an unbiased compressor divided by 1 + omega: 1/(1 + omega)."""
    return 1 / (1 + omega)


def averaged(omega: float, n: int) -> float:
    """Variance of the mean of n independent compressions of one vector: omega/n."""
    return omega / n


def composed(outer: float, inner: float) -> float:
    """Variance of one unbiased compressor after another: (1 + o)(1 + i) - 1."""
    return (1 + outer) * (1 + inner) - 1


def induced(omega: float, delta: float) -> float:
    """Variance of C(x) + Q(x - C(x)), for C with delta and unbiased Q with omega."""
    return omega * (1 - delta)


def interval_omega(low: float, high: float) -> float:
    """Largest relative variance of unbiased rounding between neighbours of a grid.

    :math:`(b - a)^2 / (4 a b)` for a < b, at x = 2ab/(a + b); infinite at a = 0.

    Args:
        low: a >= 0.
        high: b > a.

    Example:
        >>> interval_omega(1.0, 2.0)  # powers of two
        0.125
    """
    return (high - low) ** 2 / (4 * low * high) if low > 0 else math.inf


def subspace_contraction(singular_values: Any, rank: int) -> float:
    r"""Factor of the angle to the leading subspace in a step of warm-started PowerSGD.

    :math:`(\sigma_{r+1}/\sigma_r)^2` on a fixed matrix.

    Args:
        singular_values: of the matrix, the largest first.
        rank: r.
    """
    s = np.asarray(singular_values, float)
    return float((s[rank] / s[rank - 1]) ** 2)


# --- compressors whose second moments are exact ---------------------------------------


class Message(NamedTuple):
    r"""A linear random compressor, as second moments see one element of a vector.

    :math:`C(z) = q z + \varepsilon` with :math:`E \varepsilon = 0`, uncorrelated with
    z, and :math:`E \varepsilon^2 = v z^2`, exactly and for every z.

    Attributes:
        kept: q.
        variance: v.
        shared: all workers draw the same mask wherever payloads are summed (gossip
            draws one for each worker all the same).
    """

    kept: float = 1.0
    variance: float = 0.0
    shared: bool = False


EXACT = Message()
"""No compression."""


def message(compressor: Compressor | None, d: int) -> Message:
    r"""Return the exact second moments of a compressor, where it has them.

    Random-k keeps an element with probability k/d. Masks of different elements are
    correlated, but on a diagonal Hessian every element evolves by itself.

    Args:
        compressor: ``identity()``, ``randk``, or ``None`` for no compression.
        d: elements of a bucket.

    Raises:
        ValueError: for any other: its error depends on the vector.

    Example:
        >>> from bagua_jax import compressors
        >>> message(compressors.randk(0.25, scaled=False), 8)
        Message(kept=0.25, variance=0.1875, shared=True)
    """
    if compressor is None or compressor.facts.name == "identity":
        return EXACT
    facts = compressor.facts
    if not facts.name.startswith("randk("):
        raise ValueError(
            f"theory: second moments under {facts.name} are not exact: the error of "
            "most compressors depends on the vector, and only bounds are known "
            "(theory.rates). Use randk or identity for exact predictions."
        )
    if facts.omega is not None:
        return Message(1.0, facts.omega(d), facts.linear)
    assert facts.delta is not None
    delta = facts.delta(d)
    return Message(delta, delta * (1 - delta), facts.linear)
