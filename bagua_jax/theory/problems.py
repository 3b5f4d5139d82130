"""Problems whose optimum is known: quadratics of chosen spectra, and logistic losses.

Plain float64 data, and gradient functions of plain operators, which NumPy and JAX can
both run: the same function is what an algorithm trains on and what a prediction knows.
"""

from typing import Any, NamedTuple

import numpy as np

__all__ = [
    "Logistic",
    "Quadratic",
    "logistic_gradient",
    "quadratic",
    "quadratic_gradient",
]


def quadratic_gradient(x: Any, curvature: Any, target: Any, noise: Any = 0.0) -> Any:
    r"""Compute :math:`h (x - b) + \xi` of one worker, or of all where stacked.

    Args:
        x: [d] or [n, d], NumPy or JAX.
        curvature: h, of the same shape.
        target: b, of the same shape.
        noise: xi, of the same shape.
    """
    return curvature * (x - target) + noise


class Quadratic(NamedTuple):
    r"""Losses :math:`f_i(x) = \tfrac12 \sum_j h_{ij} (x_j - b_{ij})^2`, with noise.

    A worker's gradient is :math:`h_i (x - b_i) + \xi`, with :math:`\xi \sim N(0,
    \sigma^2 I)` drawn anew for each worker and step.

    Attributes:
        curvature: h [n, d] float64, positive.
        target: b [n, d] float64, the optimum of each worker.
        sigma: standard deviation of the noise of an element.

    Example:
        >>> problem = quadratic(2, [1.0, 2.0], targets=[[0.0, 0.0], [4.0, 2.0]])
        >>> problem.optimum.tolist(), problem.heterogeneity
        ([2.0, 1.0], 8.0)
    """

    curvature: np.ndarray
    target: np.ndarray
    sigma: float = 0.0

    @property
    def n(self) -> int:
        """Number of workers."""
        return self.curvature.shape[0]

    @property
    def d(self) -> int:
        """Number of parameters."""
        return self.curvature.shape[1]

    @property
    def equal_curvature(self) -> bool:
        """Whether all workers have the same Hessian: then modes of W do not mix."""
        return bool(np.all(self.curvature == self.curvature[0]))

    @property
    def optimum(self) -> np.ndarray:
        """The minimum of the mean loss, [d]: the curvature-weighted mean of targets."""
        return (self.curvature * self.target).sum(0) / self.curvature.sum(0)

    @property
    def heterogeneity(self) -> float:
        r""":math:`\zeta^2 = \tfrac1n \sum_i \|\nabla f_i(x^\star)\|^2`."""
        gradients = quadratic_gradient(self.optimum, self.curvature, self.target)
        return float((gradients**2).sum(1).mean())

    @property
    def smoothness(self) -> float:
        """L, the largest curvature of any worker."""
        return float(self.curvature.max())

    @property
    def strong_convexity(self) -> float:
        """Mu, the smallest curvature of the mean loss."""
        return float(self.curvature.mean(0).min())

    def gradient(self, x: Any, noise: Any = 0.0) -> Any:
        """Compute the gradients of all workers at their own x [n, d]."""
        return quadratic_gradient(x, self.curvature, self.target, noise)

    def loss(self, x: np.ndarray) -> float:
        """Compute the mean loss at one x [d]."""
        return float((0.5 * self.curvature * (x - self.target) ** 2).sum(1).mean())


def quadratic(
    n: int,
    curvature: Any,
    *,
    targets: Any = None,
    zeta: float = 0.0,
    sigma: float = 0.0,
    seed: int = 0,
) -> Quadratic:
    r"""Make a quadratic of chosen spectrum, heterogeneity and noise.

    Args:
        n: number of workers.
        curvature: h: [d] for all workers alike, or [n, d]; positive.
        targets: b [n, d]; where ``None`` drawn, with optimum 0 and heterogeneity zeta.
        zeta: root mean square over workers of the gradient's norm at the optimum.
        sigma: standard deviation of the gradient's noise.
        seed: of the targets.

    Returns:
        The problem, in float64.

    Raises:
        ValueError: for curvatures that are not positive, or shapes that do not fit.

    Example:
        >>> problem = quadratic(8, [1.0, 0.1], zeta=3.0)
        >>> round(problem.heterogeneity, 9), problem.smoothness
        (9.0, 1.0)
    """
    h = np.atleast_1d(np.asarray(curvature, np.float64))
    if h.ndim > 2 or (h.ndim == 2 and len(h) != n) or not (h > 0).all():
        raise ValueError(
            f"quadratic: curvature must be positive, of shape [d] or [n, d] with n={n};"
            f" got shape {h.shape} with minimum {h.min():g}."
        )
    h = np.broadcast_to(h, (n, h.shape[-1])).copy()
    if targets is None:
        b = np.random.default_rng(seed).standard_normal(h.shape)
        b -= (h * b).sum(0) / h.sum(0)
        unit = Quadratic(h, b).heterogeneity
        b *= zeta / np.sqrt(unit) if unit else 0.0
    else:
        b = np.asarray(targets, np.float64)
        if b.shape != h.shape:
            raise ValueError(
                f"quadratic: targets must have the shape {h.shape} of the curvature of "
                f"all workers, got {b.shape}."
            )
    return Quadratic(h, b, sigma)


