"""Bounds of the literature: how bad an algorithm can be, each with its assumptions.

Nothing here is exact. A bound says what holds for every problem of a class, and a
problem may do far better; the exact values for quadratics are in
:mod:`bagua_jax.theory.modes` and :mod:`bagua_jax.theory.moments`. Every function gives
a :class:`Bound`, whose ``confirmed`` says whether its constant was proved here or read
in the paper, or only recalled. What is recalled must not be quoted as the paper's.
"""

import math
from typing import NamedTuple

__all__ = [
    "Bound",
    "choco_consensus_step",
    "choco_energy_rate",
    "d2_smallest_eigenvalue",
    "dcd_largest_error",
    "diana_learning_rate",
    "diana_rate",
    "ecd_error_variance",
    "ef21_constants",
    "ef21_learning_rate",
    "ef21_rate",
    "ef_sgd_rate",
    "gradient_descent_rate",
    "marina_learning_rate",
    "parallel_sgd_error",
    "qsgd_floor",
    "qsgd_omega",
]


class Bound(NamedTuple):
    """One inequality of the literature.

    Attributes:
        value: the number.
        statement: what it bounds.
        assumptions: what must hold.
        source: who proved it.
        confirmed: proved in a line here, or read in the paper; else only recalled.
        up_to_constant: an order of growth, with an unknown constant left out.
    """

    value: float
    statement: str
    assumptions: str
    source: str
    confirmed: bool
    up_to_constant: bool = False

    def __str__(self) -> str:
        """Say all of it, the doubt included."""
        order = ", up to a constant" if self.up_to_constant else ""
        doubt = "" if self.confirmed else "; recalled, unconfirmed"
        return (
            f"{self.statement}: {self.value:.6g}{order} (bound, if {self.assumptions}; "
            f"{self.source}{doubt})"
        )


# --- synchronous ----------------------------------------------------------------------


def gradient_descent_rate(
    learning_rate: float, smoothness: float, strong_convexity: float
) -> Bound:
    r"""Bound the factor of :math:`\|x - x^\star\|` a step of gradient descent.

    :math:`\max(|1 - \gamma \mu|, |1 - \gamma L|)`, reached by a quadratic.

    Args:
        learning_rate: gamma.
        smoothness: L.
        strong_convexity: mu.

    Example:
        >>> gradient_descent_rate(0.5, 1.0, 0.5).value
        0.75
    """
    value = max(
        abs(1 - learning_rate * strong_convexity), abs(1 - learning_rate * smoothness)
    )
    return Bound(
        value,
        "|x+ - x*| / |x - x*|",
        "f is L-smooth and mu-strongly convex, gradients are exact",
        "elementary: gradients lie between mu and L times the distance",
        confirmed=True,
    )


def parallel_sgd_error(
    steps: int,
    n: int,
    learning_rate: float,
    strong_convexity: float,
    noise: float,
    start: float,
) -> Bound:
    r"""Bound :math:`E\|x_T - x^\star\|^2` of SGD on the mean of n noisy gradients.

    :math:`(1 - \gamma \mu)^T \|x_0 - x^\star\|^2 + \gamma \sigma^2 / (n \mu)`.

    Args:
        steps: T.
        n: workers.
        learning_rate: gamma.
        strong_convexity: mu.
        noise: sigma^2, variance of a worker's gradient summed over elements.
        start: squared distance at the start.
    """
    value = (1 - learning_rate * strong_convexity) ** steps * start
    value += learning_rate * noise / (n * strong_convexity)
    return Bound(
        value,
        "E|x_T - x*|^2",
        "f is L-smooth and mu-strongly convex, gamma <= 1/L, noise is unbiased and "
        "independent with bounded variance",
        "elementary: one step contracts by 1 - gamma mu and adds gamma^2 sigma^2 / n",
        confirmed=True,
    )


# --- compressed gradients -------------------------------------------------------------


def qsgd_omega(d: int, levels: int) -> Bound:
    r"""Bound QSGD's relative variance with the L2 norm: min(d/s^2, sqrt(d)/s).

    The sharp constant is ``compressors.qsgd(levels).facts.omega(d)``.

    Args:
        d: elements.
        levels: s.
    """
    return Bound(
        min(d / levels**2, math.sqrt(d) / levels),
        "E|C(x) - x|^2 / |x|^2",
        "L2 norm, s levels",
        "Alistarh et al., QSGD, 2017",
        confirmed=True,  # the sharp constant, derived, is below it
    )


