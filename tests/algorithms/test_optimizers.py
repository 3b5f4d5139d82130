"""Optimizers that communicate: their oracles, reductions and invariants."""

import functools
import importlib

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P
from oracles import buckets
from oracles import optimizers as oracles
from oracles import topologies as matrices
from oracles.algorithms import trajectory
from scipy import fft

import bagua_jax
from bagua_jax import Workers, topologies
from bagua_jax import algorithms as alg
from bagua_jax.compressors import SparsePayload, dct, identity

AXIS = "workers"
N, STEPS, LR = 4, 60, 0.03
TREE = {
    "a": np.zeros((6, 4)),
    "b": np.zeros((3, 5)),
    "none": None,
    "s": np.zeros(()),
    "v": np.zeros(7),
}
LEAVES = jax.tree.leaves(TREE)
SHAPES = [leaf.shape for leaf in LEAVES]
SIZES = [leaf.size for leaf in LEAVES]
ENDS = np.cumsum(SIZES)
D = int(ENDS[-1])
POSITIONS = [slice(end - size, end) for end, size in zip(ENDS, SIZES, strict=True)]
WHOLE, SPLIT = 10 * 2**20, 100


def per_worker(step, n=N):
    """Run a function of one worker on n of them, compiled."""
    return jax.jit(jax.vmap(step, axis_name=AXIS, axis_size=n))


# --- trajectories --------------------------------------------------------------------


@functools.cache
def problem():
    """Draw H_i, b_i and noise: gradients H_i (x_i - b_i) + noise_i(t)."""
    rng = np.random.default_rng(5)
    root = rng.standard_normal((N, D, D)) / np.sqrt(D)
    return {
        "h": (0.2 * np.eye(D) + 0.4 * root @ np.swapaxes(root, 1, 2)).astype("f4"),
        "b": (1 + rng.standard_normal((N, D))).astype("f4"),
        "noise": 0.3 * rng.standard_normal((N, STEPS, D)).astype("f4"),
        "x0": rng.standard_normal(D).astype("f4"),
    }


def gradient(x, t):
    p = problem()
    return (p["h"].astype(float) @ (x - p["b"])[..., None])[..., 0] + p["noise"][:, t]


def run_jax(tx, place, own_params):
    """Record every worker's parameters after each step, [T, n, d]."""
    p = problem()
    _, unravel = jax.flatten_util.ravel_pytree(jax.tree.map(jnp.float32, TREE))

    def run(data):
        params = unravel(jnp.asarray(p["x0"]))
        if own_params:
            params = bagua_jax.worker_local(params, AXIS)

        def step(carry, noise):
            params, state = carry
            local = bagua_jax.worker_local(params, AXIS)
            x, _ = jax.flatten_util.ravel_pytree(local)
            grads = unravel(data["h"] @ (x - data["b"]) + noise)
            updates, state = tx.update(grads, state, params)
            params = optax.apply_updates(params, updates)
            return (params, state), jax.flatten_util.ravel_pytree(params)[0]

        return jax.lax.scan(step, (params, tx.init(params)), data["noise"])[1]

    data = {name: p[name] for name in ("h", "b", "noise")}
    if place == "vmap":
        return np.asarray(jnp.moveaxis(per_worker(run)(data), 0, 1))
    xs = np.asarray(Workers.devices(N).spmd(run, in_specs=P(AXIS))(data))
    if own_params:
        return np.moveaxis(xs, 0, 1)
    assert xs.ndim == 2, "replicas are proved equal"
    return np.broadcast_to(xs[:, None], (STEPS, N, D))


WHOLE_BUCKET, BUCKETS = buckets.indices(SIZES, WHOLE), buckets.indices(SIZES, SPLIT)
axis, split = {"axis_name": AXIS}, {"axis_name": AXIS, "bucket_bytes": SPLIT}
LIMITS = (10.0, 0.01, 0.9, 4.0, 0.5, 0.1)
SCHEDULE = optax.linear_schedule(LR, LR / 3, STEPS)


