"""The table of all algorithms is whole, and its numbers are those of the programs."""

import importlib
from pathlib import Path

import pytest

from bagua_jax.algorithms import REGISTRY
from bagua_jax.experiments.tables import survey

ROWS = {survey.label(row): row for row in survey.SURVEY}
PAGE = Path(__file__).parents[2] / "docs" / "algorithms.md"


def test_every_algorithm_has_a_row_and_every_row_its_numbers():
    assert {row.algorithm for row in survey.SURVEY} == set(REGISTRY)
    assert len(ROWS) == len(survey.SURVEY)
    assert set(survey.read()) == set(ROWS), (
        "run python -m bagua_jax.experiments.tables.survey again"
    )


def test_the_pages_are_those_that_the_registry_gives():
    assert PAGE.read_text() == survey.to_markdown(survey.read())
    assert survey.families() in PAGE.parents[1].joinpath("README.md").read_text()


@pytest.mark.parametrize("name", sorted({entry.oracle for entry in REGISTRY.values()}))
def test_oracles_are_where_the_table_says(name):
    module, _, function = name.partition(".")
    assert callable(getattr(importlib.import_module(f"oracles.{module}"), function))


def test_every_row_says_who_has_it_and_what_holds():
    for row in survey.SURVEY:
        assert row.peers and (row.invariant or row.entry.invariant)


def test_the_exact_mean_sends_what_arithmetic_says(devices):
    d, n = 25_557_032, survey.WORKERS
    numbers = survey.read()["gradient_allreduce"]
    assert numbers["parameters"] == d
    assert numbers["bytes_per_worker"] == 8 * d * (n - 1) / n


@pytest.mark.parametrize("name", ["local_sgd(local_steps=8)", "powersgd(rank=2)"])
def test_counting_again_gives_the_same(devices, name):
    assert survey.measure(ROWS[name]) == survey.read()[name]


def test_a_small_model(devices):
    (row,) = [row for row in survey.SURVEY if row.known_as == "D-PSGD"]
    numbers = survey.measure(row, {"kernel": (3, 5), "bias": ()}, workers=4)
    assert numbers == {
        "bytes_per_worker": 2 * 4 * 16,
        "messages_per_worker": 2,
        "parameters": 16,
    }
