"""Another number of workers: what a state of n keeps when m go on."""

import re
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P
from table import ONE_EACH, ROWS, ids, run, targets, training

import bagua_jax
from bagua_jax import Workers, compressors, resizing
from bagua_jax import algorithms as alg
from bagua_jax.loops import spec_leaves
from bagua_jax.primitives import Errors

AXIS = "workers"
# One of each algorithm, and all with errors or messages under way.
MEMORY = [r for r in ROWS if {"error_feedback", "staleness"} & {*r.options}]
KINDS = list({row.id: row for row in [*ONE_EACH, *MEMORY]}.values())
every_kind = pytest.mark.parametrize("row", KINDS, ids=ids(KINDS))
every_algorithm = pytest.mark.parametrize("row", ONE_EACH, ids=ids(ONE_EACH))


def fits(row, n: int) -> bool:
    """Whether a row's own graph or trace of delays exists for n workers."""
    try:
        run(Workers.simulate(n), row, 1)
    except ValueError:
        return False
    return True


def resized(row, n: int, m: int, steps: int = 5):
    """Train with n workers, and carry the state to m."""
    state = run(Workers.simulate(n), row, steps)
    new = training(Workers.simulate(m), row)
    specs = training(Workers.simulate(n), row).specs
    return state, bagua_jax.resize(state, specs, new.init(), workers=m), new


def mean(tree, own: bool):
    return jax.tree.map(lambda x: np.asarray(x, np.float64).mean(0) if own else x, tree)


def masses_of(opt):
    is_push = lambda s: hasattr(s, "common_model")  # noqa: E731
    states = jax.tree.leaves(opt, is_leaf=is_push)
    return next((s for s in states if is_push(s)), None)


@every_kind
def test_the_mean_model_is_kept_and_training_goes_on(row):
    n, m = 4, 8
    if not (fits(row, n) and fits(row, m)):
        pytest.skip("its graph or trace is of one number of workers")
    state, new_state, new = resized(row, n, m)
    push = masses_of(state[1])
    if push is None:
        before = mean(state[0], row.own_params)
    else:  # by mass, with what is under way
        parcels = getattr(push, "in_flight", ())
        mass = np.asarray(push.mass, np.float64)
        whole = mass.sum() + sum(np.sum(p.mass) for p in parcels)
        before = jax.tree.map(
            lambda x, *on: (
                (np.einsum("i,i...->...", mass, x) + sum(np.sum(y, 0) for y in on))
                / whole
            ),
            state[0],
            *(p.model for p in parcels),
        )
    after = mean(new_state[0], row.own_params)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-6, atol=2e-6),
        before,
        after,
    )
    if row.own_params:
        for leaf in jax.tree.leaves(new_state[0]):
            assert (np.asarray(leaf) == np.asarray(leaf)[:1]).all()
    for _ in range(3):
        new_state = new.step(new_state, targets(m))
    for leaf in jax.tree.leaves(new_state):
        if jnp.issubdtype(leaf.dtype, jnp.inexact):
            assert np.isfinite(np.asarray(leaf, np.float32)).all()


@every_algorithm
@pytest.mark.parametrize(("n", "m"), [(4, 3)])
def test_resizing_twice_is_resizing_once(row, n, m):
    if not (fits(row, n) and fits(row, m)):
        pytest.skip("its graph or trace is of one number of workers")
    _, once, new = resized(row, n, m, steps=3)
    twice = bagua_jax.resize(once, new.specs, new.init(), workers=m)
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(once), jax.tree.leaves(twice), strict=True
    ):
        if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = map(jax.random.key_data, (a, b))
        np.testing.assert_array_equal(a, b, err_msg=jax.tree_util.keystr(path))


def errors_of(tree) -> Errors:
    is_errors = lambda x: isinstance(x, Errors)  # noqa: E731
    (found,) = filter(is_errors, jax.tree.leaves(tree, is_leaf=is_errors))
    return found


