"""Counterexamples: what fails without error feedback, and by how much."""

import functools

import jax.numpy as jnp
import numpy as np
import optax

from bagua_jax import algorithms, compressors
from bagua_jax.experiments.studies.measure import AXIS, average, simulate
from bagua_jax.experiments.studies.predictions.rows import AT_MOST, exact, identity, row

__all__: list[str] = []

QUARTILE = -0.6744897501960817  # of the normal distribution
SKEW = 0.5  # epsilon of the second and the third
BEZNOSIKOV = np.array([[-3, 2, 2], [2, -3, 2], [2, 2, -3]], np.float32)


def signs(learning_rate):
    """Plain signs of the gradient."""
    return algorithms.signum(learning_rate, axis_name=AXIS, momentum=0.0)


def fed_back_signs(learning_rate):
    """Scaled signs with error feedback."""
    tx = algorithms.compressed_mean(
        compressors.sign("l1"), axis_name=AXIS, plan="all_gather"
    )
    return optax.chain(tx, optax.sgd(learning_rate))


def top1(learning_rate):
    """Send the largest element and forget the others."""
    tx = algorithms.compressed_mean(
        compressors.topk(1 / 3),
        axis_name=AXIS,
        plan="all_gather",
        error_feedback="none",
        unsafe=True,
    )
    return optax.chain(tx, optax.sgd(learning_rate))


def top1_fed_back(learning_rate):
    """Send the largest element and keep the others for later."""
    tx = algorithms.compressed_mean(
        compressors.topk(1 / 3), axis_name=AXIS, plan="all_gather"
    )
    return optax.chain(tx, optax.sgd(learning_rate))


def top1_ef21(learning_rate):
    """Send the largest element of what others do not know."""
    tx = algorithms.ef21(compressors.topk(1 / 3), axis_name=AXIS)
    return optax.chain(tx, optax.sgd(learning_rate))


def skewed(x, h, b, noise):
    """Return the slopes of x/4: 4 once and -1 three times in four steps."""
    del h, b
    return jnp.where(noise < QUARTILE, 4.0, -1.0) + 0 * x


def kink(x, h, b, noise):
    """Return a slope of eps |x1 + x2| + |x1 - x2|, 1 at the kinks."""
    del h, b, noise
    along = jnp.where(x[0] + x[1] >= 0, 1.0, -1.0) * jnp.ones(2)
    across = jnp.where(x[0] - x[1] >= 0, 1.0, -1.0) * jnp.array([1.0, -1.0])
    return SKEW * along + across


def least_squares(x, h, b, noise):
    """Return a gradient of <a, x>^2, a = +-(1, -1) + eps (1, 1) with either sign."""
    del h, b
    a = jnp.where(noise[0] > 0, 1.0, -1.0) * jnp.array([1.0, -1.0]) + SKEW
    return 2 * jnp.dot(a, x) * a


def beznosikov(x, a, b, noise):
    """Return the gradient of <a_i, x>^2 + |x|^2/4."""
    del b, noise
    return 2 * jnp.dot(a, x) * a + x / 2


ONE = np.ones((1, 2), np.float32)


@row(
    "C.2",
    "Slopes 4, -1, -1, -1: signSGD moves x up by gamma/2 a step, EF down by gamma/4",
    identity(0.0),
)
def signs_drift_the_wrong_way():

    def measure(effort):
        gamma, steps = 0.01, 400
        drift = []
        for make in (signs, fed_back_signs):
            x = simulate(
                make,
                steps=steps,
                start=np.zeros((1, 1)),
                sigma=1.0,
                knobs=(gamma,),
                replicas=256 * effort,
                gradient=skewed,
            )
            drift.append(x[:, -1, 0, 0] / (gamma * steps))
        return average(np.stack(drift, -1))

    return lambda: [0.5, -0.25], measure


@row(
    "C.2",
    "eps |x1 + x2| + |x1 - x2| from (1, 1): x1 + x2 stays 2 under signSGD",
    identity(1e-5),
)
def signs_keep_x1_plus_x2_of_a_kink():

    def measure(effort):
        x = simulate(signs, steps=300, start=ONE, knobs=(0.0078125,), gradient=kink)
        total = x[0, :, 0].sum(-1)
        return exact([total.min(), total.max()])

    return lambda: [2.0, 2.0], measure


@functools.cache
def run_least_squares(make, gamma):
    return simulate(
        make,
        steps=3000,
        start=ONE,
        sigma=1.0,
        knobs=(gamma,),
        gradient=least_squares,
    )[0, :, 0]


@row(
    "C.2",
    "<a, x>^2, a = +-(1, -1) + eps (1, 1): x1 + x2 stays 2 under signSGD for ever",
    identity(1e-5),
)
def signs_keep_x1_plus_x2_of_least_squares():

    def measure(effort):
        total = run_least_squares(signs, 0.0078125).sum(-1)
        return exact([total.min(), total.max()])

    return lambda: [2.0, 2.0], measure


@row(
    "C.2",
    "|x| after 3000 steps of error feedback at gamma = 0.01, from (1, 1)",
    AT_MOST,
)
def error_feedback_solves_least_squares():

    def measure(effort):
        return exact(np.linalg.norm(run_least_squares(fed_back_signs, 0.01)[-1]))

    return lambda: 1e-10, measure


@functools.cache
def run_beznosikov(make):
    x = simulate(
        make,
        steps=600,
        start=np.ones((3, 3)),
        curvature=BEZNOSIKOV,
        knobs=(0.01,),
        gradient=beznosikov,
    )
    return np.asarray(x[0, :, 0], np.float64)


@row(
    "C.2",
    "<a_i, x>^2 + |x|^2/4 from (1, 1, 1): top-1 grows by 1 + 11 gamma/6 a step",
    identity(2e-6),
)
def top_1_grows_without_feedback():

    def measure(effort):
        x = run_beznosikov(top1)[:101, 0]
        return exact(x[1:] / x[:-1])

    return lambda: np.full(100, 1 + 11 * 0.01 / 6), measure


@row(
    "C.2",
    "|x| after 600 steps, from |x| = 1.7: error feedback; EF21",
    AT_MOST,
)
def top_1_converges_with_feedback():

    def measure(effort):
        ends = [run_beznosikov(make)[-1] for make in (top1_fed_back, top1_ef21)]
        return exact([np.linalg.norm(x) for x in ends])

    return lambda: [0.05, 0.05], measure


@row(
    "C.2",
    "|C(x) - x|^2/|x|^2 = 2 (1 - 1/sqrt(d)) > 1 for one element of 64; l1: 1 - 1/d",
    identity(1e-5),
)
def l2_scaled_signs_exceed_a_sparse_vector():

    def measure(effort):
        x = jnp.zeros(64).at[5].set(3.0)
        found = []
        for scale in ("l2", "l1"):
            c = compressors.sign(scale)
            decoded = c.decompress(c.compress(None, x, ())[0], x)
            found.append(float(jnp.sum((decoded - x) ** 2) / 9))
        return exact(found)

    def predict():
        deltas = [compressors.sign(scale).facts.delta for scale in ("l2", "l1")]
        return [1 - delta(64) for delta in deltas if delta is not None]

    return predict, measure
