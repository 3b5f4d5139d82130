"""Workers on the user's own mesh, and train steps written for jax.jit."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import bagua_jax
from bagua_jax import Workers, primitives
from bagua_jax.algorithms import (
    bytegrad,
    decentralized,
    gradient_allreduce,
    one_bit_adam,
)

WIDTH, HIDDEN, ROWS, STEPS = 8, 1000, 24, 3  # 8,000 parameters: several buckets
SGD = optax.sgd(0.01, momentum=0.9)
SPECS = {"in": P(None, "model"), "out": P("model")}


def grid(kind, shape=(2, 3), names=("model", "data")):
    """The workers' axis last, and another one before it."""
    devices = np.array(jax.devices()[: np.prod(shape)]).reshape(shape)
    return Mesh(devices, names, axis_types=(AxisType[kind],) * len(shape))


def params():
    rng = np.random.default_rng(1)
    draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)  # noqa: E731
    return {"in": draw(WIDTH, HIDDEN), "out": draw(HIDDEN) / HIDDEN}


def batches():
    rng = np.random.default_rng(2)
    draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)  # noqa: E731
    return [(draw(ROWS, WIDTH), draw(ROWS)) for _ in range(STEPS)]


def loss_fn(p, x, y):
    return jnp.mean((jnp.tanh(x @ p["in"]) @ p["out"] - y) ** 2)


def plain():
    """The one-device program on whole batches."""
    p, state = params(), SGD.init(params())
    take = jax.jit(jax.value_and_grad(loss_fn))
    for x, y in batches():
        loss, grads = take(p, x, y)
        updates, state = SGD.update(grads, state)
        p = optax.apply_updates(p, updates)
    return p, float(loss)


def place(mesh, tree, specs):
    move = lambda x, spec: jax.device_put(x, NamedSharding(mesh, spec))  # noqa: E731
    return jax.tree.map(move, tree, specs)


def train_step(tx):
    def step(state, batch):
        p, opt_state = state
        loss, grads = bagua_jax.value_and_grad(loss_fn, "data")(p, *batch)
        updates, opt_state = tx.update(grads, opt_state, p)
        return (optax.apply_updates(p, updates), opt_state), {"loss": loss}

    return step


def run(mesh, step, state):
    for batch in batches():
        state, out = step(state, place(mesh, batch, (P("data"), P("data"))))
    return state, float(out["loss"])


@pytest.mark.parametrize("within", ["plain", "set_mesh"])
@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_exact_averages_give_the_plain_program_s_numbers(kind, sharded, within):
    mesh = grid(kind)
    specs = SPECS if sharded else {"in": P(), "out": P()}
    expected, expected_loss = plain()
    around = jax.set_mesh(mesh) if within == "set_mesh" else contextlib.nullcontext()
    with around:
        exchange = gradient_allreduce(axis_name="data")
        if sharded:
            exchange = bagua_jax.sharded(exchange, SPECS, num_shards=2)
        tx = optax.chain(exchange, SGD)
        start = place(mesh, params(), specs)
        init = lambda p: (p, tx.init(p))  # noqa: E731
        decorate = bagua_jax.data_parallel(
            mesh, axis="data", init=init if sharded else None
        )
        step = decorate(train_step(tx))
        state = step.init(start) if sharded else init(start)
        (p, _), loss = run(mesh, step, state)
    assert abs(loss - expected_loss) < 1e-5
    assert step.loop.promoted == ()
    for leaf in p:
        np.testing.assert_allclose(p[leaf], expected[leaf], rtol=0, atol=2e-6)
        assert np.abs(expected[leaf] - params()[leaf]).max() > 1e-4
        assert p[leaf].sharding.mesh == mesh
        assert p[leaf].sharding.spec == specs[leaf]


@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_an_eager_state_gets_the_axis_of_workers_it_lacks(kind):
    mesh = grid(kind)
    tx = optax.chain(bytegrad(axis_name="data", error_feedback="both"), SGD)
    step = bagua_jax.data_parallel(mesh, axis="data")(train_step(tx))
    start = place(mesh, params(), {"in": P(), "out": P()})
    eager = start, tx.init(start)
    state, _ = run(mesh, step, eager)
    assert state[1][0].error.worker["in"].shape == (3, WIDTH, HIDDEN)
    assert set(step.loop.promoted) >= {"[1][0].error.worker['in']"}
    expected, _ = plain()
    np.testing.assert_allclose(state[0]["in"], expected["in"], rtol=0, atol=1e-2)
    again, _ = run(mesh, step, eager)  # the same function, from the start
    np.testing.assert_array_equal(again[0]["in"], state[0]["in"])


def test_a_gossip_keeps_a_model_for_each_worker():
    mesh = grid("Auto", (4,), ("data",))
    tx = optax.chain(SGD, decentralized(axis_name="data"))
    step = bagua_jax.data_parallel(mesh, axis="data")(train_step(tx))
    start = place(mesh, params(), {"in": P(), "out": P()})
    state, _ = run(mesh, step, (start, tx.init(start)))
    assert state[0]["in"].shape == (4, WIDTH, HIDDEN)
    assert step.loop.average(state)[0]["in"].shape == (WIDTH, HIDDEN)
    found = bagua_jax.Workers.on(mesh, "data")
    assert step.workers == found and found.num_workers == 4