def falling(t):
    return LR * (1 - 2 / 3 * t / STEPS)


def one_peer(n, t):
    return matrices.one_peer_exponential(n, t)


TRAJECTORIES = {
    "zero_one_adam": (
        lambda: alg.zero_one_adam(
            SCHEDULE,
            **split,
            var_freeze_step=20,
            var_update_scaler=3,
            local_step_scaler=12,
            local_step_clipper=3,
            b2=0.9,
            eps=1e-6,
        ),
        lambda: oracles.zero_one_adam(
            falling,
            BUCKETS,
            oracles.variance_steps(3, 20),
            oracles.sync_steps(20, 12, 3, STEPS),
            0.9,
            0.9,
            1e-6,
        ),
    ),
    "one_bit_lamb": (
        lambda: alg.one_bit_lamb(
            LR, **split, warmup_steps=20, b2=0.9, eps=1e-6, weight_decay=0.1
        ),
        lambda: oracles.one_bit_lamb(
            LR, BUCKETS, POSITIONS, 20, 0.9, 0.9, 1e-6, 0.1, LIMITS
        ),
    ),
    "one_bit_lamb-exact": (
        lambda: alg.one_bit_lamb(
            LR, **axis, warmup_steps=20, b2=0.95, compressor=identity(), max_coeff=0.5
        ),
        lambda: oracles.one_bit_lamb(
            LR,
            WHOLE_BUCKET,
            POSITIONS,
            20,
            0.9,
            0.95,
            1e-8,
            0.0,
            (0.5, *LIMITS[1:]),
            lambda x: x,
        ),
    ),
    "demo": (
        lambda: alg.demo(LR, **axis, decay=0.9, topk=3, chunk=4, weight_decay=0.05),
        lambda: oracles.demo(LR, POSITIONS, SHAPES, 0.9, 3, 4, 0.05),
    ),
    "gradient_tracking": (
        lambda: alg.gradient_tracking(0.2, **split),
        lambda: oracles.gradient_tracking(0.2, matrices.ring),
    ),
    "gradient_tracking-rotating": (
        lambda: alg.gradient_tracking(0.2, **axis, topology="one_peer_exponential"),
        lambda: oracles.gradient_tracking(0.2, one_peer),
    ),
}


@pytest.mark.parametrize("name", TRAJECTORIES)
def test_trajectory_of_the_oracle(name):
    """In float32, freely: choices at near-ties would show, and there are none."""
    make_tx, make_oracle = TRAJECTORIES[name]
    x0 = np.tile(problem()["x0"].astype(float), (N, 1))
    expected = trajectory(make_oracle(), x0, gradient, STEPS)[1:]
    assert np.isfinite(expected).all() and np.ptp(expected, axis=0).max() > 0.5
    own = alg.REGISTRY[name.split("-")[0]].own_params
    for place in ("vmap", "devices"):
        got = run_jax(make_tx(), place, own)
        np.testing.assert_allclose(got, expected, rtol=0, atol=2e-5, err_msg=place)


# --- shared helpers ------------------------------------------------------------------


def gradients(t, n=N, d=37):
    rng = np.random.default_rng([7, t])
    return (rng.standard_normal((n, d)) + np.linspace(-1, 1, d)).astype("f4")


def feed(tx, steps, make=gradients, n=N, d=37):
    """Feed gradients from common params; give params [T + 1, n, d] and all states."""
    x = jnp.ones((n, d))
    state = jax.vmap(tx.init, axis_name=AXIS)(x)
    step = per_worker(tx.update, n)
    xs, states = [x], [state]
    for t in range(steps):
        updates, state = step(make(t, n, d), state, x)
        x = x + updates
        xs.append(x)
        states.append(state)
    return np.asarray(jnp.stack(xs)), states


def float64(x):
    return np.asarray(x, float)


# --- zero_one_adam -------------------------------------------------------------------


