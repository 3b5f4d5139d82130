"""What the benchmark against PyTorch makes of its measurements."""

import importlib
from pathlib import Path

import pytest


@pytest.fixture
def versus_ddp(monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[1])
    return importlib.import_module("benchmarks.network.versus_ddp")


def facts(**medians):
    cases = {case: {"step_ms": [ms, 0.0, 1e6]} for case, ms in medians.items()}
    return {"networks": {n: {"cases": cases} for n in ("100mbit", "1gbit", "unshaped")}}


def test_ratios_are_of_medians_and_know_their_goals(versus_ddp):
    rows = versus_ddp.ratios(facts(bytegrad=50.0, ddp=200.0, local_sgd=30.0))
    assert [row["ratio"] for row in rows] == [0.25] * 3  # a pair needs both sides
    assert [row["target"] for row in rows] == [0.28, None, versus_ddp.UNSHAPED_TARGET]


@pytest.mark.parametrize(
    ("losses", "target", "steps"),
    [
        ([(0, 2.0), (10, 0.4), (20, 0.3), (30, 0.35)], 0.3, 20),
        ([(0, 2.0), (10, 0.4)], 0.3, None),
        ([(0, 2.0), (10, 0.2), (20, None)], 0.3, None),  # it diverged afterwards
        ([], 0.3, None),
    ],
)
def test_steps_to_a_loss(versus_ddp, losses, target, steps):
    assert versus_ddp.steps_to(losses, target) == steps


def test_steps_of_a_warm_up_take_the_time_of_an_all_reduce(versus_ddp):
    cases = facts(qadam=10.0, bytegrad=10.0, gradient_allreduce=100.0)
    cases = cases["networks"]["100mbit"]["cases"]
    assert versus_ddp.seconds_to(None, "bytegrad", cases) is None
    assert versus_ddp.seconds_to(60, "bytegrad", cases) == pytest.approx(0.6)
    # 50 steps of warm-up, ten after it
    assert versus_ddp.seconds_to(60, "qadam", cases) == pytest.approx(5.1)
    assert versus_ddp.seconds_to(30, "qadam", cases) == pytest.approx(3.0)
    del cases["gradient_allreduce"]
    assert versus_ddp.seconds_to(60, "qadam", cases) is None


@pytest.mark.parametrize(
    ("losses", "found"), [([2.0, 1.004], 0), ([2.0, 1.02], 1), ([2.0, None], 1)]
)
def test_a_case_in_one_program_must_train_alike(versus_ddp, losses, found):
    def curve(values):
        return [(10 * k, loss) for k, loss in enumerate(values)]

    curves = {
        "bytegrad": curve([2.0, 1.0, 0.5]),
        "bytegrad, one program": curve(losses),
        "qadam": curve([3.0]),
    }
    assert len(versus_ddp.differing(curves)) == found