@pytest.mark.parametrize("m", [2, 3, 8])
def test_unsent_errors_are_kept(m):
    """5,003 elements in several buckets: the recursion of the virtual iterate goes on.

    With equal gradients on all workers p - gamma (mean d + E) takes exact steps of SGD,
    whatever the number of workers.
    """
    n, gamma, d = 4, 0.05, 5003
    codec = compressors.topk(0.02)
    gradient = jax.random.normal(jax.random.key(3), (d,))

    def loop_of(k):
        tx = optax.chain(
            alg.compressed_mean(
                codec,
                axis_name=AXIS,
                plan="scatter_reduce",
                error_feedback="both",
                bucket_bytes=4 * 2000,
            ),
            optax.sgd(gamma),
        )

        def init():
            x = {"a": jnp.zeros(3000), "b": jnp.zeros(d - 3000)}
            return x, tx.init(x)

        def step(state, scale):
            x, opt = state
            g = {"a": gradient[:3000] * scale, "b": gradient[3000:] * scale}
            g = bagua_jax.worker_local(g, AXIS)
            updates, opt = tx.update(g, opt, x)
            return optax.apply_updates(x, updates), opt

        workers = Workers.simulate(k)
        return workers.loop(init, step, inputs=(jnp.ones(k),))

    def virtual(state):
        x, opt = state
        error = errors_of(opt)
        flat = lambda tree, rows: np.concatenate(  # noqa: E731
            [rows(np.asarray(v, np.float64)).ravel() for v in jax.tree.leaves(tree)]
        )
        return (
            flat(x, lambda v: v)
            - gamma * flat(error.worker, lambda v: v.mean(0))
            - gamma * flat(error.owner, lambda v: v.sum(0))
        )

    old, new = loop_of(n), loop_of(m)
    state = old.init()
    for _ in range(4):
        state = old.step(state, jnp.ones(n))
    before = virtual(state)
    owner = errors_of(state[1]).owner
    state = bagua_jax.resize(state, old.specs, new.init(), workers=m)
    for a, b in zip(
        jax.tree.leaves(owner), jax.tree.leaves(errors_of(state[1]).owner), strict=True
    ):
        np.testing.assert_array_equal(np.asarray(a).sum(0), np.asarray(b)[0])
    for steps in range(1, 4):
        state = new.step(state, jnp.ones(m))
        expected = before - steps * gamma * np.asarray(gradient, np.float64)
        np.testing.assert_allclose(virtual(state), expected, atol=2e-6)


def test_on_devices_and_back(devices):
    row = next(r for r in ROWS if r.algorithm == "qadam")
    state = run(Workers.devices(4), row, 4)
    specs = training(Workers.devices(4), row).specs
    new = training(Workers.devices(8), row)
    state = bagua_jax.resize(state, specs, new.init(), workers=8)
    state = new.step(state, targets(8))
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(state[0]))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (dict(workers=0), "workers must be an integer >= 1, got 0"),
        (dict(workers=True), "workers must be an integer >= 1, got True"),
        (dict(specs=P()), "specs must have a spec for each of the 3 leaves"),
        (dict(state=[jnp.zeros(2)]), "must be tuples .* got list"),
        (
            dict(workers=3),
            r"leaf \[0\] would be .*\(3, 2\).* and is .*\(2, 2\).* in like",
        ),
    ],
)
def test_refusals(call, message):
    state = jnp.zeros((2, 2)), jnp.zeros((2, 2)), jnp.zeros(())
    given = dict(state=state, specs=(P(AXIS), P(AXIS), P()), like=state, workers=2)
    given |= call
    with pytest.raises(ValueError, match=f"resize: .*{message}"):
        bagua_jax.resize(
            given["state"], given["specs"], given["like"], workers=given["workers"]
        )


def test_what_is_no_number_must_be_equal():
    state = jnp.zeros((2, 2)), {"seen": jnp.arange(2)}
    specs = P(AXIS), {"seen": P(AXIS)}
    with pytest.raises(ValueError, match=re.escape("leaf [1]['seen'] differs between")):
        bagua_jax.resize(state, specs, state, workers=2)
    keys = jax.random.split(jax.random.key(0), 2)
    with pytest.raises(ValueError, match="differs between workers"):
        bagua_jax.resize((state[0], keys), (P(AXIS), P(AXIS)), state, workers=2)


def test_workers_in_nodes_are_refused(devices):
    workers = Workers.devices((2, 2))
    row = next(r for r in ROWS if r.options.get("error_feedback") == "both")
    loop = training(workers, row)
    assert any(len(s) and isinstance(s[0], tuple) for s in spec_leaves(loop.specs))
    with pytest.raises(ValueError, match="of workers in nodes"):
        bagua_jax.resize(loop.init(), loop.specs, loop.init(), workers=4)


class OwnState(NamedTuple):
    """State of someone's own algorithm: a mean, and a memory that begins anew."""

    momentum: jax.Array
    memory: jax.Array

    def resized(self, like, params, workers):
        assert params.shape == (workers, 2)
        return OwnState(resizing.mean(self.momentum, workers), like.memory)


def test_a_state_of_ones_own_has_its_own_rule():
    x = jnp.array([[0.0, 2.0], [4.0, 4.0]])
    state = x, {"mine": OwnState(2 * x, 3 * x)}
    specs = P(AXIS), {"mine": OwnState(P(AXIS), P(AXIS))}
    zeros = jnp.zeros((3, 2))
    like = zeros, {"mine": OwnState(zeros, zeros)}
    new, rest = bagua_jax.resize(state, specs, like, workers=3)
    assert new.tolist() == [[2.0, 3.0]] * 3
    assert rest["mine"].momentum.tolist() == [[4.0, 6.0]] * 3
    assert rest["mine"].memory.tolist() == zeros.tolist()