class TestZeroOneAdam:
    def test_schedules(self):
        """The closed forms are the loops that the paper describes."""
        module = importlib.import_module("bagua_jax.algorithms.zero_one_adam")
        t = jnp.arange(600)
        for kappa in (1, 3, 16):
            found = np.flatnonzero(module._is_refresh(t, kappa))
            assert found.tolist() == oracles.variance_steps(kappa, 600)
        for start, scaler, clipper in ((1, 100, 1), (20, 50, 12), (9, 7, 16)):
            found = np.flatnonzero(module._is_sync(t, start, scaler, clipper))
            assert found.tolist() == oracles.sync_steps(start, scaler, clipper, 600)
            assert np.diff(found).max() == clipper
            assert found[:start].tolist() == list(range(start))

    def test_everything_at_every_step_is_adam_with_a_late_variance(self):
        tx = alg.zero_one_adam(
            LR,
            **axis,
            var_freeze_step=100,
            var_update_scaler=100,
            local_step_clipper=1,
            b2=0.9,
            compressor=identity(),
        )
        xs, _ = feed(tx, 12)
        x, m, v = np.ones(37), np.zeros(37), np.zeros(37)
        for t in range(12):
            g = float64(gradients(t)).mean(0)
            m = 0.9 * m + 0.1 * g
            x = x - (LR * m / (np.sqrt(v) + 1e-8) if t else 0)
            v = 0.9 * v + 0.1 * g**2
            np.testing.assert_allclose(xs[t + 1], np.tile(x, (N, 1)), atol=2e-5)

    def test_synchronizations(self):
        """Workers part between them, and meet bit for bit; no momentum is lost."""
        start, steps = 6, 30
        tx = alg.zero_one_adam(
            LR,
            **axis,
            var_freeze_step=start,
            local_step_scaler=4,
            local_step_clipper=4,
            b2=0.5,
        )
        xs, states = feed(tx, steps)
        syncs = oracles.sync_steps(start, 4, 4, steps)
        sent = due = np.zeros(37)
        for t in range(steps):
            old, new = states[t], states[t + 1]
            np.testing.assert_array_equal(new.anchor[0], new.anchor[1])
            assert np.ptp(new.nu, axis=0).max() == 0
            if t not in syncs:
                assert np.ptp(xs[t + 1], axis=0).max() > 1e-3
                np.testing.assert_array_equal(new.anchor, old.anchor)
                continue
            np.testing.assert_allclose(xs[t + 1], new.anchor, rtol=2e-7, atol=1e-7)
            for zero in (new.moved, new.rates, np.ptp(new.mu, axis=0)):
                np.testing.assert_array_equal(zero, 0)
            m = 0.9 * float64(old.mu) + 0.1 * float64(gradients(t))
            due = due + (float64(old.moved) + LR * m).mean(0)
            sent = sent + float64(new.mu[0]) * (float(old.rates[0]) + LR)
        error = states[-1].error
        held = float64(error.worker).mean(0) + float64(error.owner).sum(0)
        assert np.abs(held).max() > 1e-2
        np.testing.assert_allclose(sent + held, due, atol=1e-5)
        frozen = [states[t].nu for t in (start, steps)]
        np.testing.assert_array_equal(*frozen)

    def test_a_learning_rate_that_starts_at_zero(self):
        """Nothing moves, and the momentum waits for a rate to be sent with."""
        rate = lambda t: jnp.where(t < 2, 0.0, LR)  # noqa: E731
        xs, states = feed(alg.zero_one_adam(rate, **axis), 4)
        np.testing.assert_array_equal(xs[2], 1)
        assert np.ptp(states[2].mu, axis=0).max() > 0.01
        assert np.isfinite(xs).all() and np.abs(xs[3] - 1).max() > 0.01

    def test_entries_without_a_gradient_stand(self):
        alive = (np.arange(37) != 5).astype("f4")
        make = lambda t, n, d: alive * gradients(t, n, d)  # noqa: E731
        xs, _ = feed(alg.zero_one_adam(LR, **axis), 5, make)
        np.testing.assert_array_equal(xs[:, :, 5], 1)
        assert np.abs(xs[-1, :, :5] - 1).min() > 1e-3


