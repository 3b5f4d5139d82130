"""Gradient-side algorithms: trajectories of their oracles, reductions, invariants."""

import functools

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P
from oracles import buckets
from oracles import gradient_side as oracles
from oracles.algorithms import trajectory

import bagua_jax
from bagua_jax import Workers, compressors, wire
from bagua_jax import algorithms as alg
from bagua_jax.algorithms.compressed_mean import choose_plan
from bagua_jax.compressors import cast, identity, minmax_uint8, qsgd, randk, sign, topk

AXIS = "workers"
N, STEPS, LR = 4, 50, 0.1
TREE = {
    "a": np.zeros((6, 5)),
    "b": np.zeros((6, 5)),
    "c": np.zeros((2, 3, 4)),
    "none": None,
    "s": np.zeros(()),
    "v": np.zeros(7),
}
SIZES = [leaf.size for leaf in jax.tree.leaves(TREE)]
D = sum(SIZES)
WHOLE, SPLIT = 10 * 2**20, 120


def per_worker(step, n):
    """Run a function of one worker on n of them, compiled."""
    return jax.jit(jax.vmap(step, axis_name=AXIS, axis_size=n))


# --- trajectories --------------------------------------------------------------------


@functools.cache
def problem():
    """Draw H_i, b_i and noise: gradients H_i (x - b_i) + noise_i(t)."""
    rng = np.random.default_rng(11)
    root = rng.standard_normal((N, D, D)) / np.sqrt(D)
    return {
        "h": (0.2 * np.eye(D) + 0.4 * root @ np.swapaxes(root, 1, 2)).astype("f4"),
        "b": rng.standard_normal((N, D)).astype("f4"),
        "noise": 0.3 * rng.standard_normal((N, STEPS, D)).astype("f4"),
        "x0": rng.standard_normal(D).astype("f4"),
    }


def gradient(x, t):
    p = problem()
    return (p["h"].astype(float) @ (x - p["b"])[..., None])[..., 0] + p["noise"][:, t]


def run_jax(tx, place):
    """Record the parameters before each step and after the last, [T + 1, D]."""
    p = problem()
    _, unravel = jax.flatten_util.ravel_pytree(jax.tree.map(jnp.float32, TREE))

    def run(data):
        params = unravel(jnp.asarray(p["x0"]))

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
        xs = per_worker(run, N)(data)
        np.testing.assert_array_equal(xs, np.broadcast_to(xs[:1], xs.shape))
        return np.asarray(xs[0])
    xs = Workers.devices(N).spmd(run, in_specs=P(AXIS))(data)
    assert xs.ndim == 2, "replicas are proved equal"
    return np.asarray(xs)


def low_rank_leaves(rank):
    """List the matrices of TREE with the Q that the algorithm starts from."""
    tx = alg.powersgd(axis_name=AXIS, rank=rank, min_compression=1)
    bases = jax.tree.leaves(tx.init(jax.tree.map(jnp.float32, TREE)).basis)
    ends = np.cumsum(SIZES)
    shapes = [(6, 5), (6, 5), (6, 4)]
    return [
        (np.arange(end - size, end), shape, np.asarray(q))
        for end, size, shape, q in zip(ends, SIZES, shapes, bases, strict=False)
    ]


def sgd(tx):
    return optax.chain(tx, optax.sgd(LR))


def claims_unbiased(compressor):
    """Run DIANA with a deterministic compressor; its equations do not mind."""
    facts = compressor.facts._replace(unbiased=True, omega=lambda d: 1.5, delta=None)
    return compressor._replace(facts=facts)


WHOLE_SPLIT, TWO_SPLIT = buckets.indices(SIZES, WHOLE), buckets.indices(SIZES, SPLIT)
two = {"axis_name": AXIS, "bucket_bytes": SPLIT}
one = {"axis_name": AXIS}

