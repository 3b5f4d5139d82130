"""Stragglers: what it costs to wait for the slowest worker."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from bagua_jax.network.base import require, require_at_least

__all__ = ["ShiftedExponential"]


@dataclass(frozen=True)
class ShiftedExponential:
    r"""Compute time of a worker's step: a constant part and an exponential one.

    .. math::
        P(T > t) = e^{-(t - a)/b}, \quad t \ge a, \qquad
        E\,T = a + b, \qquad E \max_{i \le n} T_i = a + b \sum_{k=1}^n \tfrac1k

    Synchronous workers wait for the slowest of n, drawn anew in every step; an
    asynchronous one waits for none.

    Args:
        shift: a, seconds that every step takes; at least 0.
        scale: b, mean seconds on top of them; at least 0.

    Raises:
        ValueError: a number outside its range.

    Example (128 workers, each a tenth slower than its best on average):
        >>> steps = ShiftedExponential(shift=1.0, scale=0.1)
        >>> round(steps.synchronous(128), 3), steps.asynchronous
        (1.543, 1.1)
    """

    shift: float
    scale: float

    def __post_init__(self) -> None:
        require_at_least("ShiftedExponential", "shift", self.shift, 0)
        require_at_least("ShiftedExponential", "scale", self.scale, 0)

    @property
    def asynchronous(self) -> float:
        """Expected seconds of a step that waits for nobody, a + b."""
        return self.shift + self.scale

    def synchronous(self, n: int, fastest: int | None = None) -> float:
        r"""Expected seconds of a step that waits for the fastest k of n workers.

        .. math:: a + b (H_n - H_{n-k}), \quad H_n = \sum_{i=1}^n \tfrac1i

        Args:
            n: workers; at least 1.
            fastest: k in [1, n]; by default all n, the slowest included.

        Raises:
            ValueError: a count outside its range.
        """
        return self.shift + self.scale * math.fsum(_gaps(n, fastest))

    def deviation(self, n: int, fastest: int | None = None) -> float:
        """Standard deviation of the seconds of such a step; arguments likewise."""
        return self.scale * math.hypot(*_gaps(n, fastest))

    def sample(self, rng: np.random.Generator, shape: Sequence[int]) -> np.ndarray:
        """Draw compute times, a trace of delays for simulations."""
        return self.shift + self.scale * rng.standard_exponential(tuple(shape))


def _gaps(n: int, fastest: int | None) -> list[float]:
    """Mean times between arrivals, in scales: with i workers left, the next in 1/i."""
    k = n if fastest is None else fastest
    rule = "ShiftedExponential: needs n >= 1 workers and 1 <= fastest <= n"
    require(1 <= k <= n, rule, (n, fastest))
    return [1 / left for left in range(n, n - k, -1)]
