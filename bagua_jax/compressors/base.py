"""What a compressor is: three pure functions on one flat vector, and its facts."""

import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

__all__ = ["Compressor", "CompressorFacts", "Payload"]

Payload = Any
"""A pytree of arrays in the dtypes that cross the wire."""


class CompressorFacts(NamedTuple):
    r"""What is known of a compressor before any data is seen.

    Attributes:
        name: as in ``compressors.REGISTRY``, with its parameters.
        unbiased: ``E C(x) = x``.
        payload_bytes: ``like -> int``, bytes of the payload of a vector of this shape
            and dtype; equal to the summed bytes of the real payload's leaves.
        source: where the constants come from, and what they assume.
        omega: for unbiased ones, ``d -> omega`` with
            ``E|C(x) - x|^2 <= omega |x|^2`` for every x of d elements.
        delta: for biased ones, ``d -> delta`` with
            ``E|C(x) - x|^2 <= (1 - delta) |x|^2``; ``None`` where no such bound is
            known. Zero or less: the bound holds, and it is no contraction.
        linear: payloads may be summed elementwise and the sum decompressed.
        padding: how a vector's tail is filled up to whole partitions so that the
            filling never changes the code of a real element: ``"zero"``, or ``"edge"``
            (a copy of the last element) for codes that depend on a range. Where a code
            depends on its element alone, ``"edge"``, too: XLA compiles it into the
            packing of the vector, and zeros as a copy of their own.
        attained: ``d -> x`` of d elements whose relative error is omega, or 1 - delta;
            it gives ``None`` for a d whose bound no vector reaches.
        max_error: a number m with ``max|C(x) - x| <= m max|x|`` for every x and every
            draw; below 1 it contracts in the maximum norm, whatever delta says.
        assumes: what omega or delta need beyond finite elements in the normal range of
            float32; empty if nothing.
        range: for codes without a scale, the smallest and the largest magnitude that
            they hold: what is below half the smallest becomes zero, and what is beyond
            the largest is not finite. ``None`` where a scale follows the vector.
    """

    name: str
    unbiased: bool
    payload_bytes: Callable[[Any], int]
    source: str
    omega: Callable[[int], float] | None = None
    delta: Callable[[int], float] | None = None
    linear: bool = False
    padding: Literal["zero", "edge"] = "zero"
    attained: Callable[[int], np.ndarray | None] | None = None
    assumes: str = ""
    max_error: float | None = None
    range: tuple[float, float] | None = None


class Compressor(NamedTuple):
    """Three pure functions on a flat vector, and the facts about them.

    Attributes:
        init: ``x -> state`` of this vector; ``()`` where there is none.
        compress: ``(key, x [d], state) -> (payload, state)``. ``key`` may be ``None``
            for deterministic compressors.
        decompress: ``(payload, like) -> x_hat``, of the shape and dtype of ``like``
            (an array or a ``jax.ShapeDtypeStruct``).
        facts: see :class:`CompressorFacts`.
    """

    init: Callable[[Any], Any]
    compress: Callable[[jax.Array | None, jax.Array, Any], tuple[Payload, Any]]
    decompress: Callable[[Payload, Any], jax.Array]
    facts: CompressorFacts


def stateless(x: Any) -> tuple[()]:
    """Return the empty state of a compressor that remembers nothing."""
    del x
    return ()


# --- refusals: function, rule, value, cure --------------------------------------------


def require_integer(
    caller: str, name: str, value: Any, low: int, high: int, cure: str
) -> None:
    """Refuse an argument that is no integer in [low, high]."""
    if (
        isinstance(value, bool)
        or not isinstance(value, int)
        or not low <= value <= high
    ):
        raise ValueError(
            f"{caller}: {name} must be an integer in [{low}, {high}], got {value!r}. "
            f"{cure}"
        )


def require_number(caller: str, name: str, value: Any, high: float, cure: str) -> None:
    """Refuse an argument that is no number in (0, high]."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not 0 < value <= high or math.isinf(value):
        bracket = ")" if math.isinf(high) else "]"
        raise ValueError(
            f"{caller}: {name} must be a number in (0, {high}{bracket}, got {value!r}. "
            f"{cure}"
        )


def require_choice(
    caller: str, name: str, value: Any, choices: tuple[str, ...], cure: str
) -> None:
    """Refuse a word that is not among the choices."""
    if value not in choices:
        raise ValueError(
            f"{caller}: {name} must be one of {', '.join(map(repr, choices))}; got "
            f"{value!r}. {cure}"
        )


def require_key(name: str, key: jax.Array | None) -> jax.Array:
    """Return the key; refuse its absence."""
    if key is None:
        raise ValueError(
            f"{name}: it draws random numbers, and key is None. Pass a PRNG key to "
            "compress, or to the primitive that calls it."
        )
    return key
