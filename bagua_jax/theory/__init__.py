"""Theory as code: what algorithms do on problems that can be solved on paper.

Three kinds of statement are kept apart: exact values on quadratics (``modes`` for
deterministic linear algorithms, ``moments`` for random linear ones, ``predict`` for an
algorithm by name), constants of compressors and topologies (``compression``,
``mixing``: read off their facts), and bounds of the literature (``rates``).
"""

from bagua_jax.theory import compression, mixing, modes, moments, problems, rates
from bagua_jax.theory.datasets import adult, breast_cancer, stored_optimum
from bagua_jax.theory.predict import COVERED, Prediction, predict, trajectory
from bagua_jax.theory.problems import Quadratic, quadratic

__all__ = [
    "COVERED",
    "Prediction",
    "Quadratic",
    "adult",
    "breast_cancer",
    "compression",
    "mixing",
    "modes",
    "moments",
    "predict",
    "problems",
    "quadratic",
    "rates",
    "stored_optimum",
    "trajectory",
]
