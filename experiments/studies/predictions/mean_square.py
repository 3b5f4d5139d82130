"""Mean-square rates and thresholds of random compressors, from both sides."""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import optax

from bagua_jax import algorithms, topologies
from bagua_jax.experiments.studies.measure import AXIS, Estimate, mean_square_rate
from bagua_jax.experiments.studies.predictions.channels import bernoulli
from bagua_jax.experiments.studies.predictions.rows import SIDES, Rule, add, join
from bagua_jax.theory import mixing, modes, moments
from bagua_jax.theory.compression import Message

__all__ = ["RATES", "Setting"]


class Setting(NamedTuple):
    """A linear random algorithm with one knob.

    Attributes:
        name: of its rows.
        knob: what is varied, in words.
        make: knob -> transform, the optimizer included.
        model: knob -> its modes, with curvature 1.
        n: workers.
        upper: a value of the knob that is too large.
        burn: steps until the slowest part of the state dominates.
        quick: whether the default test run measures it.
        gossip: without gradients, so that the mean is conserved.
    """

    name: str
    knob: str
    make: Callable[[Any], optax.GradientTransformationExtraArgs]
    model: Callable[[float], modes.Modes]
    n: int
    upper: float
    burn: int = 10
    quick: bool = True
    gossip: bool = False


@functools.cache
def threshold(index: int) -> float:
    """Return the knob at which second moments of a setting begin to grow."""
    setting = RATES[index]

    def is_stable(knob):
        return moments.ModeMoments(setting.model(knob)).stable

    return modes.largest_stable(is_stable, setting.upper)


def masked(keep: float, scaled: bool) -> Message:
    """Return the second moments of ``bernoulli``."""
    return Message(1.0, 1 / keep - 1) if scaled else Message(keep, keep * (1 - keep))


def ring(n: int = 8) -> np.ndarray:
    """Eigenvalues of the ring."""
    return mixing.spectrum(topologies.ring(n)).eigenvalues


def compressed_gradients(learning_rate):
    tx = algorithms.compressed_mean(bernoulli(0.25), axis_name=AXIS, plan="all_gather")
    return optax.chain(tx, optax.sgd(learning_rate))


def error_feedback(learning_rate):
    tx = algorithms.compressed_mean(
        bernoulli(0.5, scaled=False), axis_name=AXIS, plan="all_gather"
    )
    return optax.chain(tx, optax.sgd(learning_rate))


def diana(learning_rate):
    tx = algorithms.diana(bernoulli(0.25), axis_name=AXIS)
    return optax.chain(tx, optax.sgd(learning_rate))


def ef21(learning_rate):
    tx = algorithms.ef21(bernoulli(0.5, scaled=False), axis_name=AXIS)
    return optax.chain(tx, optax.sgd(learning_rate))


def choco_gossip(consensus_step_size):
    return algorithms.choco_sgd(
        bernoulli(0.5, scaled=False),
        axis_name=AXIS,
        consensus_step_size=consensus_step_size,
    )


def choco(consensus_step_size):
    return optax.chain(optax.sgd(0.1), choco_gossip(consensus_step_size))


def dcd_gossip(omega):
    return algorithms.low_precision_decentralized(
        axis_name=AXIS, compressor=bernoulli(1 / (1 + omega))
    )


def dcd(omega):
    return optax.chain(optax.sgd(0.05), dcd_gossip(omega))


