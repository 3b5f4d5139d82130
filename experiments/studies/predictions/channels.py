"""Compressors of known second moments, whose strength a program may vary."""

from typing import Any

import jax
import jax.numpy as jnp

from bagua_jax.compressors import Compressor, CompressorFacts

__all__ = ["additive", "bernoulli"]


def bernoulli(keep: Any, scaled: bool = True) -> Compressor:
    """Keep each element with a given probability, each by itself; 1/q times, if scaled.

    Random-k with a random k: an element has the same second moments.

    Args:
        keep: q; may be traced.
        scaled: which makes it unbiased.
    """

    def compress(key, x, state):
        kept = jax.random.uniform(key, x.shape) < keep
        return jnp.where(kept, x / keep if scaled else x, 0), state

    facts = CompressorFacts(
        name="bernoulli",
        unbiased=scaled,
        payload_bytes=lambda like: 4 * like.shape[0],
        source="exact for every x",
        omega=(lambda d: 1 / keep - 1) if scaled else None,
        delta=None if scaled else (lambda d: keep),
    )
    return Compressor(lambda x: (), compress, lambda p, like: p, facts)


def additive(deviation: float) -> Compressor:
    """Add noise of one standard deviation, whatever is sent.

    Args:
        deviation: of the noise of an element.
    """

    def compress(key, x, state):
        return x + deviation * jax.random.normal(key, x.shape), state

    facts = CompressorFacts(
        name="additive",
        unbiased=True,
        payload_bytes=lambda like: 4 * like.shape[0],
        source="a model of rounding to a fixed grid",
    )
    return Compressor(lambda x: (), compress, lambda p, like: p, facts)
