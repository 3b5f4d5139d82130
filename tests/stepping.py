"""Weight-side transforms at work: on a noisy problem, and on given updates."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import PartitionSpec as P
from oracles.algorithms import Sgd

import bagua_jax
from bagua_jax import Workers, compressors

AXIS = "workers"
STEPS = 50
ATOL = 1e-5  # states are of order 1; orders of addition differ for 50 steps
SGD = Sgd(0.1, momentum=0.5)
SHAPES = {"block": (3, 5), "bias": (), "vector": (7,)}


def half() -> compressors.Compressor:
    """C(x) = x / 2: contractive, not exact, and without ties that compilers decide."""
    whole = compressors.identity()
    return whole._replace(
        compress=lambda key, x, state: (0.5 * x, state),
        facts=whole.facts._replace(
            name="half", unbiased=False, omega=None, delta=lambda d: 0.75
        ),
    )


def halve(x):
    return np.float32(0.5) * x


# --- a noisy heterogeneous problem, run here and there --------------------------------


class Problem:
    """Gradients H_i (x_i - b_i) + noise_i(t), with everything different everywhere."""

    def __init__(self, n, steps=STEPS, seed=11):
        rng = np.random.default_rng([seed, n])
        start = {k: rng.standard_normal(s).astype("f4") for k, s in SHAPES.items()}
        flat, self.unravel = jax.flatten_util.ravel_pytree(start)
        self.n, d = n, flat.size
        self.x0 = np.broadcast_to(np.asarray(flat), (n, d))
        root = rng.standard_normal((n, d, d)) / np.sqrt(d)
        self.h = (0.2 * np.eye(d) + 0.3 * root @ np.swapaxes(root, 1, 2)).astype("f4")
        self.b = rng.standard_normal((n, d)).astype("f4")
        self.noise = 0.3 * rng.standard_normal((n, steps, d)).astype("f4")

    def gradient(self, x, t):
        return (self.h @ (x - self.b)[..., None])[..., 0] + self.noise[:, t]


@functools.cache
def problem(n):
    return Problem(n)


def trajectory(place, tx, problem):
    """Parameters before each step and after the last, [T + 1, n, d]."""

    def one_worker(x0, h, b, noise):
        x = bagua_jax.worker_local(problem.unravel(x0), AXIS)
        tx_all = optax.chain(optax.sgd(SGD.lr, momentum=SGD.momentum), tx)

        def step(carry, noise):
            x, opt = carry
            flat = jax.flatten_util.ravel_pytree(x)[0]
            grads = problem.unravel(h @ (flat - b) + noise)
            updates, opt = tx_all.update(grads, opt, x)
            x = optax.apply_updates(x, updates)
            return (x, opt), jax.flatten_util.ravel_pytree(x)[0]

        return jax.lax.scan(step, (x, tx_all.init(x)), noise)[1]

    data = (problem.h, problem.b, problem.noise)
    if place == "vmap":
        mapped = jax.jit(jax.vmap(one_worker, in_axes=(None, 0, 0, 0), axis_name=AXIS))
    else:
        specs = (P(), P(AXIS), P(AXIS), P(AXIS))
        mapped = Workers.devices(problem.n).spmd(one_worker, in_specs=specs)
    later = np.moveaxis(np.asarray(mapped(jnp.asarray(problem.x0[0]), *data)), 0, 1)
    return np.concatenate([problem.x0[None], later])


def shares(n, t=0):
    """A directed graph whose columns, not rows, sum to 1: i tells i + 1 and i + 3."""
    del t
    given = np.linspace(0.2, 0.5, n)
    w = np.diag(1 - given)
    for i in range(n):
        w[(i + 1) % n, i] += 0.7 * given[i]
        w[(i + 3) % n, i] += 0.3 * given[i]
    return w


def same(one, other, n=8, atol=ATOL):
    """Two transforms give one trajectory."""
    p = problem(n)
    np.testing.assert_allclose(
        trajectory("vmap", one, p), trajectory("vmap", other, p), rtol=0, atol=atol
    )


def steps_of(tx, n, d, steps, updates=None, x=None, seed=0):
    """Step n workers with given updates [steps, n, d]; states after each, stacked."""
    rng = np.random.default_rng(seed)
    if x is None:
        x = rng.standard_normal((n, d)).astype("f4")
    if updates is None:
        updates = 0.1 * rng.standard_normal((steps, n, d)).astype("f4")

    @jax.jit
    @functools.partial(jax.vmap, axis_name=AXIS, in_axes=(0, 1), out_axes=1)
    def go(x, updates):
        def step(carry, u):
            x, opt = carry
            moves, opt = tx.update(u, opt, x)
            x = x + moves
            return (x, opt), (x, opt)

        return jax.lax.scan(step, (x, tx.init(x)), updates)[1]

    later, states = go(jnp.asarray(x), jnp.asarray(updates))
    return x, updates, np.asarray(later, np.float64), states


def assert_mean_moves_by_mean_update(tx, n=8, d=11, atol=1e-5):
    x, updates, later, _ = steps_of(tx, n, d, 60)
    due = x.mean(0) + np.cumsum(np.asarray(updates, np.float64).mean(1), axis=0)
    np.testing.assert_allclose(later.mean(1), due, rtol=0, atol=atol)


NODES, PER_NODE = 4, 2


def assert_nodes_act_as_workers(make):
    """Their devices agree after every step, and do what one worker with their means."""
    d, steps = 7, 30
    rng = np.random.default_rng(3)
    x = np.repeat(rng.standard_normal((NODES, d)), PER_NODE, axis=0).astype("f4")
    u = 0.1 * rng.standard_normal((steps, NODES, PER_NODE, d)).astype("f4")
    flat = steps_of(make(AXIS), NODES, d, steps, u.mean(2), x[::2])[2]

    pair = ("node", "local")
    workers = Workers.simulate((NODES, PER_NODE), pair)
    tx = make(pair)

    def go(x, updates):
        def step(carry, u):
            x, opt = carry
            moves, opt = tx.update(u, opt, x)
            return (x + moves, opt), x + moves

        return jax.lax.scan(step, (x, tx.init(x)), updates)[1]

    stacked = np.moveaxis(u.reshape(steps, -1, d), 0, 1)
    nested = workers.spmd(go, in_specs=workers.spec)(jnp.asarray(x), stacked)
    nested = np.moveaxis(np.asarray(nested), 1, 0).reshape(steps, NODES, PER_NODE, d)
    for device in range(PER_NODE):
        np.testing.assert_allclose(nested[:, :, device], flat, rtol=0, atol=5e-6)
