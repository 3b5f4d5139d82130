"""The contracts as checks for algorithms, compressors and topologies of one's own.

Three lines of pytest hold a relaxation to what every shipped one is held to::

    from bagua_jax import testing

    def test_mine():
        testing.check_algorithm(my_relaxation, "gradient")

Needs chex: ``pip install 'bagua-jax[testing]'``.
"""

from bagua_jax import extras

try:
    import chex as _  # noqa: F401
except ModuleNotFoundError as error:
    raise ImportError(extras.missing(error, "bagua_jax.testing")) from None

from bagua_jax.testing.algorithms import (
    CHECKS,
    Case,
    algorithm_checks,
    check_algorithm,
)
from bagua_jax.testing.compressors import check_compressor
from bagua_jax.testing.topologies import check_topology

__all__ = [
    "CHECKS",
    "Case",
    "algorithm_checks",
    "check_algorithm",
    "check_compressor",
    "check_topology",
]
