"""The schedule that XLA predicts hides an exchange that is tied at layer boundaries.

The model and the forms are those of ``benchmarks/overlap.py``; every time here is a
prediction of XLA's cost model, repeatable, and no time that a GPU took.
"""

import importlib.util
from pathlib import Path

import pytest

from bagua_jax import planning

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "overlap.py"
FLAT, NODES = planning.Cluster.parse("8:h100"), planning.Cluster.parse("16x8:h100")


@pytest.fixture(scope="module")
def predict():
    pytest.importorskip("jax_cuda13_plugin", reason="bagua-jax[plan] is not installed")
    spec = importlib.util.spec_from_file_location("overlap_benchmark", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.predict


def test_all_buckets_but_the_last_are_hidden(predict):
    (end,) = predict("end-u8", FLAT, [100.0])
    (tie,) = predict("tie-u8", FLAT, [100.0])
    *early, _ = tie["hidden_by_part"].values()
    assert len(early) == 4 and min(early) >= 0.9
    assert tie["exposed_us"] < end["exposed_us"] / 2
    assert tie["end_us"] < end["end_us"]
    # A quarter of 2 x 7/8 x 234.9 MB of gradients, as without the tie.
    assert tie["mb_inside"] == pytest.approx(102.8, abs=0.05)
    assert tie["mb_inside"] == pytest.approx(end["mb_inside"], abs=0.05)


def test_hierarchy_and_tie_are_faster_than_all_reduce(predict):
    gbits = [10.0, 25.0, 100.0]
    plain = predict("end-f32", NODES, gbits)
    tied = predict("tie-u8-hier", NODES, gbits)
    study = [17_200, 11_100, 9_200]  # predicted for the first formulation, in us
    for a, b, best in zip(plain, tied, study, strict=True):
        assert b["end_us"] < a["end_us"]
        assert b["end_us"] < 1.05 * best
        assert b["mb_between"] < a["mb_between"] / 4