TRAJECTORIES = {
    "compressed_mean-all_gather": (
        lambda: sgd(alg.compressed_mean(topk(0.2), plan="all_gather", **two)),
        lambda: oracles.compressed_mean(
            LR, TWO_SPLIT, oracles.topk(0.2), oracles.gathered
        ),
    ),
    "compressed_mean-scatter_reduce": (
        lambda: sgd(alg.compressed_mean(sign("l1"), **one)),
        lambda: oracles.compressed_mean(
            LR, WHOLE_SPLIT, oracles.sign_l1, oracles.scatter_reduced
        ),
    ),
    "compressed_mean-ring": (
        lambda: sgd(alg.compressed_mean(topk(0.5), plan="ring", **two)),
        lambda: oracles.compressed_mean(
            LR, TWO_SPLIT, oracles.topk(0.5), oracles.ring_reduced
        ),
    ),
    "delayed_gradients": (
        lambda: sgd(alg.delayed_gradients(**two, staleness=3)),
        lambda: oracles.delayed_gradients(LR, 3),
    ),
    "signum": (
        lambda: alg.signum(LR, **two, momentum=0.8, weight_decay=0.05),
        lambda: oracles.signum(LR, 0.8, 0.05),
    ),
    "one_bit_adam": (
        lambda: alg.one_bit_adam(LR, **two, warmup_steps=12, b2=0.9, eps=1e-6),
        lambda: oracles.one_bit_adam(LR, TWO_SPLIT, 12, 0.9, 0.9, 1e-6),
    ),
    "diana": (
        lambda: sgd(alg.diana(claims_unbiased(topk(0.2)), **two)),
        lambda: oracles.diana(LR, TWO_SPLIT, oracles.topk(0.2), 0.4),
    ),
    "ef21": (
        lambda: sgd(alg.ef21(topk(0.2), **two)),
        lambda: oracles.ef21(LR, TWO_SPLIT, oracles.topk(0.2)),
    ),
    "dgc": (
        lambda: sgd(alg.dgc(**two, momentum=0.7, ratio=0.2, clip=5.0)),
        lambda: oracles.dgc(LR, TWO_SPLIT, 0.7, 0.2, 5.0),
    ),
    "powersgd": (
        lambda: sgd(
            alg.powersgd(axis_name=AXIS, rank=1, min_compression=1, warmup_steps=5)
        ),
        lambda: oracles.powersgd(LR, low_rank_leaves(1), 5),
    ),
}


@pytest.mark.parametrize("name", TRAJECTORIES)
def test_trajectory_of_the_oracle(name):
    """In float32, freely: choices at near-ties would show, and there are none."""
    make_tx, make_oracle = TRAJECTORIES[name]
    x0 = np.tile(problem()["x0"].astype(float), (N, 1))
    expected = trajectory(make_oracle(), x0, gradient, STEPS)
    assert np.isfinite(expected).all() and np.ptp(expected, axis=0).max() > 0.5
    np.testing.assert_array_equal(
        expected, np.broadcast_to(expected[:, :1], expected.shape)
    )
    # A power iteration divides by a length that is small now and then; what rounding
    # did to it then stays in the errors.
    atol = 2e-3 if name == "powersgd" else 2e-5
    for place in ("vmap", "devices"):
        got = run_jax(make_tx(), place)
        np.testing.assert_allclose(
            got, expected[1:, 0], rtol=0, atol=atol, err_msg=place
        )


def test_half_precision_is_a_cast_before_an_all_reduce_and_one_after():
    def cast(dtype):
        return optax.stateless_with_tree_map(lambda g, _: g.astype(dtype))

    workers, full = Workers.devices(N), alg.gradient_allreduce(axis_name=AXIS)
    half = optax.chain(cast("float16"), full, cast("float32"))
    grads = np.random.default_rng(0).standard_normal((N, 1000)).astype("f4")
    grads[:, 0] = 60_000  # their sum is no float16

    def program(tx):
        return workers.spmd(lambda g: tx.update(g, tx.init(g))[0], workers.spec)

    got = np.asarray(program(half)(grads))
    rounded = grads.astype("f2").astype("f8")
    assert got.dtype == np.float32 and got[0] == rounded[0, 0]
    np.testing.assert_array_equal(got, got.astype("f2"))
    np.testing.assert_array_less(  # an addition rounds to 11 bits; there are three
        np.abs(got - rounded.mean(0)), 3 * 2.0**-11 * np.abs(rounded).mean(0) + 1e-7
    )
    sent = [
        wire.count(program(tx).lower(grads).compile()).bytes_per_worker
        for tx in (half, full)
    ]
    assert 2 * sent[0] == sent[1] == 2 * (N - 1) / N * 4000


