"""The smallest problems on which compression without correction fails."""

import jax.numpy as jnp
import numpy as np

from bagua_jax.experiments.tasks.base import Task
from bagua_jax.experiments.tasks.data import Data

__all__ = ["sign_counterexamples", "top1_counterexample"]


def sign_counterexamples() -> Task:
    r"""Three problems at once that the sign of the gradient cannot solve.

    - ``linear_loss``: x/4, with gradients of 4 once and -1 three times in four steps.
      Each sign counts the same, so that signs move x up, by half the step size a step.
    - ``kink_loss``: :math:`\tfrac12 |x_1 + x_2| + |x_1 - x_2|` from (1, 1). The signs
      are those of the second part, and :math:`x_1 + x_2` stays 2: the loss is at least
      1. The slope at a kink is +1.
    - ``least_squares_loss``: mean of :math:`\langle a, x \rangle^2` over
      :math:`a = \pm(1, -1) + \tfrac12 (1, 1)`, one of the two a step, from (1, 1). All
      signs are those of (1, -1), again :math:`x_1 + x_2` stays 2 and the loss is at
      least 1.

    Parameters are a leaf for each problem; the training loss is their sum. Every worker
    has the same four samples: a batch of 1 draws the noise, and an epoch is four steps.
    After Karimireddy et al., `Error Feedback Fixes SignSGD`, 2019.
    """
    rows = np.array([[1.5, -0.5], [-0.5, 1.5]], np.float32)

    def init(key):
        del key
        return {
            "linear": jnp.zeros(()),
            "kink": jnp.ones(2),
            "least_squares": jnp.ones(2),
        }

    def magnitude(z):  # jnp.abs has slope 0 at 0
        return jnp.where(z >= 0, z, -z)

    def kink(x):
        return 0.5 * magnitude(x[0] + x[1]) + magnitude(x[0] - x[1])

    def loss(params, batch):
        squares = (batch["row"] @ params["least_squares"]) ** 2
        slope = jnp.mean(batch["slope"])
        return slope * params["linear"] + kink(params["kink"]) + jnp.mean(squares)

    def data(seed, workers):
        del seed
        slope = np.tile(np.array([4, -1, -1, -1], np.float32), workers)
        train = {"slope": slope, "row": np.tile(rows, (2 * workers, 1))}
        return Data(train, np.repeat(np.arange(workers), 4), {"row": rows})

    def evaluate(params, test):
        return {
            "least_squares_loss": jnp.mean(
                (test["row"] @ params["least_squares"]) ** 2
            ),
            "kink_loss": kink(params["kink"]),
            "linear_loss": params["linear"] / 4,
        }

    return Task("three counterexamples to signs", init, loss, data, evaluate)


def top1_counterexample() -> Task:
    r"""Three workers whose largest gradient elements point the wrong way.

    Worker i has :math:`f_i(x) = \langle a_i, x \rangle^2 + \tfrac14 |x|^2` with a =
    (-3, 2, 2), (2, -3, 2), (2, 2, -3), and x starts at (1, 1, 1). On the diagonal the
    largest element of every gradient is the negative one, so that top-1 without
    correction moves x outwards: at a step size gamma by a factor of exactly
    :math:`1 + \tfrac{11}{6} \gamma` a step. The optimum is 0. Use three workers,
    ``sharding: label`` and a batch of 1. After Beznosikov et al., `On Biased
    Compression for Distributed Learning`, 2020.
    """
    rows = np.array([[-3, 2, 2], [2, -3, 2], [2, 2, -3]], np.float32)

    def init(key):
        del key
        return jnp.ones(3)

    def loss(x, batch):
        return jnp.mean((batch["row"] @ x) ** 2) + 0.25 * jnp.sum(x**2)

    def data(seed, workers):
        del seed, workers
        return Data({"row": rows}, np.arange(3), {"row": rows})

    def evaluate(x, test):
        return {
            "distance_to_optimum": jnp.sqrt(jnp.sum(x**2)),
            "excess_loss": loss(x, test),
        }

    return Task("Beznosikov's counterexample", init, loss, data, evaluate)