# --- one_bit_lamb --------------------------------------------------------------------


class TestOneBitLamb:
    def test_the_warm_up_is_lamb(self):
        """Of optax, which has no bounds on the ratio."""
        tx = alg.one_bit_lamb(
            LR, **axis, weight_decay=0.1, max_coeff=1e9, min_coeff=0.0, eps=1e-6
        )
        xs, _ = feed(tx, 8)
        lamb = optax.lamb(LR, weight_decay=0.1)
        x = jnp.ones(37)
        state, update = lamb.init(x), jax.jit(lamb.update)
        for t in range(8):
            u, state = update(gradients(t).mean(0), state, x)
            x = x + u
            np.testing.assert_allclose(xs[t + 1], jnp.tile(x, (N, 1)), atol=2e-6)

    def test_one_scale_fits_layers_of_all_sizes(self):
        """What compression leaves of a layer's momentum is relative to its size."""

        def step(noise, carry):
            x, state = carry
            grads = {"big": noise[:20], "small": 1e-3 * noise[20:]}
            updates, state = tx.update(grads, state, x)
            return optax.apply_updates(x, updates), state

        tx = alg.one_bit_lamb(LR, **axis, warmup_steps=5)
        x = {"big": jnp.ones((N, 20)), "small": jnp.ones((N, 20))}
        carry = x, jax.vmap(tx.init, axis_name=AXIS)(x)
        run = per_worker(step)
        for t in range(12):
            carry = run(gradients(t, d=40), carry)
        mu, error = carry[1].mu, carry[1].error.worker
        ratio = np.abs(mu["small"]).mean() / np.abs(mu["big"]).mean()
        assert 0.3e-3 < ratio < 3e-3
        ratio = np.abs(error["small"]).mean() / np.abs(error["big"]).mean()
        assert 1 / 3 < ratio < 3

    def test_the_factor_follows_the_gradients_within_its_limits(self):
        """It grows as gradients shrink, in steps of a tenth at most, and stops."""
        make = lambda t, n, d: gradients(t, n, d) * np.float32(1 if t < 10 else 1e-3)  # noqa: E731
        tx = alg.one_bit_lamb(LR, **axis, warmup_steps=10, b2=0.5, factor_max=2.0)
        _, states = feed(tx, 40, make)
        firsts = [jax.tree.leaves(state.factor)[0] for state in states]
        factor = np.stack(firsts)[:, 0]  # of worker 0
        np.testing.assert_array_equal(factor[:11], 1)
        change = factor[1:] / factor[:-1] - 1
        assert np.abs(change).max() <= 0.1 + 1e-6 and change.max() > 0.09
        assert factor.max() == 2 and factor[-1] == 2

    def test_params_are_needed(self):
        tx = alg.one_bit_lamb(LR, **axis)
        with pytest.raises(ValueError, match="one_bit_lamb: .* params is None"):
            jax.vmap(lambda g: tx.update(g, tx.init(g)), axis_name=AXIS)(jnp.ones(4))


# --- demo ----------------------------------------------------------------------------