# --- shared helpers ------------------------------------------------------------------


def gradients(t, n=N, d=37):
    return jax.random.normal(jax.random.key(100 + t), (n, d))


def feed(tx, steps, n=N, d=37, make=gradients):
    """Feed gradients; give all updates [T, n, d], the mean gradients and the state."""
    state = jax.vmap(tx.init, axis_name=AXIS)(jnp.zeros((n, d)))
    step = per_worker(tx.update, n)
    out, means = [], []
    for t in range(steps):
        g = make(t, n, d)
        u, state = step(g, state)
        out.append(np.asarray(u, float))
        means.append(np.asarray(g, float).mean(0))
    return np.stack(out), np.stack(means), state


def descend(tx, hessian, targets, steps, start=0.0):
    """Run f_i(x) = h (x - b_i)^2 / 2 from `start`; give x [n, d] and the state."""
    n, d = targets.shape
    x = jnp.full((n, d), start)

    def run(x, b):
        def step(carry, _):
            x, state = carry
            updates, state = tx.update(hessian * (x - b), state, x)
            return (x + updates, state), None

        return jax.lax.scan(step, (x, tx.init(x)), length=steps)[0]

    return per_worker(run, n)(x, targets)


# --- compressed_mean -----------------------------------------------------------------


class TestCompressedMean:
    @pytest.mark.parametrize(
        ("compressor", "plan"),
        [
            (identity(), "linear_sum"),
            (cast("bfloat16"), "scatter_reduce"),  # bits of bf16 as integers
            (randk(0.1, mask="shared"), "linear_sum"),
            (minmax_uint8(), "scatter_reduce"),
            (sign(), "scatter_reduce"),
            (topk(0.5), "scatter_reduce"),
            (topk(0.005), "all_gather"),
            (compressors.powersgd(1), "all_gather"),
        ],
        ids=lambda v: v if isinstance(v, str) else v.facts.name,
    )
    def test_the_plan_follows_from_the_facts(self, compressor, plan):
        assert choose_plan(compressor) == plan

    @pytest.mark.parametrize(
        ("compressor", "options", "text"),
        [
            (sign(), {"plan": "linear_sum"}, "cannot be summed.*Use 'all_gather'"),
            (
                compressors.powersgd(1),
                {"plan": "scatter_reduce"},
                "keeps state for a whole vector.*Use 'all_gather'",
            ),
            (
                compressors.powersgd(1),
                {"plan": "ring"},
                "plan='ring' cuts it in parts. Use 'all_gather'",
            ),
            (
                topk(0.5),
                {"plan": "ring", "error_feedback": "both"},
                "plan='ring' no owner compresses a mean.*Use 'worker'",
            ),
            (
                compressors.powersgd(1),
                {"axis_name": ("node", "local")},
                "a hierarchy .*exchanges shards. Use one axis",
            ),
            (
                topk(0.001),
                {"error_feedback": "both"},
                "no owner compresses a mean.*Use 'worker'",
            ),
            (
                topk(0.01),
                {"plan": "all_gather", "error_feedback": "none"},
                r"0.99 \(1 - delta.*without error feedback.*error_feedback='worker'\.",
            ),
            (
                randk(0.01, mask="private"),
                {"error_feedback": "worker"},
                "below 1.*omega at d=65536.*unsafe=True shows it",
            ),
            (
                sign(),
                {"error_feedback": "none"},
                r"without error feedback.*Use error_feedback='both'\.",
            ),
        ],
    )
    def test_what_cannot_work_is_refused(self, compressor, options, text):
        options = {"axis_name": AXIS, **options}
        with pytest.raises(ValueError, match=text) as info:
            alg.compressed_mean(compressor, **options)
        assert str(info.value).startswith("compressed_mean: ")

    def test_what_is_risky_warns_once(self):
        aimless = sign()
        aimless = aimless._replace(facts=aimless.facts._replace(delta=None))
        with pytest.warns(UserWarning, match=r"facts of sign\(l1\) state no d") as seen:
            alg.compressed_mean(aimless, axis_name=AXIS)
        assert len(seen) == 1 and seen[0].filename == __file__

    @pytest.mark.parametrize(
        ("compressor", "plan"),
        [
            (topk(0.2), "all_gather"),
            (randk(0.3, mask="shared", scaled=False), "linear_sum"),
            (sign("l1"), "scatter_reduce"),
            (topk(0.3), "ring"),
        ],
        ids=["all_gather", "linear_sum", "scatter_reduce", "ring"],
    )
    def test_nothing_is_lost(self, compressor, plan):
        """Sum of updates = sum of mean gradients - what the errors hold."""
        tx = alg.compressed_mean(compressor, axis_name=AXIS, plan=plan)
        out, means, state = feed(tx, 40)
        held = np.asarray(state.error.worker, float).mean(0)
        if plan == "scatter_reduce":
            held = held + np.asarray(state.error.owner, float).sum(0)
        else:
            assert state.error.owner is None
        assert np.abs(held).max() > 0.1
        np.testing.assert_allclose(out.sum(0)[0] + held, means.sum(0), atol=5e-5)

    @pytest.mark.parametrize("kind", ["none", "both"])
    def test_bytegrad_is_a_special_case(self, kind):
        feedback = {"axis_name": AXIS, "error_feedback": kind}
        special = alg.compressed_mean(minmax_uint8(), plan="scatter_reduce", **feedback)
        out, _, state = feed(special, 10)
        expected, _, same = feed(alg.bytegrad(**feedback), 10)
        np.testing.assert_array_equal(out, expected)
        jax.tree.map(np.testing.assert_array_equal, state.error, same.error)

    def test_workers_draw_their_own_noise_and_the_key_moves_on(self):
        tx = alg.compressed_mean(qsgd(2), axis_name=AXIS, plan="all_gather")
        x = jnp.linspace(-1, 1, 512)
        same = lambda t, n, d: jnp.tile(x, (n, 1))  # noqa: E731
        out, _, _ = feed(tx, 2, n=16, d=512, make=same)
        alone, _, _ = feed(tx, 1, n=1, d=512, make=same)
        assert np.abs(out[0] - out[1]).max() > 0.1
        variance = lambda u: np.mean((u[0, 0] - np.asarray(x)) ** 2)  # noqa: E731
        assert variance(out) < variance(alone) / 8  # a 16th, if noises are independent

    def test_a_stateful_compressor_keeps_its_state(self):
        tx = alg.compressed_mean(
            compressors.powersgd(1), axis_name=AXIS, error_feedback="worker"
        )
        _, _, state = feed(tx, 3, d=64)
        first = jax.vmap(tx.init, axis_name=AXIS)(jnp.zeros((N, 64)))
        assert np.abs(np.asarray(state.codec[0] - first.codec[0])).max() > 0.1


