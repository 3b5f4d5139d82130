"""skip_not_finite: who decides, what is kept, when it gives up; optax's own guards."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

import bagua_jax
from bagua_jax import (
    Workers,
    accumulate,
    overlap,
    primitives,
    skip_not_finite,
    varying,
    wire,
)
from bagua_jax.algorithms import bytegrad, decentralized, gradient_allreduce

PLACES = {"simulate": Workers.simulate, "devices": Workers.devices}
both_places = pytest.mark.parametrize("place", PLACES)
AXIS = "workers"
BAD = pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])


def bytegrad_adam():
    return optax.chain(bytegrad(axis_name=AXIS, error_feedback="both"), optax.adam(0.1))


def gossip():
    return optax.chain(optax.sgd(0.1), decentralized(axis_name=AXIS))


def visited(place, tx, gradients, own_params=False):
    """Updates and states after each step, time first, for gradients [n, steps, d]."""
    workers = PLACES[place](gradients.shape[0])

    def run(gradients):
        x = jnp.zeros(gradients.shape[-1])
        x = bagua_jax.worker_local(x, AXIS) if own_params else x

        def step(carry, g):
            x, state = carry
            updates, state = tx.update(g, state, x)
            return (optax.apply_updates(x, updates), state), (updates, state)

        return jax.lax.scan(step, (x, tx.init(x)), gradients)[1]

    out = workers.spmd(run, in_specs=workers.spec)(gradients)
    specs = workers.specs(run, gradients, in_specs=workers.spec)
    return jax.tree.map(lambda x, s: jnp.swapaxes(x, 0, 1) if s else x, out, specs)


def noise(n, steps, d, seed=0):
    return np.random.default_rng(seed).normal(size=(n, steps, d)).astype(np.float32)


# --- the verdict ----------------------------------------------------------------------


@BAD
@both_places
@pytest.mark.parametrize("n", [1, 2, 3, 8])
def test_any_element_of_any_worker_decides_for_all(n, place, bad):
    """In vectors in which XLA's maximum would lose it."""
    d, places = 5000, [0, 2500, 4999]
    gradients = noise(n, 2 * len(places), d)
    for k, at in enumerate(places):
        gradients[(k + 1) % n, 2 * k + 1, at] = bad
    tx = skip_not_finite(
        optax.chain(gradient_allreduce(axis_name=AXIS), optax.sgd(0.1)), AXIS
    )
    updates, states = visited(place, tx, gradients)
    np.testing.assert_array_equal(states.last_finite, [True, False] * len(places))
    np.testing.assert_array_equal(states.skipped, [0, 1, 1, 2, 2, 3])
    assert (np.asarray(updates) != 0).any(-1).tolist() == [True, False] * len(places)


@both_places
def test_gradients_decide_though_the_outcome_is_finite(place):
    """Not only what comes out: codes and clips can make finite numbers of a NaN."""
    hides = optax.stateless(lambda u, _: jax.tree.map(jnp.nan_to_num, u))
    gradients = noise(4, 3, 5)
    gradients[2, 1, 3] = np.nan
    updates, states = visited(
        place, skip_not_finite(hides, AXIS), gradients, own_params=True
    )
    np.testing.assert_array_equal(states.last_finite, [1, 0, 1])
    assert not np.asarray(updates)[1].any() and np.asarray(updates)[[0, 2]].all()


@both_places
def test_the_outcome_decides_though_gradients_are_finite(place):
    """Of one worker alone: the others are told."""

    def overflow(u, _):
        return u * jnp.where(primitives.axis_index(AXIS) == 1, 1e30, 1.0)

    gradients = noise(4, 3, 5)
    gradients[:, 1] *= 1e30
    tx = skip_not_finite(optax.stateless(overflow), AXIS)
    updates, states = visited(place, tx, gradients, own_params=True)
    np.testing.assert_array_equal(states.last_finite, [1, 0, 1])
    assert not np.asarray(updates)[1].any() and np.asarray(updates)[[0, 2]].all()


@both_places
def test_an_infinity_in_the_state_is_no_bad_step(place):
    """The best loss so far, of a scheduler for example, starts at infinity."""
    keeps = optax.GradientTransformation(
        lambda params: {"best": jnp.float32(jnp.inf), "key": jax.random.key(0)},
        lambda u, state, _: (u, state | {"key": jax.random.split(state["key"], 1)[0]}),
    )
    gradients = noise(2, 4, 3)
    gradients[1, 2] = np.inf
    updates, states = visited(
        place, skip_not_finite(keeps, AXIS), gradients, own_params=True
    )
    assert int(states.skipped[-1]) == 1
    keys = jax.random.key_data(states.inner_state["key"])
    assert (keys[1] == keys[2]).all() and (keys[2] != keys[3]).any()
    assert np.isinf(states.inner_state["best"]).all()


