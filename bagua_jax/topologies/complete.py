"""The complete graph: everybody hears everybody."""

from bagua_jax.topologies.base import Topology, circulant, require_few, require_workers

__all__ = ["complete"]


def complete(n: int) -> Topology:
    r"""Average over all workers: :math:`x_i' = \frac1n \sum_j x_j`.

    Full-precision mixing over it runs as one all-reduce.

    Args:
        n: number of workers, at least 1.

    Returns:
        A symmetric topology of period 1 with W = 11'/n; contraction 0.

    Raises:
        ValueError: if n < 1, or above 1,024: a period has at most 2^20 messages.

    Example:
        >>> complete(4).mixing_matrix()[0].tolist()
        [0.25, 0.25, 0.25, 0.25]
    """
    require_workers("complete", n)
    require_few("complete", n * (n - 1))
    shifts = [(shift, 1 / n) for shift in range(1, n)]
    return Topology("complete", n, (circulant(n, 1 / n, shifts),))