# --- delayed_gradients ---------------------------------------------------------------


class TestDelayedGradients:
    def test_no_delay_is_gradient_allreduce(self):
        out, *_ = feed(alg.delayed_gradients(axis_name=AXIS, staleness=0), 5)
        expected, *_ = feed(alg.gradient_allreduce(axis_name=AXIS), 5)
        np.testing.assert_array_equal(out, expected)

    def test_the_mean_of_tau_steps_ago(self):
        out, means, state = feed(alg.delayed_gradients(axis_name=AXIS, staleness=3), 9)
        assert len(state.pending) == 3
        np.testing.assert_array_equal(out[:3], 0)
        np.testing.assert_allclose(out[3:, 0], means[:-3], atol=1e-6)

    @pytest.mark.parametrize(("tau", "steps"), [(0, 400), (1, 2000), (4, 3000)])
    def test_stability_limit(self, tau, steps):
        """gamma lambda < 2 sin(pi / (2 (2 tau + 1))), from both sides."""
        limit = 2 * np.sin(np.pi / (2 * (2 * tau + 1)))
        tx = alg.delayed_gradients(axis_name=AXIS, staleness=tau)
        curvature = 3.0
        for factor, stable in ((0.98, True), (1.02, False)):
            chained = optax.chain(tx, optax.sgd(factor * limit / curvature))
            x, _ = descend(chained, curvature, jnp.zeros((2, 1)), steps, start=1.0)
            size = float(np.abs(x).max())
            assert size < 1e-3 if stable else size > 1e3, (tau, factor, size)


