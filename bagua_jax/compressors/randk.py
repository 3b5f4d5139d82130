"""Sparsification by chance: random k of d elements."""

import math
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from bagua_jax.compressors.base import (
    Compressor,
    CompressorFacts,
    require_choice,
    require_key,
    require_number,
    stateless,
)
from bagua_jax.compressors.numerics import (
    draw_places,
    kept,
    poisoned,
    saturate,
    seeded,
)

__all__ = ["RandKPayload", "randk"]


class RandKPayload(NamedTuple):
    """What :func:`randk` sends."""

    values: jax.Array  # [k] float32, as they are in the vector
    seed: jax.Array  # private: [2] uint32; shared: [5] float32, 1 and four bytes


def randk(
    ratio: float = 0.01,
    mask: Literal["shared", "private"] = "shared",
    scaled: bool = True,
) -> Compressor:
    r"""Keep k elements drawn at random, all subsets alike.

    .. math:: C(x)_j = \tfrac dk\, x_j \text{ (scaled) or } x_j
              \text{ for } j \in S,\quad 0 \text{ otherwise};\quad
              |S| = k = \lceil \rho d \rceil

    Indices do not travel: the receiver draws S again from the seed.

    Args:
        ratio: rho, the kept fraction, in (0, 1]; at least one element is kept. Static.
        mask: ``"shared"`` for payloads that may be summed if all were made with one
            key, as ``linear_mean`` does; ``"private"`` for the smaller seed.
        scaled: multiply by d/k, which makes it unbiased; without, it is a contraction,
            as error feedback needs.

    Returns:
        A compressor, unbiased if scaled; needs a key. Payload: k values (float32), and
        a seed of 8 bytes (private) or 20 bytes (shared): 4 k + 8 or 4 k + 20 bytes. A
        shared seed travels as a one and four bytes, all float32, so that sums, means
        and other positive combinations of up to 65536 equal ones still decode.

    Raises:
        ValueError: for an argument out of range; when compressing without a key.

    Notes:
        For every x the expected squared error is (d/k - 1) \|x\|^2 if scaled, hence
        omega = d/k - 1, and (1 - k/d) \|x\|^2 if not, hence delta = k/d. A NaN or
        infinity, drawn or not, makes all values that are sent NaN. Scaled values beyond
        the dtype's range saturate.

    References:
        Stich et al., `Sparsified SGD with Memory`, 2018 (arXiv 1809.07599); scaled
        as in Wangni et al., `Gradient Sparsification for Communication-Efficient
        Distributed Optimization`, 2017 (arXiv 1710.09854).

    Example:
        >>> import jax, jax.numpy as jnp
        >>> c = randk(0.5, mask="private", scaled=False)
        >>> x = jnp.arange(1.0, 7.0)
        >>> payload, _ = c.compress(jax.random.key(0), x, ())
        >>> decoded = c.decompress(payload, x)
        >>> int((decoded == x).sum()), int((decoded == 0).sum())
        (3, 3)
        >>> c.facts.payload_bytes(x), c.facts.delta(6)
        (20, 0.5)
    """
    require_number("randk", "ratio", ratio, 1, "0.01 keeps one element of a hundred.")
    require_choice(
        "randk",
        "mask",
        mask,
        ("shared", "private"),
        "A shared mask allows linear_mean, a private one has the smaller seed.",
    )
    if not isinstance(scaled, bool):
        raise ValueError(
            f"randk: scaled must be True or False, got {scaled!r}. True is unbiased, "
            "False is what error feedback needs."
        )
    shared = mask == "shared"
    name = f"randk({ratio}, mask={mask}, scaled={scaled})"

    def factor(d: int) -> float:
        return d / kept(ratio, d)

    def compress(key, x, state):
        x, k = x.astype(jnp.float32), kept(ratio, x.shape[0])
        seed = _draw_seed(require_key(name, key), shared)
        values = x[_subset(seed, x.shape[0], k)]
        return RandKPayload(poisoned(values, x), seed), state

    def decompress(payload, like):
        count = math.prod(like.shape)
        place = _subset(payload.seed, count, kept(ratio, count))
        values = payload.values * (factor(count) if scaled else 1.0)
        full = jnp.zeros((count,), jnp.float32)
        full = full.at[place].set(values, mode="promise_in_bounds", unique_indices=True)
        return saturate(full, like.dtype)

    facts = CompressorFacts(
        name=name,
        unbiased=scaled,
        omega=(lambda d: factor(d) - 1) if scaled else None,
        delta=None if scaled else lambda d: 1 / factor(d),
        payload_bytes=lambda like: (
            4 * kept(ratio, math.prod(like.shape)) + (20 if shared else 8)
        ),
        linear=shared,
        source="exact for every x",
        attained=np.ones,
    )
    return Compressor(stateless, compress, decompress, facts)


def _draw_seed(key: jax.Array, shared: bool) -> jax.Array:
    if not shared:
        return jax.random.bits(key, (2,), jnp.uint32)
    small = jax.random.bits(key, (4,), jnp.uint8).astype(jnp.float32)
    return jnp.concatenate([jnp.ones((1,), jnp.float32), small])


def _subset(seed: jax.Array, d: int, k: int) -> jax.Array:
    """Draw the places that a seed stands for."""
    if seed.dtype != jnp.uint32:
        small = jnp.rint(seed[1:] / seed[0]).astype(jnp.uint8)
        word = lax.bitcast_convert_type(small, jnp.uint32)
        seed = jnp.stack([jnp.zeros_like(word), word])
    return draw_places(seeded(seed), d, k)
