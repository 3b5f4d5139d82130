"""Workers.loop: what a step makes each worker's own is stacked from the start."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

import bagua_jax
from bagua_jax import Workers, primitives
from bagua_jax.algorithms import (
    bytegrad,
    decentralized,
    diloco,
    gradient_allreduce,
    local_sgd,
)

AXIS, WIDTH, HIDDEN = "workers", 5, 1000
PLACES = {"simulate": Workers.simulate, "devices": Workers.devices}
both_places = pytest.mark.parametrize("place", PLACES)


def params():
    rng = np.random.default_rng(1)
    draw = lambda *shape: jnp.float32(rng.standard_normal(shape))  # noqa: E731
    return {"frozen": draw(WIDTH, HIDDEN), "trained": draw(HIDDEN) / HIDDEN}


def batches(n, steps=3):
    rng = np.random.default_rng(n)
    x = rng.standard_normal((steps, n, 4, WIDTH)).astype(np.float32)
    return x, rng.standard_normal((steps, n, 4)).astype(np.float32)


def loss_fn(p, x, y):
    return jnp.mean((jnp.tanh(x @ p["frozen"]) @ p["trained"] - y) ** 2)


def train(workers, tx, steps=3, own_params=False):
    """A loop, its last state; shapes never change on the way."""

    def init():
        p = params()
        p = bagua_jax.worker_local(p, AXIS) if own_params else p
        return p, tx.init(p)

    def step(state, x, y):
        p, opt_state = state
        loss, grads = bagua_jax.value_and_grad(loss_fn, AXIS)(p, x, y)
        updates, opt_state = tx.update(grads, opt_state, p)
        return (optax.apply_updates(p, updates), opt_state), loss

    x, y = batches(workers.num_workers, steps)
    loop = workers.loop(init, step, inputs=(x[0], y[0]))
    state = loop.init()
    shapes = jax.tree.map(jnp.shape, state)
    for k in range(steps):
        state, loss = loop.step(state, x[k], y[k])
        assert jax.tree.map(jnp.shape, state) == shapes
        assert loss.shape == (workers.num_workers,)
    return loop, state


def exact():
    return gradient_allreduce(axis_name=AXIS)


def with_error():
    return bytegrad(axis_name=AXIS, error_feedback="both", bucket_bytes=8192)


LABELS = {"frozen": "still", "trained": "moving"}
SGD = optax.sgd(0.01, momentum=0.9)
FROZEN = {
    "partition, exchange inside": lambda e: optax.partition(
        {"moving": optax.chain(e(), SGD), "still": optax.set_to_zero()}, LABELS
    ),
    "partition, exchange before": lambda e: optax.chain(
        e(), optax.partition({"moving": SGD, "still": optax.set_to_zero()}, LABELS)
    ),
    "masked, then frozen": lambda e: optax.chain(
        optax.masked(e(), {"frozen": False, "trained": True}),
        optax.transforms.freeze({"frozen": True, "trained": False}),
        SGD,
    ),
}


@pytest.mark.parametrize("exchange", [exact, with_error])
@pytest.mark.parametrize("name", FROZEN)
def test_frozen_leaves_stay_and_keep_their_shapes(name, exchange):
    """Held once where JAX proves them equal: with the exchange before."""
    finals = {}
    for place, make in PLACES.items():
        loop, state = train(make(3), FROZEN[name](exchange))
        stacked = "exchange before" not in name
        assert loop.specs[0]["frozen"] == (P(AXIS) if stacked else P())
        assert loop.specs[0]["trained"] == P()
        assert ("[0]['frozen']" in loop.promoted) == stacked
        finals[place] = loop.average(state)[0]
        frozen = np.asarray(state[0]["frozen"])
        np.testing.assert_array_equal(
            frozen, np.broadcast_to(params()["frozen"], frozen.shape)
        )
    moved = np.abs(finals["devices"]["trained"] - params()["trained"]).max()
    assert moved > 1e-4
    atol = 1e-6 if exchange is exact else 1e-2 * moved
    np.testing.assert_allclose(
        finals["simulate"]["trained"], finals["devices"]["trained"], rtol=0, atol=atol
    )


@both_places
def test_an_optimizer_in_front_of_an_exchange_is_stacked(place):
    tx = optax.chain(optax.ema(0.9, debias=False), with_error(), optax.sgd(0.01))
    loop, state = train(PLACES[place](3), tx)
    assert loop.promoted == (
        "[1][0].ema['frozen']",
        "[1][0].ema['trained']",
    )
    assert loop.specs[0] == {"frozen": P(), "trained": P()}
    assert state[1][0].count.shape == ()


@pytest.mark.parametrize(
    "name", ["decentralized", "local_sgd", "diloco", "declared decentralized"]
)
def test_parameters_of_one_s_own_are_found(name):
    """A gossip needs no worker_local in init; declared or not, the numbers are same."""
    tx = {
        "decentralized": decentralized(axis_name=AXIS),
        "local_sgd": local_sgd(local_steps=2, axis_name=AXIS),
        "diloco": diloco(local_steps=2, axis_name=AXIS),
    }[name.split()[-1]]
    tx = optax.chain(optax.adam(0.01), tx)
    declared = name.startswith("declared") or name == "diloco"
    finals = []
    for make in PLACES.values():
        loop, state = train(make(4), tx, own_params=declared)
        assert loop.specs[0] == {"frozen": P(AXIS), "trained": P(AXIS)}
        assert bool(loop.promoted) != declared or name == "diloco"
        finals.append(state[0])
    for leaf in finals[0]:
        np.testing.assert_allclose(finals[0][leaf], finals[1][leaf], atol=1e-5)


@both_places
@pytest.mark.parametrize("n", [1, 2, 8])
def test_the_state_alone_may_be_returned(place, n):
    workers = PLACES[place](n)
    x = np.arange(2.0 * n).reshape(n, 2)
    loop = workers.loop(
        lambda start: {"sum": jnp.zeros(2) + start, "count": 0},
        lambda s, x: {"sum": s["sum"] + x, "count": s["count"] + 1},
        init_args=(jnp.float32(1),),
        inputs=(x,),
    )
    assert loop.specs == {"sum": P(AXIS), "count": P()}
    assert loop.promoted == ("['sum']",)
    state = loop.init(jnp.float32(1))
    assert state["sum"].shape == (n, 2)
    for _ in range(3):
        state = loop.step(state, x)
    np.testing.assert_array_equal(state["sum"], 1 + 3 * x)
    assert int(state["count"]) == 3
    np.testing.assert_allclose(loop.average(state)["sum"], 1 + 3 * x.mean(0))
    stacked = loop.stack({"sum": jnp.ones(2), "count": 0})
    assert jax.tree.map(jnp.shape, stacked) == {"sum": (n, 2), "count": ()}


@both_places
def test_keys_and_numbers_of_one_s_own_are_worker_0_s_in_an_average(place):
    workers = PLACES[place](3)

    def step(state, x):
        key = primitives.worker_key(state["key"], AXIS)
        return {"key": key, "seen": state["seen"] + jnp.int32(x)}

    loop = workers.loop(
        lambda: {"key": jax.random.key(0), "seen": 0}, step, inputs=(jnp.arange(3.0),)
    )
    state = loop.step(loop.init(), jnp.arange(3.0) + 5)
    assert state["key"].shape == state["seen"].shape == (3,)
    one = loop.average(state)
    assert one["key"].shape == () and int(one["seen"]) == 5
    assert jax.random.key_data(one["key"]).tolist() == (
        jax.random.key_data(state["key"][0]).tolist()
    )


@both_places
def test_flat_batches_come_in_and_flat_outputs_leave(place):
    workers = PLACES[place]((2, 2))
    axis = workers.axis_name

    def step(state, batch, rate):
        mean = primitives.c_fp_s(batch["x"].mean(0), axis_name=axis)
        out = {
            "loss": batch["x"].mean(),
            "index": primitives.axis_index(axis),
            "doubled": 2 * batch["x"],
            "shared": mean,
        }
        return state - rate * mean, out

    x = np.random.default_rng(0).standard_normal((12, 3)).astype(np.float32)
    loop = workers.loop(
        lambda: jnp.ones(3), step, inputs=({"x": x}, 0.5), flat=True, donate=False
    )
    state, out = loop.step(loop.init(), {"x": x}, 0.5)
    np.testing.assert_allclose(state, 1 - 0.5 * x.mean(0), rtol=1e-5)
    np.testing.assert_allclose(out["loss"], x.mean(), rtol=1e-5)
    np.testing.assert_array_equal(out["index"], np.arange(4))
    np.testing.assert_array_equal(out["doubled"], 2 * x)
    np.testing.assert_allclose(out["shared"], x.mean(0), rtol=1e-5)
    again = workers.spmd(lambda b: b, in_specs=workers.batch)(x)
    np.testing.assert_array_equal(again, x.reshape(4, 3, 3))


@both_places
def test_the_state_is_donated_unless_told_otherwise(place):
    workers = PLACES[place](4)
    for donate in (True, False):
        loop = workers.loop(
            lambda: jnp.zeros(8),
            lambda s, x: s + x,
            inputs=(jnp.ones((4, 8)),),
            donate=donate,
        )
        state = loop.init()
        loop.step(state, jnp.ones((4, 8)))
        assert state.is_deleted() == donate


# --- refusals -------------------------------------------------------------------------


def test_a_step_without_the_state_is_refused():
    workers = Workers.simulate(2)
    with pytest.raises(ValueError, match="Workers.loop: step must return the state"):
        workers.loop(lambda: {"a": 0.0}, lambda s, x: x, inputs=(jnp.ones(2),))


@pytest.mark.parametrize(
    ("change", "got"),
    [
        (lambda a: a.astype(jnp.bfloat16), r"float32\[3\] .* as bfloat16\[3\]"),
        (lambda a: a[:2], r"float32\[3\] .* as float32\[2\]"),
    ],
)
def test_a_leaf_that_changes_is_named(change, got):
    workers = Workers.simulate(2)
    with pytest.raises(ValueError, match=r"state leaf \['a'\] is " + got):
        workers.loop(lambda: {"a": jnp.ones(3)}, lambda s: {"a": change(s["a"])})


def test_batches_of_several_lengths_are_refused():
    workers = Workers.simulate(2)
    x = jnp.ones((4, 3)), jnp.ones(10)
    with pytest.raises(ValueError, match=r"sizes \[4, 10\]. .*in_specs"):
        workers.loop(lambda: 0.0, lambda s, x, y: s, inputs=x, flat=True)
    specs = (workers.batch, P())
    workers.loop(lambda: 0.0, lambda s, x, y: s, inputs=x, flat=True, in_specs=specs)
    with pytest.raises(ValueError, match="a batch, whose leading axis the 2 workers"):
        workers.loop(lambda: 0.0, lambda s, x: s, inputs=(jnp.ones(3),), flat=True)


# --- Workers.spmd ---------------------------------------------------------------------


@both_places
def test_a_carried_leaf_that_grows_is_refused_on_the_second_call(place):
    workers = PLACES[place](4)

    def step(params, state, x):
        mean = 0.9 * state["mean"] + x.mean(0)
        return params, {"mean": mean, "count": state["count"] + 1}, x.sum()

    run = workers.spmd(step, in_specs=(P(), P(), workers.spec))
    x = jnp.ones((4, 5, 3))
    p, state, _ = run(jnp.ones(2), {"mean": jnp.zeros(3), "count": 0}, x)
    assert state["mean"].shape == (4, 3)
    with pytest.raises(ValueError) as error:
        run(p, state, x)
    text = str(error.value)
    assert text.startswith("Workers.spmd: leaf [1]['mean'] went in as P()")
    assert "(4, 3)" in text and "Workers.loop" in text


@both_places
def test_honest_conversions_are_not_refused(place):
    workers = PLACES[place](4)
    declare = workers.spmd(lambda p: bagua_jax.worker_local(p, AXIS))
    for _ in range(2):
        assert declare({"a": jnp.ones(3)})["a"].shape == (4, 3)
    assert declare({"a": jnp.ones(5)})["a"].shape == (4, 5)


def mean_in_a_scan(x):
    local = lambda x: bagua_jax.worker_local(x, AXIS)  # noqa: E731
    body = lambda c, _: (local(jax.lax.pmean(c, AXIS)), None)  # noqa: E731
    return jax.lax.scan(body, local(x), length=2)[0]


@jax.jit
def gathered_mean(x):
    return jax.lax.all_gather(bagua_jax.worker_local(x, AXIS), AXIS).mean(0)


COMMUNICATE = {
    "a primitive": lambda x: primitives.c_fp_s(x, axis_name=AXIS),
    "lax": lambda x: jax.lax.pmean(x, AXIS),
    "in a scan": mean_in_a_scan,
    "in jit": gathered_mean,
}


@both_places
@pytest.mark.parametrize("name", COMMUNICATE)
def test_forgotten_in_specs_are_refused(place, name):
    workers = PLACES[place](4)
    x = {"a": jnp.arange(8.0).reshape(4, 2), "b": jnp.arange(4.0)}
    fn = lambda tree: jax.tree.map(COMMUNICATE[name], tree)  # noqa: E731
    with pytest.raises(ValueError, match=r"no in_specs .* argument \[0\]\['a'\] of"):
        workers.spmd(fn)(x)
    workers.spmd(fn, in_specs=P())(x)  # as told
    mean = workers.spmd(fn, in_specs=workers.spec)(x)["a"]
    np.testing.assert_allclose(mean, np.broadcast_to([3, 4], mean.shape))


@both_places
def test_workers_that_read_their_own_rows_are_not_refused(place):
    workers = PLACES[place](4)

    def fn(table):
        row = table[primitives.axis_index(AXIS)]
        return jax.lax.pmean(row, AXIS), table

    mean, table = workers.spmd(fn)(jnp.arange(8.0).reshape(4, 2))
    np.testing.assert_allclose(mean, [3, 4])
    assert table.shape == (4, 2)