# --- signum --------------------------------------------------------------------------


class TestSignum:
    @pytest.mark.parametrize("n", [1, 3, 4, 8])
    def test_the_vote_is_the_sign_of_the_sum_of_signs(self, n):
        """Bit for bit, ties and zeros included."""
        rng = np.random.default_rng(n)
        g = rng.integers(-1, 2, (n, 203)).astype(np.float32)
        tx = alg.signum(1.0, axis_name=AXIS, momentum=0.0)
        out = per_worker(lambda g: tx.update(g, tx.init(g))[0], n)(jnp.asarray(g))
        votes = np.where(g >= 0, 1, -1).sum(0)
        assert n % 2 or (votes == 0).any()
        expected = -np.where(votes >= 0, 1.0, -1.0)
        np.testing.assert_array_equal(out, np.tile(expected, (n, 1)))

    def test_one_worker_without_momentum_is_sign_descent(self):
        tx = alg.signum(0.25, axis_name=AXIS, momentum=0.0)
        out, means, _ = feed(tx, 3, n=1)
        np.testing.assert_array_equal(out[:, 0], -0.25 * np.sign(means))

    def test_heterogeneous_workers_come_to_a_median(self):
        targets = jnp.array([[0.0], [1.0], [10.0]])
        tx = alg.signum(0.01, axis_name=AXIS, momentum=0.0)
        x, _ = descend(tx, 1.0, targets, 400)
        np.testing.assert_allclose(x, 1.0, atol=0.011)

    def test_weight_decay_needs_params(self):
        tx = alg.signum(0.1, axis_name=AXIS, weight_decay=0.1)
        with pytest.raises(ValueError, match="signum: weight decay .* params is None"):
            feed(tx, 1)


# --- one_bit_adam --------------------------------------------------------------------


class TestOneBitAdam:
    def test_the_warm_up_is_adam(self):
        tx = alg.one_bit_adam(0.1, axis_name=AXIS, warmup_steps=10)
        out, means, _ = feed(tx, 10)
        adam = optax.adam(0.1)
        state = adam.init(jnp.zeros(37))
        for update, mean in zip(out, means, strict=True):
            expected, state = adam.update(jnp.float32(mean), state)
            np.testing.assert_allclose(update[0], expected, atol=2e-6)

    def test_with_identity_it_is_preconditioned_heavy_ball(self):
        """x'' = x' - gamma (m / sqrt v): z^2 - (1 + b1 - (1 - b1) gamma h) z + b1."""
        b1, rate, warmup = 0.8, 0.05, 5
        tx = alg.one_bit_adam(
            rate,
            axis_name=AXIS,
            warmup_steps=warmup,
            b1=b1,
            b2=0.9,
            compressor=identity(),
        )
        targets = jnp.linspace(-1, 1, N)[:, None]
        xs, v = [], None
        for t in range(warmup, warmup + 6):
            x, state = descend(tx, 2.0, targets, t, start=3.0)
            xs.append(float(x[0, 0]))
            v = float(state.nu[0, 0])
        assert v is not None
        h = 2.0 * rate / (np.sqrt(v) + 1e-8)
        for before, now, after in zip(xs[1:], xs[2:], xs[3:], strict=False):
            expected = (1 + b1 - (1 - b1) * h) * now - b1 * before
            np.testing.assert_allclose(after, expected, atol=1e-5)

    def test_entries_without_gradient_in_the_warm_up_stand_still(self):
        silent = jnp.arange(37) < 5
        make = lambda t, n, d: jnp.where(  # noqa: E731
            silent & (t < 4), 0.0, gradients(t, n, d)
        )
        tx = alg.one_bit_adam(0.1, axis_name=AXIS, warmup_steps=4)
        out, *_ = feed(tx, 8, make=make)
        assert (out[:, :, :5] == 0).all() and (out[:, :, 5:] != 0).all()


# --- diana and ef21 ------------------------------------------------------------------


def copies_agree(state):
    mean = np.asarray(state.tracker, float).mean(0)
    assert np.abs(mean).max() > 1e-3
    np.testing.assert_allclose(state.mean_tracker[0], mean, atol=1e-5)


