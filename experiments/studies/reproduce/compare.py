"""Predictions beside what was published: errors, fitted and cross-validated."""

import itertools
from collections.abc import Mapping
from typing import NamedTuple

import numpy as np

from bagua_jax.experiments.studies.reproduce.cells import Table
from bagua_jax.experiments.studies.reproduce.model import fit

__all__ = ["Comparison", "Errors", "Orders", "compare", "crossings", "orders"]

CLOSE = 1.05  # published values nearer than this ratio have no order


class Errors(NamedTuple):
    """Relative errors of some cells, in absolute value."""

    cells: int
    median: float
    mean: float
    percentile_90: float
    maximum: float


class Orders(NamedTuple):
    """Pairs of systems in one row whose published values differ by more than 5 %."""

    right: int
    pairs: int
    wrong: tuple[tuple[float, str, str], ...]  # row, and who is published first


class Comparison(NamedTuple):
    """A table, predicted.

    Attributes:
        constants: the fitted ones.
        predicted: [rows, systems].
        errors: predicted / published - 1, [rows, systems].
        fitted: of the cells that are fitted; without systems left out.
        telling: of them, those of rows on which the constants matter.
        by_system: of each system's column.
        baselines: of models with nothing fitted, over the same cells.
        baseline_errors: predicted / published - 1 of each, [rows, systems].
        algorithm_out: each algorithm predicted by constants fitted to the others; of
            telling rows.
        row_out: likewise rows, or groups of them; ``None`` where the constants are not
            determined without them.
        orders: of pairs in all rows.
        crossovers: (published, predicted) places where two curves cross.
    """

    constants: Mapping[str, float]
    predicted: np.ndarray
    errors: np.ndarray
    fitted: Errors
    telling: Errors
    by_system: Mapping[str, Errors]
    baselines: Mapping[str, Errors]
    baseline_errors: Mapping[str, np.ndarray]
    algorithm_out: Errors
    row_out: Mapping[str, Errors | None]
    orders: Orders
    crossovers: Mapping[str, tuple[tuple[float, ...], tuple[float, ...]]]


def summarize(errors: np.ndarray) -> Errors:
    """Summarize relative errors."""
    size = np.abs(errors[np.isfinite(errors)])
    return Errors(
        size.size,
        float(np.median(size)),
        float(size.mean()),
        float(np.percentile(size, 90)),
        float(size.max()),
    )


def orders(table: Table, predicted: np.ndarray, rows: slice = slice(None)) -> Orders:
    """Compare the order of every pair of systems in every row."""
    right, wrong = 0, []
    names, cells = list(table.published), table.cells
    for i in range(len(table.rows))[rows]:
        for a, b in itertools.combinations(range(len(names)), 2):
            if max(cells[i, a], cells[i, b]) <= CLOSE * min(cells[i, a], cells[i, b]):
                continue
            if (cells[i, a] - cells[i, b]) * (predicted[i, a] - predicted[i, b]) > 0:
                right += 1
            else:
                low, high = (a, b) if cells[i, a] < cells[i, b] else (b, a)
                wrong.append((table.rows[i], names[low], names[high]))
    return Orders(right, right + len(wrong), tuple(wrong))


def crossings(x: np.ndarray, a: np.ndarray, b: np.ndarray) -> tuple[float, ...]:
    """Find where two curves change places, with straight lines between points.

    Example:
        >>> crossings(np.array([0.0, 2.0]), np.array([0.0, 4.0]), np.array([1.0, 1.0]))
        (0.5,)
    """
    gap = a - b
    at = np.flatnonzero(gap[:-1] * gap[1:] < 0)
    share = gap[at] / (gap[at] - gap[at + 1])
    return tuple((x[at] + share * (x[at + 1] - x[at])).tolist())


def compare(table: Table) -> Comparison:
    """Fit a table's constants, predict it, and say how well that goes.

    Example:
        >>> from bagua_jax.experiments.studies.reproduce import tables
        >>> found = compare(tables.load("bandwidth"))
        >>> found.fitted.cells, len(found.constants), found.fitted.median < 0.03
        (35, 2, True)
    """
    cells, names = table.cells, list(table.published)
    counted = [system not in table.left_out for system in names]
    used = np.where(counted, cells, np.nan)
    telling = np.isin(table.rows, table.telling)
    start = {key: constant.start for key, constant in table.constants.items()}

    def refit(hidden: np.ndarray) -> np.ndarray | None:
        """Return the errors of hidden cells by a fit to the others."""
        found = fit(table.predictions, np.where(hidden, np.nan, used), start)
        if not found.identified:
            return None
        return np.where(hidden, table.predictions(found.constants) / used - 1, np.nan)

    found = fit(table.predictions, used, start)
    predicted = table.predictions(found.constants)
    errors = predicted / cells - 1

    columns = []
    for system in np.flatnonzero(counted):
        hidden = np.zeros(cells.shape, bool)
        hidden[:, system] = True
        column = refit(hidden)
        if column is not None:
            columns.append(column[:, system])
    row_out = {}
    for rows in table.held_out:
        hidden = np.isin(table.rows, rows)[:, None] & np.ones(cells.shape, bool)
        rest = refit(hidden)
        label = " and ".join(f"{row:g}" for row in rows)
        row_out[label] = None if rest is None else summarize(rest)

    x = np.array(table.rows, float)
    crossed = {}
    for a, b in table.crossovers:
        pair = [names.index(a), names.index(b)]
        found_at = [crossings(x, *values[:, pair].T) for values in (cells, predicted)]
        crossed[f"{a} / {b}"] = (found_at[0], found_at[1])

    def left(values):
        return np.where(counted, values / cells - 1, np.nan)

    baselines = {
        key: table.predictions(value) for key, value in table.baselines.items()
    }
    return Comparison(
        constants=found.constants,
        predicted=predicted,
        errors=errors,
        fitted=summarize(left(predicted)),
        telling=summarize(left(predicted)[telling]),
        by_system={name: summarize(errors[:, i]) for i, name in enumerate(names)},
        baselines={key: summarize(left(value)) for key, value in baselines.items()},
        baseline_errors={key: value / cells - 1 for key, value in baselines.items()},
        algorithm_out=summarize(np.array(columns)[:, telling]),
        row_out=row_out,
        orders=orders(table, predicted),
        crossovers=crossed,
    )