class TestDeMo:
    @pytest.mark.parametrize("shape", [(), (13,), (30,), (6, 10), (2, 9, 4), (0, 3)])
    def test_blocks(self, shape):
        """Transforms are scipy's of each block; blocks tile the array."""
        x = np.random.default_rng(0).standard_normal(shape).astype("f4")
        y = np.asarray(dct.block_dct(x, 5))
        h, w = dct.block_sides(shape, 5)
        assert h <= 5 and w <= 5 and (shape != (6, 10) or (h, w) == (3, 5))
        rows = dct.split_blocks(jnp.asarray(x), 5)
        turned = np.asarray(dct.split_blocks(jnp.asarray(y), 5))
        expected = [fft.dctn(r.reshape(h, w), norm="ortho").ravel() for r in rows]
        np.testing.assert_allclose(
            turned, np.reshape(expected, turned.shape), atol=1e-6
        )
        np.testing.assert_array_equal(dct.join_blocks(rows, shape, 5), x)
        np.testing.assert_allclose(dct.block_dct(y, 5, inverse=True), x, atol=1e-6)

    def test_the_mean_is_over_senders(self):
        rng = np.random.default_rng(1)
        n, rows, width, k = 5, 3, 8, 3
        chosen = np.stack([rng.permutation(width)[:k] for _ in range(n * rows)])
        values = rng.standard_normal((n, rows * k)).astype("f4")
        total, count = np.zeros((rows, width)), np.zeros((rows, width))
        for (i, r, j), place in np.ndenumerate(chosen.reshape(n, rows, k)):
            total[r, place] += values[i, r * k + j]
            count[r, place] += 1
        assert count.min() == 0 and count.max() > 1
        payload = SparsePayload(values, chosen.reshape(n, -1).astype(np.uint8))
        module = importlib.import_module("bagua_jax.algorithms.demo")
        mean = module._mean_over_senders(
            jax.tree.map(jnp.asarray, payload), rows, width
        )
        np.testing.assert_allclose(mean, total / np.maximum(count, 1), atol=1e-6)

    @pytest.mark.parametrize("names", [AXIS, ("node", "local")])
    def test_whole_blocks_are_the_sign_of_the_mean_gradient(self, names):
        """Nothing stays; a node sends what its devices have on average."""
        tx = alg.demo(0.5, axis_name=names, topk=10**6)
        g = jax.random.normal(jax.random.key(0), (4, 6, 5))
        g = g.at[:, 1].set(0)
        step = lambda g: tx.update(g, tx.init(g))  # noqa: E731
        if names == AXIS:
            out, state = per_worker(step)(g)
        else:
            inner = jax.vmap(step, axis_name="local")
            outer = jax.jit(jax.vmap(inner, axis_name="node"))
            out, state = outer(g.reshape(2, 2, 6, 5))
        expected = -0.5 * np.sign(np.asarray(g).mean(0))
        close = np.abs(np.asarray(g).mean(0)) > 1e-6
        got = np.asarray(out).reshape(4, 6, 5)
        np.testing.assert_array_equal(got[:, close], np.tile(expected[close], (4, 1)))
        np.testing.assert_array_equal(state.momentum, 0)

    def test_devices_of_a_node_share_its_message(self):
        """Seven bytes on two devices: parts of four, whose filling is dropped."""
        mean = jnp.arange(15, dtype=jnp.uint8).reshape(3, 5)
        payload = {"a": mean, "b": jnp.float16([1.5, -2, 3])}

        def run(node):
            message = {"a": node["a"][:4], "b": node["b"][None], "c": node["a"][4:]}
            names = ("node", "local")
            return bagua_jax.primitives.gather_payloads(message, axis_name=names)

        inner = jax.vmap(run, axis_name="local", axis_size=2, in_axes=None)
        got = jax.vmap(inner, axis_name="node")(payload)
        for name, expected in (("a", mean[:, :4]), ("b", payload["b"][:, None])):
            everywhere = jnp.broadcast_to(expected, (3, 2, *expected.shape))
            np.testing.assert_array_equal(got[name], everywhere)

    def test_a_gradient_of_zero_moves_nothing(self):
        xs, _ = feed(alg.demo(LR, **axis), 2, lambda t, n, d: jnp.zeros((n, d)))
        np.testing.assert_array_equal(xs, 1)

    def test_what_is_not_sent_stays(self):
        """Momenta sum to the gradients' transforms less what was sent, per worker."""
        tx = alg.demo(1.0, **axis, decay=0.0, topk=2, chunk=5)
        _, states = feed(tx, 1, d=35)
        spectrum = jax.vmap(lambda g: dct.block_dct(g, 5))(gradients(0, d=35))
        left = float64(states[1].momentum).reshape(N, 7, 5)
        spectrum = float64(spectrum).reshape(N, 7, 5)
        sent = left == 0
        np.testing.assert_array_equal(sent.sum(-1), 2)
        np.testing.assert_allclose(left[~sent], spectrum[~sent], atol=1e-6)
        assert np.abs(spectrum[sent]).min() > 0


