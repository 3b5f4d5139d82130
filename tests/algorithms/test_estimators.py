"""MARINA, Adasum, CocktailSGD, traces of delays: oracles, reductions, invariants."""

import functools
import inspect

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P
from oracles import buckets, estimators
from oracles.algorithms import trajectory
from oracles.gradient_side import topk as oracle_topk

import bagua_jax
from bagua_jax import Workers, compressors, topologies
from bagua_jax import algorithms as alg
from bagua_jax.compressors import identity, qsgd, randk, topk

AXIS = "workers"
N, STEPS, LR = 4, 50, 0.1
TREE = {"a": np.zeros((3, 5)), "none": None, "s": np.zeros(()), "v": np.zeros(7)}
SIZES = [leaf.size for leaf in jax.tree.leaves(TREE)]
D = sum(SIZES)
WHOLE, SPLIT = 10 * 2**20, 40
ONE_BUCKET = [np.asarray(b) for b in buckets.indices(SIZES, WHOLE)]
TWO_BUCKETS = [np.asarray(b) for b in buckets.indices(SIZES, SPLIT)]
LEAVES = np.split(np.arange(D), np.cumsum(SIZES)[:-1])


def per_worker(step, n=N):
    """Run a function of one worker on n of them, compiled."""
    return jax.jit(jax.vmap(step, axis_name=AXIS, axis_size=n))


def claims_unbiased(compressor):
    """Run MARINA with a deterministic compressor; its equations do not mind."""
    facts = compressor.facts._replace(unbiased=True, omega=lambda d: 1.5, delta=None)
    return compressor._replace(facts=facts)


# --- trajectories --------------------------------------------------------------------


@functools.cache
def problem():
    """Draw H_i, b_i and noise_i(t), which scales gradients: a sample is its noise."""
    rng = np.random.default_rng(12)
    root = rng.standard_normal((N, D, D)) / np.sqrt(D)
    return {
        "h": (0.2 * np.eye(D) + 0.4 * root @ np.swapaxes(root, 1, 2)).astype("f4"),
        "b": rng.standard_normal((N, D)).astype("f4"),
        "noise": 0.3 * rng.standard_normal((N, STEPS, D)).astype("f4"),
        "x0": rng.standard_normal(D).astype("f4"),
    }


def gradient(x, t):
    p = problem()
    noise = p["noise"][:, t]
    return (1 + noise) * (p["h"].astype(float) @ (x - p["b"])[..., None])[..., 0]


def run_jax(tx, place, own_params=False, resample=False):
    """Record every worker's parameters after each step, [T, n, D]."""
    p = problem()
    unravel = jax.flatten_util.ravel_pytree(jax.tree.map(jnp.float32, TREE))[1]

    def run(data):
        params = unravel(jnp.asarray(p["x0"]))
        params = bagua_jax.worker_local(params, AXIS) if own_params else params

        def step(carry, noise):
            params, state = carry

            def gradient_fn(params):
                x, _ = jax.flatten_util.ravel_pytree(params)
                return unravel((1 + noise) * (data["h"] @ (x - data["b"])))

            grads = gradient_fn(bagua_jax.worker_local(params, AXIS))
            extra = {"gradient_fn": gradient_fn} if resample else {}
            updates, state = tx.update(grads, state, params, **extra)
            params = optax.apply_updates(params, updates)
            return (params, state), jax.flatten_util.ravel_pytree(params)[0]

        return jax.lax.scan(step, (params, tx.init(params)), data["noise"])[1]

    data = {name: p[name] for name in ("h", "b", "noise")}
    if place == "vmap":
        return np.moveaxis(np.asarray(per_worker(run)(data)), 0, 1)
    xs = np.asarray(Workers.devices(N).spmd(run, in_specs=P(AXIS))(data))
    assert xs.ndim == 2 + own_params, "replicas are proved equal"
    return np.moveaxis(xs, 0, 1) if own_params else np.repeat(xs[:, None], N, 1)


