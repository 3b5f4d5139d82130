"""Predictions of theory beside measurements of our algorithms: one table of rows.

A row names a statement, computes it (``bagua_jax.theory``), measures it on simulated
workers (``bagua_jax.experiments.studies.measure``), and says when the two agree: within
the standard error of the measurement, which is computed from its replicas, and within
stated rounding. Tests walk over the rows; this command writes the table::

    python -m bagua_jax.experiments.studies.predictions --out docs/predictions.md
"""

from bagua_jax.experiments.studies.predictions import (  # noqa: F401  (they fill the table)
    constants,
    counterexamples,
    identities,
    linear,
    mean_square,
    special,
)
from bagua_jax.experiments.studies.predictions.rows import (
    ROWS,
    SIGMAS,
    Row,
    Rule,
    Verdict,
    check,
)

__all__ = ["ROWS", "SIGMAS", "Row", "Rule", "Verdict", "check"]