def test_nodes_of_a_hierarchy_decide_together():
    names = ("node", "local")
    for workers in (Workers.simulate((2, 2)), Workers.devices((2, 2))):
        tx = skip_not_finite(
            optax.chain(bytegrad(axis_name=names), optax.sgd(1.0)), names
        )

        def step(g, tx=tx):
            updates, state = tx.update(g, tx.init(g))
            return updates, state

        gradients = noise(4, 1, 6)[:, 0]
        gradients[3, 2] = np.nan
        updates, state = workers.spmd(step, in_specs=workers.spec)(gradients)
        assert not np.asarray(updates).any() and not bool(state.last_finite)


@pytest.mark.parametrize("checked", [True, False])
def test_in_a_shard_map_of_ones_own(checked):
    """Replicas agree by JAX's own check, or unchecked."""
    workers = Workers.devices(4)
    tx = skip_not_finite(optax.chain(gradient_allreduce(axis_name=AXIS)), AXIS)

    @functools.partial(
        jax.shard_map,
        mesh=workers.mesh,
        in_specs=P(AXIS),
        out_specs=P(),
        check_vma=checked,
    )
    def step(g):
        updates, state = tx.update(g[0], tx.init(g[0]))
        return updates, state.last_finite

    gradients = noise(4, 1, 6)[:, 0]
    updates, finite = jax.jit(step)(gradients)
    np.testing.assert_allclose(updates, gradients.mean(0), rtol=1e-6)
    assert finite
    gradients[0, 0] = np.inf
    updates, finite = jax.jit(step)(gradients)
    assert not updates.any() and not finite


def test_a_missing_axis_is_named():
    tx = skip_not_finite(optax.sgd(0.1), "wrokers")
    with pytest.raises(NameError, match="no mapped axis is named 'wrokers'"):
        tx.update(jnp.ones(2), tx.init(jnp.ones(2)))


# --- what it costs on the wire --------------------------------------------------------


def sent(tx, own_params=False):
    workers = Workers.devices(4)

    def step(g):
        x = bagua_jax.worker_local(g, AXIS) if own_params else jnp.zeros(g.shape)
        return tx.update(g, tx.init(x), x)

    program = workers.spmd(step, in_specs=workers.spec)
    return wire.count(program.lower(jnp.ones((4, 5000))).compile())


def test_the_verdict_is_one_small_message():
    for chain, own_params in ((bytegrad_adam(), False), (gossip(), True)):
        plain = sent(chain, own_params)
        guarded = sent(skip_not_finite(chain, AXIS), own_params)
        assert guarded.messages_per_worker == plain.messages_per_worker + 1
        assert guarded.bytes_per_worker == plain.bytes_per_worker + 2 * 3 / 4 * 4


def test_the_verdict_rides_with_an_all_reduce():
    chain = optax.chain(gradient_allreduce(axis_name=AXIS), optax.sgd(0.1))
    assert sent(chain).messages_per_worker == 1
    assert sent(skip_not_finite(chain, AXIS)).messages_per_worker == 1


def test_no_message_where_all_know_already():
    """Behind the exchange all see the same."""
    exchange = gradient_allreduce(axis_name=AXIS)
    behind = optax.chain(exchange, skip_not_finite(optax.adam(0.1), AXIS))
    assert sent(behind).bytes_per_worker == sent(exchange).bytes_per_worker


# --- giving up ------------------------------------------------------------------------


@both_places
@pytest.mark.parametrize("chain, own", [(bytegrad_adam, False), (gossip, True)])
def test_it_gives_up_visibly_after_so_many(place, chain, own):
    gradients = noise(4, 8, 6)
    gradients[1, [1, 2, 4, 5, 6], 3] = np.nan  # two in a row, a good step, then three
    updates, states = visited(
        place, skip_not_finite(chain(), AXIS, 2), gradients, own_params=own
    )
    np.testing.assert_array_equal(states.consecutive[:7], [0, 1, 2, 0, 1, 2, 3])
    np.testing.assert_array_equal(states.gave_up, [0, 0, 0, 0, 0, 0, 1, 1])
    np.testing.assert_array_equal(states.skipped[:7], [0, 1, 2, 2, 3, 4, 5])
    updates = np.asarray(updates)
    assert np.isnan(updates[6:]).all()  # the last step, too: it was sound, and too late
    assert not updates[[1, 2, 4, 5]].any() and updates[[0, 3]].any()
    for leaf in jax.tree.leaves(states.inner_state):
        for t in range(4, 8):  # that of the last step taken
            np.testing.assert_array_equal(leaf[t], leaf[3])