# --- gradient_tracking ---------------------------------------------------------------


class TestGradientTracking:
    def test_means(self):
        """The estimates' mean is the gradients', and moves the models' mean."""
        tx = alg.gradient_tracking(LR, **axis)
        xs, states = feed(tx, 20, n=5)
        for t in range(20):
            g = float64(gradients(t, n=5)).mean(0)
            moved = float64(xs[t + 1] - xs[t]).mean(0)
            np.testing.assert_allclose(moved, -LR * g, atol=2e-6)
            mean = float64(states[t + 1].correction).mean(0)
            np.testing.assert_allclose(mean, 0, atol=2e-6)
        assert np.ptp(xs[-1], axis=0).max() > 0.05

    def test_the_first_step_is_a_mixed_gradient_step(self):
        xs, _ = feed(alg.gradient_tracking(LR, **axis), 1)
        expected = 1 - LR * matrices.ring(N) @ float64(gradients(0))
        np.testing.assert_allclose(xs[1], expected, atol=1e-6)

    @pytest.mark.parametrize("topology", ["ring", "one_peer_exponential"])
    def test_exact_with_a_constant_step(self, topology):
        """Where workers differ in curvature and optimum; plain gossip is far off."""
        rng = np.random.default_rng(2)
        h = rng.uniform(0.3, 1.5, (8, 6)).astype("f4")
        b = rng.standard_normal((8, 6)).astype("f4")
        best = (h * b).sum(0) / h.sum(0)

        def end(tx):
            def run(h, b):
                def step(carry, _):
                    x, state = carry
                    updates, state = tx.update(h * (x - b), state, x)
                    return (x + updates, state), None

                x = jnp.zeros(6)
                return jax.lax.scan(step, (x, tx.init(x)), length=400)[0][0]

            return np.abs(np.asarray(per_worker(run, 8)(h, b)) - best).max()

        assert end(alg.gradient_tracking(0.3, **axis, topology=topology)) < 1e-5
        gossip = alg.decentralized(**axis, topology=topology)
        assert end(optax.chain(optax.sgd(0.3), gossip)) > 0.1

    def test_rate(self):
        """Of equal curvatures: the slowest root of the modes' polynomials."""
        n, gh = 8, 0.5
        roots = [
            np.abs(np.roots([1, -z * (2 - gh), z * (z - gh)])).max()
            for z in np.linalg.eigvalsh(matrices.ring(n))[:-1]
        ]
        slowest = max(*roots, 1 - gh)
        tx = alg.gradient_tracking(gh, **axis)
        b = jax.random.normal(jax.random.key(3), (n, 4))

        def run(b):
            def step(carry, _):
                x, state = carry
                updates, state = tx.update(x - b, state, x)
                return (x + updates, state), x

            x = jnp.zeros(4)
            return jax.lax.scan(step, (x, tx.init(x)), length=31)[1]

        x = float64(per_worker(run, n)(b))
        distance = np.linalg.norm(x - float64(b).mean(0), axis=(0, 2))
        rate = (distance[30] / distance[10]) ** (1 / 20)
        assert rate == pytest.approx(slowest, rel=0.03)

    def test_a_directed_graph_that_moves_the_mean_is_refused(self):
        graph = topologies.from_matrix([[0.5, 0], [0.5, 1]], stochastic="column")
        with pytest.raises(ValueError, match="gradient_tracking: rows and columns"):
            alg.gradient_tracking(LR, axis_name=AXIS, topology=graph)
