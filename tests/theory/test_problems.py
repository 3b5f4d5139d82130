"""Problems with known optima."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bagua_jax.theory import problems


def test_a_quadratic_has_the_chosen_heterogeneity_and_optimum():
    rng = np.random.default_rng(0)
    h = rng.uniform(0.1, 1, (5, 3))
    problem = problems.quadratic(5, h, zeta=2.5, seed=4)
    assert problem.heterogeneity == pytest.approx(2.5**2)
    np.testing.assert_allclose(problem.optimum, 0, atol=1e-12)
    mean = problem.gradient(np.tile(problem.optimum, (5, 1))).mean(0)
    np.testing.assert_allclose(mean, 0, atol=1e-12)
    around = [problem.loss(problem.optimum + d) for d in 1e-3 * np.eye(3)]
    assert min(around) > problem.loss(problem.optimum)
    assert problem.smoothness == h.max()
    assert problem.strong_convexity == h.mean(0).min()
    assert not problem.equal_curvature
    assert problems.quadratic(2, [1.0]).heterogeneity == 0


def test_one_gradient_function_for_numpy_and_jax():
    problem = problems.quadratic(4, [1.0, 0.3], zeta=1.0)
    x = np.random.default_rng(1).standard_normal((4, 2))
    in_jax = jax.vmap(problems.quadratic_gradient)(
        x, problem.curvature, problem.target, jnp.zeros((4, 2))
    )
    np.testing.assert_allclose(in_jax, problem.gradient(x), rtol=1e-6)
    w = np.ones(3)
    data = problems.Logistic(np.eye(3), np.array([1.0, -1, 1]), 0.1)
    found = problems.logistic_gradient(
        jnp.asarray(w), jnp.eye(3), jnp.asarray(data.labels), 0.1, xp=jnp
    )
    np.testing.assert_allclose(found, data.gradient(w), rtol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (([0.0, 1.0],), "positive"),
        ((np.ones((3, 2)),), "n=2"),
        (([1.0],), "targets must have the shape"),
    ],
)
def test_refusals(arguments, why):
    targets = np.zeros((2, 5)) if "targets" in why else None
    with pytest.raises(ValueError, match=why):
        problems.quadratic(2, *arguments, targets=targets)