def qsgd_floor(
    learning_rate: float,
    omega: float,
    n: int,
    heterogeneity: float,
    strong_convexity: float,
) -> Bound:
    r"""Bound the floor of unbiased compressed gradients, about gamma omega zeta^2/n.

    Args:
        learning_rate: gamma.
        omega: relative variance of the compressor.
        n: workers.
        heterogeneity: zeta^2.
        strong_convexity: mu.
    """
    return Bound(
        learning_rate * omega * heterogeneity / (n * strong_convexity),
        "floor of E|x - x*|^2",
        "f_i convex and L-smooth, f mu-strongly convex, gamma of order "
        "1/(L (1 + omega/n)), exact gradients",
        "order of several analyses of compressed gradient descent",
        confirmed=False,
        up_to_constant=True,
    )


def diana_learning_rate(smoothness: float, omega: float, n: int) -> Bound:
    r"""Return DIANA's step: :math:`1/(L (1 + 6 \omega/n))`.

    Args:
        smoothness: L.
        omega: relative variance of the compressor.
        n: workers.
    """
    return Bound(
        1 / (smoothness * (1 + 6 * omega / n)),
        "gamma at most",
        "f_i convex and L-smooth, f mu-strongly convex, alpha <= 1/(1 + omega)",
        "Mishchenko et al., DIANA, 2019, and analyses after it",
        confirmed=False,
    )


def diana_rate(learning_rate: float, strong_convexity: float, alpha: float) -> Bound:
    r"""Bound DIANA's factor a step: :math:`\max(1 - \gamma \mu, 1 - \alpha/2)`.

    Args:
        learning_rate: gamma, at most :func:`diana_learning_rate`.
        strong_convexity: mu.
        alpha: step of the shifts.
    """
    return Bound(
        max(1 - learning_rate * strong_convexity, 1 - alpha / 2),
        "factor a step of a Lyapunov function of |x - x*|^2 and |h_i - h_i*|^2",
        "as diana_learning_rate, exact gradients",
        "Mishchenko et al., DIANA, 2019, and analyses after it",
        confirmed=False,
    )


def marina_learning_rate(
    smoothness: float, omega: float, n: int, probability: float
) -> Bound:
    r"""Return MARINA's step: :math:`1/(L (1 + \sqrt{(1 - p) \omega / (p n)}))`.

    Args:
        smoothness: L.
        omega: relative variance of the compressor.
        n: workers.
        probability: p of a dense step.
    """
    root = math.sqrt((1 - probability) * omega / (probability * n))
    return Bound(
        1 / (smoothness * (1 + root)),
        "gamma at most",
        "f_i L-smooth, exact gradients; then mean |grad f|^2 <= 2 (f_0 - f*)/(gamma T)",
        "Gorbunov et al., MARINA, 2021",
        confirmed=False,
    )


def ef_sgd_rate(steps: int, n: int, delta: float, sigma: float) -> Bound:
    r"""Return the order of error feedback's mean squared gradient.

    :math:`\sigma/\sqrt{n T} + (1/(\delta T))^{2/3}`.

    Args:
        steps: T.
        n: workers.
        delta: contraction of the compressor.
        sigma: standard deviation of a worker's gradient.
    """
    return Bound(
        sigma / math.sqrt(n * steps) + (1 / (delta * steps)) ** (2 / 3),
        "mean of E|grad f|^2 over T steps",
        "f L-smooth, bounded second moments, step sizes tuned to T",
        "Stich and Karimireddy, error-feedback framework, 2019, and analyses after it",
        confirmed=False,
        up_to_constant=True,
    )


def ef21_constants(delta: float) -> tuple[float, float]:
    r"""Return EF21's theta = 1 - sqrt(1 - delta) and beta = (1 - delta)/theta.

    Args:
        delta: contraction of the compressor.
    """
    theta = 1 - math.sqrt(1 - delta)
    return theta, (1 - delta) / theta


def ef21_learning_rate(
    delta: float,
    smoothness: float,
    mean_smoothness: float,
    strong_convexity: float | None = None,
) -> Bound:
    r"""Return EF21's step.

    :math:`1/(L + \tilde L \sqrt{\beta/\theta})`; with mu for the linear rate
    :math:`\min\{1/(L + \tilde L \sqrt{2 \beta/\theta}), \theta/(2 \mu)\}`.

    Args:
        delta: contraction of the compressor.
        smoothness: L of f.
        mean_smoothness: root mean square of the workers' L_i.
        strong_convexity: mu, for the linear rate.
    """
    theta, beta = ef21_constants(delta)
    factor = 1 if strong_convexity is None else 2
    value = 1 / (smoothness + mean_smoothness * math.sqrt(factor * beta / theta))
    if strong_convexity is not None:
        value = min(value, theta / (2 * strong_convexity))
    return Bound(
        value,
        "gamma at most",
        "f_i smooth, exact gradients, C a deterministic or random contraction"
        + ("" if strong_convexity is None else ", f mu-PL"),
        "Richtarik et al., EF21, 2021",
        confirmed=False,
    )