class TestDiana:
    @pytest.mark.parametrize(
        "compressor", [qsgd(4), randk(0.25, mask="shared")], ids=lambda c: c.facts.name
    )
    def test_the_mean_shift_is_the_mean_of_shifts(self, compressor):
        _, _, state = feed(alg.diana(compressor, axis_name=AXIS), 30)
        copies_agree(state)

    def test_identity_is_the_exact_mean(self):
        out, means, _ = feed(alg.diana(identity(), axis_name=AXIS), 10)
        np.testing.assert_allclose(out[:, 0], means, atol=2e-6)

    def test_it_reaches_the_optimum_where_qsgd_has_a_floor(self):
        targets = 3 * jax.random.normal(jax.random.key(5), (8, 16))
        optimum = np.asarray(targets).mean(0)
        codes = qsgd(2)
        plain = alg.compressed_mean(codes, axis_name=AXIS, plan="all_gather")
        off = {}
        for name, tx in (("qsgd", plain), ("diana", alg.diana(codes, axis_name=AXIS))):
            x, _ = descend(optax.chain(tx, optax.sgd(0.2)), 1.0, targets, 400)
            off[name] = np.abs(np.asarray(x) - optimum).max()
        assert off["diana"] < 1e-4 < 0.1 < off["qsgd"], off

    def test_biased_compressors_are_refused(self):
        with pytest.raises(ValueError, match="diana: .* topk.* is not.*Use ef21"):
            alg.diana(topk(0.1), axis_name=AXIS)

    @pytest.mark.parametrize("alpha", [0.0, -1.0, 1.5])
    def test_alpha_out_of_range(self, alpha):
        with pytest.raises(ValueError, match=f"diana: alpha must .* got {alpha}"):
            alg.diana(qsgd(4), axis_name=AXIS, alpha=alpha)


class TestEF21:
    def test_the_mean_copy_is_the_mean_of_copies(self):
        _, _, state = feed(alg.ef21(topk(0.1), axis_name=AXIS), 30)
        copies_agree(state)

    def test_identity_is_the_exact_mean(self):
        out, means, _ = feed(alg.ef21(identity(), axis_name=AXIS), 10)
        np.testing.assert_allclose(out[:, 0], means, atol=2e-6)

    def test_the_lyapunov_function_falls_at_every_step(self):
        """By 1 - gamma mu, at the largest step of the theorem."""
        d, ratio, curvature = 10, 0.2, np.linspace(0.5, 2.0, 10)
        theta = 1 - np.sqrt(1 - ratio)
        beta = (1 - ratio) / theta
        gamma = 1 / (2.0 * (1 + np.sqrt(beta / theta)))
        b = np.asarray(jax.random.normal(jax.random.key(9), (N, d)), float)
        tx = alg.ef21(topk(ratio), axis_name=AXIS)
        step = per_worker(tx.update, N)
        state = jax.vmap(tx.init, axis_name=AXIS)(jnp.zeros((N, d)))
        x, psi = np.full(d, 2.0), None
        for _ in range(60):
            grads = curvature * (x - b)
            updates, state = step(jnp.float32(grads), state)
            gap = 0.5 * (curvature * (x - b.mean(0)) ** 2).sum()
            distance = ((np.asarray(state.tracker) - grads) ** 2).sum(1).mean()
            now = gap + gamma / theta * distance
            assert psi is None or now <= (1 - gamma * 0.5) * psi * (1 + 1e-5)
            psi, x = now, x - gamma * np.asarray(updates[0], float)

    def test_expanding_compressors_are_refused_and_unknown_ones_warned_of(self):
        with pytest.raises(ValueError, match="ef21: .* must be below 1, .*Use diana"):
            alg.ef21(randk(0.01), axis_name=AXIS)
        with pytest.warns(UserWarning, match=r"1.99 \(1 - delta at d=65536\)") as seen:
            alg.ef21(sign("l2"), axis_name=AXIS)
        assert len(seen) == 1 and seen[0].filename == __file__


# --- dgc -----------------------------------------------------------------------------


