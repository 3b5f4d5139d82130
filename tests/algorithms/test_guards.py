"""Guards around every algorithm: one bad step leaves no trace."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from table import ONE_EACH, ROWS, ids, loss, params, targets

import bagua_jax
from bagua_jax import Workers, skip_not_finite

PLACES = {"simulate": Workers.simulate, "devices": Workers.devices}
AXIS = "workers"
N, STEPS, BAD = 4, 9, 4


def batches(bad_step, value=jnp.nan, worker=2):
    """[n, STEPS]: the same sound steps in both orders, with the bad one where told."""
    drift = np.linspace(0, 0.5, STEPS - 1, dtype=np.float32)
    sound = np.asarray(targets(N))[:, None] + drift
    bad = np.asarray(targets(N)).copy()
    bad[worker] = value
    return jnp.asarray(np.insert(sound, bad_step, bad, axis=1))


def trained(row, tx, place, start=None):
    """Compile a scan over steps; a function of the batches: parameters and state."""
    workers = PLACES[place](N)
    start = params() if start is None else start

    def init():
        x = bagua_jax.worker_local(start, AXIS) if row.own_params else start
        return x, tx.init(x)

    def train(state, batches):
        def step(carry, target):
            x, opt = carry
            grads = jax.grad(loss)(bagua_jax.worker_local(x, AXIS), target)
            updates, opt = tx.update(grads, opt, x)
            return (optax.apply_updates(x, updates), opt), None

        return jax.lax.scan(step, state, batches)[0]

    specs = (workers.specs(init), workers.spec)
    program = workers.spmd(train, in_specs=specs, donate_argnums=0)
    begin = workers.spmd(init)
    return lambda batches: program(begin(), batches)


def assert_no_trace(inside, last, start):
    """A bad step inside a run is as one after it, bit for bit; yet the model moved."""
    (x, opt), (same_x, same_opt) = inside, last
    assert np.all(opt.last_finite) and np.all(opt.consecutive == 0)
    assert not np.any(same_opt.last_finite) and np.all(same_opt.consecutive == 1)
    assert np.all(opt.skipped == 1) and np.all(same_opt.skipped == 1)
    assert not np.any(opt.gave_up) and not np.any(same_opt.gave_up)
    states = (x, opt.inner_state), (same_x, same_opt.inner_state)
    chex.assert_trees_all_equal(*states)
    for leaf, old in zip(*map(jax.tree.leaves, (x, start)), strict=True):
        assert np.isfinite(np.asarray(leaf, np.float32)).all()
        if leaf.size:
            assert (np.asarray(leaf) != np.asarray(old)).any()


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("row", ROWS, ids=ids(ROWS))
def test_one_bad_step_leaves_no_trace(row, place):
    """The run with it equals, bit for bit, the one in which it comes last.

    Inside ``lax.scan``, so that types hold; under donation; on devices with JAX's check
    that replicas agree.
    """
    run = trained(row, skip_not_finite(row.chain(AXIS), AXIS), place)
    assert_no_trace(run(batches(BAD)), run(batches(STEPS - 1)), params())


@pytest.mark.parametrize("index", range(len(ONE_EACH)), ids=ids(ONE_EACH))
def test_one_bad_step_in_half_precision(index):
    """One worker's gradient is infinite on the bad step."""
    row, dtype = ONE_EACH[index], (jnp.bfloat16, jnp.float16)[index % 2]
    start = params(dtype)
    run = trained(row, skip_not_finite(row.chain(AXIS), AXIS), "simulate", start)
    inside, last = (run(batches(at, jnp.inf)) for at in (BAD, STEPS - 1))
    assert {leaf.dtype for leaf in jax.tree.leaves(inside[0])} == {jnp.dtype(dtype)}
    assert_no_trace(inside, last, start)
