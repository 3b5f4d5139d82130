"""What a program sends: bytes and messages, read from the program.

:func:`count` reads the optimized HLO of a compiled program, :func:`intended` the
StableHLO that JAX gave to the compiler, and :func:`compare` names the differences.
:func:`assert_bytes` is for tests. Nothing is guessed: a form that is not known, a loop
of unknown length or a branch of unknown share is an error.
"""

from bagua_jax.wire.asserting import assert_bytes
from bagua_jax.wire.base import Collective, WireCount
from bagua_jax.wire.comparison import Change, WireComparison, compare
from bagua_jax.wire.groups import replica_groups
from bagua_jax.wire.hlo import count
from bagua_jax.wire.stablehlo import intended
from bagua_jax.wire.weights import scoped_shares

__all__ = [
    "Change",
    "Collective",
    "WireComparison",
    "WireCount",
    "assert_bytes",
    "compare",
    "count",
    "intended",
    "replica_groups",
    "scoped_shares",
]
