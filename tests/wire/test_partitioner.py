"""What the partitioner adds is named, and told apart from what the source asks for."""

import jax
import jax.numpy as jnp
import optax
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import bagua_jax
from bagua_jax import Workers, wire
from bagua_jax.algorithms import bytegrad


def test_collectives_that_nobody_wrote():
    workers = Workers.devices(8)
    rows = NamedSharding(workers.mesh, P("workers"))
    x = jax.ShapeDtypeStruct((8, 100), jnp.float32, sharding=rows)
    lowered = jax.jit(lambda x: (x * 2).sum(0)).lower(x)
    assert wire.intended(lowered).collectives == ()
    compared = wire.compare(lowered, lowered.compile())
    assert compared.differences == {"added": 2 * 400 * 7 / 8}


def test_a_reshard_before_shard_map():
    workers = Workers.devices(8)
    columns = NamedSharding(workers.mesh, P(None, "workers"))
    x = jax.ShapeDtypeStruct((8, 800), jnp.float32, sharding=columns)
    mean = workers.spmd(
        lambda x: jax.lax.pmean(x, workers.axis_name), in_specs=workers.spec
    )
    lowered = mean.lower(x)
    compared = wire.compare(lowered, lowered.compile())
    same, added = 2 * 3200 * 7 / 8, 3200 * 7 / 8
    assert compared.intended.bytes_per_worker == same
    assert compared.differences == {"added": added}
    assert {c.kind for c in compared.compiled.collectives} == {
        "all-reduce",
        "all-to-all",
    }


@pytest.fixture
def hybrid():
    """A step of four workers of two devices each, parameters sharded over the two."""
    workers = Workers.devices(4, shards={"model": 2})
    specs = {"in": P(None, "model"), "out": P("model", None)}

    def lowered(exchange):
        tx = optax.chain(exchange, optax.sgd(0.1))

        def init():
            params = {"in": jnp.ones((16, 64)), "out": jnp.ones((64, 16))}
            return params, tx.init(params)

        def step(state, x):
            params, opt_state = state
            local = bagua_jax.worker_local(params, "workers")
            grads = jax.grad(
                lambda p: jnp.mean((jnp.tanh(x @ p["in"]) @ p["out"]) ** 2)
            )(local)
            updates, opt_state = tx.update(grads, opt_state, params)
            return optax.apply_updates(params, updates), opt_state

        params, opt_state = workers.spmd(init)()
        placed = {k: NamedSharding(workers.mesh, s) for k, s in specs.items()}
        state = (jax.device_put(params, placed), opt_state)
        program = workers.spmd(step, in_specs=(workers.specs(init), workers.spec))
        return program.lower(state, jnp.ones((4, 8, 16)))

    return specs, lowered


def test_workers_of_several_devices(hybrid):
    """The relaxation sends shards as intended; tensor parallelism adds its own sums."""
    specs, lower = hybrid
    exchange = bytegrad(axis_name="workers")
    lowered = lower(bagua_jax.sharded(exchange, specs, num_shards=2))
    compared = wire.compare(lowered, lowered.compile())
    shard = 2 * 16 * 64 // 2  # elements of both matrices on one device
    row = shard / 4 + 8  # u8 codes of a quarter, and their range
    assert compared.intended.by_kind() == {
        "all-to-all": (1, 3 * row),
        "all-gather": (1, 3 * row),
    }
    kept = [change for change in compared.changes if not change.differences]
    assert sum(len(change.compiled) for change in kept) == 2
    (added,) = [c.compiled[0] for c in compared.changes if c.differences == ("added",)]
    assert (added.kind, added.group_size) == ("all-reduce", 2)  # over "model"


def test_what_is_left_to_the_partitioner_is_refused(hybrid):
    _, lower = hybrid
    with pytest.raises(ValueError, match="2 parts of each array.*left to the partit"):
        wire.intended(lower(bytegrad(axis_name="workers")))