class TestDGC:
    def test_without_momentum_it_is_topk_with_error_feedback(self):
        tx = alg.dgc(axis_name=AXIS, momentum=0.0, ratio=0.2)
        out, _, state = feed(tx, 20)
        plain = alg.compressed_mean(topk(0.2), axis_name=AXIS, plan="all_gather")
        expected, _, same = feed(plain, 20)
        np.testing.assert_allclose(out, expected, atol=1e-6)
        np.testing.assert_allclose(state.error, same.error.worker, atol=1e-6)

    def test_at_full_density_it_is_plain_sgd(self):
        """Masking empties the momentum of everything that was sent."""
        tx = alg.dgc(axis_name=AXIS, momentum=0.9, ratio=1.0)
        out, means, state = feed(tx, 5)
        np.testing.assert_allclose(out[:, 0], means, atol=1e-6)
        np.testing.assert_array_equal(state.velocity, 0)

    def test_nothing_is_lost(self):
        """What was sent and what waits add up to the sum of all momenta."""
        momentum, ratio = 0.9, 0.1
        tx = alg.dgc(axis_name=AXIS, momentum=momentum, ratio=ratio)
        step = per_worker(tx.update, N)
        state = jax.vmap(tx.init, axis_name=AXIS)(jnp.zeros((N, 37)))
        sent, due = 0.0, 0.0
        for t in range(30):
            g = gradients(t)
            due = due + (momentum * np.asarray(state.velocity, float) + g).mean(0)
            updates, state = step(g, state)
            sent = sent + np.asarray(updates[0], float)
        held = np.asarray(state.error, float).mean(0)
        np.testing.assert_allclose(sent + held, due, atol=5e-5)

    def test_each_worker_clips_at_a_share_of_the_norm(self):
        tx = alg.dgc(axis_name=AXIS, momentum=0.0, ratio=1.0, clip=2.0)
        g = jnp.array([[30.0, 40.0], [0.3, 0.4], [0.0, 5.0], [0.0, 0.0]])
        out, _, _ = feed(tx, 1, d=2, make=lambda t, n, d: g)
        expected = (np.array([[0.6, 0.8], [0.3, 0.4], [0, 1], [0, 0]])).mean(0)
        np.testing.assert_allclose(out[0, 0], expected, atol=1e-6)


# --- powersgd ------------------------------------------------------------------------