def ef21_rate(learning_rate: float, strong_convexity: float) -> Bound:
    r"""Bound EF21's factor a step: :math:`1 - \gamma \mu`.

    Of :math:`f - f^\star + \tfrac\gamma\theta \tfrac1n \sum_i \|g_i - \nabla f_i\|^2`,
    at every single step for a deterministic compressor.

    Args:
        learning_rate: gamma, at most :func:`ef21_learning_rate`.
        strong_convexity: mu.
    """
    return Bound(
        1 - learning_rate * strong_convexity,
        "factor a step of f - f* + gamma/theta mean|g_i - grad f_i|^2",
        "as ef21_learning_rate with mu",
        "Richtarik et al., EF21, 2021",
        confirmed=False,
    )


# --- gossip ---------------------------------------------------------------------------


def d2_smallest_eigenvalue() -> Bound:
    """Return the eigenvalue of W above which D2 is stable for small steps: -1/3."""
    return Bound(
        -1 / 3,
        "every eigenvalue of W above",
        "W symmetric and doubly stochastic",
        "Tang et al., D2, 2018; the limit of -1/(3 - 2 gamma h), derived",
        confirmed=True,
    )


def choco_consensus_step(gap: float, farthest: float, delta: float) -> Bound:
    r"""Return CHOCO's consensus step.

    :math:`\rho^2 \delta / (16 \rho + \rho^2 + 4 \beta^2 + 2 \rho \beta^2 - 8 \rho
    \delta)`, with the gap rho and beta = ||I - W||.

    Args:
        gap: ``mixing.Spectrum.gap``.
        farthest: beta, ``mixing.Spectrum.farthest``.
        delta: contraction of the compressor.
    """
    below = 16 * gap + gap**2 + (4 + 2 * gap) * farthest**2 - 8 * gap * delta
    return Bound(
        gap**2 * delta / below,
        "consensus step with a guarantee",
        "W symmetric and doubly stochastic, E|C(x) - x|^2 <= (1 - delta) |x|^2",
        "Koloskova et al., CHOCO, 2019",
        confirmed=False,
    )


def choco_energy_rate(gap: float, delta: float) -> Bound:
    r"""Bound CHOCO's factor of the energy a step: :math:`1 - \rho^2 \delta/82`.

    Args:
        gap: ``mixing.Spectrum.gap``.
        delta: contraction of the compressor.
    """
    return Bound(
        1 - gap**2 * delta / 82,
        "factor a step of E|x - mean|^2 + E|x - x_hat|^2",
        "as choco_consensus_step, with that step, no gradients",
        "Koloskova et al., CHOCO, 2019",
        confirmed=False,
    )


def dcd_largest_error(gap: float, farthest: float) -> Bound:
    r"""Return the relative error sup ||C(z) - z||/||z|| that DCD is proved to stand.

    :math:`\alpha < (1 - \rho)/(2 \mu)`, from :math:`(1 - \rho)^2 - 4 \mu^2 \alpha^2 >
    0`. The exact threshold on vertex-transitive graphs is
    ``moments.ModeMoments(...).largest_variance()``.

    Args:
        gap: 1 - rho, ``mixing.Spectrum.gap``.
        farthest: mu, ``mixing.Spectrum.farthest``.
    """
    return Bound(
        gap / (2 * farthest),
        "sup |C(z) - z| / |z| below",
        "W symmetric and doubly stochastic, C unbiased",
        "Tang et al., Communication Compression for Decentralized Training, 2018",
        confirmed=False,
    )


def ecd_error_variance(variance: float, t: int) -> Bound:
    r"""Bound the variance of ECD's estimates: :math:`4 \tilde\sigma^2 / t`.

    Exactly :math:`(2v/3)(2t - 1)/(t (t - 1))` for errors of equal variance v, derived
    from the recursion; the paper's :math:`\tilde\sigma^2/t` counts otherwise.

    Args:
        variance: v, of a message's element.
        t: step, at least 2.
    """
    return Bound(
        4 * variance / t,
        "E|estimate - model|^2 of an element",
        "unbiased errors of variance at most v, whatever is sent",
        "Tang et al., 2018; constant derived from the recursion",
        confirmed=True,
    )
