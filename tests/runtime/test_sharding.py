"""Relaxations over workers, parameters sharded over a second axis that GSPMD has."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import bagua_jax
from bagua_jax import Workers, wire
from bagua_jax.algorithms import bytegrad, gradient_allreduce, local_sgd, powersgd

NUM_WORKERS, NUM_SHARDS, WIDTH = 4, 2, 16
SPECS = {"in": P(None, "model"), "bias": P("model"), "out": P("model"), "last": P()}
SIZES = {"in": 2 * WIDTH**2, "bias": 2 * WIDTH, "out": 2 * WIDTH**2, "last": WIDTH}
PART = (sum(SIZES.values()) - SIZES["last"]) // NUM_SHARDS  # elements of a shard


def init_params(key):
    first, second = jax.random.split(key)
    return {
        "in": jax.random.normal(first, (WIDTH, 2 * WIDTH)) / 4,
        "bias": jnp.zeros(2 * WIDTH),
        "out": jax.random.normal(second, (2 * WIDTH, WIDTH)) / 4,
        "last": jnp.zeros(WIDTH),
    }


def loss_fn(params, batch):
    """A column-parallel layer and a row-parallel one, as in tensor parallelism."""
    hidden = jnp.tanh(batch @ params["in"] + params["bias"][None])
    return jnp.mean(
        (hidden @ params["out"] + params["last"][None] - jnp.sin(batch)) ** 2
    )


def gradient_side(transform):
    return optax.chain(transform, optax.sgd(0.3, momentum=0.9)), False


def sharded(tx):
    return bagua_jax.sharded(tx, SPECS, num_shards=NUM_SHARDS)


CASES = {
    "gradient_allreduce": lambda wrap: gradient_side(
        wrap(gradient_allreduce(axis_name="workers"))
    ),
    "bytegrad": lambda wrap: gradient_side(
        wrap(bytegrad(axis_name="workers", error_feedback="both"))
    ),
    "powersgd": lambda wrap: gradient_side(wrap(powersgd(axis_name="workers", rank=1))),
    "local_sgd": lambda wrap: (
        optax.chain(
            optax.sgd(0.3, momentum=0.9),
            wrap(local_sgd(axis_name="workers", local_steps=3)),
        ),
        True,
    ),
}
LINEAR = ("gradient_allreduce", "local_sgd")


def train(workers, tx, own_params, steps=7):
    """Final parameters, stacked over workers, and what a step sends."""

    def init(key):
        params = init_params(key)
        if own_params:
            params = bagua_jax.worker_local(params, "workers")
        return params, tx.init(params)

    def step(state, batch):
        params, opt_state = state
        local = bagua_jax.worker_local(params, "workers")
        grads = jax.grad(loss_fn)(local, batch)
        updates, opt_state = tx.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state

    key = jax.random.key(0)
    specs = workers.specs(init, key)
    params, opt_state = workers.spmd(init)(key)
    if workers.mesh is not None and "model" in workers.mesh.shape:
        lead = ("workers",) if own_params else ()
        placed = {
            k: NamedSharding(workers.mesh, P(*lead, *s)) for k, s in SPECS.items()
        }
        params = jax.device_put(params, placed)
    run = workers.spmd(step, in_specs=(specs, workers.spec))
    batches = jax.random.normal(jax.random.key(1), (steps, NUM_WORKERS, 8, WIDTH))
    state = (params, opt_state)
    program = run.lower(state, batches[0]).compile()
    for batch in batches:
        state = run(state, batch)
    stacked = jax.tree.map(
        lambda x: np.broadcast_to(x, (NUM_WORKERS, *x.shape[own_params:])), state[0]
    )
    return state, stacked, program


def on_mesh():
    return Workers.devices(NUM_WORKERS, shards={"model": NUM_SHARDS})


def assert_near(found, expected, tolerance):
    for name, x in expected.items():
        np.testing.assert_allclose(found[name], x, rtol=0, atol=tolerance, err_msg=name)


@pytest.mark.parametrize("name", CASES)
def test_numbers_equal_those_of_the_shards_taken_one_by_one(name):
    """The same transform without a model axis does shard after shard."""
    _, found, _ = train(on_mesh(), *CASES[name](sharded))
    _, expected, _ = train(Workers.simulate(NUM_WORKERS), *CASES[name](sharded))
    # The loss adds up over the model axis in another order; a code of 8 bits may flip.
    assert_near(found, expected, 2e-3 if name == "bytegrad" else 2e-6)


@pytest.mark.parametrize("name", LINEAR)
def test_numbers_equal_those_without_sharding(name):
    _, found, _ = train(on_mesh(), *CASES[name](sharded))
    _, expected, _ = train(Workers.devices(NUM_WORKERS), *CASES[name](lambda tx: tx))
    assert_near(found, expected, 2e-6)


def test_powersgd_left_to_gspmd_keeps_its_numbers_and_gathers_no_matrix():
    tx, own = CASES["powersgd"](lambda tx: tx)
    _, found, program = train(on_mesh(), tx, own)
    _, expected, _ = train(Workers.devices(NUM_WORKERS), tx, own)
    assert_near(found, expected, 2e-5)
    largest = max(c.operand_bytes for c in wire.count(program).collectives)
    assert largest < 4 * SIZES["in"] / NUM_SHARDS


def over_workers(program):
    """The collectives between workers; the others are the model's own."""
    found = []
    for c in wire.count(program).collectives:
        groups = {tuple(device // NUM_SHARDS for device in group) for group in c.groups}
        crosses = any(len(set(group)) > 1 for group in groups)
        assert crosses or c.operand_bytes <= 4 * 8 * WIDTH, f"extra: {c}"  # activations
        if crosses:
            found.append(c)
    return found


@pytest.mark.parametrize("name", CASES)
def test_each_device_exchanges_its_shard_and_nothing_is_gathered(name):
    state, _, program = train(on_mesh(), *CASES[name](sharded), steps=1)
    own = CASES[name](sharded)[1]
    for key, leaf in state[0].items():
        expected = P(*("workers",) * own, *SPECS[key])
        assert leaf.sharding.is_equivalent_to(
            NamedSharding(leaf.sharding.mesh, expected), leaf.ndim
        )
    sent = sum(c.weight * c.bytes_sent for c in over_workers(program))
    share = (NUM_WORKERS - 1) / NUM_WORKERS
    exact = 2 * share * 4 * (PART + SIZES["last"])
    if name == "gradient_allreduce":
        assert sent == pytest.approx(exact)
    elif name == "local_sgd":
        assert sent == pytest.approx(exact / 3)
    elif name == "bytegrad":
        kinds = {c.kind for c in over_workers(program)}
        dtypes = {c.dtype for c in over_workers(program)}
        assert kinds == {"all-to-all", "all-gather"} and dtypes == {"u8"}
        ranges = 2 * 2 * share * NUM_WORKERS * 8  # two buckets, two phases
        padded = sum(-(-d // NUM_WORKERS) * NUM_WORKERS for d in (PART, SIZES["last"]))
        assert sent == pytest.approx(2 * share * padded + ranges)
    else:
        assert sent < 0.5 * exact


def test_a_nan_on_one_shard_of_one_worker_reaches_that_shard_everywhere():
    workers = on_mesh()
    tx = sharded(bytegrad(axis_name="workers"))
    grads = jax.tree.map(
        lambda x: jnp.stack([x] * NUM_WORKERS), init_params(jax.random.key(0))
    )
    grads["in"] = grads["in"].at[2, 0, 0].set(jnp.nan)
    found = workers.spmd(lambda g: tx.update(g, tx.init(g))[0], in_specs=workers.spec)(
        grads
    )
    assert np.isnan(found["in"][0, 0])
    assert np.isfinite(found["last"]).all()


@pytest.mark.parametrize(
    ("specs", "num_shards", "words"),
    [
        ({"w": P("workers")}, 2, "'model' once"),
        ({"w": P("model", "model")}, 2, "'model' once"),
        ({"w": P(None, None, "model")}, 2, "'model' once"),
        ({"w": P("model")}, 4, "4 divides"),
        (P("model"), 0, "num_shards must be"),
    ],
)
def test_refusals(specs, num_shards, words):
    with pytest.raises(ValueError, match=words):
        tx = bagua_jax.sharded(
            gradient_allreduce(axis_name="workers"), specs, num_shards=num_shards
        )
        tx.init({"w": jnp.zeros((6, 4))})


def test_another_size_of_the_axis_is_refused():
    workers = on_mesh()
    tx = bagua_jax.sharded(gradient_allreduce(axis_name="workers"), SPECS, num_shards=1)
    grads = jax.tree.map(
        lambda x: jnp.stack([x] * NUM_WORKERS), init_params(jax.random.key(0))
    )
    step = workers.spmd(lambda g: tx.update(g, tx.init(g))[0], in_specs=workers.spec)
    with pytest.raises(ValueError, match="axis 'model', which is 2; got 1"):
        step(grads)


def test_workers_of_several_devices():
    workers = on_mesh()
    assert workers.num_workers == NUM_WORKERS and workers.axes == ("workers",)
    assert dict(workers.mesh.shape) == {"workers": NUM_WORKERS, "model": NUM_SHARDS}
    assert Workers.devices(shards={"model": 2}).num_workers == len(jax.devices()) // 2
    with pytest.raises(ValueError, match="shards must be"):
        Workers.devices(2, shards={"workers": 2})
    with pytest.raises(ValueError, match="8 workers x 2 model need 16 devices"):
        Workers.devices(8, shards={"model": 2})
