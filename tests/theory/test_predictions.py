"""Every quick row of the table of predictions, and that the table can tell."""

import json

import numpy as np
import pytest

from bagua_jax.experiments.studies.measure import Estimate, average
from bagua_jax.experiments.studies.predictions import ROWS, Row, Rule, check, rows
from bagua_jax.experiments.studies.predictions.__main__ import main, report

QUICK = [name for name, row in ROWS.items() if row.quick]


@pytest.mark.parametrize("name", QUICK)
def test_measurement_agrees_with_prediction(name):
    verdict = check(ROWS[name])
    assert verdict.agrees, json.dumps(
        {
            "predicted": verdict.predicted.tolist(),
            "measured": verdict.measured.tolist(),
            "tolerance": verdict.tolerance.tolist(),
        }
    )


@pytest.mark.parametrize(
    "name",
    [
        "decentralized (before): floor",
        "exact_diffusion: path",
        "compressed_mean: path",
        "choco_sgd: path",
        "marina path",
        "heavy ball variance",
        "error feedback virtual iterate",
    ],
)
def test_a_wrong_prediction_is_told(name):
    """A tenth more, or a thousandth beside zero, is too much for the tolerance."""
    row = ROWS[name]
    right = np.asarray(row.predict(), float)
    wrong = row._replace(predict=lambda: np.where(right == 0, 1e-3, 1.1 * right))
    assert not check(wrong).agrees


def make_row(rule, predicted, value, error=0.0):
    estimate = Estimate(np.asarray(value, float), error)
    return Row("a row", "C.1", "x", rule, lambda: predicted, lambda _: estimate, True)


@pytest.mark.parametrize(
    ("rule", "predicted", "value", "error", "agrees"),
    [
        (Rule("equal"), 1.0, 1.39, 0.1, True),
        (Rule("equal"), 1.0, 1.41, 0.1, False),
        (Rule("equal"), [1.0, 2.0], [1.0, 2.5], 0.1, False),
        (Rule("equal", 1e-3), 1.0, 1.0009, 0.0, True),
        (Rule("equal", 1e-3), 1.0, 1.0011, 0.0, False),
        (Rule("equal", 0, 1e-6), 0.0, np.nan, 0.0, False),
        (Rule("at most"), 1.0, -5.0, 0.0, True),
        (Rule("at most"), 1.0, 1.01, 0.0, False),
        (Rule("sides"), 0.7, [0.9, 1.1], 0.0, True),
        (Rule("sides"), 0.7, [0.9, 1.1], 0.03, False),
        (Rule("sides"), 0.7, [0.9, 0.99], 0.0, False),
        (Rule("sides"), 0.7, [np.nan, 1.1], 0.0, False),
    ],
)
def test_rules(rule, predicted, value, error, agrees):
    assert check(make_row(rule, predicted, value, error)).agrees is agrees


def test_an_average_knows_its_error():
    """Of 400 averages of 25 normals, 4 errors hold all, 1 error about two thirds."""
    draws = np.random.default_rng(0).standard_normal((25, 400))
    value, error = average(draws)
    assert (np.abs(value) < rows.SIGMAS * error).mean() > 0.99
    assert 0.6 < (np.abs(value) < error).mean() < 0.75


def test_a_ratio_knows_its_error():
    rng = np.random.default_rng(1)
    below = rng.uniform(1, 2, (200, 300))
    above = 3 * below + rng.standard_normal(below.shape)
    value, error = rows.ratio(above, below)
    off = np.abs(value - 3) / error
    assert off.max() < 5
    assert 0.6 < (off < 1).mean() < 0.75


def test_the_report_shows_every_row_and_its_error(tmp_path):
    good = check(make_row(Rule("equal"), 1.0, 1.01, 0.1))
    bad = check(make_row(Rule("sides"), 0.5, [0.9, 0.95]))
    text = report([good, bad], 1)
    assert "1 of 2 rows agree" in text
    assert "| a row | x | 1 | 1.01 ± 1.0e-01 | +1.0e-02 of 4.0e-01 |" in text
    assert "**no**" in text


def test_the_command_writes_the_table(tmp_path, capsys):
    out = tmp_path / "docs" / "predictions.md"
    assert main(["--only", "^pair gossip", "--out", str(out)]) == 0
    text = out.read_text()
    assert "2 of 2 rows agree" in text
    assert "pair gossip energy" in text
    assert "pair gossip energy" in capsys.readouterr().err


def test_there_are_rows_of_every_section():
    sections = [row.section for row in ROWS.values()]
    assert {s: sections.count(s) > 5 for s in ("A", "B", "C.1", "C.2", "C.3")} == {
        s: True for s in ("A", "B", "C.1", "C.2", "C.3")
    }
    assert len(ROWS) > 60
