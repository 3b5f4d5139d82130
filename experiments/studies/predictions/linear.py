"""Linear algorithms by name: path, floor and threshold, as ``theory.predict`` says."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import optax

from bagua_jax import algorithms, compressors, theory, topologies
from bagua_jax.experiments.studies.measure import AXIS, average, simulate
from bagua_jax.experiments.studies.predictions.rows import SIDES, Rule, add, exact

__all__ = ["CASES", "Case", "energies"]


class Case(NamedTuple):
    """A configuration that ``theory.predict`` covers.

    Attributes:
        algorithm: its name in the registry.
        options: of its factory.
        learning_rate: of the SGD beside it.
        n: workers.
        random: whether its compressor is.
        quick: whether the default test run measures it.
        note: tells cases of one algorithm apart.
    """

    algorithm: str
    options: dict[str, Any]
    learning_rate: float
    n: int = 8
    random: bool = False
    quick: bool = True
    note: str = ""

    @property
    def name(self) -> str:
        """Of its rows."""
        return self.algorithm + (f" ({self.note})" if self.note else "")

    def problem(self, zeta: float = 2.0, sigma: float = 0.0) -> theory.Quadratic:
        """Two curvatures, or one where masks make paths noisy."""
        spectrum = [1.0] * 32 if self.random else [1.0] * 8 + [0.5] * 8
        return theory.quadratic(self.n, spectrum, zeta=zeta, sigma=sigma, seed=1)

    @property
    def steps(self) -> int:
        """Steps of a run."""
        return 40 if self.random else 160


SHARED = compressors.randk(0.25)
PRIVATE = compressors.randk(0.25, mask="private")
HALF = compressors.randk(0.5, mask="private", scaled=False)
IDENTITY = compressors.identity()
GATHER = {"plan": "all_gather"}

CASES = [
    Case("gradient_allreduce", {}, 0.5),
    Case("delayed_gradients", {"staleness": 1}, 0.25, note="tau = 1"),
    Case("delayed_gradients", {"staleness": 2}, 0.15, note="tau = 2"),
    Case("delayed_gradients", {"staleness": 5}, 0.08, quick=False, note="tau = 5"),
    Case("decentralized", {}, 0.2, note="before"),
    Case("decentralized", {"combine": "after"}, 0.5, note="after"),
    Case("decentralized", {"topology": "star"}, 0.3, quick=False, note="star"),
    Case("exact_diffusion", {}, 0.5),
    Case("d2", {"topology": topologies.ring(8, self_weight=0.5)}, 0.5),
    Case("gradient_tracking", {}, 0.3),
    Case("stochastic_gradient_push", {"topology": "static_exponential"}, 0.5),
    Case("local_sgd", {"local_steps": 4}, 0.3),
    Case("async_model_average", {"local_steps": 4, "staleness": 2}, 0.2),
    Case("slowmo", {"local_steps": 4, "outer_momentum": 0.5}, 0.2),
    Case("diloco", {"local_steps": 4}, 0.2),
    Case(
        "delayed_choco",
        {"compressor": IDENTITY, "consensus_step_size": 0.4},
        0.3,
    ),
    Case("compressed_mean", {"compressor": PRIVATE, **GATHER}, 0.3, 4, True),
    Case(
        "compressed_mean",
        {"compressor": SHARED},
        0.15,
        4,
        True,
        quick=False,
        note="one mask",
    ),
    Case(
        "compressed_mean",
        {"compressor": HALF, **GATHER},
        0.3,
        4,
        True,
        note="error feedback",
    ),
    Case("diana", {"compressor": PRIVATE}, 0.3, 4, True),
    Case("diana", {"compressor": SHARED}, 0.08, 4, True, quick=False, note="one mask"),
    Case("ef21", {"compressor": HALF}, 0.3, 4, True, quick=False),
    Case("choco_sgd", {"compressor": HALF, "consensus_step_size": 0.5}, 0.3, 8, True),
    Case(
        "delayed_choco",
        {"compressor": HALF, "consensus_step_size": 0.2},
        0.3,
        8,
        True,
        quick=False,
        note="random-k",
    ),
    Case(
        "low_precision_decentralized",
        {"compressor": compressors.randk(0.75, mask="private")},
        0.2,
        8,
        True,
    ),
    Case(
        "deep_squeeze",
        {"compressor": HALF, "consensus_step_size": 0.4},
        0.3,
        8,
        True,
        quick=False,
    ),
]


@functools.cache
def optimizer(index: int) -> Callable[[Any], optax.GradientTransformationExtraArgs]:
    """Put a case's algorithm where it stands beside SGD of a learning rate to come."""
    case = CASES[index]
    entry = algorithms.REGISTRY[case.algorithm]
    factory: Callable[..., Any] = entry.factory

    def make(learning_rate):
        options = {"axis_name": AXIS, **case.options}
        if case.algorithm == "slowmo":
            options["learning_rate"] = learning_rate
        if entry.is_optimizer:
            return factory(learning_rate, **options)
        sgd, tx = optax.sgd(learning_rate), factory(**options)
        return (
            optax.chain(tx, sgd)
            if entry.placement == "gradient"
            else (optax.chain(sgd, tx))
        )

    return make


