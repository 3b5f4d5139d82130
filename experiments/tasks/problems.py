"""Problems whose optimum is known, with an objective for each worker."""

import jax
import jax.numpy as jnp
import numpy as np

from bagua_jax.experiments.data import Data, generator
from bagua_jax.experiments.tasks.base import Task

__all__ = ["logistic", "quadratic"]


def quadratic() -> Task:
    r"""Minimize a heterogeneous quadratic whose optimum is known exactly.

    A sample is a curvature h and a target b, and the loss of a batch is the mean of
    :math:`\tfrac12 \sum_k h_k (x_k - b_k)^2`. There are as many groups of 64 samples as
    workers, each with a curvature in [0.2, 1] and a center of its own, so that under
    ``sharding: label`` every worker has an objective of its own. The optimum of their
    mean is :math:`x^\star = \sum h b / \sum h`; ``evaluate`` reports the distance to it
    and the excess loss. With a batch of 64 gradients are exact.
    """
    dim, samples = 32, 64

    def init(key):
        del key
        return jnp.zeros(dim)

    def loss(x, batch):
        residual = x[None] - batch["target"]
        return jnp.mean(jnp.sum(0.5 * batch["curvature"] * residual**2, axis=-1))

    def data(seed, workers):
        rng = generator(seed, "quadratic")
        groups = np.repeat(np.arange(workers), samples)
        curvature = rng.uniform(0.2, 1, (workers, dim))[groups]
        center = rng.normal(0, 1, (workers, dim))[groups]
        target = center + rng.normal(0, 0.5, (workers * samples, dim))
        optimum = (curvature * target).sum(0) / curvature.sum(0)
        test = {"curvature": curvature.mean(0), "optimum": optimum}
        train = {"curvature": curvature, "target": target}
        single = jax.tree.map(lambda a: a.astype(np.float32), (train, test))
        return Data(single[0], groups, single[1])

    def evaluate(x, test):
        difference = x - test["optimum"]
        return {
            "distance_to_optimum": jnp.sqrt(jnp.sum(difference**2)),
            "excess_loss": 0.5 * jnp.sum(test["curvature"] * difference**2),
        }

    return Task("heterogeneous quadratic", init, loss, data, evaluate)


def logistic() -> Task:
    r"""Logistic regression in which every worker has another distribution of data.

    Worker i has 64 rows :math:`a \sim N(s_i, I)/\sqrt d` of its own center
    :math:`s_i \sim N(0, I)`, d = 20, and labels
    :math:`y = \mathrm{sign}(a^\top (x_\star + 1.5\, \xi_i) + 0.3\, \epsilon)` of a
    truth of its own. The loss of a batch is the mean of
    :math:`\log(1 + e^{-y a^\top x})` plus :math:`\tfrac{0.05}{2} |x|^2`. Under
    ``sharding: label`` every worker has its own rows; with a batch of 64 gradients are
    exact. The optimum is found to rounding by Newton's method; ``evaluate`` reports the
    distance to it and the excess loss, both without cancellation.
    """
    dim, samples, decay = 20, 64, 0.05

    def init(key):
        del key
        return jnp.zeros(dim)

    def loss(x, batch):  # rows hold y a, the label times the features
        margins = batch["rows"] @ x
        return jnp.mean(jax.nn.softplus(-margins)) + 0.5 * decay * jnp.sum(x**2)

    def data(seed, workers):
        rng = generator(seed, "logistic")
        centers = rng.normal(size=(workers, 1, dim))
        rows = (centers + rng.normal(size=(workers, samples, dim))) / np.sqrt(dim)
        truths = rng.normal(size=dim) + 1.5 * rng.normal(size=(workers, dim))
        noise = 0.3 * rng.normal(size=(workers, samples))
        signs = np.sign(np.einsum("nmd,nd->nm", rows, truths) + noise)
        rows = (signs[..., None] * rows).reshape(-1, dim)
        test = {"rows": rows, "optimum": _minimize_logistic(rows, decay)}
        single = jax.tree.map(lambda a: a.astype(np.float32), test)
        groups = np.repeat(np.arange(workers), samples)
        return Data({"rows": single["rows"]}, groups, single)

    def evaluate(x, test):
        difference = x - test["optimum"]
        # log(1 + e^-z) less its tangent at the optimum, where gradients add up to 0.
        slope = jax.nn.sigmoid(-test["rows"] @ test["optimum"])
        change = -test["rows"] @ difference
        bend = jnp.log1p(slope * jnp.expm1(change)) - slope * change
        squared = jnp.sum(difference**2)
        return {
            "distance_to_optimum": jnp.sqrt(squared),
            "excess_loss": jnp.mean(bend) + 0.5 * decay * squared,
        }

    return Task("heterogeneous logistic regression", init, loss, data, evaluate)


def _minimize_logistic(rows: np.ndarray, decay: float) -> np.ndarray:
    """Minimize mean log(1 + exp(-rows x)) + decay/2 |x|^2 in float64."""
    x = np.zeros(rows.shape[1])
    for _ in range(50):
        slope = 1 / (1 + np.exp(rows @ x))  # of each row, downwards
        gradient = decay * x - slope @ rows / len(rows)
        if np.linalg.norm(gradient) < 1e-14:
            break
        curvature = rows.T @ (rows * (slope * (1 - slope))[:, None]) / len(rows)
        x = x - np.linalg.solve(curvature + decay * np.eye(len(x)), gradient)
    return x
