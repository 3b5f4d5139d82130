"""Random pairs that average, redrawn at every step."""

import numpy as np

from bagua_jax.topologies.base import (
    MixingStep,
    Send,
    Topology,
    require_few,
    require_workers,
)

__all__ = ["random_matching"]


def random_matching(
    n: int, period: int = 8, seed: int = 0, *, pairs: int | None = None
) -> Topology:
    r"""Average with a partner drawn at random, another one at every step.

    .. math:: x_i' = \tfrac12 (x_i + x_{\text{partner}(i)})

    The matchings are drawn on the host when this is called and are static from then on,
    so that a compiled step holds one branch for each of the period. With ``pairs=1``
    a step is one event of pair gossip, as in AD-PSGD; who is not drawn keeps its own.

    Args:
        n: number of workers, even unless ``pairs`` is given.
        period: number of matchings, after which they repeat; at least 1.
        seed: of the draw; the same seed gives the same matchings.
        pairs: how many pairs meet in a step, from 1 to n/2; by default n/2, everybody.

    Returns:
        A topology whose every matrix is a symmetric matching; a worker sends one
        message a step (2 pairs/n on average). Over the draw, the squared distance to
        the mean shrinks in expectation to exactly 1 - pairs/(n-1) of it in a step:
        (n-2)/(2(n-1)) if everybody meets, 1 - 1/(n-1) for one pair. In a short period
        some workers may never hear of one another (``connected``); ``contraction`` is
        the rate of the matchings drawn, 0 where some happen to multiply to J, as is
        common for n = 4 and 8.

    Raises:
        ValueError: if n is odd and pairs is not given, n < 2, or period or pairs are
            out of range, or make more than 2^20 messages.

    References:
        Boyd et al., `Randomized Gossip Algorithms`, 2006; Lian et al., `Asynchronous
        Decentralized Parallel Stochastic Gradient Descent`, 2018.

    Example:
        >>> topology = random_matching(6, period=3, seed=1)
        >>> [step.sends[0].pairs[0] for step in topology.steps]  # whom worker 0 meets
        [(0, 4), (0, 1), (0, 4)]
    """
    require_workers("random_matching", n)
    if n % 2 and pairs is None or n < 2:
        raise ValueError(
            f"random_matching: the number of workers must be even, got n={n}: perfect "
            "matchings leave nobody out. Use an even n, pairs for a matching that "
            "leaves some out, or 'base_k' or 'ring', which take any n."
        )
    pairs = n // 2 if pairs is None else pairs
    for name, value, most in (("period", period, None), ("pairs", pairs, n // 2)):
        whole = isinstance(value, int | np.integer) and not isinstance(value, bool)
        if not whole or value < 1 or (most is not None and value > most):
            limit = "at least 1" if most is None else f"from 1 to n/2 = {most}"
            raise ValueError(
                f"random_matching: {name} must be an integer {limit}, got {value!r}."
            )
    require_few("random_matching", 2 * pairs * period)
    rng = np.random.default_rng(seed)

    def matching() -> MixingStep:
        drawn = rng.permutation(n)[: 2 * pairs].reshape(pairs, 2).tolist()
        both_ways = sorted((a, b) for pair in drawn for a, b in (pair, pair[::-1]))
        met = {a for a, _ in both_ways}
        own = tuple(0.5 if i in met else 1.0 for i in range(n))
        heard = tuple(0.5 if i in met else 0.0 for i in range(n))
        return MixingStep(own, (Send(tuple(both_ways), heard),))

    return Topology("random_matching", n, tuple(matching() for _ in range(period)))
