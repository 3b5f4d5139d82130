"""The compressor that sends everything as it is."""

import math

import numpy as np

from bagua_jax.compressors.base import Compressor, CompressorFacts, stateless

__all__ = ["identity"]


def identity() -> Compressor:
    r"""Send the vector unchanged: :math:`C(x) = x`.

    It turns every low-precision algorithm into its full-precision relative, which is
    how the tests use it.

    Returns:
        A compressor with omega = 0 whose payload is the vector itself, in its dtype.

    Example:
        >>> import jax.numpy as jnp
        >>> c = identity()
        >>> payload, state = c.compress(None, jnp.array([1.0, -2.0]), ())
        >>> c.decompress(payload, payload).tolist()
        [1.0, -2.0]
    """

    def compress(key, x, state):
        del key
        return x, state

    def decompress(payload, like):
        return payload.astype(like.dtype)

    facts = CompressorFacts(
        name="identity",
        unbiased=True,
        omega=lambda d: 0.0,
        payload_bytes=lambda like: (
            math.prod(like.shape) * np.dtype(like.dtype).itemsize
        ),
        linear=True,
        source="by definition",
        padding="edge",
    )
    return Compressor(stateless, compress, decompress, facts)
