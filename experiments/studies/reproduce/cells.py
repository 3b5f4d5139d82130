"""What a public table is: its cells, and the model that predicts them."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np

from bagua_jax.experiments.studies.reproduce.model import Exchange

__all__ = ["Constant", "Table", "Values"]

Values = Mapping[str, float]


class Constant(NamedTuple):
    """One number that is fitted to a table."""

    symbol: str
    unit: str
    start: float
    meaning: str


class Table(NamedTuple):
    """A public table, and the model that predicts it.

    Attributes:
        name: of the command.
        title: in words.
        unit: of a cell.
        row_unit: of a row's number.
        note: what the source says of the measurement.
        rows: the number of each row.
        published: cells of each system, in the order of the rows.
        exchange: (system, row) -> what it sends.
        predict: (constants, system, row) -> a cell.
        constants: what is fitted, by name.
        stated: numbers that are not fitted here, and why they are what they are.
        baselines: models with nothing fitted here: the constants of each.
        left_out: systems that are neither fitted nor summarized, and why.
        exceptions: (system, row, or None for all rows) -> why the model misses there.
        telling: rows on which the constants matter.
        held_out: rows that cross-validation predicts from the others.
        crossovers: pairs of systems whose curves are compared.
        choices: what was decided after seeing the data.
        misses: where the model is wrong, in words.
        slower_is_more: whether a larger cell is a slower system.
    """

    name: str
    title: str
    unit: str
    row_unit: str
    note: str
    rows: tuple[float, ...]
    published: Mapping[str, tuple[float, ...]]
    exchange: Callable[[str, float], Exchange]
    predict: Callable[[Values, str, float], float]
    constants: Mapping[str, Constant]
    stated: tuple[str, ...]
    baselines: Mapping[str, Values]
    left_out: Mapping[str, str]
    exceptions: Mapping[tuple[str, float | None], str]
    telling: tuple[float, ...]
    held_out: tuple[tuple[float, ...], ...]
    crossovers: tuple[tuple[str, str], ...]
    choices: tuple[str, ...]
    misses: tuple[str, ...]
    slower_is_more: bool

    @property
    def cells(self) -> np.ndarray:
        """The published cells, [rows, systems]."""
        return np.array([*self.published.values()], float).T

    def predictions(self, constants: Values) -> np.ndarray:
        """Predict every cell, [rows, systems]."""
        return np.array(
            [
                [self.predict(constants, system, row) for system in self.published]
                for row in self.rows
            ]
        )