def test_none_is_borne_or_any_number():
    gradients = noise(2, 50, 3)
    gradients[:, 1:-1] = np.inf
    tx = optax.chain(gradient_allreduce(axis_name=AXIS), optax.sgd(0.1))
    updates, states = visited("simulate", skip_not_finite(tx, AXIS), gradients)
    assert not np.any(states.gave_up) and np.asarray(updates)[-1].all()
    updates, states = visited("simulate", skip_not_finite(tx, AXIS, 0), gradients)
    assert np.isnan(updates)[1:].all() and np.all(np.asarray(states.gave_up)[1:])


@pytest.mark.parametrize("value", [-1, 1.5, True])
def test_the_bound_must_be_a_count(value):
    with pytest.raises(
        ValueError, match="skip_not_finite: max_consecutive must be an integer >= 0"
    ):
        skip_not_finite(optax.sgd(0.1), AXIS, value)


# --- in loops of other kinds ----------------------------------------------------------


@both_places
def test_around_accumulate_a_bad_micro_batch_is_dropped(place):
    """The others make up the step."""
    k, gradients = 2, noise(4, 9, 6)
    gradients[1, 3, 2] = np.nan
    sound = np.delete(gradients, 3, axis=1)
    tx = skip_not_finite(accumulate(bytegrad_adam(), k), AXIS)
    updates, states = visited(place, tx, gradients)
    expected, others = visited(place, tx, sound)
    np.testing.assert_array_equal(np.delete(updates, 3, axis=0), expected)
    ours, theirs = jax.tree.map(lambda s: s[-1], (states, others))
    assert int(ours.skipped) == 1
    chex.assert_trees_all_equal(ours.inner_state, theirs.inner_state)


@both_places
def test_inside_accumulate_its_step_is_dropped(place):
    k, gradients = 2, noise(4, 8, 6)
    gradients[1, 3, 2] = np.nan
    sound = np.delete(gradients, [2, 3], axis=1)
    tx = accumulate(skip_not_finite(bytegrad_adam(), AXIS), k)
    updates, states = visited(place, tx, gradients)
    expected, others = visited(place, tx, sound)
    np.testing.assert_array_equal(np.delete(updates, [2, 3], axis=0), expected)
    ours, theirs = jax.tree.map(lambda s: s[-1], (states, others))
    assert int(ours.inner_state.skipped) == 1
    chex.assert_trees_all_equal(
        ours.inner_state.inner_state, theirs.inner_state.inner_state
    )


def test_an_eager_state_can_be_donated():
    """No two leaves of it share a buffer."""
    tx = optax.chain(gradient_allreduce(axis_name=AXIS), optax.sgd(0.1, momentum=0.9))
    tx = skip_not_finite(tx, AXIS)
    workers = Workers.devices(2)
    step = workers.spmd(
        lambda state, g: tx.update(g, state)[1],
        in_specs=(P(), workers.spec),
        donate_argnums=0,
    )
    state = jax.device_put(
        tx.init(jnp.ones((3, 2))), jax.NamedSharding(workers.mesh, P())
    )
    for bad in (0.0, np.nan):
        state = step(state, jnp.full((2, 3, 2), bad))
        assert bool(state.last_finite) == (bad == 0)


def test_workers_of_several_devices():
    """Leaves sharded over a second axis of the mesh are seen whole."""
    workers = Workers.devices(2, shards={"model": 2})
    tx = skip_not_finite(
        optax.chain(gradient_allreduce(axis_name=AXIS), optax.sgd(0.1)), AXIS
    )
    step = workers.spmd(lambda g: tx.update(g, tx.init(g)), in_specs=workers.spec)
    gradients = noise(2, 1, 8)
    sharding = jax.NamedSharding(workers.mesh, P(AXIS, None, "model"))
    for bad in (0.0, np.nan):
        gradients[1, 0, 7] = bad
        updates, state = step(jax.device_put(gradients, sharding))
        assert bool(state.last_finite) == (bad == 0) == np.asarray(updates).any()


