"""Gossip on estimates, residues, trees and late messages; averages of groups and parts.

Oracles, invariants, and what each reduces to.
"""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P
from oracles import algorithms as oracles
from oracles import gossip
from oracles import topologies as matrices
from stepping import (
    ATOL,
    AXIS,
    SGD,
    STEPS,
    assert_mean_moves_by_mean_update,
    assert_nodes_act_as_workers,
    half,
    halve,
    problem,
    same,
    shares,
    steps_of,
    trajectory,
)
from table import Row, run, training

from bagua_jax import Workers, compressors, primitives, topologies, wire
from bagua_jax import algorithms as alg
from bagua_jax.compressors import Compressor
from bagua_jax.traffic import payload


def unbiased(compressor: Compressor) -> Compressor:
    """Claim it, so that a test's own compressor passes."""
    claimed = compressor.facts._replace(unbiased=True, omega=lambda d: 0.25)
    return compressor._replace(facts=claimed)


def tree_edges(n):
    return [((i - 1) // 2, i) for i in range(1, n)]


def path_edges(n):
    return list(itertools.pairwise(range(n)))


# Of the flat vector of 23: "bias", then "block", then "vector".
BIAS, BLOCK, VECTOR = np.array([0]), np.arange(1, 16), np.arange(16, 23)

FREE_RUNS = {
    "ecd_psgd": lambda n: (
        alg.ecd_psgd(unbiased(half()), axis_name=AXIS, bucket_bytes=40),
        gossip.ecd_psgd(SGD, matrices.ring, halve),
    ),
    "moniqua": lambda n: (
        alg.moniqua(axis_name=AXIS, theta=4.0, bits=5, bucket_bytes=40),
        gossip.moniqua(SGD, lambda n, t: matrices.ring(n), 4.0, 5),
    ),
    "moniqua_rotating": lambda n: (
        alg.moniqua(axis_name=AXIS, theta=6.0, bits=4, topology="one_peer_exponential"),
        gossip.moniqua(SGD, matrices.one_peer_exponential, 6.0, 4),
    ),
    "relay_sgd": lambda n: (
        alg.relay_sgd(axis_name=AXIS, bucket_bytes=40),
        gossip.relay_sgd(SGD, tree_edges(n), n),
    ),
    "relay_sgd_path": lambda n: (
        alg.relay_sgd(axis_name=AXIS, topology="path"),
        gossip.relay_sgd(SGD, path_edges(n), n),
    ),
    "quasi_global_momentum": lambda n: (
        alg.quasi_global_momentum(
            axis_name=AXIS,
            learning_rate=SGD.lr,
            topology="one_peer_exponential",
            momentum=0.7,
            smoothing=0.4,
        ),
        gossip.quasi_global_momentum(
            SGD, matrices.one_peer_exponential, SGD.lr, 0.7, 0.4
        ),
    ),
    "overlapped_push": lambda n: (
        alg.overlapped_push(axis_name=AXIS, bucket_bytes=40),
        gossip.overlapped_push(SGD, matrices.one_peer_exponential, 1),
    ),
    "overlapped_push_directed": lambda n: (
        alg.overlapped_push(
            axis_name=AXIS,
            topology=topologies.from_matrix(shares(n), stochastic="column"),
            staleness=3,
        ),
        gossip.overlapped_push(SGD, shares, 3),
    ),
    "streaming_diloco": lambda n: (
        alg.streaming_diloco(
            axis_name=AXIS, local_steps=7, fragments=2, staleness=5, mixing=0.4
        ),
        gossip.streaming_diloco(
            SGD,
            7,
            [np.concatenate([BIAS, VECTOR]), BLOCK],
            5,
            0.4,
            0.7,
            0.9,
            lambda x: x,
        ),
    ),
    "streaming_diloco_compressed": lambda n: (
        alg.streaming_diloco(
            axis_name=AXIS,
            local_steps=4,
            fragments=4,
            staleness=1,
            compressor=half(),
            bucket_bytes=40,
        ),
        gossip.streaming_diloco(
            SGD, 4, [BIAS, BLOCK, VECTOR, []], 1, 0.5, 0.7, 0.9, halve
        ),
    ),
}


@pytest.mark.parametrize("name", FREE_RUNS)
@pytest.mark.parametrize(("place", "n"), [("vmap", 5), ("devices", 8)])
def test_oracle(name, place, n):
    """Oracle = vmap = devices at every one of 50 steps."""
    tx, oracle = FREE_RUNS[name](n)
    p = problem(n)
    expected = oracles.trajectory(oracle, p.x0, p.gradient, STEPS)
    assert np.ptp(expected, axis=0).max() > 0.5
    np.testing.assert_allclose(
        trajectory(place, tx, p), expected, rtol=0, atol=ATOL, err_msg=name
    )


PERIODS = {2: 2, 3: 4, 5: None}  # 3 is no multiple of 2, nor 5 of either


@pytest.mark.parametrize("place", ["vmap", "devices"])
def test_hierarchical_averaging_oracle(place):
    p = problem(8)
    oracle = gossip.hierarchical_averaging(SGD, {**PERIODS, 5: 8})
    tx = alg.hierarchical_averaging(axis_name=AXIS, periods=PERIODS, bucket_bytes=40)
    expected = oracles.trajectory(oracle, p.x0, p.gradient, STEPS)
    np.testing.assert_allclose(trajectory(place, tx, p), expected, rtol=0, atol=ATOL)


# --- what they reduce to --------------------------------------------------------------

before = alg.decentralized(axis_name=AXIS)
after = alg.decentralized(axis_name=AXIS, combine="after")
REDUCTIONS = {
    "ecd_psgd without compression": (
        alg.ecd_psgd(compressors.identity(), axis_name=AXIS),
        before,
    ),
    "quasi_global_momentum without momentum": (
        alg.quasi_global_momentum(axis_name=AXIS, learning_rate=0.1, momentum=0.0),
        after,
    ),
    "overlapped_push without staleness": (
        alg.overlapped_push(axis_name=AXIS, staleness=0),
        alg.stochastic_gradient_push(axis_name=AXIS),
    ),
    "hierarchical_averaging of one level": (
        alg.hierarchical_averaging(axis_name=AXIS, periods={4: None}),
        alg.local_sgd(axis_name=AXIS, local_steps=4),
    ),
    "streaming_diloco of one fragment": (
        alg.streaming_diloco(
            axis_name=AXIS, local_steps=3, fragments=1, staleness=0, mixing=0.0
        ),
        alg.diloco(axis_name=AXIS, local_steps=3),
    ),
    "streaming_diloco of one compressed fragment": (
        alg.streaming_diloco(
            axis_name=AXIS,
            local_steps=3,
            fragments=1,
            staleness=0,
            mixing=0.0,
            compressor=half(),
        ),
        alg.diloco(axis_name=AXIS, local_steps=3, compressor=half()),
    ),
}


@pytest.mark.parametrize("name", REDUCTIONS)
def test_reduction(name):
    same(*REDUCTIONS[name])


def test_many_bits_are_decentralized_within_the_quantization_step():
    """Of two errors of theta / (2^b - 1) a step, gossip with 1/3 keeps at most two."""
    theta, bits = 8.0, 16
    tx = alg.moniqua(axis_name=AXIS, theta=theta, bits=bits)
    same(tx, before, atol=20 * theta / (2**bits - 1))


def test_two_workers_relay_nothing():
    same(
        alg.relay_sgd(axis_name=AXIS, topology="path"),
        alg.local_sgd(axis_name=AXIS, local_steps=1),
        n=2,
    )


class TestOneWorker:
    """Quasi-global momentum of one worker, by hand."""

    rate, beta = 0.1, 0.6

    def moves(self, mu, updates):
        tx = alg.quasi_global_momentum(
            axis_name=AXIS,
            learning_rate=self.rate,
            topology="path",
            momentum=self.beta,
            smoothing=mu,
        )
        x = np.zeros((1, 1), "f4")
        *_, later, _ = steps_of(tx, 1, 1, len(updates), updates[:, None, None], x=x)
        return np.diff(later[:, 0, 0], prepend=0)

    def test_without_smoothing_it_is_the_heavy_ball(self):
        g = np.random.default_rng(0).standard_normal(30).astype("f4")
        trace, due = 0.0, []
        for value in g:
            trace = self.beta * trace + value
            due.append(-self.rate * trace)
        np.testing.assert_allclose(self.moves(0.0, -self.rate * g), due, atol=1e-6)

    @pytest.mark.parametrize("mu", [0.3, 0.6])
    def test_with_smoothing_it_is_quasi_hyperbolic(self, mu):
        g = np.random.default_rng(0).standard_normal(30).astype("f4")
        discount = mu + self.beta - mu * self.beta
        share = self.beta / discount
        mean, due = 0.0, []
        for value in g:
            mean = discount * mean + (1 - discount) * value
            step = self.rate / (1 - self.beta)
            due.append(-step * (share * mean + (1 - share) * value))
        np.testing.assert_allclose(self.moves(mu, -self.rate * g), due, atol=1e-6)

    def test_the_direction_outlives_a_fall_of_the_rate_and_a_rate_of_zero(self):
        """Units of gradients: 1, then beta of it, at a tenth of the rate a tenth."""
        rates = jnp.array([1.0, 0.0, 0.1])
        tx = alg.quasi_global_momentum(
            axis_name=AXIS,
            learning_rate=lambda count: rates[count],
            topology="path",
            momentum=0.5,
            smoothing=0.5,
        )
        updates = np.zeros((3, 1, 1), "f4")
        updates[0] = 1.0
        *_, later, states = steps_of(tx, 1, 1, 3, updates, x=np.zeros((1, 1), "f4"))
        # m_hat = -0.5, -0.25, and moves of -rate / 2 m_hat.
        np.testing.assert_allclose(later[:, 0, 0], [1, 1, 1.0125], atol=1e-6)


# --- invariants -----------------------------------------------------------------------

MEAN_PRESERVING = {
    "moniqua": alg.moniqua(axis_name=AXIS, theta=6.0, bits=4),
    "moniqua of one bit": alg.moniqua(
        axis_name=AXIS,
        theta=6.0,
        bits=1,
        topology=topologies.ring(8, self_weight=0.9),
    ),
    "hierarchical_averaging": alg.hierarchical_averaging(
        axis_name=AXIS, periods=PERIODS
    ),
}


@pytest.mark.parametrize("name", MEAN_PRESERVING)
def test_mean_moves_by_the_mean_update(name):
    """As a model recovered by its owner and by its neighbours is the same."""
    assert_mean_moves_by_mean_update(MEAN_PRESERVING[name], atol=2e-5)


def test_the_mean_moves_as_one_worker_with_quasi_global_momentum():
    options = {"axis_name": AXIS, "learning_rate": 0.1, "momentum": 0.8}
    rng = np.random.default_rng(1)
    updates = 0.1 * rng.standard_normal((40, 8, 5)).astype("f4")
    x = rng.standard_normal((8, 5)).astype("f4")
    many = alg.quasi_global_momentum(**options)
    *_, later, _ = steps_of(many, 8, 5, 40, updates, x)
    one = alg.quasi_global_momentum(**options, topology="path")
    mean = updates.mean(1, keepdims=True)
    *_, alone, _ = steps_of(one, 1, 5, 40, mean, x.mean(0, keepdims=True))
    np.testing.assert_allclose(later.mean(1), alone[:, 0], atol=1e-5)


class TestEstimates:
    """What ECD-PSGD believes of a model, and how wrong it is."""

    def noisy(self, variance):
        whole = compressors.identity()

        def compress(key, x, state):
            return x + np.sqrt(variance) * jax.random.normal(key, x.shape), state

        return whole._replace(compress=compress)

    def test_the_variance_is_the_derived_one_from_the_first_step(self):
        v, d, steps = 0.01, 40_000, 12
        tx = alg.ecd_psgd(self.noisy(v), axis_name=AXIS, topology="path")
        *_, later, states = steps_of(
            tx, 1, d, steps, updates=np.zeros((steps, 1, d), "f4")
        )
        wrong = np.asarray(states.mixed_estimates, np.float64) - later
        found = (wrong**2).mean((1, 2))
        t = np.arange(2, steps + 1)
        due = [4 * v, *(2 * v / 3 * (2 * t - 1) / (t * (t - 1)))]
        # The error of an estimated variance is sqrt(2/d) = 0.7% of it.
        np.testing.assert_allclose(found, due, rtol=0.04)

    def test_they_stay_exact_without_noise(self):
        """Also where coefficients are -1, 2 and 0, 1, and after many steps."""
        tx = alg.ecd_psgd(compressors.identity(), axis_name=AXIS, topology="path")
        *_, later, states = steps_of(tx, 1, 9, 300)
        np.testing.assert_allclose(states.mixed_estimates, later, atol=2e-5)


class TestResidues:
    """What receivers make of models modulo a bound."""

    def mixed(self, x, theta, bits):
        tx = alg.moniqua(axis_name=AXIS, theta=theta, bits=bits, topology="complete")
        n, d = x.shape
        return steps_of(tx, n, d, 1, np.zeros((1, n, d), "f4"), x)[2][0]

    @pytest.mark.parametrize("bits", [1, 3, 8, 13])
    def test_within_the_bound_they_are_exact_up_to_a_step(self, bits):
        """However far from zero, and at the bound itself."""
        theta = 0.25
        rng = np.random.default_rng(bits)
        far = 40 * rng.standard_normal(500)
        x = far + theta * rng.uniform(0, 1, (2, 500))
        x[:, 0] = 0, theta
        x = x.astype("f4")
        error = self.mixed(x, theta, bits) - x.mean(0)
        allowed = theta / (2**bits - 1)
        assert np.abs(error).max() < allowed + 2e-5
        assert np.abs(error).max() > 0.5 * allowed or bits == 13

    def test_beyond_the_bound_they_are_wrong_by_the_modulus(self):
        """As in the paper: nothing tells."""
        theta, bits = 1.0, 8
        modulus = 2 * theta / (1 - 2.0**-bits)
        x = np.array([[0.0], [1.2 * theta]], "f4")
        error = self.mixed(x, theta, bits) - x.mean(0)
        np.testing.assert_allclose(
            error[:, 0], [-modulus / 2, modulus / 2], atol=2 * theta / 255
        )

    @pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
    def test_not_finite_is_not_finite_for_the_receiver(self, bad):
        x = np.zeros((3, 4), "f4")
        x[1, 2] = bad
        assert not np.isfinite(self.mixed(x, 1.0, 2)).any()

    def test_bits_are_packed(self):
        """Three bits an element and a byte a message, on the wire of the program."""
        row = Row("moniqua", {"theta": 4.0, "bits": 3})
        start = {"w": jnp.zeros(801)}
        loop = training(Workers.devices(8), row, start=start)
        compiled = loop.step.lower(loop.init(), jnp.zeros(8)).compile()
        packed = -(-801 // 4) + -(-801 // 8)
        assert wire.count(compiled).bytes_per_worker == 2 * (packed + 1)

    def test_a_schedule_of_bounds(self):
        """A bound that halves: the same numbers from a finer grid."""
        x = np.array([[0.0], [0.6]], "f4")
        tx = alg.moniqua(
            axis_name=AXIS,
            theta=lambda count: 0.5 ** count.astype(jnp.float32),
            bits=2,
            topology="complete",
        )
        # B = 8/3 and a step of 2/3: 0.6 is sent as 2/3, recovered as 2/3.
        zero = np.zeros((2, 2, 1), "f4")
        *_, later, _ = steps_of(tx, 2, 1, 2, zero, x)
        np.testing.assert_allclose(later[0, :, 0], [1 / 3, 0.6 - 1 / 3], atol=1e-6)
        # B = 4/3 and a step of 1/3: 1/3 is a point, 4/15 is nearest to it as well.
        np.testing.assert_allclose(later[1], later[0], atol=1e-6)


class TestRelay:
    n, edges = 8, tree_edges(8)

    def distances(self, edges, n):
        far = np.where(np.eye(n, dtype=bool), 0, n)
        for i, j in edges:
            far[i, j] = far[j, i] = 1
        for k in range(n):
            far = np.minimum(far, far[:, [k]] + far[[k]])
        return far

    @pytest.mark.parametrize("topology", ["binary_tree", "path", topologies.star(8)])
    def test_models_are_means_of_models_as_old_as_their_way(self, topology):
        """x_i = mean_j x_half_j (t - max(d_ij - 1, 0)), x_0 before the start."""
        edges = {"binary_tree": self.edges, "path": path_edges(8)}
        edges = edges.get(topology, [(0, i) for i in range(1, 8)])
        x0 = np.broadcast_to(np.float32([0.5, -2.0]), (8, 2))
        tx = alg.relay_sgd(axis_name=AXIS, topology=topology)
        _, updates, later, _ = steps_of(tx, 8, 2, 20, x=x0)
        halves = np.concatenate([x0[None], later[:-1]]) + updates
        age = np.maximum(self.distances(edges, 8) - 1, 0)
        for t in range(20):
            due = [
                np.mean(
                    [halves[t - a, j] if a <= t else x0[j] for j, a in enumerate(row)],
                    axis=0,
                )
                for row in age
            ]
            np.testing.assert_allclose(later[t], due, atol=1e-5)

    def test_counts_reach_everybody_after_as_many_steps_as_the_tree_is_wide(self):
        """Of the oracle: what the algorithm knows from the start."""
        edges = path_edges(5)
        oracle = gossip.relay_sgd(SGD, edges, 5)
        state = oracle.init(np.zeros((5, 1), "f4"))
        heard = []
        for t in range(5):
            state = oracle.step(state, np.zeros((5, 1), "f4"), t, None)
            counts = state["counts"]
            heard.append(
                [sum(c for (_, to), c in counts.items() if to == i) for i in range(5)]
            )
        assert heard == [
            [1, 2, 2, 2, 1],
            [2, 3, 4, 3, 2],
            [3, 4, 4, 4, 3],
            [4, 4, 4, 4, 4],
            [4, 4, 4, 4, 4],
        ]

    def test_one_worker_and_idle_slots(self):
        *_, later, _ = steps_of(alg.relay_sgd(axis_name=AXIS), 1, 3, 4)
        assert np.isfinite(later).all()


class TestExactness:
    """Where workers differ, relays come to the optimum, and gossip does not."""

    h = np.linspace(0.5, 2.0, 8)
    b = np.array([3.0, -1, 2, 0, -2, 1, 4, -3])
    optimum = (h @ b) / h.sum()

    def distance(self, tx, rate=0.1):
        tx = optax.chain(optax.sgd(rate), tx)

        @jax.jit
        @functools.partial(jax.vmap, axis_name=AXIS)
        def train(h, b):
            def step(carry, _):
                x, opt = carry
                updates, opt = tx.update(h * (x - b), opt, x)
                return (x + updates, opt), None

            x = jnp.zeros(())
            return jax.lax.scan(step, (x, tx.init(x)), length=600)[0][0]

        found = train(jnp.asarray(self.h, "f4"), jnp.asarray(self.b, "f4"))
        return np.abs(np.asarray(found) - self.optimum).max()

    def test_on_a_path(self):
        gossip_floor = self.distance(
            alg.decentralized(axis_name=AXIS, topology="path", combine="after")
        )
        relay = self.distance(alg.relay_sgd(axis_name=AXIS, topology="path"))
        assert relay < 1e-5 < 0.3 < gossip_floor

    @pytest.mark.parametrize("topology", ["path", "binary_tree"])
    def test_relays_are_as_stable_as_the_workers_by_themselves(self, topology):
        """At a rate of 0.97 times 2 / max h, on any tree."""
        tx = alg.relay_sgd(axis_name=AXIS, topology=topology)
        assert self.distance(tx, rate=0.97) < 1e-5


class TestOverlappedPush:
    def test_masses_and_models_under_way_are_counted(self):
        push = topologies.from_matrix(shares(8), stochastic="column")
        tx = alg.overlapped_push(axis_name=AXIS, topology=push, staleness=3)
        x, updates, later, states = steps_of(tx, 8, 5, 60)
        flying = sum(np.asarray(p.mass, np.float64).sum(1) for p in states.in_flight)
        mass = np.asarray(states.mass, np.float64)
        np.testing.assert_allclose(mass.sum(1) + flying, 8, atol=2e-5)
        assert (flying > 1).all()
        total = (mass[..., None] * later).sum(1)
        total += sum(np.asarray(p.model, np.float64).sum(1) for p in states.in_flight)
        due = x.sum(0) + np.cumsum(np.asarray(updates, np.float64).sum(1), axis=0)
        np.testing.assert_allclose(total, due, atol=1e-4)

    @pytest.mark.parametrize("staleness", [1, 4])
    def test_they_agree_on_the_mean_and_masses_settle(self, staleness):
        """At 1 / (1 + tau / 2) where half of everything is kept."""
        tx = alg.overlapped_push(axis_name=AXIS, staleness=staleness)
        zero = np.zeros((200, 8, 3), "f4")
        x, _, later, states = steps_of(tx, 8, 3, 200, zero)
        np.testing.assert_allclose(later[-1], np.tile(x.mean(0), (8, 1)), atol=1e-5)
        np.testing.assert_allclose(
            states.mass[-1], np.full(8, 1 / (1 + staleness / 2)), atol=1e-5
        )

    def test_a_worker_that_keeps_nothing_is_refused_where_messages_are_late(self):
        swap = topologies.from_matrix([[0.0, 1.0], [1.0, 0.0]])
        with pytest.raises(ValueError, match=r"keeps 0. Put weights on W's diagonal"):
            alg.overlapped_push(axis_name=AXIS, topology=swap)
        alg.overlapped_push(axis_name=AXIS, topology=swap, staleness=0)


class TestGroups:
    def test_group_mean(self):
        """Under vmap and on devices, for sizes that do not divide the vector."""
        x = np.random.default_rng(0).standard_normal((8, 5)).astype("f4")

        def means(v):
            return [primitives.group_mean(v, s, axis_name=AXIS) for s in (1, 2, 4, 8)]

        due = [np.repeat(x.reshape(-1, s, 5).mean(1), s, axis=0) for s in (1, 2, 4, 8)]
        found = jax.vmap(means, axis_name=AXIS)(x)
        np.testing.assert_allclose(found, due, atol=1e-6)
        mapped = Workers.devices(8).spmd(means, in_specs=P(AXIS))
        np.testing.assert_allclose(mapped(x), due, atol=1e-6)
        with pytest.raises(ValueError, match=r"size=3 must divide the 8 workers"):
            jax.vmap(
                lambda v: primitives.group_mean(v, 3, axis_name=AXIS), axis_name=AXIS
            )(x)

    def test_shares_of_steps_are_those_of_a_cycle(self):
        from bagua_jax.algorithms.hierarchical_averaging import _shares

        periods = (2, 3, 5)
        level = [
            max((i for i, p in enumerate(periods, 1) if t % p == 0), default=0)
            for t in range(30)
        ]
        np.testing.assert_allclose(_shares(periods), np.bincount(level) / 30)

    def test_groups_agree_when_they_should(self):
        tx = alg.hierarchical_averaging(axis_name=AXIS, periods={2: 2, 4: 4, 8: None})
        *_, later, _ = steps_of(tx, 8, 3, 8)

        def agree(size):
            groups = later.reshape(8, -1, size, 3)
            return (np.ptp(groups, axis=2).max((1, 2)) < 1e-6).tolist()

        assert agree(2) == [False, True] * 4
        assert agree(4) == ([False] * 3 + [True]) * 2
        assert agree(8) == [False] * 7 + [True]

    @pytest.mark.parametrize(
        ("periods", "text"),
        [
            ({2: 4, 8: 8}, r"must be all 6 workers"),
            ({2: 4, 8: None}, r"got 6 workers over 4 in \{2: 4, 8: None\}"),
        ],
    )
    def test_groups_that_do_not_fit_the_axis_are_refused(self, periods, text):
        tx = alg.hierarchical_averaging(axis_name=AXIS, periods=periods)
        with pytest.raises(ValueError, match=text):
            steps_of(tx, 6, 3, 1)


class TestFragments:
    def test_each_has_its_turn_and_is_merged_later(self):
        """Which leaf of which step is pulled to the others."""
        tx = alg.streaming_diloco(
            axis_name=AXIS,
            local_steps=4,
            fragments=2,
            staleness=1,
            mixing=0.0,
            outer_learning_rate=1.0,
            outer_momentum=0.0,
        )

        @functools.partial(jax.vmap, axis_name=AXIS)
        def train(u):
            def step(carry, _):
                x, opt = carry
                updates, opt = tx.update((u, u), opt, x)
                x = optax.apply_updates(x, updates)
                return (x, opt), x

            x = (jnp.zeros(()), jnp.zeros(()))
            return jnp.stack(jax.lax.scan(step, (x, tx.init(x)), length=9)[1])

        seen = train(jnp.array([1.0, -1.0]))[0]
        # Turns after 2, 6 and after 4, 8; merged a step later, when they are forgotten.
        np.testing.assert_allclose(seen[0], [1, 2, 0, 1, 2, 3, 0, 1, 2])
        np.testing.assert_allclose(seen[1], [1, 2, 3, 4, 0, 1, 2, 3, 0])

    def test_four_bits_on_the_wire(self):
        """Parts to their owners and back, of a leaf at each of two turns in four."""
        codes = compressors.blockwise(bits=4)
        options = {"local_steps": 4, "fragments": 2, "compressor": codes}
        start = (jnp.zeros(801), jnp.zeros((40, 3)))
        loop = training(
            Workers.devices(8), Row("streaming_diloco", options), start=start
        )
        compiled = loop.step.lower(loop.init(), jnp.zeros(8)).compile()
        parts = payload(codes, 101) + payload(codes, 15)
        counted = wire.count(compiled)
        assert counted.bytes_per_worker == pytest.approx(2 * 7 * parts / 4)
        assert {c.dtype for c in counted.collectives} == {"u8"}

    def test_compressed_fragments_lose_no_mass(self):
        tx = alg.streaming_diloco(
            axis_name=AXIS,
            local_steps=1,
            fragments=1,
            staleness=0,
            mixing=0.0,
            outer_learning_rate=1.0,
            outer_momentum=0.0,
            compressor=compressors.blockwise(bits=4),
        )
        x0 = np.zeros((8, 21), "f4")
        _, updates, later, states = steps_of(tx, 8, 21, 40, x=x0)
        due = np.cumsum(np.asarray(updates, np.float64).mean(1), axis=0)
        held = np.asarray(states.error.worker).mean(1)
        held = held + np.asarray(states.error.owner).sum(1)
        np.testing.assert_allclose(later[:, 0] - held, due, atol=2e-5)
        assert np.abs(held).max() > 1e-3


# --- hierarchies ----------------------------------------------------------------------

BETWEEN_NODES = {
    "ecd_psgd": lambda axis: alg.ecd_psgd(unbiased(half()), axis_name=axis),
    "relay_sgd": lambda axis: alg.relay_sgd(axis_name=axis, topology="path"),
    "quasi_global_momentum": lambda axis: alg.quasi_global_momentum(
        axis_name=axis, learning_rate=0.1
    ),
    "overlapped_push": lambda axis: alg.overlapped_push(axis_name=axis, staleness=2),
    "hierarchical_averaging": lambda axis: alg.hierarchical_averaging(
        axis_name=axis, periods={1: 2, 3: None}
    ),
}


@pytest.mark.parametrize("name", BETWEEN_NODES)
def test_nodes_of_a_hierarchy_act_as_workers(name):
    assert_nodes_act_as_workers(BETWEEN_NODES[name])


def test_streaming_over_a_hierarchy_is_that_of_all_workers():
    row = Row("streaming_diloco", {"local_steps": 3, "fragments": 2})
    flat = run(Workers.simulate(8), row, steps=12)[0]
    workers = Workers.simulate((2, 4))
    nested = run(workers, row, steps=12, tx=row.chain(workers.axis_name))[0]
    for one, other in zip(jax.tree.leaves(flat), jax.tree.leaves(nested), strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=2e-6)


def test_many_bits_over_a_hierarchy_are_decentralized():
    """Devices of a node are averaged before they mix, and then step by themselves."""
    workers = Workers.simulate((2, 4))
    fine = Row("moniqua", {"theta": 8.0, "bits": 16})
    x, y = (
        run(workers, row, steps=12, tx=row.chain(workers.axis_name))[0]
        for row in (fine, Row("decentralized", {}))
    )
    for one, other in zip(jax.tree.leaves(x), jax.tree.leaves(y), strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=2e-3)