class TestPowerSGD:
    shape = (12, 9)

    def matrices(self, seed, rank):
        left, right = jax.random.split(jax.random.key(seed))
        a = jax.random.normal(left, (N, self.shape[0], rank))
        b = jax.random.normal(right, (rank, self.shape[1]))
        return a @ b  # a common row space: the mean has this rank, too

    def run(self, tx, grads, steps):
        state = jax.vmap(tx.init, axis_name=AXIS)(jnp.zeros((N, *self.shape)))
        step = per_worker(tx.update, N)
        out = []
        for t in range(steps):
            g = grads(t) if callable(grads) else grads
            u, state = step(g, state)
            out.append(np.asarray(u, float))
        return np.stack(out), state

    def test_exact_in_one_step_up_to_its_rank(self):
        tx = alg.powersgd(axis_name=AXIS, rank=2, min_compression=1)
        g = self.matrices(1, 2)
        out, _ = self.run(tx, g, 1)
        np.testing.assert_allclose(out[0, 0], np.asarray(g).mean(0), atol=1e-5)

    def test_it_is_an_orthogonal_projection(self):
        tx = alg.powersgd(axis_name=AXIS, rank=2, min_compression=1)
        g = jax.random.normal(jax.random.key(2), (N, *self.shape))
        out, _ = self.run(tx, g, 1)
        mean = np.asarray(g, float).mean(0)
        parts = (out[0, 0] ** 2).sum() + ((mean - out[0, 0]) ** 2).sum()
        assert parts == pytest.approx((mean**2).sum(), rel=1e-5)

    def test_the_angle_shrinks_by_the_squared_ratio_of_singular_values(self):
        """Without feedback: the first step after a reset of errors."""
        u, _ = np.linalg.qr(np.random.default_rng(3).standard_normal((12, 9)))
        v, _ = np.linalg.qr(np.random.default_rng(4).standard_normal((9, 9)))
        values = np.array([4.0, 2.0, *([0.0] * 7)])
        g = jnp.tile(jnp.float32((u * values) @ v.T), (N, 1, 1))
        tx = alg.powersgd(axis_name=AXIS, rank=1, min_compression=1)
        step = per_worker(tx.update, N)
        state = jax.vmap(tx.init, axis_name=AXIS)(jnp.zeros((N, *self.shape)))
        tangents = []
        for _ in range(6):
            _, state = step(g, state._replace(error=jnp.zeros_like(state.error)))
            q = np.asarray(state.basis[0, :, 0], float)
            tangents.append(abs(q @ v[:, 1]) / abs(q @ v[:, 0]))
        ratios = np.array(tangents[1:]) / np.array(tangents[:-1])
        np.testing.assert_allclose(ratios, (2.0 / 4.0) ** 2, rtol=1e-2)

    def test_nothing_is_lost(self):
        tx = alg.powersgd(axis_name=AXIS, rank=1)
        shape = (N, *self.shape)
        make = lambda t: jax.random.normal(jax.random.key(t), shape)  # noqa: E731
        out, state = self.run(tx, make, 20)
        due = sum(np.asarray(make(t), float).mean(0) for t in range(20))
        held = np.asarray(state.error, float).mean(0)
        assert np.abs(held).max() > 0.5
        np.testing.assert_allclose(out.sum(0)[0] + held, due, atol=5e-5)

    def test_before_start_step_it_is_exact(self):
        tx = alg.powersgd(axis_name=AXIS, rank=1, warmup_steps=2)
        g = jax.random.normal(jax.random.key(6), (N, *self.shape))
        out, _ = self.run(tx, g, 3)
        mean = np.asarray(g).mean(0)
        np.testing.assert_allclose(out[:2, 0], [mean, mean], atol=1e-6)
        assert np.linalg.matrix_rank(out[2, 0], tol=1e-4) == 1

    def test_what_would_not_shrink_is_exact(self):
        tx = alg.powersgd(axis_name=AXIS, rank=3)  # (12 + 9) * 3 * 2 > 12 * 9
        g = jax.random.normal(jax.random.key(7), (N, *self.shape))
        out, state = self.run(tx, g, 1)
        np.testing.assert_allclose(out[0, 0], np.asarray(g).mean(0), atol=1e-6)
        np.testing.assert_array_equal(state.error, 0)

    def test_zero_and_tiny_gradients(self):
        tx = alg.powersgd(axis_name=AXIS, rank=1)
        g = 1e-25 * self.matrices(8, 1)
        out, _ = self.run(tx, lambda t: 0 * g if t < 2 else g, 4)
        np.testing.assert_array_equal(out[:2], 0)
        np.testing.assert_allclose(out[3, 0], np.asarray(g).mean(0), rtol=1e-3)


# --- hierarchy -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "make",
    [
        lambda axis: alg.dgc(axis_name=axis, momentum=0.0, ratio=0.3),
        lambda axis: alg.ef21(topk(0.3), axis_name=axis),
        lambda axis: alg.diana(qsgd(4), axis_name=axis, alpha=0.5),
        lambda axis: alg.compressed_mean(topk(0.3), axis_name=axis, plan="all_gather"),
        lambda axis: alg.powersgd(axis_name=axis, rank=1, min_compression=1),
    ],
    ids=["dgc", "ef21", "diana", "compressed_mean", "powersgd"],
)
def test_nodes_of_two_find_the_mean_of_a_constant_gradient(make):
    """In the mean over time, for odd sizes; shards and their state fit together."""
    axes = ("node", "local")
    tx = make(axes)
    g = jax.random.normal(jax.random.key(1), (2, 2, 5, 3))

    def run(g):
        def step(state, _):
            u, state = tx.update(g, state)
            return state, u

        return jax.lax.scan(step, tx.init(g), length=120)[1]

    mapped = jax.vmap(jax.vmap(run, axis_name="local"), axis_name="node")
    out = np.asarray(jax.jit(mapped)(g), float)
    np.testing.assert_array_equal(out, np.broadcast_to(out[:1, :1], out.shape))
    mean = np.asarray(g).mean((0, 1))
    np.testing.assert_allclose(out[0, 0, 20:].mean(0), mean, atol=0.08)
