"""Two compressors in a row: choose elements, then send them in few bits."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from bagua_jax.compressors.base import Compressor, CompressorFacts, Payload
from bagua_jax.compressors.blockwise import blockwise
from bagua_jax.compressors.topk import topk

__all__ = ["ChainPayload", "chain"]


class ChainPayload(NamedTuple):
    """What :func:`chain` sends."""

    values: Payload  # of the quantizer
    rest: Payload  # of the sparsifier, all but its values


def chain(
    sparsifier: Compressor = topk(),  # noqa: B008  (immutable)
    quantizer: Compressor = blockwise(),  # noqa: B008  (immutable)
) -> Compressor:
    r"""Sparsify, then quantize the values that are left.

    .. math:: C(x) = S^\top Q(S x)

    with S x the values that the sparsifier sends.

    Args:
        sparsifier: one whose payload has ``values``: ``topk``, ``block_topk``,
            ``threshold``, ``randk`` or ``dct_topk``.
        quantizer: any compressor; it sees the values as one vector.

    Returns:
        A compressor, unbiased if both are. It needs a key if one of them does; each
        gets its own half. Payload: the quantizer's for the number of values, and the
        sparsifier's without its 4 bytes a value. Linear if both are.

    Raises:
        ValueError: if the sparsifier's payload has no values.

    Notes:
        Let k values be sent. If both are unbiased,
        omega = (1 + omega_S)(1 + omega_Q(k)) - 1. If the sparsifier is a projection
        with contraction delta_S and the quantizer's relative error is at most
        e = omega_Q(k) or 1 - delta_Q(k), then delta = delta_S (1 - e) if e < 1, and
        1 - e, no contraction, otherwise: give the quantizer more levels or smaller
        buckets there. An unbiased sparsifier before a biased quantizer is in neither
        class. Bounds need not be reached.

    References:
        Basu et al., `Qsparse-local-SGD`, 2019 (arXiv 1906.02367), scales the result
        instead. Derived here: what is left out is orthogonal to what is sent, hence
        E\|C(x) - x\|^2 <= \|x - Sx\|^2 + e \|Sx\|^2 = \|x\|^2 - (1 - e) \|Sx\|^2.

    Example:
        >>> import jax.numpy as jnp
        >>> c = chain(topk(0.5), blockwise(bits=8))
        >>> x = jnp.array([3.0, -1.0, 0.5, -4.0])
        >>> payload, _ = c.compress(None, x, c.init(x))
        >>> c.decompress(payload, x).tolist()
        [3.0, 0.0, 0.0, -4.0]
        >>> c.facts.name
        'chain(topk(0.5), blockwise(bits=8, block=512, rounding=nearest))'
    """
    for role, given in (("sparsifier", sparsifier), ("quantizer", quantizer)):
        if not isinstance(given, Compressor):
            raise ValueError(
                f"chain: {role} must be a Compressor, got {given!r}. Call its factory, "
                "as in chain(topk(0.01), blockwise(bits=4))."
            )
    first, second = sparsifier.facts, quantizer.facts

    def sent(like):
        """Shapes of the sparsifier's payload."""
        x = jax.ShapeDtypeStruct((math.prod(like.shape),), jnp.float32)
        compress = lambda v: sparsifier.compress(  # noqa: E731
            jax.random.key(0), v, sparsifier.init(v)
        )
        return jax.eval_shape(compress, x)[0]

    probe = sent(jax.ShapeDtypeStruct((8,), jnp.float32))
    if not isinstance(getattr(probe, "values", None), jax.ShapeDtypeStruct):
        raise ValueError(
            f"chain: the payload of {first.name} has no values to quantize. As a "
            "sparsifier use topk, block_topk, threshold, randk or dct_topk."
        )

    def init(x):
        state = sparsifier.init(x), quantizer.init(sent(x).values)
        return state if jax.tree.leaves(state) else ()

    def compress(key, x, state):
        keys = (None, None) if key is None else jax.random.split(key)
        first_state, second_state = state or ((), ())
        chosen, first_state = sparsifier.compress(keys[0], x, first_state)
        values, second_state = quantizer.compress(keys[1], chosen.values, second_state)
        payload = ChainPayload(values, chosen._replace(values=()))
        return payload, (first_state, second_state) if state else ()

    def decompress(payload, like):
        values = quantizer.decompress(payload.values, sent(like).values)
        return sparsifier.decompress(payload.rest._replace(values=values), like)

    def count(d: int) -> int:
        return sent(jax.ShapeDtypeStruct((d,), jnp.float32)).values.shape[0]

    def composed(omega1, omega2):
        return lambda d: (1 + omega1(d)) * (1 + omega2(count(d))) - 1

    def projected(delta1, delta2):
        def delta(d):
            left = delta2(count(d))
            return delta1(d) * left if left > 0 else left

        return delta

    omega2, delta2 = second.omega, second.delta
    if omega2 is not None:  # as a bound on the error, which is all that counts here
        delta2 = lambda k: 1 - omega2(k)  # noqa: E731
    neither = first.delta is None or delta2 is None
    facts = CompressorFacts(
        name=f"chain({first.name}, {second.name})",
        unbiased=first.unbiased and second.unbiased,
        omega=composed(first.omega, omega2)
        if first.unbiased and second.unbiased
        else None,
        delta=None if neither else projected(first.delta, delta2),
        payload_bytes=lambda like: (
            first.payload_bytes(like)
            - 4 * math.prod(sent(like).values.shape)
            + second.payload_bytes(sent(like).values)
        ),
        linear=first.linear and second.linear,
        source="derived; an upper bound",
        assumes="; ".join(filter(None, (first.assumes, second.assumes))),
        range=second.range,
    )
    return Compressor(init, compress, decompress, facts)
