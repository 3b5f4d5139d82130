"""BAGUA's rotating pairs between two halves of the workers."""

from bagua_jax.topologies.base import (
    MixingStep,
    Send,
    Topology,
    require_few,
    require_workers,
)

__all__ = ["shift_one"]


def shift_one(n: int) -> Topology:
    r"""Average with one partner from the other half; partners rotate.

    With h = n/2, at communication s worker r < h meets worker
    :math:`((s + r) \bmod h) + h`, and

    .. math:: x_i' = \tfrac12 (x_i + x_{\text{peer}(i)})

    Args:
        n: number of workers, even.

    Returns:
        A topology of period n/2 whose every matrix is a symmetric perfect matching;
        every worker sends one message a step. It contracts by cos(2 pi / n) a step,
        where ``one_peer_exponential`` is exact after log2 n steps at the same traffic.

    Raises:
        ValueError: if n is odd or below 2: somebody would be left without a partner;
            or above 1,448: a period has at most 2^20 messages.

    References:
        Gan et al., `BAGUA`, 2021 (arXiv 2107.01499); peer selection ``shift_one`` of
        the original's decentralized algorithm.

    Example:
        >>> [pair[1] for pair in sorted(shift_one(8).steps[1].sends[0].pairs)]
        [5, 6, 7, 4, 3, 0, 1, 2]
    """
    require_workers("shift_one", n)
    if n % 2:
        raise ValueError(
            f"shift_one: the number of workers must be even, got n={n}: pairs between "
            "two halves leave nobody out. Use an even n, or 'one_peer_exponential' or "
            "'ring', which take any."
        )
    half = n // 2
    require_few("shift_one", n * half)

    def pairing(step: int) -> MixingStep:
        pairs = [(r, (step + r) % half + half) for r in range(half)]
        both_ways = tuple(pairs + [(b, a) for a, b in pairs])
        return MixingStep((0.5,) * n, (Send(both_ways, (0.5,) * n),))

    return Topology("shift_one", n, tuple(pairing(step) for step in range(half)))
