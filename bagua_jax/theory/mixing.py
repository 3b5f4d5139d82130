"""Spectra of mixing matrices, computed from the topologies that algorithms run on.

No number is written down here: everything is read off ``Topology.mixing_matrix``.
"""

from typing import NamedTuple

import numpy as np

from bagua_jax.topologies import Topology

__all__ = [
    "Spectrum",
    "consensus_energy_factor",
    "pair_energy_factor",
    "random_matching_energy_factor",
    "spectrum",
]

_TOLERANCE = 1e-9


class Spectrum(NamedTuple):
    r"""The modes of one normal mixing matrix, :math:`W = U \Lambda U^*`.

    Attributes:
        eigenvalues: lambda [n], that of the mean first; real for symmetric W.
        basis: U [n, n], unitary; column 0 is :math:`1/\sqrt n`.
        even: every eigenspace is spread evenly over the workers (the projector on it
            has a constant diagonal), as on circulant and other vertex-transitive
            graphs. Noise that is independent between workers is then of equal energy
            in all modes, whichever workers it comes from.
    """

    eigenvalues: np.ndarray
    basis: np.ndarray
    even: bool

    @property
    def gap(self) -> float:
        """1 - max |lambda_k| over the modes that are not the mean."""
        return float(1 - np.abs(self.eigenvalues[1:]).max(initial=0.0))

    @property
    def farthest(self) -> float:
        r""":math:`\max_k |1 - \lambda_k| = \|I - W\|_2`; beta of CHOCO, mu of DCD."""
        return float(np.abs(1 - self.eigenvalues).max())

    @property
    def smallest(self) -> float:
        """The smallest eigenvalue (its real part for a directed W)."""
        return float(np.real(self.eigenvalues).min())

    def to_modes(self, x: np.ndarray) -> np.ndarray:
        """Express [n, ...] by its coefficients in the modes; norms stay."""
        return np.tensordot(self.basis.conj().T, x, 1)


def spectrum(topology: Topology, step: int = 0) -> Spectrum:
    """Diagonalise one step's mixing matrix.

    Args:
        topology: doubly stochastic at this step.
        step: of its period.

    Raises:
        ValueError: if W does not preserve the mean, or is not normal: then its modes
            are not orthogonal, and energies do not add up over them.

    Example:
        >>> from bagua_jax import topologies
        >>> found = spectrum(topologies.ring(4))
        >>> found.eigenvalues.round(6).tolist(), found.even
        ([1.0, 0.333333, -0.333333, 0.333333], True)
    """
    w = topology.mixing_matrix(step)
    n = len(w)
    if not (np.allclose(w.sum(0), 1) and np.allclose(w.sum(1), 1)):
        raise ValueError(
            f"spectrum: W of {topology.name!r} must be doubly stochastic, so that the "
            "mean is a mode of its own. Use a symmetric or circulant topology."
        )
    circulant = all(np.allclose(np.roll(w[0], i), w[i]) for i in range(n))
    if circulant:
        basis = np.exp(2j * np.pi * np.outer(range(n), range(n)) / n) / np.sqrt(n)
        values = np.fft.fft(w[:, 0])
    elif np.allclose(w, w.T):
        # J moves the mean to 2, the largest, so that it comes first, by itself.
        values, basis = np.linalg.eigh(w + 1 / n)
        values, basis = values[::-1].copy(), basis[:, ::-1]
        values[0] -= 1
    else:
        raise ValueError(
            f"spectrum: W of {topology.name!r} is neither symmetric nor circulant, so "
            "that its modes are not orthogonal. Use such a topology, or "
            "moments.lift on the whole network."
        )
    if np.allclose(w, w.T):
        values = np.real(values)
    return Spectrum(values, basis, circulant or _is_even(values, basis))


def _is_even(values: np.ndarray, basis: np.ndarray) -> bool:
    """Tell whether every eigenspace's projector has a constant diagonal."""
    left = np.ones(len(values), bool)
    while left.any():
        space = np.abs(values - values[left][0]) < _TOLERANCE
        diagonal = (np.abs(basis[:, space]) ** 2).sum(1)
        if np.ptp(diagonal) > 1e-6:
            return False
        left &= ~space
    return True


def consensus_energy_factor(matrices: np.ndarray) -> float:
    r"""Compute by how much a random W shrinks disagreement in mean square, at worst.

    :math:`\lambda_{\max}(E[W^\top W] - J)`: W is drawn anew at each step from the given
    matrices, all alike.

    Args:
        matrices: [m, n, n], doubly stochastic.

    Example:
        >>> swap = np.array([[0.5, 0.5], [0.5, 0.5]])
        >>> consensus_energy_factor(np.stack([swap, np.eye(2)]))
        0.5
    """
    n = matrices.shape[-1]
    second = np.mean([w.T @ w for w in matrices], axis=0)
    return float(np.linalg.eigvalsh(second - 1 / n)[-1])


def random_matching_energy_factor(n: int) -> float:
    """Energy left after a uniformly random perfect matching averages its pairs.

    A pair is matched with probability 1/(n-1), and W'W = W, so that E[W'W] = I/2 +
    (11' - I)/(2 (n-1)).

    Args:
        n: number of workers, even.

    Example:
        >>> round(random_matching_energy_factor(8), 4)
        0.4286
    """
    mean = 0.5 * np.eye(n) + 0.5 * (1 - np.eye(n)) / (n - 1)
    return float(np.linalg.eigvalsh(mean - 1 / n)[-1]) if n > 2 else 0.0


def pair_energy_factor(n: int) -> float:
    """Energy left after one uniformly random pair averages: an event of AD-PSGD.

    Args:
        n: number of workers, at least 2.

    Example:
        >>> pair_energy_factor(5)
        0.75
    """
    return 1 - 1 / (n - 1)