@both_places
def test_an_exchange_in_the_backward_pass(place):
    """Its state is chosen by the verdict of the guarded optimizer."""
    exchange = bytegrad(axis_name=AXIS, error_feedback="both")
    optimizer = skip_not_finite(optax.sgd(0.1, momentum=0.9), AXIS)
    start = {"a": jnp.ones(3), "b": jnp.full(3, 0.5)}

    def loss(params, state, x):
        chain = overlap.Chain(exchange, params, state, axis_name=AXIS)
        for name in params:
            x = chain(jnp.multiply, name, x)
        return chain.finish(jnp.sum(x**2))

    def run(batches):
        def step(carry, x):
            params, old, opt = carry
            grads, new = jax.grad(loss, argnums=(0, 1))(params, old, x)
            updates, opt = optimizer.update(grads, opt, params)
            new = jax.tree.map(
                lambda new, old: jnp.where(opt.last_finite, new, old), new, old
            )
            return (optax.apply_updates(params, updates), new, opt), None

        carry = start, overlap.init(exchange, start), optimizer.init(start)
        params, state, opt = jax.lax.scan(step, carry, batches)[0]
        return params, state, opt.inner_state, opt.skipped

    workers = PLACES[place](4)
    program = workers.spmd(run, in_specs=workers.spec)
    batches = noise(4, 6, 3)
    outs = []
    for at in (2, 5):  # inside, and last
        order = [t for t in range(6) if t != 2]
        order.insert(at, 2)
        spoilt = batches[:, order].copy()
        spoilt[1, at, 0] = np.nan
        outs.append(program(spoilt))
    chex.assert_trees_all_equal(*outs)
    chex.assert_tree_all_finite(outs[0])
    assert int(outs[0][3]) == 1 and (outs[0][0]["a"] != 1).all()


# --- optax's own ----------------------------------------------------------------------


def multi_steps(inner, **options):
    return optax.MultiSteps(inner, 2, **options).gradient_transformation()


skipping = functools.partial(multi_steps, should_skip_update_fn=optax.skip_not_finite)
OPTAX = {
    "apply_if_finite": (
        lambda tx: optax.apply_if_finite(tx, 5),
        r"skip_not_finite\(tx, 'workers'\)",
    ),
    "apply_if_finite varying": (
        lambda tx: optax.apply_if_finite(varying(tx, AXIS), 5),
        r"skip_not_finite\(tx, 'workers'\)",
    ),
    "MultiSteps": (multi_steps, r"accumulate\(tx, every_k\), which exchanges once"),
    "MultiSteps varying": (
        lambda tx: multi_steps(varying(tx, AXIS)),
        r"accumulate\(tx, every_k\), which exchanges once",
    ),
    "skip_not_finite": (
        lambda tx: skipping(varying(tx, AXIS)),
        r"skip_not_finite\(bagua_jax.accumulate\(tx, every_k\), 'workers'\)",
    ),
    "skip_large_updates": (
        lambda tx: multi_steps(
            tx,
            should_skip_update_fn=functools.partial(
                optax.skip_large_updates, max_squared_norm=1.0
            ),
        ),
        r"skip_not_finite\(bagua_jax.accumulate\(tx, every_k\), 'workers'\)",
    ),
}


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("chain", [bytegrad_adam, gossip])
@pytest.mark.parametrize("wrapper", OPTAX)
def test_optax_guards_around_an_exchange_name_the_cure(wrapper, chain, compiled):
    """In a shard_map of one's own, too, before anything hangs."""
    make, cure = OPTAX[wrapper]
    tx = make(chain())
    update = jax.jit(tx.update) if compiled else tx.update
    workers = Workers.devices(4)

    def step(g):
        x = jnp.zeros(g.shape)
        if chain is gossip:
            x = bagua_jax.worker_local(x, AXIS)
        return update(g, tx.init(x), x)[0][None]

    mapped = jax.shard_map(
        lambda g: step(g[0]),
        mesh=workers.mesh,
        in_specs=P(AXIS),
        out_specs=P(AXIS),
    )
    if wrapper == "MultiSteps varying" and chain is gossip:
        jax.eval_shape(mapped, jnp.ones((4, 6)))  # all varies: right, if wasteful
        return
    with pytest.raises(ValueError, match=cure) as info:
        jax.eval_shape(mapped, jnp.ones((4, 6)))
    assert "worker_local" not in str(info.value)


def test_apply_if_finite_in_simulation_is_refused_too():
    """There the others would take the NaN that one worker leaves out."""
    tx = optax.apply_if_finite(bytegrad_adam(), 5)
    step = jax.vmap(lambda g: tx.update(g, tx.init(g), g)[0], axis_name=AXIS)
    with pytest.raises(ValueError, match="or they take its NaN"):
        step(jnp.ones((4, 3)))


def test_apply_if_finite_behind_the_exchange_protects_only_what_it_is_around():
    """Why it is no cure: the memory of the exchange is not finite from then on."""
    exchange = bytegrad(axis_name=AXIS, error_feedback="both")
    behind = optax.chain(exchange, optax.apply_if_finite(optax.sgd(0.1), 99))
    gradients = noise(4, 6, 5)
    gradients[1, 2, 3] = np.nan
    updates, states = visited("simulate", behind, gradients)
    assert not np.asarray(updates)[2:].any()
    around = skip_not_finite(optax.chain(exchange, optax.sgd(0.1)), AXIS)
    updates, states = visited("simulate", around, gradients)
    assert np.asarray(updates)[[0, 1, 3, 4, 5]].all() and int(states.skipped[-1]) == 1