@functools.cache
def threshold(index: int) -> float:
    """Return the largest stable learning rate of a case."""
    case = CASES[index]
    return theory.predict(
        case.algorithm,
        case.problem(),
        case.options,
        learning_rate=case.learning_rate,
    ).largest_learning_rate


def energies(x: np.ndarray) -> np.ndarray:
    """Squared errors of models [R, T, n, d] about 0: of the mean, and from it."""
    x = np.asarray(x, np.float64)
    mean = x.mean(2)
    apart = ((x - mean[:, :, None]) ** 2).sum(-1).mean(2)
    return np.stack([(mean**2).sum(-1), apart], -1)


@functools.cache
def experiment(index: int, effort: int) -> dict[str, np.ndarray]:
    """Run all that a case's rows measure, as one program.

    Groups of replicas: ``path`` has exact gradients, ``noisy`` has noise of variance 1,
    ``below`` and ``above`` are 2 % from the threshold (of random compressors it is one
    in mean square, which :data:`RATES` measures).
    """
    case = CASES[index]
    count = {"path": 96 * effort if case.random else 1}
    count["noisy"] = (64 if case.random else 48) * effort
    count |= {} if case.random else {"below": 1, "above": 1}
    group = np.repeat(list(count), list(count.values()))
    problem = case.problem()
    learning_rate = np.full(len(group), case.learning_rate)
    if not case.random:
        learning_rate[group == "below"] = 0.98 * threshold(index)
        learning_rate[group == "above"] = 1.02 * threshold(index)
    x = simulate(
        optimizer(index),
        steps=case.steps,
        start=np.ones_like(problem.target),
        curvature=problem.curvature,
        target=problem.target,
        sigma=(group == "noisy").astype(float),
        knobs=(learning_rate,),
        replicas=len(group),
        seed=index,
    )
    return {name: x[group == name] for name in count}


def stride(case: Case) -> int:
    """Steps from one average to the next."""
    return case.options.get("local_steps", 1)


def path_times(case: Case) -> list[int]:
    """Steps at which a path is compared: few and early where masks make it noisy."""
    return [stride(case) * k for k in ((1, 3, 8) if case.random else (1, 2, 5, 12, 40))]


def window(case: Case) -> slice:
    """Steps over which a floor is averaged: after the start, at every average."""
    return slice(case.steps // 2, None, stride(case))


def add_case(index: int) -> None:
    """Register the rows of a case."""
    case = CASES[index]

    def predicted(sigma):
        path = theory.trajectory(
            case.algorithm,
            case.problem(sigma=sigma),
            case.options,
            learning_rate=case.learning_rate,
            steps=case.steps,
            start=1.0,
        )
        return dict(path)

    def predict_path():
        path = predicted(0.0)
        return [path[t] for t in path_times(case)]

    def measure_path(effort):
        found = energies(experiment(index, effort)["path"])
        return average(found[:, path_times(case)])

    def predict_floor():
        path = predicted(1.0)
        return np.mean([path[t] for t in range(case.steps + 1)[window(case)]], axis=0)

    def measure_floor(effort):
        found = energies(experiment(index, effort)["noisy"])
        return average(found[:, window(case)].mean(1))

    def measure_sides(effort):
        groups = experiment(index, effort)
        return exact([_late_growth(case, groups[side]) for side in ("below", "above")])

    kind = "mean square" if case.random else "exact gradients"
    add(
        f"{case.name}: path",
        "C.1",
        f"errors of mean and consensus after {path_times(case)} steps, {kind}",
        Rule("equal", 2e-4, 1e-6),
        predict_path,
        measure_path,
        case.quick,
    )
    add(
        f"{case.name}: floor",
        "C.1",
        "steady errors of mean and consensus, noise of variance 1, zeta = 2",
        Rule("equal", 2e-4, 1e-6),
        predict_floor,
        measure_floor,
        case.quick,
    )
    if not case.random:
        add(
            f"{case.name}: threshold",
            "C.1",
            "steps shrink at 0.98 and grow at 1.02 of the largest learning rate",
            SIDES,
            lambda: threshold(index),
            measure_sides,
            case.quick,
        )


def _late_growth(case: Case, x: np.ndarray) -> float:
    """Growth of the squared steps of [1, T, n, d] over the last quarter of a run."""
    moved = np.diff(x[0, :: stride(case)].astype(np.float64), axis=0)
    square = (moved**2).sum((1, 2))
    last = len(square) // 4
    return square[-last:].sum() / square[-2 * last : -last].sum()


for _index in range(len(CASES)):
    add_case(_index)
