"""What measures algorithms does not misjudge them."""

import optax
import pytest

from bagua_jax import algorithms, topologies
from bagua_jax.experiments.studies.measure import AXIS, mean_square_rate
from bagua_jax.experiments.studies.predictions.channels import bernoulli
from bagua_jax.theory import mixing, modes, moments
from bagua_jax.theory.compression import Message


def choco(keep):
    tx = algorithms.choco_sgd(
        bernoulli(keep, scaled=False), axis_name=AXIS, consensus_step_size=0.5
    )
    return optax.chain(optax.sgd(0.2), tx)


def test_rounding_errors_of_replicas_are_not_taken_for_the_rate():
    """The state shrinks by 1e-19 here, the error of an aggregate of copies does not."""
    n, q = 4, 0.75
    model = modes.choco_sgd(
        mixing.spectrum(topologies.ring(n)).eigenvalues,
        1.0,
        0.2,
        consensus_step_size=0.5,
        message=Message(q, q * (1 - q)),
    )
    value, error = mean_square_rate(
        choco, n=n, knobs=(q,), replicas=32, populations=4, steps=200, burn=100
    )
    predicted = moments.ModeMoments(model).rate
    assert abs(value[0] - predicted) < 4 * error[0] + 3e-4


def test_burn_covers_the_steps_that_find_the_span():
    with pytest.raises(ValueError, match="burn must be at least 8"):
        mean_square_rate(choco, n=4, knobs=(0.5,), burn=3)
