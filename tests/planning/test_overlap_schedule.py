"""The schedule that XLA predicts hides an exchange that is tied at layer boundaries.

The model and the forms are those of ``benchmarks/overlap.py``; every time here is a
prediction of XLA's cost model, repeatable, and no time that a GPU took.
"""

import importlib.util
import re
from collections import Counter
from pathlib import Path

import jax
import numpy as np
import pytest

from bagua_jax import planning

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "overlap.py"
FLAT, NODES = planning.Cluster.parse("8:h100"), planning.Cluster.parse("16x8:h100")


@pytest.fixture(scope="module")
def benchmark():
    spec = importlib.util.spec_from_file_location("overlap_benchmark", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def predict(benchmark):
    pytest.importorskip("jax_cuda13_plugin", reason="bagua-jax[plan] is not installed")
    return benchmark.predict


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


def test_ring_averages_over_nodes_and_devices(benchmark):
    nodes, local, size = 4, 2, 1003  # neither divides the vector
    x = np.random.default_rng(0).standard_normal((nodes, local, size), np.float32)
    ring = lambda v: benchmark.ring_mean(v, ("node", "local"))  # noqa: E731
    for axis in ("local", "node"):
        ring = jax.vmap(ring, axis_name=axis)
    mean = np.asarray(jax.jit(ring)(x))
    assert (mean == mean[0, 0]).all()
    # A sum of up to n nodes is rounded n times, each time by at most a step of its own
    # range, which is below twice that of the whole sum; and the mean is an n-th of it.
    step = 2 * np.ptp(x.mean(1).sum(0)) / 255
    error = np.abs(mean[0, 0] - x.mean((0, 1)))
    assert 0 < error.max() < nodes * step / nodes


def test_annotations_pair_collectives_with_products_of_the_layer_below(benchmark):
    form = benchmark.Form.parse("tie-u8-hier-note")
    text = benchmark.lowered(form, NODES, 2, 64, "1x8").as_text()
    groups = Counter(re.findall(r'_scheduling_group_id = "(\d)"', text))
    # A reduce-scatter and two gathers of the upper layer, each with one product.
    assert groups == {"0": 2, "1": 2, "2": 2}