# --- logistic regression --------------------------------------------------------------


def logistic_gradient(
    w: Any, features: Any, labels: Any, l2: float, xp: Any = np
) -> Any:
    r"""Compute the gradient of the mean of :math:`\log(1 + e^{-y_i a_i w})` plus l2.

    Args:
        w: [d].
        features: a [m, d].
        labels: y [m], -1 or 1.
        l2: lambda of the term :math:`\tfrac\lambda2 \|w\|^2`.
        xp: ``numpy`` or ``jax.numpy``, whichever the arrays are of.

    Returns:
        [d].
    """
    margin = labels * (features @ w)
    weight = -labels / (1 + xp.exp(xp.minimum(margin, 500.0)))
    return features.T @ weight / features.shape[0] + l2 * w


class Logistic(NamedTuple):
    r"""Mean of :math:`\log(1 + e^{-y_i a_i w})`, plus :math:`\tfrac\lambda2 \|w\|^2`.

    Attributes:
        features: a [m, d] float64.
        labels: y [m] float64, -1 or 1.
        l2: lambda > 0.
    """

    features: np.ndarray
    labels: np.ndarray
    l2: float

    @property
    def smoothness(self) -> float:
        r""":math:`\lambda_{\max}(A^\top A)/(4 m) + \lambda`, a bound on the Hessian."""
        largest = np.linalg.norm(self.features, 2) ** 2
        return float(largest / (4 * len(self.labels)) + self.l2)

    def loss(self, w: np.ndarray) -> float:
        """Compute the loss at w [d]."""
        margin = self.labels * (self.features @ w)
        return float(np.logaddexp(0, -margin).mean() + 0.5 * self.l2 * w @ w)

    def gradient(self, w: np.ndarray) -> np.ndarray:
        """Compute the gradient at w [d]."""
        return logistic_gradient(w, self.features, self.labels, self.l2)

    def hessian(self, w: np.ndarray) -> np.ndarray:
        """Compute the Hessian [d, d] at w."""
        p = 1 / (1 + np.exp(-np.abs(self.features @ w)))
        curved = (self.features * (p * (1 - p))[:, None]).T @ self.features
        return curved / len(self.labels) + self.l2 * np.eye(self.features.shape[1])

    def optimum(self, tolerance: float = 1e-14) -> np.ndarray:
        """Find the optimum [d] by Newton's method in float64.

        Args:
            tolerance: of the gradient's largest element.

        Raises:
            RuntimeError: if 50 steps do not reach it.
        """
        w = np.zeros(self.features.shape[1])
        for _ in range(50):
            gradient = self.gradient(w)
            if np.abs(gradient).max() <= tolerance:
                return w
            step = np.linalg.solve(self.hessian(w), gradient)
            size, before = 1.0, self.loss(w)
            while size > 1e-4 and self.loss(w - size * step) > before + 1e-12:
                size /= 2
            w = w - size * step
        raise RuntimeError(
            f"Logistic.optimum: Newton's method stands at a gradient of "
            f"{np.abs(self.gradient(w)).max():.1e} after 50 steps, above {tolerance}. "
            "Raise l2 or the tolerance."
        )

    def split(self, n: int, by_label: bool = False, seed: int = 0) -> list["Logistic"]:
        """Share the samples out among n workers, as equally as they divide.

        Args:
            n: number of workers.
            by_label: sorted by label, the most heterogeneous way; else shuffled.
            seed: of the order.
        """
        order = np.random.default_rng(seed).permutation(len(self.labels))
        if by_label:
            order = order[np.argsort(self.labels[order], kind="stable")]
        return [
            Logistic(self.features[part], self.labels[part], self.l2)
            for part in np.array_split(order, n)
        ]
