"""Quantized gossip: its oracle, what it reduces to, and the floor that theory gives."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from oracles import topologies as matrices
from oracles.quantized_gossip import quantized_gossip as oracle

import bagua_jax
from bagua_jax import Workers, compressors, topologies
from bagua_jax.algorithms import decentralized, quantized_gossip

N, D, STEPS, RATE = 4, 5, 60, 0.1
_RNG = np.random.default_rng(5)
START = np.broadcast_to(_RNG.standard_normal(D), (N, D)).astype("f4")
CENTERS = _RNG.standard_normal((N, D)).astype("f4")


def half() -> compressors.Compressor:
    """C(x) = x / 2: not exact, and without ties that compilers decide."""
    whole = compressors.identity()
    return whole._replace(compress=lambda key, x, state: (0.5 * x, state))


def noisy() -> compressors.Compressor:
    """C(x) = x + N(0, 1) for each element."""
    whole = compressors.identity()

    def compress(key, x, state):
        return x + jax.random.normal(key, x.shape), state

    return whole._replace(compress=compress)


def trajectory(workers: Workers, tx) -> np.ndarray:
    """Models before each step and after the last, [T + 1, n, d]."""

    def one_worker(x, center):
        tx_all = optax.chain(optax.sgd(RATE), tx)

        def step(carry, _):
            x, opt = carry
            updates, opt = tx_all.update(x - center, opt, x)
            x = optax.apply_updates(x, updates)
            return (x, opt), x

        x = bagua_jax.worker_local(x, workers.axis_name)
        return jax.lax.scan(step, (x, tx_all.init(x)), length=STEPS)[1]

    mapped = workers.spmd(one_worker, in_specs=workers.spec)
    later = np.moveaxis(np.asarray(mapped(START, CENTERS)), 0, 1)
    return np.concatenate([START[None], later])


@pytest.mark.parametrize("topology", ["ring", "one_peer_exponential"])
def test_oracle_equals_simulation_and_devices(topology):
    tx = quantized_gossip(half(), axis_name="workers", topology=topology)
    matrix = getattr(matrices, topology)
    expected = oracle(
        START, lambda x, t: x - CENTERS, matrix, lambda x: x / 2, RATE, STEPS
    )
    for workers in (Workers.simulate(N), Workers.devices(N)):
        np.testing.assert_allclose(trajectory(workers, tx), expected, atol=1e-6)


def test_without_compression_it_is_gossip_after_the_update():
    plain = quantized_gossip(compressors.identity(), axis_name="workers")
    after = decentralized(axis_name="workers", combine="after")
    ours, theirs = (trajectory(Workers.simulate(N), tx) for tx in (plain, after))
    np.testing.assert_allclose(ours, theirs, atol=1e-6)


def test_consensus_stays_at_the_floor_and_the_mean_walks():
    n, d, steps = 8, 5000, 60
    tx = quantized_gossip(noisy(), axis_name="workers")

    def one_worker(x):
        def step(carry, _):
            x, opt = carry
            updates, opt = tx.update(jnp.zeros_like(x), opt, x)
            return (optax.apply_updates(x, updates), opt), None

        return jax.lax.scan(step, (x, tx.init(x)), length=steps)[0][0]

    x = np.asarray(jax.vmap(one_worker, axis_name="workers")(jnp.zeros((n, d))))
    mean = x.mean(0)
    eigenvalues = np.sort(topologies.ring(n).eigenvalues().real)[:-1]
    floor = np.sum(eigenvalues**2 / (1 - eigenvalues**2))
    assert np.sum((x - mean) ** 2) / d == pytest.approx(floor, rel=0.05)
    assert np.mean(mean**2) == pytest.approx(steps / n, rel=0.08)
