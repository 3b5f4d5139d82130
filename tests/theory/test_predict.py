"""The entry by name: it knows the factories, their bytes, and its limits."""

import inspect
import math

import numpy as np
import pytest
from table import ROWS, ids

from bagua_jax import compressors, theory, topologies
from bagua_jax.algorithms import REGISTRY
from bagua_jax.compressors import Compressor

PROBLEM = theory.quadratic(8, [1.0, 0.5], zeta=1.0, sigma=0.3)
PRIVATE = compressors.randk(0.5, mask="private")


@pytest.mark.parametrize("name", theory.COVERED)
def test_options_are_those_of_the_factory(name):
    ours = inspect.signature(theory.COVERED[name]).parameters
    theirs = inspect.signature(REGISTRY[name].factory).parameters
    options = {k: p for k, p in ours.items() if k != "setting"}
    assert set(options) <= set(theirs)
    left_out = set(theirs) - set(options)
    assert left_out <= {"axis_name", "seed", "bucket_bytes", "learning_rate"}
    for key, option in options.items():
        default = theirs[key].default
        if isinstance(default, Compressor) or default is inspect.Parameter.empty:
            continue  # has no model, or none there
        assert option.default == default, key


COVERED_ROWS = []
for _row in ROWS:
    try:
        theory.predict(_row.algorithm, PROBLEM, _row.options, learning_rate=0.1)
    except ValueError:
        continue
    COVERED_ROWS.append(_row)


@pytest.mark.parametrize("row", COVERED_ROWS, ids=ids(COVERED_ROWS))
def test_bytes_are_those_that_the_compiled_program_sends(row):
    """``row.sends`` is what tests count in compiled programs."""
    found = theory.predict(row.algorithm, PROBLEM, row.options, learning_rate=0.1)
    nbytes, _ = row.sends(8, (PROBLEM.d,))
    assert found.bytes_per_step == pytest.approx(nbytes)


@pytest.mark.parametrize("plan", ["all_gather", "linear_sum"])
def test_bytes_of_compressed_means(plan):
    shared = compressors.randk(0.5)
    found = theory.predict(
        "compressed_mean",
        PROBLEM,
        {"compressor": shared, "plan": plan},
        learning_rate=0.1,
    )
    payload = 4 * 1 + 20  # one of two elements, and the seed
    expected = 7 * payload if plan == "all_gather" else 2 * 7 / 8 * payload
    assert found.bytes_per_step == pytest.approx(expected)


def test_the_tables_know_some_that_are_covered():
    assert len({row.algorithm for row in COVERED_ROWS}) >= 8


def test_every_registered_algorithm_is_covered_or_refused_with_a_reason():
    assert set(theory.COVERED) <= set(REGISTRY)
    for name in set(REGISTRY) - set(theory.COVERED):
        with pytest.raises(ValueError, match=f"predict: '{name}' is not covered: .*"):
            theory.predict(name, PROBLEM, learning_rate=0.1)


GIVEN = {"compressor": PRIVATE}


@pytest.mark.parametrize(
    ("name", "options", "why"),
    [
        ("choco", {}, "no model of it is written.*choco_sgd"),
        ("choco_sgd", {}, "options do not fit.*compressor"),
        (
            "choco_sgd",
            {**GIVEN, "consensus_step_size": 0.1, "gamma": 1},
            "options do not fit.*gamma",
        ),
        (
            "compressed_mean",
            GIVEN,
            "scatter_reduce.*compresses sums once more.*all_gather",
        ),
        (
            "choco_sgd",
            {"compressor": compressors.topk(0.5), "consensus_step_size": 0.1},
            "depends on the vector",
        ),
        ("decentralized", {"topology": "shift_one"}, "rotates"),
        ("decentralized", {"topology": "rng"}, "topology must be"),
        (
            "choco_sgd",
            {**GIVEN, "topology": "star", "consensus_step_size": 0.1},
            "not alike",
        ),
        ("decentralized", {"local_steps": 2}, "local_steps=1"),
        ("local_sgd", {"local_steps": 2, "warmup_steps": 5}, "warmup_steps=0"),
        ("diloco", {"local_steps": 2, **GIVEN}, "compressor=None"),
        ("delayed_gradients", {"staleness": (0, 1)}, "a trace of delays"),
        ("gradient_allreduce", {"bucket_bytes": 4}, "does not hold"),
    ],
)
def test_refusals_name_the_reason(name, options, why):
    with pytest.raises(ValueError, match=f"(?s){why}"):
        theory.predict(name, PROBLEM, options, learning_rate=0.1)


