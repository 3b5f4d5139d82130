"""What a row of the table is, and when a measurement agrees with its prediction."""

import math
import time
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from bagua_jax.experiments.studies.measure import Estimate

__all__ = [
    "AT_MOST",
    "EQUAL",
    "ROWS",
    "SIDES",
    "SIGMAS",
    "Row",
    "Rule",
    "Verdict",
    "add",
    "check",
    "exact",
    "identity",
    "join",
    "ratio",
    "row",
]

SIGMAS = 4.0
"""Standard errors that a measurement may be off: 6 in 100,000 fair ones exceed it.
Seeds are fixed, so that a row that agrees once agrees always."""


class Rule(NamedTuple):
    """When a measurement agrees with its prediction.

    Attributes:
        kind: ``"equal"``: within standard errors and rounding. ``"at most"``: not above
            it by more. ``"sides"``: the prediction is a threshold, the measurement is
            the growth just below and just above it, under 1 and over 1.
        relative: rounding, relative to the prediction.
        absolute: rounding, absolute.
    """

    kind: Literal["equal", "at most", "sides"]
    relative: float = 0.0
    absolute: float = 0.0


EQUAL = Rule("equal", 1e-6)
AT_MOST = Rule("at most", 1e-6)
SIDES = Rule("sides")


def identity(absolute: float) -> Rule:
    """An identity in float32: equal up to this much, for numbers of order 1."""
    return Rule("equal", 1e-6, absolute)


class Row(NamedTuple):
    """One statement.

    Attributes:
        name: of the row.
        section: where it belongs: constants of compressors (A), mixing (B), exact
            values (C.1), counterexamples (C.2), identities (C.3).
        claim: the statement in words or symbols.
        rule: when it counts as met.
        predict: computes it; a number or several.
        measure: effort -> estimate; replicas are a multiple of the effort.
        quick: among those that a default test run checks.
    """

    name: str
    section: str
    claim: str
    rule: Rule
    predict: Callable[[], Any]
    measure: Callable[[int], Estimate]
    quick: bool


class Verdict(NamedTuple):
    """What came of a row.

    Attributes:
        row: the row.
        agrees: whether the rule is met.
        predicted: [...].
        measured: [...].
        error: standard error of the measurement, [...].
        tolerance: what the difference may be, [...].
        seconds: of processor time that the measurement took.
    """

    row: Row
    agrees: bool
    predicted: np.ndarray
    measured: np.ndarray
    error: np.ndarray
    tolerance: np.ndarray
    seconds: float

    @property
    def worst(self) -> int:
        """Index of the number that is farthest off, in tolerances."""
        if self.row.rule.kind == "sides":
            return 0
        off = np.abs(self.measured - self.predicted).ravel()
        return int(np.argmax(off / np.maximum(self.tolerance.ravel(), 1e-300)))


def check(row: Row, effort: int = 1) -> Verdict:
    """Predict, measure, and judge.

    Args:
        row: one of :data:`ROWS`.
        effort: multiple of the replicas of a quick run.
    """
    predicted = np.asarray(row.predict(), np.float64)
    begin = time.process_time()
    value, error = row.measure(effort)
    seconds = time.process_time() - begin
    measured = np.asarray(value, np.float64)
    error = np.broadcast_to(np.asarray(error, np.float64), measured.shape)
    tolerance = SIGMAS * error
    if row.rule.kind == "sides":
        slack = tolerance * np.array([1, -1])
        below, above = measured + slack
        agrees = bool(below < 1 < above)
    else:
        tolerance = (
            tolerance + row.rule.relative * np.abs(predicted) + row.rule.absolute
        )
        off = measured - predicted
        off = np.abs(off) if row.rule.kind == "equal" else off
        agrees = bool(np.all(off <= tolerance))
    return Verdict(row, agrees, predicted, measured, error, tolerance, seconds)


ROWS: dict[str, Row] = {}
"""Every statement, by name."""


def add(
    name: str,
    section: str,
    claim: str,
    rule: Rule,
    predict: Callable[[], Any],
    measure: Callable[[int], Estimate],
    quick: bool = True,
) -> None:
    """Register a row."""
    assert name not in ROWS, name
    ROWS[name] = Row(name, section, claim, rule, predict, measure, quick)


def row(section: str, claim: str, rule: Rule, quick: bool = True):
    """Register what a function makes, (predict, measure), under the function's name."""

    def register(make):
        predict, measure = make()
        name = make.__name__.replace("_", " ")
        add(name, section, claim, rule, predict, measure, quick)
        return make

    return register


def exact(value: Any) -> Estimate:
    """Wrap a measurement in which nothing is random."""
    return Estimate(np.asarray(value, np.float64))


def ratio(above: np.ndarray, below: np.ndarray) -> Estimate:
    """Estimate a ratio of means from replicas [R, ...] of both."""
    above, below = np.asarray(above, np.float64), np.asarray(below, np.float64)
    value = above.mean(0) / below.mean(0)
    error = (above - value * below).std(0, ddof=1) / math.sqrt(len(above))
    return Estimate(value, error / below.mean(0))


def join(estimates: Sequence[Estimate]) -> Estimate:
    """Put estimates side by side."""
    values, errors = zip(*estimates, strict=True)
    return Estimate(np.stack(values), np.stack(np.broadcast_arrays(*errors)))
