"""Bytes and messages that an algorithm states, as formulas.

Each function returns a formula: from the number of workers and the elements of each
bucket to the bytes and messages that a worker sends on a step in the long run. A
registry entry states one for each configuration; tests compare it with what
:func:`bagua_jax.wire.count` reads from the compiled program.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from bagua_jax import topologies
from bagua_jax.compressors import Compressor

__all__ = [
    "Sends",
    "allreduce",
    "gather",
    "gossip",
    "payload",
    "ring",
    "scatter_reduce",
    "together",
]

Sends = Callable[[int, tuple[int, ...]], tuple[float, float]]
"""(workers, elements of each bucket) -> (bytes, messages) of a worker on a step."""


def payload(compressor: Compressor, elements: int) -> int:
    """Return the bytes of a compressed float32 vector.

    Example:
        >>> from bagua_jax import compressors
        >>> payload(compressors.minmax_uint8(), 100)  # codes, and a range
        108
    """
    like = jax.ShapeDtypeStruct((elements,), jnp.float32)
    return compressor.facts.payload_bytes(like)


def allreduce(share: float = 1.0) -> Sends:
    """State an exact mean of all buckets in one message, on a share of the steps.

    Example:
        >>> allreduce()(8, (100,))
        (700.0, 1.0)
    """
    return lambda n, sizes: (share * 2 * (n - 1) / n * 4 * sum(sizes), share)


def scatter_reduce(compressor: Compressor, share: float = 1.0) -> Sends:
    """State ``c_lp_s``: parts to their owners and means back, n - 1 payloads each way.

    Example:
        >>> from bagua_jax import compressors
        >>> scatter_reduce(compressors.minmax_uint8())(4, (100,))
        (198.0, 2.0)
    """

    def sends(n: int, sizes: tuple[int, ...]) -> tuple[float, float]:
        parts = sum(payload(compressor, math.ceil(d / n)) for d in sizes)
        return share * 2 * (n - 1) * parts, share * 2 * len(sizes)

    return sends


def ring(compressor: Compressor) -> Sends:
    """State a compressed ring: partial sums around it, and means back.

    Example:
        >>> from bagua_jax import compressors
        >>> ring(compressors.minmax_uint8())(4, (100,))
        (198, 4)
    """

    def sends(n: int, sizes: tuple[int, ...]) -> tuple[float, float]:
        parts = sum(payload(compressor, math.ceil(d / n)) for d in sizes)
        return 2 * (n - 1) * parts, n * len(sizes)

    return sends


def gather(compressor: Compressor, share: float = 1.0) -> Sends:
    """State an all-gather: a payload to each of the others.

    Example:
        >>> from bagua_jax import compressors
        >>> gather(compressors.sign())(4, (80,))  # ten bytes of signs, and a scale
        (42.0, 1.0)
    """

    def sends(n: int, sizes: tuple[int, ...]) -> tuple[float, float]:
        total = sum(payload(compressor, d) for d in sizes)
        return share * (n - 1) * total, share * len(sizes)

    return sends


def gossip(
    topology: str = "ring",
    compressor: Compressor | None = None,
    share: float = 1.0,
    extra: int = 0,
) -> Sends:
    """State a message along each permutation of a graph.

    Args:
        topology: its name in ``bagua_jax.topologies.REGISTRY``.
        compressor: of the messages; full precision where ``None``.
        share: of the steps that communicate.
        extra: floats that ride along with each step's message.

    Example:
        >>> gossip("ring")(8, (100,))
        (800.0, 2.0)
    """

    def sends(n: int, sizes: tuple[int, ...]) -> tuple[float, float]:
        graph = topologies.REGISTRY[topology](n)
        ways = share * sum(len(step.sends) for step in graph.steps) / graph.period
        sent = sum(payload(compressor, d) if compressor else 4 * d for d in sizes)
        return ways * (sent + 4 * extra), ways * len(sizes)

    return sends


def together(*kinds: Sends) -> Sends:
    """Add up what steps of several kinds send, each on its share.

    Example:
        >>> together(allreduce(1 / 4), gossip("ring", share=3 / 4))(8, (100,))
        (775.0, 1.75)
    """

    def sends(n: int, sizes: tuple[int, ...]) -> tuple[float, float]:
        each = [kind(n, sizes) for kind in kinds]
        return sum(nbytes for nbytes, _ in each), sum(messages for _, messages in each)

    return sends