def coins(probability, steps=STEPS, seed=0):
    """Draw the steps on which MARINA sends whole gradients: the first, and by coin."""

    def draw(t):
        key = jax.random.fold_in(jax.random.key(seed), t)
        return jax.random.bernoulli(jax.random.split(key)[0], probability)

    return np.asarray(jax.vmap(draw)(jnp.arange(steps))) | (np.arange(steps) == 0)


def masks(ratio, split, seed=0):
    """Draw CocktailSGD's places inside an owner's part of each bucket, [T][bucket]."""
    lengths = [-(-len(b) // N) for b in split]

    def draw(t):
        key = jax.random.fold_in(jax.random.key(seed), t)
        for b, d in enumerate(lengths):
            bits = jax.random.bits(jax.random.split(jax.random.fold_in(key, b))[0], d)
            yield jax.lax.top_k(bits, int(np.ceil(ratio * d)))[1]

    drawn = jax.vmap(lambda t: list(draw(t)))(jnp.arange(STEPS))
    return list(zip(*map(np.asarray, drawn), strict=True))


def sgd(tx):
    return optax.chain(tx, optax.sgd(LR))


def weights(tx):
    return optax.chain(optax.sgd(LR), tx)


two = {"axis_name": AXIS, "bucket_bytes": SPLIT}
one = {"axis_name": AXIS}
ROWS_OF_DELAYS = [[0, 3, 1, 2], [2, 0, 0, 3], [1, 1, 4, 0]]
PAIRS = topologies.random_matching(N, period=5, seed=3, pairs=1)

TRAJECTORIES = {
    "marina": (
        lambda: sgd(alg.marina(claims_unbiased(topk(0.2)), **two, probability=0.3)),
        lambda: estimators.marina(LR, TWO_BUCKETS, oracle_topk(0.2), coins(0.3)),
    ),
    "marina on the same sample": (
        lambda: sgd(alg.marina(claims_unbiased(topk(0.2)), **two, probability=0.3)),
        lambda: estimators.marina(
            LR, TWO_BUCKETS, oracle_topk(0.2), coins(0.3), gradient
        ),
    ),
    "adasum": (
        lambda: sgd(alg.adasum(**two)),
        lambda: estimators.adasum(LR, LEAVES),
    ),
    "adasum of the whole": (
        lambda: sgd(alg.adasum(**two, scope="whole")),
        lambda: estimators.adasum(LR, [np.arange(D)]),
    ),
    "cocktail_sgd": (
        lambda: weights(alg.cocktail_sgd(topk(0.4), **two, ratio=0.6)),
        lambda: estimators.cocktail_sgd(
            LR, TWO_BUCKETS, masks(0.6, TWO_BUCKETS), oracle_topk(0.4), 0
        ),
    ),
    "cocktail_sgd one step late": (
        lambda: weights(alg.cocktail_sgd(topk(0.4), **one, ratio=0.6, staleness=1)),
        lambda: estimators.cocktail_sgd(
            LR, ONE_BUCKET, masks(0.6, ONE_BUCKET), oracle_topk(0.4), 1
        ),
    ),
    "delays by step": (
        lambda: sgd(alg.delayed_gradients(**two, staleness=(0, 3, 1))),
        lambda: estimators.delayed_gradients(LR, [[0] * N, [3] * N, [1] * N]),
    ),
    "delays by worker": (
        lambda: sgd(alg.delayed_gradients(**two, staleness=np.array(ROWS_OF_DELAYS))),
        lambda: estimators.delayed_gradients(LR, ROWS_OF_DELAYS),
    ),
    # AD-PSGD's event: a random pair averages, gradients are those taken before.
    "random pairs": (
        lambda: weights(alg.decentralized(**one, topology=PAIRS, combine="before")),
        lambda: estimators.pair_gossip(LR, PAIRS.mixing_matrix),
    ),
}


@pytest.mark.parametrize("name", TRAJECTORIES)
def test_trajectory_of_the_oracle(name):
    """In float32, freely: choices at near-ties would show, and there are none."""
    make_tx, make_oracle = TRAJECTORIES[name]
    x0 = np.tile(problem()["x0"].astype(float), (N, 1))
    expected = trajectory(make_oracle(), x0, gradient, STEPS)[1:]
    assert np.isfinite(expected).all() and np.ptp(expected, axis=0).max() > 0.5
    for place in ("vmap", "devices"):
        got = run_jax(
            make_tx(),
            place,
            own_params=name.startswith(("cocktail", "random")),
            resample=name.endswith("sample"),
        )
        np.testing.assert_allclose(got, expected, rtol=0, atol=2e-5, err_msg=place)


# --- shared helpers ------------------------------------------------------------------


def gradients(t, n=N, d=37):
    return jax.random.normal(jax.random.key(100 + t), (n, d))


def feed(tx, steps, n=N, d=37):
    """Feed gradients; give all updates [T, n, d], the mean gradients and the state."""
    state = jax.vmap(tx.init, axis_name=AXIS)(jnp.zeros((n, d)))
    step = per_worker(tx.update, n)
    out, means = [], []
    for t in range(steps):
        g = gradients(t, n, d)
        u, state = step(g, state)
        out.append(np.asarray(u))
        means.append(np.asarray(g, float).mean(0))
    return np.stack(out), np.stack(means), state


def once(tx, grads):
    """Return the update of each worker on the first step."""
    grads = jnp.asarray(grads, jnp.float32)
    step = lambda g: tx.update(g, tx.init(g), g)[0]  # noqa: E731
    return np.asarray(per_worker(step, len(grads))(grads))


def on_nodes(step):
    """Map a function of one device to nodes of devices, [node, local, ...]."""
    mapped = jax.vmap(jax.vmap(step, axis_name="local"), axis_name="node")
    return jax.jit(mapped)


# --- marina --------------------------------------------------------------------------


class TestMarina:
    def test_one_coin_for_all_workers_and_exact_means_when_it_falls(self):
        steps, p = 40, 0.3
        out, means, _ = feed(alg.marina(randk(0.3), **one, probability=p), steps)
        np.testing.assert_array_equal(out, np.broadcast_to(out[:, :1], out.shape))
        exact = np.abs(out[:, 0] - means).max(1) < 1e-6
        np.testing.assert_array_equal(exact, coins(p, steps))
        assert exact[0] and 0.1 < exact.mean() < 0.5

    def test_dense_steps_only_are_gradient_allreduce(self):
        out, _, _ = feed(alg.marina(qsgd(2), **one, probability=1.0), 5)
        expected, _, _ = feed(alg.gradient_allreduce(**one), 5)
        np.testing.assert_array_equal(out, expected)

    def test_with_identity_it_is_the_exact_mean(self):
        out, means, _ = feed(alg.marina(identity(), **one, probability=1e-6), 20)
        np.testing.assert_allclose(out[:, 0], means, atol=5e-6)

    def test_moments(self):
        """E|y|^2 of y = x - x*, from the linear map of (E|y|^2, E|e|^2, E<y, e>)."""
        n, d, runs, steps = 2, 4, 4000, 8
        h, lr, p, omega = 1.0, 0.3, 0.3, 1.0
        targets = jnp.float32(np.random.default_rng(5).standard_normal((n, d)))
        tx = alg.marina(randk(0.5, mask="private"), **one, probability=p)

        def run(key, target):
            x = 2 + targets.mean(0)

            def step(carry, _):
                x, state = carry
                updates, state = tx.update(h * (x - target), state, x)
                x = x - lr * updates
                return (x, state), jnp.sum((x - targets.mean(0)) ** 2)

            state = tx.init(x)._replace(key=key)
            return jax.lax.scan(step, (x, state), length=steps)[1]

        keys = jax.random.split(jax.random.key(1), runs)
        workers = jax.vmap(run, in_axes=(None, 0), axis_name=AXIS)
        measured = np.asarray(
            jax.jit(jax.vmap(workers, in_axes=(0, None)))(keys, targets)
        )[:, 0].astype(float)

        a = lr * h
        yy, ee, ye = 4.0 * d, 0.0, 0.0  # the first step is dense: e is 0
        for t in range(steps):
            uu = ee + 2 * h * ye + h**2 * yy
            yy, ee, ye = (
                (1 - a) ** 2 * yy - 2 * lr * (1 - a) * ye + lr**2 * ee,
                (1 - p) * (ee + omega / n * a**2 * uu),
                (1 - p) * ((1 - a) * ye - lr * ee),
            )
            error = measured[:, t].std() / np.sqrt(runs)
            assert abs(measured[:, t].mean() - yy) < 4.5 * error + 1e-6, t
        assert yy > 1.5 * 4.0 * d * (1 - a) ** (2 * steps), "noise counts"

    def test_gradient_fn_needs_params(self):
        tx = alg.marina(qsgd(2), **one, probability=0.5)
        step = lambda g: tx.update(g, tx.init(g), gradient_fn=lambda x: x)  # noqa: E731
        with pytest.raises(ValueError, match="marina: gradient_fn .* params is None"):
            per_worker(step)(jnp.ones((N, 3)))

    def test_gradient_fn_must_not_sum_over_the_workers(self):
        tx = alg.marina(qsgd(2), **one, probability=0.5)

        def step(g):
            x = jnp.zeros(3)
            return tx.update(g, tx.init(x), x, gradient_fn=lambda _: jnp.ones(3))[0]

        with pytest.raises(ValueError, match="marina's gradient_fn: .* already summed"):
            Workers.devices(N).spmd(step, in_specs=P(AXIS))(jnp.ones((N, 3)))


# --- adasum --------------------------------------------------------------------------


class TestAdasum:
    def test_orthogonal_gradients_are_added(self):
        g = np.diag([1.0, -2.0, 3.0, 7.0, 0.1, 5.0, 1e-6, 1e6])
        out = once(alg.adasum(**one), g)
        np.testing.assert_array_equal(out, np.tile(np.float32(np.diag(g)), (8, 1)))

    def test_parallel_gradients_are_averaged(self):
        """Opposite ones, too; powers of two, so that it is exact."""
        base = np.float32([1, -3, 0.5, 2])
        step = per_worker(lambda g: alg.adasum(**one).update(g, optax.EmptyState())[0])
        for scales in ([1, 1, 1, 1], [1, -2, 4, -8], [2, 8, 0.5, 1]):
            out = step(np.float32(np.outer(scales, base)))
            expected = np.float32(np.mean(scales)) * base
            np.testing.assert_array_equal(out, np.tile(expected, (4, 1)))

    def test_the_norm_between_the_extremes(self):
        """(1 - 3/4 rho^2) (|a|^2 + |b|^2) + 1/2 rho^3 |a| |b|."""
        step = per_worker(lambda g: alg.adasum(**one).update(g, optax.EmptyState())[0])
        rng = np.random.default_rng(0)
        for angle in np.linspace(0, np.pi, 7):
            u, v = np.linalg.qr(rng.standard_normal((9, 2)))[0].T
            a, b = 1.5 * u, 0.4 * (np.cos(angle) * u + np.sin(angle) * v)
            pair = np.float32([a, b, 0 * a, 0 * b])  # zeros leave a pair as it is
            squared = (np.asarray(step(pair)[0], float) ** 2).sum()
            rho, aa, bb = np.cos(angle), 1.5**2, 0.4**2
            norm = (1 - 0.75 * rho**2) * (aa + bb) + 0.5 * rho**3 * np.sqrt(aa * bb)
            assert squared == pytest.approx(norm, rel=1e-5)

    def test_every_scope_has_its_own_angle_and_buckets_change_nothing(self):
        """Leaf by leaf one is added and one averaged; as one vector neither."""
        g = {"cross": jnp.eye(2, 3), "same": jnp.ones((2, 5))}

        def run(**options):
            tx = alg.adasum(**one, **options)
            out = per_worker(lambda g: tx.update(g, tx.init(g))[0], 2)(g)
            return {name: np.asarray(x) for name, x in out.items()}

        leaves, whole = run(), run(scope="whole")
        np.testing.assert_array_equal(leaves["cross"], [[1, 1, 0]] * 2)
        np.testing.assert_array_equal(leaves["same"], np.ones((2, 5)))
        share = 1 - 5 / (2 * 6)
        np.testing.assert_allclose(whole["cross"], share * leaves["cross"], rtol=1e-6)
        np.testing.assert_allclose(whole["same"], 2 * share, rtol=1e-6)
        for name, x in run(scope="whole", bucket_bytes=1).items():
            np.testing.assert_array_equal(x, whole[name])

    def test_zeros_are_nobodys_direction(self):
        np.testing.assert_array_equal(once(alg.adasum(**one), np.zeros((4, 3))), 0)

    @pytest.mark.parametrize("n", [3, 6])
    def test_other_numbers_of_workers_are_refused(self, n):
        with pytest.raises(ValueError, match=f"adasum: .* power of two, got n={n}: "):
            once(alg.adasum(**one), np.ones((n, 3)))

    @pytest.mark.parametrize("scope", ["leaf", "whole"])
    def test_nodes_combine_their_means(self, scope):
        g = np.random.default_rng(3).standard_normal((4, 2, 11)).astype("f4")
        tx = alg.adasum(axis_name=("node", "local"), scope=scope)
        out = on_nodes(lambda g: tx.update(g, tx.init(g))[0])(g)
        expected = estimators.tree_of_pairs(g.astype(float).mean(1))
        np.testing.assert_allclose(out, np.broadcast_to(expected, out.shape), atol=2e-6)


# --- cocktail_sgd --------------------------------------------------------------------


class TestCocktailSGD:
    def walk(self, tx, steps=12, d=37, n=(N,)):
        """Apply updates; give params [n, d], the mean of all updates and the state."""
        mapped = per_worker if len(n) == 1 else on_nodes
        x = jnp.zeros((*n, d))
        state = mapped(tx.init)(x)
        step = mapped(lambda u, s, x: tx.update(u, s, x))
        due = np.zeros(d)
        for t in range(steps):
            u = gradients(t, int(np.prod(n)), d).reshape(*n, d)
            updates, state = step(u, state, x)
            x, due = x + updates, due + np.asarray(u, float).reshape(-1, d).mean(0)
        return np.asarray(x), due, state

    def test_without_relaxations_it_averages_at_every_step(self):
        x, _, _ = self.walk(alg.cocktail_sgd(compressor=identity(), **one, ratio=1.0))
        expected, _, _ = self.walk(alg.local_sgd(**one, local_steps=1))
        np.testing.assert_allclose(x, expected, atol=5e-6)

    @pytest.mark.parametrize("staleness", [0, 1])
    def test_the_shared_copy_is_equal_everywhere_and_nothing_is_lost(self, staleness):
        """With the default chain; bit for bit."""
        tx = alg.cocktail_sgd(**one, staleness=staleness)
        x, due, state = self.walk(tx)
        shared = np.asarray(state.shared)
        for copy in shared:
            assert copy.tobytes() == shared[0].tobytes()
        assert (np.ptp(x, axis=0).max() > 0.5) == bool(staleness)
        held = np.asarray(state.error.worker, float).mean(0)
        held = held + np.asarray(state.error.owner, float).sum(0)
        if staleness:
            held = held + np.asarray(state.pending[0], float)
        assert np.abs(held).max() > 0.5
        np.testing.assert_allclose(shared[0] + held, due, atol=2e-5)

    def test_nothing_is_lost_between_nodes(self):
        tx = alg.cocktail_sgd(topk(0.5), axis_name=("node", "local"), ratio=0.3)
        x, due, state = self.walk(tx, n=(2, 2))
        # Each device holds its shard of its node's error: devices add, nodes average.
        held = np.asarray(state.error.worker, float).sum(1).mean(0)
        held = held + np.asarray(state.error.owner, float).sum((0, 1))
        np.testing.assert_allclose(x[0, 0] + held, due, atol=2e-5)

    def test_the_mask_is_common_and_the_same_in_every_part(self):
        """40 entries are 4 parts of 10, of which 3 places move; then time others."""
        tx = alg.cocktail_sgd(identity(), **one, ratio=0.3)
        first, _, state = self.walk(tx, steps=1, d=40)
        places = (first[0] != 0).reshape(N, 10)
        assert (places == places[0]).all() and places[0].sum() == 3
        later = np.asarray(self.walk(tx, steps=2, d=40)[0])[0] != first[0]
        assert (later.reshape(N, 10)[0] != places[0]).any()
        sent = np.asarray(state.error.worker) == 0
        assert (sent == (first[0] != 0)).all()

    def test_what_is_not_finite_travels_outside_the_mask_too(self):
        tx = alg.cocktail_sgd(identity(), **one, ratio=0.1)
        step = per_worker(lambda u: tx.update(u, tx.init(u), u)[0])
        for place in range(3):
            u = jnp.zeros((N, 40)).at[1, place].set(jnp.nan)
            assert np.isnan(step(u)).any(1).all()


# --- delayed_gradients ---------------------------------------------------------------


class TestTracesOfDelays:
    @pytest.mark.parametrize("trace", [[2, 2], [[2] * N]], ids=["steps", "workers"])
    def test_a_constant_trace_is_a_fixed_staleness(self, trace):
        out, _, _ = feed(alg.delayed_gradients(**one, staleness=trace), 6)
        expected, _, _ = feed(alg.delayed_gradients(**one, staleness=2), 6)
        np.testing.assert_allclose(out, expected, atol=2e-7)

    @pytest.mark.parametrize("trace", [[0, 0], [[0] * N]], ids=["steps", "workers"])
    def test_no_delay_is_gradient_allreduce(self, trace):
        out, _, state = feed(alg.delayed_gradients(**one, staleness=trace), 4)
        expected, _, _ = feed(alg.gradient_allreduce(**one), 4)
        np.testing.assert_array_equal(out, expected)
        assert state.pending == ()

    def test_devices_of_nodes_have_delays_in_row_major_order(self):
        tx = alg.delayed_gradients(
            axis_name=("node", "local"), staleness=[[1, 0, 0, 0]]
        )
        g = jnp.array([[8.0, 0.0], [4.0, 0.0]])

        def two_steps(g):
            first, state = tx.update(g, tx.init(g))
            return first, tx.update(g, state)[0]

        first, second = on_nodes(two_steps)(g)
        np.testing.assert_array_equal(first, np.full((2, 2), 1.0))
        np.testing.assert_array_equal(second, np.full((2, 2), 3.0))

    def test_rows_for_other_workers_are_refused(self):
        tx = alg.delayed_gradients(**one, staleness=[[0, 1, 2]])
        with pytest.raises(ValueError, match="3 entries, and the axis 'workers' has 4"):
            once(tx, np.ones((N, 3)))


def test_defaults_of_cocktail_sgd_are_a_chain():
    parameters = inspect.signature(alg.cocktail_sgd).parameters
    expected = compressors.chain(topk(0.5), compressors.blockwise(8, 128))
    assert parameters["compressor"].default.facts.name == expected.facts.name