def test_momentum_of_local_steps_is_refused():
    with pytest.raises(ValueError, match="no momentum in the local steps"):
        theory.predict(
            "local_sgd", PROBLEM, {"local_steps": 2}, learning_rate=0.1, momentum=0.9
        )


def test_unequal_curvature_is_refused():
    problem = theory.quadratic(2, [[1.0], [2.0]])
    with pytest.raises(ValueError, match="differ in curvature"):
        theory.predict("local_sgd", problem, {"local_steps": 2}, learning_rate=0.1)


def test_floor_and_rate_of_parallel_sgd():
    found = theory.predict("gradient_allreduce", PROBLEM, learning_rate=0.4)
    expected = sum(0.4 * 0.09 / (8 * h * (2 - 0.4 * h)) for h in (1.0, 0.5))
    assert found.floor == pytest.approx(expected)
    assert found.consensus == 0
    assert found.rate == pytest.approx(0.8**2)
    assert found.largest_learning_rate == pytest.approx(2)


def test_momentum_of_the_optimizer():
    found = theory.predict(
        "gradient_allreduce", PROBLEM, learning_rate=0.4, momentum=0.5
    )
    assert found.largest_learning_rate == pytest.approx(2 * 1.5)
    assert found.rate == pytest.approx(0.5)  # |z|^2 = beta


def test_divergence_is_said():
    found = theory.predict("decentralized", PROBLEM, learning_rate=0.7)
    assert found.rate > 1
    assert found.floor == math.inf
    assert found.largest_learning_rate == pytest.approx(2 / 3)


def test_bytes_to_a_target():
    exact = PROBLEM._replace(sigma=0.0, target=0 * PROBLEM.target)
    found = theory.predict(
        "gradient_allreduce", exact, learning_rate=1.0, start=[1.0, 8.0], target=1e-3
    )
    # The second element halves a step: 64/4^k <= 1e-3 from k = 8 on.
    assert found.steps_to_target == 8
    assert found.bytes_to_target == pytest.approx(8 * 2 * 7 / 8 * 4 * 2)
    there = theory.predict("gradient_allreduce", exact, learning_rate=1.0, target=1e-3)
    assert (there.steps_to_target, there.bytes_to_target) == (0, 0)
    never = theory.predict(
        "decentralized", PROBLEM, learning_rate=0.2, start=1.0, target=1e-6
    )
    assert never.steps_to_target == never.bytes_to_target == math.inf


def test_local_steps_count_in_steps():
    exact = PROBLEM._replace(sigma=0.0)
    options = {"local_steps": 4}
    found = theory.predict(
        "local_sgd", exact, options, learning_rate=0.5, start=1.0, target=1e-3
    )
    path = theory.trajectory(
        "local_sgd", exact, options, learning_rate=0.5, start=1.0, steps=40
    )
    first = next(t for t, energies in path if energies.total <= 1e-3)
    assert found.steps_to_target == first
    assert found.bytes_per_step == 2 * 7 / 8 * 8 / 4


def test_trajectory_comes_to_the_floor():
    half = compressors.randk(0.5, mask="private", scaled=False)
    options = {"compressor": half, "consensus_step_size": 0.4}
    found = theory.predict("choco_sgd", PROBLEM, options, learning_rate=0.3)
    path = theory.trajectory(
        "choco_sgd", PROBLEM, options, learning_rate=0.3, steps=400, start=2.0
    )
    assert path[0][1].total == pytest.approx(
        ((2.0 - PROBLEM.optimum) ** 2).sum(), rel=1e-9
    )
    assert path[-1][1].total == pytest.approx(found.floor)
    assert path[-1][1].consensus == pytest.approx(found.consensus)


def test_a_directed_graph_has_complex_modes():
    options = {"topology": topologies.static_exponential(8), "combine": "after"}
    found = theory.predict("decentralized", PROBLEM, options, learning_rate=0.3)
    w = topologies.static_exponential(8).mixing_matrix()
    total = 0.0
    for j, h in enumerate((1.0, 0.5)):
        step = (1 - 0.3 * h) * w
        noise = 0.3**2 * 0.09 * w @ w.T
        kron = np.kron(step, step)
        second = np.linalg.solve(np.eye(64) - kron, noise.ravel()).reshape(8, 8)
        drive = 0.3 * h * w @ PROBLEM.target[:, j]
        mean = np.linalg.solve(np.eye(8) - step, drive) - PROBLEM.optimum[j]
        total += (np.trace(second) + mean @ mean) / 8
    assert found.floor == pytest.approx(total)