def test_a_state_that_must_be_declared_is_made_by_init():
    mesh = grid("Auto", (4,), ("data",))
    tx = one_bit_adam(1e-3, axis_name="data", warmup_steps=2)
    step = bagua_jax.data_parallel(mesh, axis="data")(train_step(tx))
    start = place(mesh, params(), {"in": P(), "out": P()})
    with pytest.raises(ValueError, match=r"data_parallel: .*init=lambda params"):
        run(mesh, step, (start, tx.init(start)))
    init = lambda p: (p, tx.init(p))  # noqa: E731
    step = bagua_jax.data_parallel(mesh, axis="data", init=init)(train_step(tx))
    with pytest.raises(ValueError, match=r"must be made by step.init"):
        run(mesh, step, (start, tx.init(start)))
    (p, _), loss = run(mesh, step, step.init(start))
    assert np.isfinite(loss) and p["in"].shape == (WIDTH, HIDDEN)


def test_a_decorated_step_goes_into_a_scan():
    mesh = grid("Auto")
    tx = optax.chain(gradient_allreduce(axis_name="data"), SGD)
    step = bagua_jax.data_parallel(mesh, axis="data")(train_step(tx))
    stacked = jax.tree.map(lambda *x: np.stack(x), *batches())
    start = jax.tree.map(jnp.asarray, params())
    scanned = jax.jit(lambda state, xs: jax.lax.scan(step, state, xs))
    (p, _), out = scanned((start, tx.init(start)), stacked)
    expected, loss = plain()
    np.testing.assert_allclose(p["in"], expected["in"], rtol=0, atol=2e-6)
    assert abs(float(out["loss"][-1]) - loss) < 1e-5


def test_the_first_error_names_the_decorator():
    tx = gradient_allreduce(axis_name="data")
    with pytest.raises(NameError, match=r"data_parallel\(mesh, axis='data'\)"):
        jax.jit(tx.update)(params(), tx.init(params()))


@pytest.mark.parametrize("axis", ["workers", ("data", "node"), 3])
def test_an_axis_that_the_mesh_lacks_is_refused(axis):
    with pytest.raises(ValueError, match=r"Workers\.on: axis_name must be one of"):
        bagua_jax.data_parallel(grid("Auto"), axis=axis)


def test_workers_stand_along_their_axis_in_any_order(devices):
    workers = Workers.on(
        grid("Explicit", (2, 2, 2), ("local", "model", "node")), "node"
    )
    assert workers.num_workers == 2 and workers.own.tolist() == [0, 1]
    pair = Workers.on(
        grid("Auto", (2, 2, 2), ("local", "model", "node")), ("node", "local")
    )
    assert pair.shape == (2, 2) and pair.own.tolist() == [0, 1, 2, 3]
    index = pair.spmd(lambda: primitives.axis_index(("node", "local")))()
    np.testing.assert_array_equal(index, np.arange(4))
    first = {d.id: k for k, d in enumerate(jax.devices())}
    shards = sorted(index.addressable_shards, key=lambda s: s.index[0].start or 0)
    standing = {(s.index[0].start or 0, first[s.device.id] % 2) for s in shards}
    assert standing == {(0, 0), (1, 0), (2, 1), (3, 1)}  # node is the last axis


# --- a mesh in context ----------------------------------------------------------------

MESHES = {
    "its own": lambda: Workers.devices(2).mesh,
    "another name": lambda: grid("Auto", (2,), ("data",)),
    "another size": lambda: grid("Auto", (4,), ("data",)),
    "explicit": lambda: grid("Explicit", (2,), ("data",)),
    "explicit, its name": lambda: grid("Explicit", (2,), ("workers",)),
    "explicit, another size": lambda: grid("Explicit", (4,), ("data",)),
}


@pytest.mark.parametrize("name", MESHES)
@pytest.mark.parametrize("make", [Workers.simulate, Workers.devices])
def test_workers_run_under_any_mesh(make, name):
    """And with arrays that were made under it."""
    workers, mesh = make(2), MESHES[name]()

    def mean(x):
        return primitives.c_fp_s(x, axis_name="workers")

    before = workers.spmd(mean, in_specs=workers.spec)
    plain_x = jnp.arange(4.0).reshape(2, 2)
    np.testing.assert_array_equal(before(plain_x), [1, 2])
    with jax.set_mesh(mesh):
        x = jnp.arange(4.0).reshape(2, 2)
        program = workers.spmd(mean, in_specs=workers.spec)
        for run, given in ((before, plain_x), (program, x), (program, x)):
            np.testing.assert_array_equal(run(given), [1, 2])
        assert workers.specs(mean, x, in_specs=workers.spec) == P()
        program.lower(x).compile()
    fresh = workers.spmd(mean, in_specs=workers.spec)
    np.testing.assert_array_equal(fresh(x), [1, 2])
