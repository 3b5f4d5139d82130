"""Casts to 8 bits have no scale: what they hold, and what feedback around them does."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bagua_jax import compressors
from bagua_jax.algorithms import choco_sgd, compressed_mean

FORMATS = ("float8_e4m3fn", "float8_e5m2")
every_format = pytest.mark.parametrize("dtype", FORMATS)


def held(dtype) -> tuple[float, float]:
    found = compressors.cast(dtype).facts.range
    assert found is not None
    return found


def made(dtype, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return compressed_mean(
            compressors.cast(dtype), axis_name="workers", plan="all_gather", **options
        )


def updates(tx, grads):
    """Updates and errors of two workers with equal gradients [steps, d]."""

    @jax.jit
    @jax.vmap
    def run(grads):
        def one_worker(grads):
            def step(state, g):
                u, state = tx.update(g, state)
                return state, (u, state.error.worker)

            return jax.lax.scan(step, tx.init(grads[0]), grads)[1]

        return jax.vmap(one_worker, axis_name="workers")(jnp.stack([grads] * 2))

    u, e = run(grads[None])
    return np.float64(u[0, 0]), None if e is None else np.float64(e[0, 0])


@pytest.mark.parametrize("dtype", [*FORMATS, "float16"])
def test_facts_state_the_range(dtype):
    smallest, largest = held(dtype)
    c = compressors.cast(dtype)
    edges = jnp.array([0.49, 0.51, 1.0]) * smallest
    x = jnp.concatenate([edges, jnp.array([1.0, 1.1]) * largest])
    decoded = np.asarray(
        jax.jit(lambda x: c.decompress(c.compress(None, x, ())[0], x))(x)
    )
    np.testing.assert_array_equal(decoded[:4], [0, smallest, smallest, largest])
    assert not np.isfinite(decoded[4])


def test_only_codes_without_a_scale_have_one():
    names = set(compressors.REGISTRY) - {"cast"}
    ranges = {n: compressors.REGISTRY[n]().facts.range for n in names}
    assert set(ranges.values()) == {None}
    fp8 = compressors.cast("float8_e5m2")
    for c in (compressors.chain(compressors.topk(), fp8), compressors.hadamard(fp8)):
        assert c.facts.range == fp8.facts.range


@every_format
def test_it_warns_once_with_the_cure(dtype):
    with pytest.warns(UserWarning, match=r"needs a scale.*blockwise\(8, 256\)") as seen:
        tx = compressed_mean(compressors.cast(dtype), axis_name="workers")
    assert len(seen) == 1 and seen[0].filename == __file__
    grads = jnp.ones((2, 4097))  # no second warning, and no feedback
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        u, error = updates(tx, grads)
    np.testing.assert_array_equal(u, 1)
    assert error is None


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_wide_formats_are_taken_as_they_are(dtype):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tx = compressed_mean(compressors.cast(dtype), axis_name="workers")
    assert updates(tx, jnp.ones((1, 7)))[1] is not None  # with feedback


@every_format
@pytest.mark.parametrize("feedback", ["worker", "both"])
def test_feedback_is_refused(dtype, feedback):
    with pytest.raises(ValueError, match=r"needs a scale.*blockwise\(8, 256\)"):
        compressed_mean(
            compressors.cast(dtype),
            axis_name="workers",
            plan="scatter_reduce",
            error_feedback=feedback,
        )


@every_format
def test_every_algorithm_that_feeds_back_refuses_it(dtype):
    with pytest.raises(ValueError, match="choco_sgd: the code needs a scale"):
        choco_sgd(compressors.cast(dtype), axis_name="workers", consensus_step_size=0.5)
    sparse = compressors.chain(compressors.topk(), compressors.cast(dtype))
    with pytest.raises(ValueError, match="compressed_mean: the code needs a scale"):
        compressed_mean(sparse, axis_name="workers")


@every_format
def test_without_feedback_small_gradients_are_lost(dtype):
    u, _ = updates(made(dtype), jnp.full((50, 4097), 0.4 * held(dtype)[0]))
    np.testing.assert_array_equal(u, 0)


@every_format
@pytest.mark.parametrize("share", [0.3, 0.01, 1e-3])
def test_feedback_loses_no_mass_below_the_range_but_jumps(dtype, share):
    """Why it is refused: the size of a step is absolute, however small the gradient."""
    smallest, _ = held(dtype)
    steps = 1500
    grads = np.full((steps, 5), share * smallest, np.float32)
    tx = made(dtype, error_feedback="worker", unsafe=True)
    u, error = updates(tx, jnp.asarray(grads))
    assert np.abs(error).max() <= smallest / 2 * (1 + 1e-3)  # however small g is
    np.testing.assert_array_equal(np.unique(u), [0, smallest])  # nothing between
    due = np.cumsum(np.float64(grads), axis=0) - error
    np.testing.assert_allclose(
        np.cumsum(u, axis=0), due, rtol=1e-4, atol=1e-5 * smallest
    )
    first = np.argmax(u[:, 0] > 0) + 1
    assert abs(first - 0.5 / share) <= 2  # waits for s/2 to have come together


@every_format
def test_feedback_never_recovers_from_a_value_beyond_the_range(dtype):
    grads = np.full((4, 4097), 1.0, np.float32)
    grads[1, 7] = 1.2 * held(dtype)[1]
    tx = made(dtype, error_feedback="worker", unsafe=True)
    u, error = updates(tx, jnp.asarray(grads))
    assert np.isfinite(u[0]).all()
    assert not np.isfinite(u[1:, 7]).any() and not np.isfinite(error[1:, 7]).any()
    assert np.isfinite(np.delete(u, 7, axis=1)).all()
