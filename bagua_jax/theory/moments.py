r"""Second moments of linear algorithms with random compressors: exact, not bounds.

Where a compressor is linear and random (random-k, dropped messages, random matchings),
a step is :math:`s' = M s + \text{noise}` with a random matrix M, and the second moment
:math:`S = E[s s^\top]` follows the linear operator

.. math::
    \mathcal E(S) = E[M S M^\top]
    = \bar M S \bar M^\top + C \big( \Gamma \circ (R S R^\top) \big) C^\top,\qquad
    M = \bar M + \sum_k \varepsilon_k\, c_k r_k^\top,\quad
    \Gamma = \mathrm{Cov}(\varepsilon)

Its spectral radius is the mean-square rate. :class:`Lifted` is this operator for any
network, never formed where it would not fit. :class:`ModeMoments` is the same for the
modes of :mod:`bagua_jax.theory.modes`, where only small blocks are left, coupled by one
number: the energy of the compression error.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from bagua_jax.theory.modes import Modes, largest_stable, solve_stein

__all__ = [
    "Energies",
    "Lifted",
    "ModeMoments",
    "choco_largest_consensus_step",
    "dcd_largest_variance",
    "ecd_error_variance",
    "lift",
    "lift_mixture",
    "marina",
    "stable_learning_rate",
]

_DENSE = 40  # states up to which the operator is formed, on symmetric matrices


# --- any network ----------------------------------------------------------------------


class Lifted(NamedTuple):
    r"""The operator E[M S M'] of a random matrix M.

    Attributes:
        mean: expectation of M [s, s].
        answers: C [s, k], the columns c of the random rank-one parts of M.
        arguments: R [k, s], their rows r.
        covariance: Gamma [k, k] of their coefficients.
    """

    mean: np.ndarray
    answers: np.ndarray
    arguments: np.ndarray
    covariance: np.ndarray

    def apply(self, second: np.ndarray) -> np.ndarray:
        """Take second moments [s, s] one step on, without noise."""
        energy = self.covariance * (self.arguments @ second @ self.arguments.T)
        return self.mean @ second @ self.mean.T + self.answers @ energy @ self.answers.T

    def without(self, direction: np.ndarray, functional: np.ndarray) -> "Lifted":
        """Project a conserved direction out, such as the mean under gossip.

        Args:
            direction: [s], a state that every M leaves as it is.
            functional: [s], a sum that every M preserves; 1 on the direction.
        """
        rest = np.eye(len(self.mean)) - np.outer(direction, functional)
        return Lifted(
            rest @ self.mean @ rest,
            rest @ self.answers,
            self.arguments @ rest,
            self.covariance,
        )

    def trajectory(
        self, start: np.ndarray, steps: int, noise: np.ndarray | float = 0.0
    ) -> np.ndarray:
        """Return the second moments before each step and after the last.

        Args:
            start: s_0 [s], or its second moment [s, s].
            steps: T.
            noise: covariance Q [s, s] of what is added at each step.

        Returns:
            [T + 1, s, s].
        """
        second = np.outer(start, start) if start.ndim == 1 else start
        path = [second]
        for _ in range(steps):
            path.append(self.apply(path[-1]) + noise)
        return np.stack(path)

    def rate(self) -> float:
        """Mean-square factor a step: the spectral radius of the operator."""
        if len(self.mean) <= _DENSE:
            return float(np.abs(np.linalg.eigvals(self._matrix())).max())
        return _spectral_radius(self.apply, np.eye(len(self.mean)))

    def steady(self, noise: np.ndarray) -> np.ndarray:
        """Solve S = E(S) + Q for the second moments [s, s] that stay.

        Args:
            noise: Q [s, s].

        Raises:
            ValueError: if the rate is 1 or more.
        """
        if self.rate() >= 1:
            raise ValueError(
                f"moments: there is no steady state at a mean-square rate of "
                f"{self.rate():.6g}. Lower the step, or project conserved directions "
                "out with `without`."
            )
        if len(self.mean) <= _DENSE:
            rows, columns = np.tril_indices(len(self.mean))
            matrix = np.eye(len(rows)) - self._matrix()
            found = np.zeros_like(self.mean)
            found[rows, columns] = np.linalg.solve(matrix, noise[rows, columns])
            return found + np.tril(found, -1).T
        return _solve_fixed_point(self.apply, noise)

    def _matrix(self) -> np.ndarray:
        """Form the operator on the lower triangles of symmetric matrices."""
        s = len(self.mean)
        rows, columns = np.tril_indices(s)
        matrix = np.empty((len(rows), len(rows)))
        for k, (i, j) in enumerate(zip(rows, columns, strict=True)):
            unit = np.zeros((s, s))
            unit[i, j] = unit[j, i] = 1
            matrix[:, k] = self.apply(unit)[rows, columns]
        return matrix


def lift(fixed: np.ndarray, random: Sequence[np.ndarray], keep: float) -> Lifted:
    r"""Lift :math:`s' = (M_0 + \sum_i m_i M_i) s` with independent Bernoulli masks.

    Args:
        fixed: M_0 [s, s].
        random: the M_i [s, s]; one for each mask. A mask that workers share has the sum
            of theirs.
        keep: probability q of m_i = 1.

    Example:
        EF-SGD with random-k on one worker: s = (x, e), p = a x + e is sent or kept.

        >>> a, q = 0.5, 0.36
        >>> ef = lift(np.array([[1, 0], [a, 1]]), [np.array([[-a, -1], [-a, -1]])], q)
        >>> ef.trajectory(np.array([1.0, 0.0]), 1)[1].round(4)[0].tolist()
        [0.73, 0.32]
    """
    parts = [_rank_one(m) for m in random]
    sizes = [len(rows) for _, rows in parts]
    owner = np.repeat(range(len(parts)), sizes)
    return Lifted(
        mean=np.asarray(fixed, float) + keep * np.sum(random, axis=0),
        answers=np.concatenate([columns for columns, _ in parts], axis=1),
        arguments=np.concatenate([rows for _, rows in parts], axis=0),
        covariance=keep * (1 - keep) * (owner[:, None] == owner).astype(float),
    )


def lift_mixture(matrices: Sequence[np.ndarray], shares: Sequence[float]) -> Lifted:
    """Lift a step whose matrix is drawn from a list, such as random matchings.

    Args:
        matrices: the M_k [s, s].
        shares: their probabilities.

    Example:
        >>> swap = np.array([[0.5, 0.5], [0.5, 0.5]])
        >>> gossip = lift_mixture([swap, np.eye(2)], [0.5, 0.5])
        >>> round(gossip.without(np.ones(2), np.ones(2) / 2).rate(), 9)
        0.5
    """
    parts = [_rank_one(m) for m in matrices]
    p = np.repeat(shares, [len(rows) for _, rows in parts])
    owner = np.repeat(range(len(parts)), [len(rows) for _, rows in parts])
    same = owner[:, None] == owner
    return Lifted(
        mean=np.tensordot(shares, np.asarray(matrices, float), 1),
        answers=np.concatenate([columns for columns, _ in parts], axis=1),
        arguments=np.concatenate([rows for _, rows in parts], axis=0),
        covariance=np.where(same, p[:, None], 0) - np.outer(p, p),
    )


def _rank_one(matrix: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Split a matrix into columns [s, r] and rows [r, s] whose product it is."""
    left, size, right = np.linalg.svd(np.asarray(matrix, float))
    kept = size > 1e-13 * max(size[0], 1e-300)
    return left[:, kept] * size[kept], right[kept]


def _krylov(apply: Callable, start: np.ndarray, size: int):
    """Arnoldi's method: an orthonormal basis, and the operator in it [size + 1, size].

    Stops early where the basis is invariant.
    """
    basis = np.zeros((size + 1, start.size))
    basis[0] = start.ravel() / np.linalg.norm(start)
    h = np.zeros((size + 1, size))
    for k in range(size):
        known = basis[: k + 1]
        vector = apply(basis[k].reshape(start.shape)).ravel()
        for _ in range(2):  # twice is enough
            parts = known @ vector
            vector = vector - parts @ known
            h[: k + 1, k] += parts
        h[k + 1, k] = np.linalg.norm(vector)
        if h[k + 1, k] < 1e-14 * np.linalg.norm(h[: k + 1, k]):
            return known, h[: k + 1, : k + 1]
        basis[k + 1] = vector / h[k + 1, k]
    return basis, h


def _spectral_radius(apply: Callable, start: np.ndarray, size: int = 40) -> float:
    """Find the largest eigenvalue of an operator that keeps matrices positive.

    By Perron and Frobenius it is real, and has a positive eigenvector.
    """
    found, previous = 0.0, math.inf
    for _ in range(50):
        basis, h = _krylov(apply, start, size)
        square = h[: h.shape[1]]
        values, vectors = np.linalg.eig(square)
        best = np.argmax(np.real(values))
        found = float(np.real(values[best]))
        if len(basis) <= size or abs(found - previous) <= 1e-12 * abs(found):
            break
        previous = found
        start = (basis[: len(square)].T @ np.real(vectors[:, best])).reshape(
            start.shape
        )
    return found


def _solve_fixed_point(apply: Callable, source: np.ndarray) -> np.ndarray:
    """Solve S = E(S) + Q by restarted GMRES."""
    found = np.zeros_like(source, dtype=float)
    scale = np.linalg.norm(source)
    for _ in range(100):
        rest = source + apply(found) - found
        length = np.linalg.norm(rest)
        if length <= 1e-13 * max(scale, np.linalg.norm(found)):
            break
        basis, h = _krylov(apply, rest, 40)
        columns = h.shape[1]
        shifted = np.eye(h.shape[0], h.shape[1]) - h
        right = length * np.eye(len(h), 1)[:, 0]
        weights = np.linalg.lstsq(shifted, right, rcond=None)[0]
        found = found + (basis[:columns].T @ weights).reshape(source.shape)
    return found


# --- modes ----------------------------------------------------------------------------


class Energies(NamedTuple):
    r"""Expected squared distances, summed over elements.

    Attributes:
        mean: :math:`E\|\bar x - x^\star\|^2`, of the mean model.
        consensus: :math:`\tfrac1n \sum_i E\|x_i - \bar x\|^2`.
    """

    mean: float
    consensus: float

    @property
    def total(self) -> float:
        r""":math:`\tfrac1n \sum_i E\|x_i - x^\star\|^2`."""
        return self.mean + self.consensus


class ModeMoments(NamedTuple):
    r"""Second moments of all modes, with compression error.

    A worker's error has variance v times the energy of what it compresses. Where
    workers draw masks of their own, and W's eigenspaces are spread evenly over the
    workers, every mode receives the mean energy :math:`\tfrac1n \sum_k E|z_k|^2`; where
    they share one mask, every mode receives its own.

    Attributes:
        modes: all n of them.

    Example:
        DCD-PSGD on a ring of 8 diverges, whatever the step, beyond this omega:

        >>> from bagua_jax import topologies
        >>> from bagua_jax.theory import mixing, modes
        >>> w = mixing.spectrum(topologies.ring(8)).eigenvalues
        >>> dcd = modes.low_precision_decentralized(w, 0.0, 0.0)
        >>> round(ModeMoments(dcd.without_mean()).largest_variance(), 4)
        1.3659
    """

    modes: Modes

    def _columns(self) -> np.ndarray:
        """Outer product c c* in each mode, [m, b, b]."""
        c = self.modes.answer
        return c[:, :, None] * c.conj()[:, None]

    def _energy(self, second: np.ndarray) -> np.ndarray:
        """E|r s|^2 of each mode, [m]."""
        r = self.modes.argument
        return np.einsum("ma,mab,mb->m", r, second, r.conj()).real

    def _gain(self, z: float) -> float:
        """Mean energy of what is compressed, after errors of variance 1 everywhere.

        Summed over the past with z^-age: at z = 1 in a steady state.
        """
        answer = solve_stein(self.modes.transition, self._columns(), z)
        return float(self._energy(answer).mean())

    def _operator(self) -> np.ndarray:
        """Each mode's own operator under a shared mask, [m, b^2, b^2]."""
        a, b = self.modes.transition, self.modes.transition.shape[-1]
        v = self.modes.message.variance

        def lifted(matrix):
            pairs = matrix[:, :, None, :, None] * matrix.conj()[:, None, :, None, :]
            return pairs.reshape(len(a), b * b, b * b)

        c_r = self.modes.answer[:, :, None] * self.modes.argument[:, None]
        return lifted(a) + v * lifted(c_r)

    @property
    def rate(self) -> float:
        """Mean-square factor of a step (of an H-th of a transition)."""
        modes = self.modes
        slowest = float(np.abs(modes.poles).max(initial=0.0)) ** 2
        v = modes.message.variance
        found = slowest
        if v and modes.common:
            found = float(np.abs(np.linalg.eigvals(self._operator())).max())
        elif v:
            found = self._private_rate(slowest, v)
        return float(found ** (1 / modes.steps))

    def _private_rate(self, slowest: float, v: float) -> float:
        """Solve v G(z) = 1 for z above the modes' own rates, where G falls."""

        def excess(z):
            return v * self._gain(z) - 1

        # At a double pole rounding hides what lies just above it.
        near = max(slowest, 1e-12) * (1 + np.array([1.0, 1e-2, 1e-4, 1e-6, 1e-9]))
        low = next((z for z in near if excess(z) > 0), None)
        if low is None:
            return slowest
        high = 2 * low
        while excess(high) > 0:
            low, high = high, 2 * high
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if excess(middle) > 0 else (low, middle)
        return (low + high) / 2

    @property
    def stable(self) -> bool:
        """Whether second moments stay bounded."""
        if not self.modes.stable:
            return False
        v = self.modes.message.variance
        if v and self.modes.common:
            return float(np.abs(np.linalg.eigvals(self._operator())).max()) < 1 - 1e-12
        return not v or v * self._gain(1.0) < 1 - 1e-12

    def largest_variance(self) -> float:
        """Return the v at which second moments blow up, all else unchanged.

        For masks of workers' own, and an error that does not change the mean step:
        an unbiased compressor.
        """
        return 1 / self._gain(1.0)

    def energies(
        self, start: np.ndarray, offsets: np.ndarray | None = None, sigma: float = 0.0
    ) -> Iterator[Energies]:
        """Return the energies before the first transition and after each, for ever.

        Args:
            start: x_0 [n] or [n, d] in modes (``Spectrum.to_modes``).
            offsets: targets b in modes, of the same shape; 0 where ``None``.
            sigma: standard deviation of the gradients' noise.
        """
        state = self._begin(start, offsets)
        while True:
            yield self._measure(*state)
            state = self._advance(*state, sigma=sigma)

    def _begin(self, start, offsets):
        start = np.asarray(start).reshape(len(start), -1)
        offsets = np.zeros_like(start) if offsets is None else np.asarray(offsets)
        offsets = offsets.reshape(start.shape)
        mean = self.modes.start[:, :, None] * start[:, None]  # [m, b, d]
        b = mean.shape[1]
        return mean, np.zeros((len(mean), b, b), complex), offsets

    def _advance(self, mean, covariance, offsets, *, sigma):
        """Take expected states [m, b, d] and summed covariances [m, b, b] one step."""
        modes, d = self.modes, mean.shape[-1]
        constant = -modes.curvature * offsets  # [m, d]
        noise = sigma**2 * d
        a, a_conj = modes.transition, np.swapaxes(modes.transition.conj(), -1, -2)
        new = a @ covariance @ a_conj
        new += noise * modes.noise @ np.swapaxes(modes.noise.conj(), -1, -2)
        if modes.message.variance:
            sent = np.einsum("ma,mad->md", modes.argument, mean)
            sent = sent + modes.argument_noise.sum(-1)[:, None] * constant
            energy = self._energy(covariance) + (np.abs(sent) ** 2).sum(-1)
            energy += noise * (np.abs(modes.argument_noise) ** 2).sum(-1)
            energy = energy if modes.common else energy.mean() * np.ones(len(a))
            new += modes.message.variance * energy[:, None, None] * self._columns()
        mean = a @ mean + modes.drive[:, :, None] * constant[:, None]
        return mean, new, offsets

    def _measure(self, mean, covariance, offsets) -> Energies:
        n = len(mean)
        goal = np.zeros_like(offsets)
        goal[0] = offsets[0]
        energy = (np.abs(mean[:, 0] - goal) ** 2).sum(-1) + covariance[:, 0, 0].real
        return Energies(float(energy[0] / n), float(energy[1:].sum() / n))

    def steady(self, offsets: np.ndarray, sigma: float = 0.0) -> Energies:
        """Return the energies that stay.

        Args:
            offsets: targets b in modes, [n] or [n, d].
            sigma: standard deviation of the gradients' noise.

        Raises:
            ValueError: if second moments do not stay bounded.
        """
        if not self.stable:
            raise ValueError(
                f"moments: there is no steady state at a mean-square rate of "
                f"{self.rate:.6g}. Lower the step, or compress less."
            )
        modes, v = self.modes, self.modes.message.variance
        offsets = np.asarray(offsets).reshape(len(offsets), -1)
        mean = modes.fixed_point(offsets)
        noise = sigma**2 * offsets.shape[1]
        source = noise * modes.noise @ np.swapaxes(modes.noise.conj(), -1, -2)
        if not v:
            return self._measure(mean, solve_stein(modes.transition, source), offsets)
        constant = -modes.curvature * offsets
        sent = np.einsum("ma,mad->md", modes.argument, mean)
        sent = sent + modes.argument_noise.sum(-1)[:, None] * constant
        energy = (np.abs(sent) ** 2).sum(-1)
        energy = energy + noise * (np.abs(modes.argument_noise) ** 2).sum(-1)
        columns = self._columns()
        if modes.common:
            source = source + v * energy[:, None, None] * columns
            b = source.shape[-1]
            left = np.eye(b * b) - self._operator()
            found = np.linalg.solve(left, source.reshape(-1, b * b, 1))
            return self._measure(mean, found.reshape(source.shape), offsets)
        plain = solve_stein(modes.transition, source)
        first = self._energy(plain).mean() + energy.mean()
        level = first / (1 - v * self._gain(1.0))
        covariance = plain + v * level * solve_stein(modes.transition, columns)
        return self._measure(mean, covariance, offsets)


def stable_learning_rate(
    make: Callable[[float, float], Modes], curvatures: Sequence[float]
) -> float:
    """Find the largest stable learning rate, in mean square.

    Args:
        make: (curvature, learning rate) -> modes.
        curvatures: of the problem; the largest and the smallest decide.

    Returns:
        The threshold; 0 if none is stable.
    """
    extremes = sorted({min(curvatures), max(curvatures)})

    def is_stable(learning_rate):
        return all(ModeMoments(make(h, learning_rate)).stable for h in extremes)

    return largest_stable(is_stable, 8 / max(curvatures))


# --- two thresholds of gossip in closed form ------------------------------------------


def dcd_largest_variance(eigenvalues: np.ndarray) -> float:
    r"""Return the omega from which gossip with DCD diverges, without gradients.

    .. math:: \omega^\star = \Big( \frac1n \sum_k
              \frac{1 - \lambda_k}{1 + \lambda_k} \Big)^{-1}

    In mode k the message is :math:`1 - \lambda_k` of what the mode holds, and an error
    dies out by :math:`\lambda_k^2` a step. So an error of energy 1 in every mode leads
    to messages of :math:`\tfrac1n \sum_k (1 - \lambda_k)^2/(1 - \lambda_k^2)`, of which
    omega becomes error; stable if that is below 1.

    Args:
        eigenvalues: lambda [n] of a symmetric W that treats all workers alike
            (``Spectrum.even``), the mean's 1 first.

    Example:
        >>> ring = (1 + 2 * np.cos(2 * np.pi * np.arange(64) / 64)) / 3
        >>> round(dcd_largest_variance(ring), 6), round((1 + 3**0.5) / 2, 6)
        (1.366025, 1.366025)
    """
    rest = _symmetric(eigenvalues, "dcd_largest_variance")[1:]
    return float(len(eigenvalues) / ((1 - rest) / (1 + rest)).sum())


def choco_largest_consensus_step(eigenvalues: np.ndarray, keep: float) -> float:
    r"""Return the consensus step from which CHOCO-gossip diverges, without gradients.

    Each element of a message is kept with probability q, not scaled. With
    :math:`a_k = \gamma_c (1 - \lambda_k)` it is stable if and only if

    .. math:: \frac{1 - q}{q} \cdot \frac1n \sum_k
              \frac{2 q + (2 + q)\, a_k}{4 - 2 q - q\, a_k} < 1,
              \qquad q \max_k a_k < 4 - 2 q

    In a mode, with the public copy y and the message e = x - y, a step is :math:`y' =
    y + q e + \nu,\ e' = (1 - q) e - \nu - a y'`, and :math:`\nu` has :math:`q (1 - q)`
    times the mean energy of the messages. Its answer in e is :math:`-((1 + a) z -
    1)/(z^2 - (2 - q - a q) z + 1 - q)`, of energy :math:`(2 q + (2 + q) a)/(q^2 (4 - 2
    q - a q))`; the sum is the energy that an error leads to, which must be below 1.

    Args:
        eigenvalues: as in :func:`dcd_largest_variance`.
        keep: q in (0, 1].

    Example:
        >>> ring = (1 + 2 * np.cos(2 * np.pi * np.arange(64) / 64)) / 3
        >>> round(choco_largest_consensus_step(ring, 0.5), 6)  # 17/18
        0.944444
    """
    q = keep
    apart = 1 - _symmetric(eigenvalues, "choco_largest_consensus_step")

    def is_stable(step):
        a = step * apart
        if q * a.max() >= 4 - 2 * q:
            return False
        led_to = ((2 * q + (2 + q) * a) / (4 - 2 * q - q * a)).mean()
        return (1 - q) / q * led_to < 1

    return largest_stable(is_stable, 8 / apart.max())


def _symmetric(eigenvalues: np.ndarray, caller: str) -> np.ndarray:
    beside = np.imag(eigenvalues)
    if np.abs(beside).max() > 1e-12:
        raise ValueError(
            f"{caller}: eigenvalues must be real, got one of imaginary part "
            f"{beside.max():.3g}: W is not symmetric. Use ModeMoments, which takes any "
            "normal W."
        )
    return np.real(eigenvalues)


# --- MARINA: a coin and masks, in three scalars ---------------------------------------


def marina(a: float, omega_over_n: float, p: float) -> np.ndarray:
    r"""Return MARINA's map of :math:`(E\|y\|^2, E\|e\|^2, E\langle y, e \rangle)`.

    With y = x - x*, h = 1 and e = g - y: :math:`y' = (1 - a) y - a e`, and e' is 0 with
    probability p, else e plus the mean error of compressed gradient differences y' - y.

    Args:
        a: gamma h.
        omega_over_n: variance of the mean of n compressed equal vectors.
        p: probability of a dense step.

    Returns:
        [3, 3]; its spectral radius is the mean-square rate.

    Example:
        >>> marina(0.5, 0.0, 1.0)[0].tolist()
        [0.25, 0.25, -0.5]
    """
    noise = (1 - p) * omega_over_n * a**2
    return np.array(
        [
            [(1 - a) ** 2, a**2, -2 * a * (1 - a)],
            [noise, (1 - p) + noise, 2 * noise],
            [0.0, -(1 - p) * a, (1 - p) * (1 - a)],
        ]
    )


# --- ECD: weights that change with time -----------------------------------------------


def ecd_error_variance(t: int) -> float:
    r"""Return the variance of ECD's estimates after step t, for errors of variance 1.

    From :math:`e \leftarrow (1 - 2/t) e + (2/t) \varepsilon`, whose step 2 forgets the
    first: :math:`\tfrac23 (2 t - 1)/(t (t - 1))`, about 4/(3 t).

    Args:
        t: at least 2.

    Example:
        >>> ecd_error_variance(2)
        1.0
    """
    return 2 / 3 * (2 * t - 1) / (t * (t - 1))