RATES = [
    Setting(
        "compressed gradients, n = 4, omega = 3",
        "learning rate 2/(h (1 + omega/n))",
        compressed_gradients,
        lambda k: modes.compressed_mean(4, 1.0, k, message=masked(0.25, True)),
        4,
        4.0,
        quick=False,
    ),
    Setting(
        "error feedback, n = 1, q = 1/2",
        "learning rate 2q/(h (2 - q))",
        error_feedback,
        lambda k: modes.compressed_mean(
            1, 1.0, k, message=masked(0.5, False), error_feedback=True
        ),
        1,
        4.0,
    ),
    Setting(
        "DIANA, n = 4, omega = 3",
        "learning rate",
        diana,
        lambda k: modes.diana(4, 1.0, k, message=masked(0.25, True)),
        4,
        4.0,
        quick=False,
    ),
    Setting(
        "EF21, n = 4, q = 1/2",
        "learning rate",
        ef21,
        lambda k: modes.ef21(4, 1.0, k, message=masked(0.5, False)),
        4,
        4.0,
        quick=False,
    ),
    Setting(
        "CHOCO on a ring of 8, q = 1/2, gamma h = 0.1",
        "consensus step",
        choco,
        lambda k: modes.choco_sgd(
            ring(), 1.0, 0.1, consensus_step_size=k, message=masked(0.5, False)
        ),
        8,
        4.0,
        burn=200,
        quick=False,
    ),
    Setting(
        "DCD on a ring of 8, gamma h = 0.05",
        "omega of the compressor",
        dcd,
        lambda k: modes.low_precision_decentralized(
            ring(), 1.0, 0.05, message=Message(1.0, k)
        ),
        8,
        10.0,
        burn=60,
        quick=False,
    ),
    Setting(
        "CHOCO-gossip on a ring of 8, q = 1/2",
        "consensus step, the root of moments.choco_largest_consensus_step",
        choco_gossip,
        lambda k: modes.choco_sgd(
            ring(), 0.0, 0.0, consensus_step_size=k, message=masked(0.5, False)
        ).without_mean(),
        8,
        4.0,
        burn=60,
        quick=False,
        gossip=True,
    ),
    Setting(
        "DCD-gossip on a ring of 8",
        "omega n / sum (1 - lambda)/(1 + lambda)",
        dcd_gossip,
        lambda k: modes.low_precision_decentralized(
            ring(), 0.0, 0.0, message=Message(1.0, k)
        ).without_mean(),
        8,
        10.0,
        burn=60,
        quick=False,
        gossip=True,
    ),
]


def add_setting(index: int) -> None:
    """Register the rows of a setting: the rate 2 % below and above, and the sides."""
    setting = RATES[index]

    def sides() -> np.ndarray:
        return np.array([0.98, 1.02]) * threshold(index)

    def predict_rates():
        return [moments.ModeMoments(setting.model(k)).rate for k in sides()]

    @functools.cache
    def measure(effort) -> Estimate:
        return mean_square_rate(
            setting.make,
            n=setting.n,
            knobs=(sides(),),
            replicas=256 // setting.n * effort,
            steps=setting.burn + 40,
            burn=setting.burn,
            curvature=0.0 if setting.gossip else 1.0,
            conserved=setting.gossip,
        )

    add(
        f"{setting.name}: mean-square rates",
        "C.1",
        "factors of E|s|^2 a step, 2 % below and above the threshold",
        Rule("equal", 1e-5, 3e-4),  # finite populations: of the order 1/particles
        predict_rates,
        measure,
        setting.quick,
    )
    add(
        f"{setting.name}: threshold",
        "C.1",
        f"E|s|^2 falls at 0.98 and grows at 1.02 of the largest {setting.knob}",
        SIDES,
        lambda: threshold(index),
        measure,
        setting.quick,
    )


def best_step(q: float) -> float:
    """Return the learning rate at which error feedback on one worker is fastest."""
    return (1 - math.sqrt(1 - q)) ** 2 / q


add(
    "error feedback at its best step, n = 1, q = 1/2",
    "C.1",
    "mean-square rate sqrt(1 - q) at gamma h = (1 - sqrt(1 - q))^2 / q",
    Rule("equal", 1e-5, 3e-4),
    lambda: math.sqrt(0.5),
    lambda effort: mean_square_rate(
        error_feedback,
        n=1,
        knobs=(best_step(0.5),),
        replicas=256 * effort,
        steps=160,
        burn=120,  # a double pole is slow to dominate
    ),
    quick=False,
)
add(
    "compressed gradients at their best step, n = 4, omega = 3",
    "C.1",
    "(1 - gamma h)^2 + (gamma h)^2 omega/n is least, (omega/n)/(1 + omega/n), at "
    "gamma h = 1/(1 + omega/n)",
    Rule("equal", 1e-5, 3e-4),
    lambda: (3 / 4) / (1 + 3 / 4),
    lambda effort: mean_square_rate(
        compressed_gradients, n=4, knobs=(1 / (1 + 3 / 4),), replicas=256 * effort
    ),
    quick=False,
)


def _one_rate(effort) -> Estimate:
    """Measure error feedback and EF21 at the same two learning rates."""
    each = [
        mean_square_rate(
            make,
            n=1,
            knobs=(np.array([0.3, 0.6]),),
            replicas=256 * effort,
            steps=80,
            burn=40,
        )
        for make in (error_feedback, ef21)
    ]
    return join(each)


add(
    "error feedback and EF21 have one rate, n = 1, q = 1/2",
    "C.3",
    "masks are linear: at gamma h = 0.3 and 0.6, of error feedback and of EF21",
    Rule("equal", 1e-5, 1e-3),
    lambda: [[moments.ModeMoments(RATES[1].model(k)).rate for k in (0.3, 0.6)]] * 2,
    _one_rate,
    quick=False,
)
for _index in range(len(RATES)):
    add_setting(_index)
