"""The oracles against published tables, closed forms and one another.

They judge the JAX code, so they are themselves held to what can be known without it.
"""

import ast
from pathlib import Path

import numpy as np
import optax
import pytest
from oracles import algorithms, buckets, topologies
from oracles.algorithms import Sgd, trajectory
from oracles.codec import LEVELS, Rounding, bagua_codec, f32, minmax_uint8
from oracles.scatter_reduce import bounds, c_lp_s, padded_partitions

RNG_SEED = 20210704


@pytest.fixture
def rng():
    return np.random.default_rng(RNG_SEED)


def test_oracles_do_not_import_jax_or_the_package():
    allowed = {"collections", "numpy", "oracles", "scipy", "typing"}
    for path in Path(algorithms.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            for name in names:
                assert name.split(".")[0] in allowed, path


# --- codec ---------------------------------------------------------------------------

TABLE = [
    ([-0.5, 0, 0.5], [1, 128, 255], [-0.49803928, 0, 0.49803928], True),
    ([0, 0, 0], [255, 255, 255], [0, 0, 0], True),
    ([-1, 0, 0.25, 1], [-1, 127, 159, 255], None, False),
]


@pytest.mark.parametrize("x, codes, decoded, well_defined", TABLE)
def test_codec_rows_of_the_original(x, codes, decoded, well_defined):
    original = bagua_codec(np.array(x))
    np.testing.assert_array_equal(original.codes, codes)
    assert original.well_defined is well_defined
    if decoded is not None:
        np.testing.assert_array_equal(original.decoded, np.array(decoded, f32))
        np.testing.assert_array_equal(minmax_uint8(x), original.decoded)


def test_symmetric_range_saturates_instead_of_wrapping():
    decoded = minmax_uint8([-1, 0, 0.25, 1])
    np.testing.assert_allclose(decoded, [-0.996, 0, 0.251, 1.0039], atol=1e-4)


@pytest.mark.parametrize("size", [1, 2, 31, 32, 33, 1000])
@pytest.mark.parametrize("shift", [-3.0, 0.0, 0.4, 20.0])
@pytest.mark.parametrize("spread", [1e-3, 1.0, 1e4])
def test_equals_the_original_where_that_is_defined(rng, size, shift, spread):
    compared = 0
    for _ in range(20):
        x = f32(spread) * (f32(shift) + rng.standard_normal(size).astype(f32))
        original = bagua_codec(x)
        scale = LEVELS / (x.max() - x.min() + f32(1e-7))
        if original.well_defined and np.abs(x).max() * scale <= 2**24:
            np.testing.assert_array_equal(minmax_uint8(x), original.decoded)
            compared += 1
    # one entry has no range: the original is undefined unless that entry is tiny
    assert compared >= (0 if size == 1 else 15)


@pytest.mark.parametrize("size", [1, 2, 37, 1000])
def test_codec_error_bound(rng, size):
    for offset in (0.0, 1.0, 1e3):
        x = (offset + rng.standard_normal(size)).astype(f32)
        step = (x.max() - x.min() + f32(1e-7)) / LEVELS
        bound = step / 2 + step / 2 + 2e-7 * np.abs(x).max()  # nearest; lower's own
        assert np.abs(minmax_uint8(x) - x).max() <= bound


def test_zero_decodes_to_exactly_zero(rng):
    for _ in range(50):
        x = rng.standard_normal(33).astype(f32) + f32(0.5)
        x[7] = 0
        assert minmax_uint8(x)[7] == 0


@pytest.mark.parametrize("value", [1.0, -1.0, 0.3, 1e6, -1e6, 2e29, 1e-3, -1e-9])
def test_constant_chunks(value):
    x = np.full(5, value, f32)
    decoded = minmax_uint8(x)
    # above 2^24 / 2.55e9 the offset grid is used, and a zero range is exact there
    atol = 0 if abs(value) > 0.0066 else 0.5 / 2.55e9
    np.testing.assert_allclose(decoded, x, rtol=0, atol=atol * (1 + 1e-6))


def test_the_traps_are_traps():
    assert not bagua_codec(np.full(5, 2e29, f32)).well_defined
    assert not bagua_codec(np.array([-3e38, 3e38], f32)).well_defined
    assert not bagua_codec(np.array([0, np.nan], f32)).well_defined
    assert not bagua_codec(np.array([0, np.inf], f32)).well_defined
    constants = np.linspace(0.5, 50, 997).astype(f32)
    assert not all(bagua_codec(np.full(3, c)).well_defined for c in constants)


def test_large_offset_small_range():
    x = (1e3 + np.linspace(0, 1e-2, 50)).astype(f32)
    step = (x.max() - x.min()) / LEVELS
    error = np.abs(minmax_uint8(x) - x).max()
    assert error <= step / 2 + np.spacing(f32(1e3))


def test_overflowing_range_is_halved():
    x = np.array([-3e38, -1e38, 0, 2e38, 3e38], f32)
    decoded = minmax_uint8(x)
    assert np.isfinite(decoded).all()
    assert np.abs(decoded.astype(float) - x).max() <= 6e38 / 255 / 2 * 1.001


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_non_finite_input_poisons_its_own_chunk_only(bad):
    x = np.arange(12, dtype=f32).reshape(3, 4)
    x[1, 2] = bad
    decoded = minmax_uint8(x)
    np.testing.assert_array_equal(np.isnan(decoded).all(-1), [False, True, False])
    np.testing.assert_array_equal(decoded[[0, 2]], minmax_uint8(x[[0, 2]]))


def test_chunks_on_the_last_axis_are_independent(rng):
    x = rng.standard_normal((4, 3, 17)).astype(f32)
    one_by_one = [[minmax_uint8(chunk) for chunk in row] for row in x]
    np.testing.assert_array_equal(minmax_uint8(x), one_by_one)


def test_rounding_remembers_near_ties_and_turns_them():
    x = np.array([0.5, 1.5, 2.25, -0.5001, 3.0], f32)
    rounding = Rounding(window=1e-3)
    np.testing.assert_array_equal(rounding(x), np.rint(x))
    assert rounding.near == [(0, 0), (0, 1), (0, 3)]
    turned = Rounding(flips={(0, 0), (0, 3)}, window=1e-3)
    np.testing.assert_array_equal(turned(x), [1, 2, 2, 0, 3])


# --- scatter-reduce ------------------------------------------------------------------


@pytest.mark.parametrize("size", [1, 5, 8, 37])
@pytest.mark.parametrize("n", [1, 2, 3, 4, 8])
def test_partitions_cover_once_and_padding_changes_nothing(rng, size, n):
    covered = np.concatenate([np.arange(size)[part] for part in bounds(size, n)])
    np.testing.assert_array_equal(covered, np.arange(size))
    x = rng.standard_normal((n, size)).astype(f32)
    sent = minmax_uint8(np.stack([padded_partitions(row, n) for row in x]))
    means = sent[0]
    for i in range(1, n):
        means = means + sent[i]
    padded = minmax_uint8(means / f32(n)).reshape(-1)[:size]
    np.testing.assert_array_equal(c_lp_s(x)[0], padded)


@pytest.mark.parametrize("n", [1, 2, 3, 4, 8])
def test_scatter_reduce_two_stage_bound(rng, n):
    x = rng.standard_normal((n, 64)).astype(f32)
    mean, worker, owner = c_lp_s(x)
    assert worker is None and owner is None
    for part in bounds(64, n):
        chunk = x[:, part]
        first = (chunk.max(-1) - chunk.min(-1) + 1e-7) / 255
        owned = minmax_uint8(chunk).mean(0)
        second = (owned.max() - owned.min() + 1e-7) / 255
        # a half step of nearest rounding, another where the rounded range clips
        allowed = first.mean() + second + 1e-6
        assert np.abs(mean[part] - chunk.mean(0)).max() <= allowed


def test_error_feedback_at_both_ends_conserves_mass(rng):
    """Sum of the means sent = sum of the exact means - what the errors still hold."""
    n, size = 4, 37
    d, e = np.zeros((n, size), f32), np.zeros((n, size), f32)
    sent, came = np.zeros(size), np.zeros(size)
    for _ in range(60):
        x = rng.standard_normal((n, size)).astype(f32)
        mean, d, e = c_lp_s(x, d, e)
        assert d is not None and e is not None
        sent += mean
        came += x.mean(0, dtype=np.float64)
    np.testing.assert_allclose(sent, came - d.mean(0) - e.sum(0), atol=2e-5)
    assert 0 < np.abs(d).max() < 0.05 and 0 < np.abs(e).max() < 0.05
    for k, part in enumerate(bounds(size, n)):
        assert not np.delete(e[k], np.arange(size)[part]).any()


def test_error_feedback_at_one_end_leaves_the_other_alone(rng):
    x = rng.standard_normal((4, 37)).astype(f32)
    held = (0.01 * rng.standard_normal((4, 37))).astype(f32)
    mean, d, e = c_lp_s(x, worker_error=held)
    assert e is None and d is not None
    np.testing.assert_array_equal(mean, c_lp_s(x + held)[0])
    zeros = np.zeros_like(x)
    mean, d, e = c_lp_s(x, owner_error=zeros)
    assert d is None and e is not None
    np.testing.assert_array_equal(mean, c_lp_s(x)[0])


def test_one_worker_compresses_twice(rng):
    x = rng.standard_normal((1, 33)).astype(f32)
    np.testing.assert_array_equal(c_lp_s(x)[0], minmax_uint8(minmax_uint8(x[0])))


# --- topologies ----------------------------------------------------------------------

SHIFT_ONE = {
    (4, 0): [2, 3, 0, 1],
    (4, 1): [3, 2, 1, 0],
    (4, 2): [2, 3, 0, 1],
    (6, 1): [4, 5, 3, 2, 0, 1],
    (6, 2): [5, 3, 4, 1, 2, 0],
    (8, 1): [5, 6, 7, 4, 3, 0, 1, 2],
    (8, 2): [6, 7, 4, 5, 2, 3, 0, 1],
}


@pytest.mark.parametrize("n, step", SHIFT_ONE)
def test_shift_one_tables(n, step):
    assert topologies.shift_one_peers(n, step) == SHIFT_ONE[n, step]


@pytest.mark.parametrize("n", range(2, 17, 2))
def test_shift_one_is_a_rotating_bipartite_matching(n):
    for step in range(2 * n):
        peers = topologies.shift_one_peers(n, step)
        assert [peers[p] for p in peers] == list(range(n))
        assert all((r < n // 2) != (p < n // 2) for r, p in enumerate(peers))
        assert peers == topologies.shift_one_peers(n, step + n // 2)
    with pytest.raises(ValueError, match="even"):
        topologies.shift_one_peers(n + 1, 0)


@pytest.mark.parametrize("name", topologies.MATRICES)
@pytest.mark.parametrize("n", [1, 2, 3, 4, 6, 8, 16])
def test_matrices_are_doubly_stochastic(name, n):
    if name == "shift_one" and n % 2:
        return
    for step in range(2 * n):
        w = topologies.MATRICES[name](n, step)
        assert (w >= 0).all()
        np.testing.assert_allclose(w.sum(0), 1, rtol=1e-12)
        np.testing.assert_allclose(w.sum(1), 1, rtol=1e-12)


def test_known_matrices():
    np.testing.assert_allclose(topologies.ring(1), [[1]])
    np.testing.assert_allclose(topologies.ring(2), [[1 / 3, 2 / 3], [2 / 3, 1 / 3]])
    np.testing.assert_allclose(topologies.ring(3), np.full((3, 3), 1 / 3))
    row = np.zeros(8)
    row[[7, 0, 1]] = 1 / 3
    np.testing.assert_allclose(topologies.ring(8)[0], row)
    k = np.arange(8)
    spectrum = np.sort((1 + 2 * np.cos(2 * np.pi * k / 8)) / 3)
    found = np.sort(np.linalg.eigvalsh(topologies.ring(8)))
    np.testing.assert_allclose(found, spectrum, atol=1e-12)
    # who receives from whom: worker 0 hears of 7 = 0 - 1, 6 = 0 - 2, 4 = 0 - 4
    np.testing.assert_allclose(
        topologies.static_exponential(8)[0], [0.25, 0, 0, 0, 0.25, 0, 0.25, 0.25]
    )
    for step, source in enumerate([7, 6, 4, 7]):
        row = topologies.one_peer_exponential(8, step)[0]
        assert row[0] == row[source] == 0.5


@pytest.mark.parametrize("n", [2, 4, 8, 16])
def test_one_peer_exponential_averages_exactly_in_log2_n(n):
    product = np.eye(n)
    for step in range(3, 3 + int(np.log2(n))):
        product = topologies.one_peer_exponential(n, step) @ product
    np.testing.assert_array_equal(product, topologies.complete(n))


@pytest.mark.parametrize("n", [4, 6, 8, 16])
def test_shift_one_contracts_by_its_closed_form(n):
    pair = topologies.shift_one(n, 1) @ topologies.shift_one(n, 0)
    mean = topologies.complete(n)
    two_steps = np.linalg.norm(pair - mean, 2)
    np.testing.assert_allclose(two_steps, np.cos(2 * np.pi / n), atol=1e-12)


# --- buckets -------------------------------------------------------------------------

F, H = np.float32, np.float16
SPLITS = [
    # sizes of 4-byte leaves, a bucket of 40 bytes = 10 entries
    ([(4, F), (4, F), (4, F)], 40, [[2, 1, 0]]),  # 8 + 4/2 <= 10
    ([(5, F), (4, F), (4, F)], 40, [[2, 1], [0]]),  # 8 + 5/2 > 10
    ([(1, F), (100, F), (1, F)], 40, [[2], [1], [0]]),
    ([(1, F), (18, F), (1, F)], 40, [[2, 1], [0]]),  # 1 + 18/2 <= 10, then over
    ([(3, F), (0, F), (2, F)], 40, [[2, 0]]),
    ([(3, F), (7, H), (2, F), (7, H)], 400, [[3, 1], [2, 0]]),
    ([(30, H), (3, F)], 40, [[1], [0]]),
    ([], 40, []),
]


@pytest.mark.parametrize("leaves, bucket_bytes, expected", SPLITS)
def test_bucket_split(leaves, bucket_bytes, expected):
    assert buckets.split(leaves, bucket_bytes) == expected


def test_bucket_indices():
    first, second = buckets.indices([2, 3, 1], bucket_bytes=16)
    np.testing.assert_array_equal(first, [5, 2, 3, 4])
    np.testing.assert_array_equal(second, [0, 1])
    (only,) = buckets.indices([2, 3, 1], bucket_bytes=10**6)
    np.testing.assert_array_equal(only, [5, 2, 3, 4, 0, 1])


# --- algorithms ----------------------------------------------------------------------

D = 6


class Quadratics:
    """f_i(x) = (x - b_i)' H_i (x - b_i) / 2 with diagonal H_i."""

    def __init__(self, rng, n):
        self.b = rng.standard_normal((n, D)).astype(f32)
        self.h = rng.uniform(0.5, 2, (n, D)).astype(f32)
        self.x0 = np.broadcast_to(rng.standard_normal(D).astype(f32), (n, D))
        self.optimum = (self.h * self.b).sum(0) / self.h.sum(0)

    def gradient(self, x, t):
        del t
        return self.h * (x - self.b)


@pytest.mark.parametrize("n", [1, 2, 4])
def test_gradient_allreduce_reaches_the_optimum(rng, n):
    problem = Quadratics(rng, n)
    oracle = algorithms.gradient_allreduce(Sgd(0.3, 0.5))
    x = trajectory(oracle, problem.x0, problem.gradient, 200)[-1]
    np.testing.assert_allclose(x, np.broadcast_to(problem.optimum, x.shape), atol=1e-5)


def test_bytegrad_follows_allreduce(rng):
    problem = Quadratics(rng, 4)
    exact = algorithms.gradient_allreduce(Sgd(0.1))
    exact = trajectory(exact, problem.x0, problem.gradient, 60)
    whole = [np.arange(D)]
    for kind in ("none", "worker", "owner", "both"):
        oracle = algorithms.bytegrad(Sgd(0.1), whole, kind)
        xs = trajectory(oracle, problem.x0, problem.gradient, 60)
        assert 0 < np.abs(xs - exact).max() < 0.05
        np.testing.assert_array_equal(xs, np.broadcast_to(xs[:, :1], xs.shape))


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_qadam_warm_up_is_adamw(rng, weight_decay):
    problem = Quadratics(rng, 4)
    oracle = algorithms.qadam(
        1e-2, [np.arange(D)], warmup_steps=100, weight_decay=weight_decay
    )
    xs = trajectory(oracle, problem.x0, problem.gradient, 100)
    tx = optax.adamw(1e-2, weight_decay=weight_decay)
    p = problem.x0[0]
    state = tx.init(p)
    for t in range(100):
        # optax takes 1 - b2^t in float32, which is off by 1e-5 of itself at first
        np.testing.assert_allclose(xs[t, 0], p, atol=1e-5)
        g = problem.gradient(np.broadcast_to(p, problem.x0.shape), t).mean(0)
        updates, state = tx.update(g, state, p)
        p = np.asarray(optax.apply_updates(p, updates))


def test_qadam_freezes_v_hat_and_keeps_the_decay(rng):
    problem = Quadratics(rng, 4)
    oracle = algorithms.qadam(
        1e-2, [], warmup_steps=3, weight_decay=0.1, compressed=False
    )
    state = oracle.init(problem.x0)
    for t in range(10):
        grads = problem.gradient(state["x"], t)
        before, state = state, oracle.step(state, grads, t, np.rint)
        if t >= 3:
            np.testing.assert_array_equal(state["v"], before["v"])
            v_hat = state["v"].astype(float) / (1 - 0.999**3)
            direction = state["m"] / (1 - 0.9 ** (t + 1)) / (np.sqrt(v_hat) + 1e-8)
            moved = before["x"] - state["x"]
            expected = 1e-2 * (direction + 0.1 * before["x"])
            np.testing.assert_allclose(moved, expected, atol=3e-7)


@pytest.mark.parametrize("combine", ["before", "after"])
@pytest.mark.parametrize("topology", ["ring", "static_exponential"])
def test_decentralized_fixed_point(rng, topology, combine):
    """before: (I - W + lr H) x = lr H b;  after: (I - W (I - lr H)) x = lr W H b."""
    n, lr = 8, 0.1
    problem = Quadratics(rng, n)
    oracle = algorithms.decentralized(Sgd(lr), topology, 1, combine)
    x = trajectory(oracle, problem.x0, problem.gradient, 600)[-1]
    w = topologies.MATRICES[topology](n)
    for c in range(D):
        h = np.diag(problem.h[:, c].astype(float))
        b = problem.b[:, c].astype(float)
        if combine == "before":
            fixed = np.linalg.solve(np.eye(n) - w + lr * h, lr * h @ b)
        else:
            fixed = np.linalg.solve(
                np.eye(n) - w @ (np.eye(n) - lr * h), lr * w @ h @ b
            )
        np.testing.assert_allclose(x[:, c], fixed, atol=1e-5)


def test_decentralized_on_the_complete_graph_is_parallel_sgd(rng):
    problem = Quadratics(rng, 4)
    gossip = algorithms.decentralized(Sgd(0.1, 0.9), "complete", combine="after")
    exact = algorithms.gradient_allreduce(Sgd(0.1, 0.9))
    np.testing.assert_allclose(
        trajectory(gossip, problem.x0, problem.gradient, 50),
        trajectory(exact, problem.x0, problem.gradient, 50),
        atol=1e-5,
    )


def test_decentralized_interval_uses_the_communication_count(rng):
    """With interval 2, one-peer averaging of 4 is exact after steps 0 and 2."""
    x0 = rng.standard_normal((4, D)).astype(f32)
    oracle = algorithms.decentralized(Sgd(0.1), "one_peer_exponential", interval=2)
    xs = trajectory(oracle, x0, lambda x, t: np.zeros_like(x), 3)
    np.testing.assert_array_equal(xs[1], xs[2])
    assert np.ptp(xs[1], axis=0).min() > 1e-3
    np.testing.assert_allclose(xs[3], np.tile(x0.mean(0), (4, 1)), atol=1e-6)


@pytest.mark.parametrize("n", range(1, 9))
def test_lpd_replicas_equal_what_they_replicate(rng, n):
    problem = Quadratics(rng, n)
    whole = [np.arange(D)]
    oracle = algorithms.low_precision_decentralized(Sgd(0.1), whole)
    state = oracle.init(problem.x0)
    for t in range(50):
        x = state["x"]
        z = x - 0.1 * problem.gradient(x, t) + topologies.ring(n) @ x - 2 * x
        state = oracle.step(state, problem.gradient(x, t), t, np.rint)
        step = (np.ptp(z, axis=1) + 1e-7) / 255
        assert (np.abs(state["x"] - x - z).max(1) <= step + 1e-6).all()
        for i in range(n):
            for j in (i, (i - 1) % n, (i + 1) % n):
                np.testing.assert_array_equal(state["replicas"][i, j], state["x"][j])


@pytest.mark.parametrize("warmup_steps", [0, 3])
@pytest.mark.parametrize("staleness", [0, 1, 2, 3])
def test_async_replays_a_script_of_events(rng, staleness, warmup_steps):
    """The same arithmetic, as a list of events in float64."""
    n, period, steps = 4, 3, 25
    problem = Quadratics(rng, n)
    oracle = algorithms.async_model_average(
        Sgd(0.1), period, staleness, warmup_steps=warmup_steps
    )
    xs = trajectory(oracle, problem.x0, problem.gradient, steps)
    snapshots = range(warmup_steps + period - 1, steps, period)
    arrivals = {t + staleness: t for t in snapshots}
    x, taken = problem.x0.astype(float), {}
    for t in range(steps):
        x = x - 0.1 * problem.gradient(x, t)
        if t < warmup_steps:
            x = np.tile(x.mean(0), (n, 1))
        if staleness and t in arrivals:
            x = x + taken[arrivals[t]].mean(0) - taken[arrivals[t]]
        if t in snapshots:
            taken[t] = x
        if not staleness and t in arrivals:
            x = np.tile(x.mean(0), (n, 1))
        np.testing.assert_allclose(xs[t + 1], x, atol=1e-5)


def test_async_mean_moves_only_by_local_updates(rng):
    x0 = rng.standard_normal((4, D)).astype(f32)
    drift = rng.standard_normal((4, D)).astype(f32)
    for staleness in (0, 1, 2):
        oracle = algorithms.async_model_average(Sgd(0.1), 2, staleness)
        xs = trajectory(oracle, x0, lambda x, t: drift, 20)
        expected = x0.mean(0) - 0.1 * np.arange(21)[:, None] * drift.mean(0)
        np.testing.assert_allclose(xs.mean(1), expected, atol=1e-5)
