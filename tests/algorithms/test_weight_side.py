"""Weight-side algorithms: their oracles, invariants, and what they reduce to."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from oracles import algorithms as oracles
from oracles import topologies as matrices
from oracles import weight_side
from stepping import (
    ATOL,
    AXIS,
    NODES,
    PER_NODE,
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
from table import LEARNING_RATE, Row, run

from bagua_jax import Workers, compressors, topologies
from bagua_jax import algorithms as alg


def lazy_ring(n, step=0):
    """Half for oneself: no eigenvalue is negative."""
    del step
    return 0.25 * np.eye(n) + 0.75 * matrices.ring(n)


FREE_RUNS = {
    "local_sgd": lambda n: (
        alg.local_sgd(axis_name=AXIS, local_steps=4),
        weight_side.local_sgd(SGD, 4),
    ),
    "post_local_sgd": lambda n: (
        alg.local_sgd(axis_name=AXIS, local_steps=3, warmup_steps=10),
        weight_side.local_sgd(SGD, 3, 10),
    ),
    "slowmo": lambda n: (
        alg.slowmo(
            axis_name=AXIS,
            local_steps=3,
            learning_rate=SGD.lr,
            outer_momentum=0.6,
            outer_learning_rate=0.7,
        ),
        weight_side.slowmo(SGD, 3, 0.6, 0.7, SGD.lr),
    ),
    "diloco": lambda n: (
        alg.diloco(axis_name=AXIS, local_steps=3),
        weight_side.diloco(SGD, 3, 0.7, 0.9),
    ),
    "diloco_compressed": lambda n: (
        alg.diloco(axis_name=AXIS, local_steps=3, compressor=half(), bucket_bytes=40),
        weight_side.diloco(SGD, 3, 0.7, 0.9, halve),
    ),
    "choco_sgd": lambda n: (
        alg.choco_sgd(half(), axis_name=AXIS, consensus_step_size=0.4, bucket_bytes=40),
        weight_side.choco_sgd(SGD, matrices.ring, 0.4, halve),
    ),
    "delayed_choco": lambda n: (
        alg.delayed_choco(half(), axis_name=AXIS, consensus_step_size=0.2, staleness=2),
        weight_side.choco_sgd(SGD, matrices.ring, 0.2, halve, staleness=2),
    ),
    "d2": lambda n: (
        alg.d2(axis_name=AXIS, topology=topologies.ring(n, self_weight=0.5)),
        weight_side.d2(SGD, lazy_ring),
    ),
    "exact_diffusion": lambda n: (
        alg.exact_diffusion(axis_name=AXIS),
        weight_side.exact_diffusion(SGD, matrices.ring),
    ),
    "deep_squeeze": lambda n: (
        alg.deep_squeeze(
            half(), axis_name=AXIS, consensus_step_size=0.5, bucket_bytes=40
        ),
        weight_side.deep_squeeze(SGD, matrices.ring, 0.5, halve),
    ),
    "stochastic_gradient_push": lambda n: (
        alg.stochastic_gradient_push(axis_name=AXIS, bucket_bytes=40),
        weight_side.stochastic_gradient_push(SGD, matrices.one_peer_exponential),
    ),
    "stochastic_gradient_push_directed": lambda n: (
        alg.stochastic_gradient_push(
            axis_name=AXIS,
            topology=topologies.from_matrix(shares(n), stochastic="column"),
        ),
        weight_side.stochastic_gradient_push(SGD, shares),
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
    # Exact diffusion adds rounding up twice: the float32 oracle itself is 1e-5 off.
    atol = 4e-5 if name == "exact_diffusion" else ATOL
    np.testing.assert_allclose(
        trajectory(place, tx, p), expected, rtol=0, atol=atol, err_msg=name
    )


# --- local steps ----------------------------------------------------------------------


class TestLocalSteps:
    local = alg.local_sgd(axis_name=AXIS, local_steps=4)

    def test_local_sgd_is_async_model_average_without_staleness(self):
        same(self.local, alg.async_model_average(axis_name=AXIS, local_steps=4))
        same(
            alg.local_sgd(axis_name=AXIS, local_steps=4, warmup_steps=6),
            alg.async_model_average(axis_name=AXIS, local_steps=4, warmup_steps=6),
        )

    def test_mean_moves_by_the_mean_update(self):
        assert_mean_moves_by_mean_update(self.local)

    def test_workers_agree_after_every_fourth_step_and_not_between(self):
        *_, later, _ = steps_of(self.local, 8, 5, 12)
        apart = np.ptp(later, axis=1).max(axis=1)
        assert (apart[3::4] < 1e-6).all()
        assert (np.delete(apart, [3, 7, 11]) > 0.05).all()

    def test_slowmo_without_momentum_is_local_sgd(self):
        slow = alg.slowmo(
            axis_name=AXIS, local_steps=4, learning_rate=0.1, outer_momentum=0.0
        )
        same(slow, self.local)

    def test_diloco_without_momentum_is_local_sgd(self):
        plain = {"outer_learning_rate": 1.0, "outer_momentum": 0.0}
        same(alg.diloco(axis_name=AXIS, local_steps=4, **plain), self.local)
        same(
            alg.diloco(
                axis_name=AXIS,
                local_steps=4,
                compressor=compressors.identity(),
                **plain,
            ),
            self.local,
        )

    def test_slow_velocity_outlives_a_fall_of_the_learning_rate(self):
        """In units of gradients: a tenth of the rate makes a tenth of the step."""
        tx = alg.slowmo(
            axis_name=AXIS,
            local_steps=1,
            learning_rate=lambda count: jnp.where(count < 1, 1.0, 0.1),
        )
        updates = np.zeros((3, 2, 1), "f4")
        updates[0] = 1.0
        x, _, later, _ = steps_of(tx, 2, 1, 3, updates, x=np.zeros((2, 1), "f4"))
        np.testing.assert_allclose(later[:, 0, 0], [1, 1.05, 1.075], atol=1e-6)

    def test_fixed_point_of_unequal_curvatures(self):
        """sum q_i b_i / sum q_i with q_i = 1 - (1 - lr h_i)^H, not sum h_i b_i / ..."""
        h, b, rate, steps = np.array([0.5, 2.0, 1.0]), np.array([3.0, -1, 0.5]), 0.2, 5
        tx = optax.chain(
            optax.sgd(rate), alg.local_sgd(axis_name=AXIS, local_steps=steps)
        )

        @functools.partial(jax.vmap, axis_name=AXIS)
        def train(h, b):
            def step(carry, _):
                x, opt = carry
                updates, opt = tx.update(h * (x - b), opt, x)
                return (x + updates, opt), None

            x = jnp.zeros(())
            return jax.lax.scan(step, (x, tx.init(x)), length=40 * steps)[0][0]

        q = 1 - (1 - rate * h) ** steps
        found = np.asarray(train(jnp.asarray(h, "f4"), jnp.asarray(b, "f4")))
        np.testing.assert_allclose(found, (q @ b) / q.sum(), atol=1e-5)
        assert abs((q @ b) / q.sum() - (h @ b) / h.sum()) > 0.1

    @pytest.mark.parametrize(("factor", "stable"), [(0.97, True), (1.03, False)])
    @pytest.mark.parametrize("name", ["slowmo", "diloco"])
    def test_outer_stability_limits(self, name, factor, stable):
        """alpha s < 2 (1 + beta); eta s < (2 + 2 beta) / (1 + 2 beta)."""
        rate, steps, beta = 0.3, 4, 0.5
        s = 1 - (1 - rate) ** steps
        if name == "slowmo":
            tx = alg.slowmo(
                axis_name=AXIS,
                local_steps=steps,
                learning_rate=rate,
                outer_momentum=beta,
                outer_learning_rate=factor * 2 * (1 + beta) / s,
            )
        else:
            tx = alg.diloco(
                axis_name=AXIS,
                local_steps=steps,
                outer_learning_rate=factor * (2 + 2 * beta) / (1 + 2 * beta) / s,
                outer_momentum=beta,
            )
        tx = optax.chain(optax.sgd(rate), tx)

        @functools.partial(jax.vmap, axis_name=AXIS)
        def train(x):
            def step(carry, _):
                x, opt = carry
                updates, opt = tx.update(x, opt, x)
                return (x + updates, opt), None

            return jax.lax.scan(step, (x, tx.init(x)), length=200 * steps)[0][0]

        left = np.abs(np.asarray(train(jnp.ones(2)))).max()
        assert left < 0.1 if stable else left > 10

    def test_compressed_diloco_loses_no_mass(self):
        """What was sent and what errors hold add up to all outer gradients."""
        tx = alg.diloco(
            axis_name=AXIS,
            local_steps=1,
            outer_learning_rate=1.0,
            outer_momentum=0.0,
            compressor=compressors.minmax_uint8(),
        )
        x0 = np.zeros((8, 21), "f4")
        _, updates, later, states = steps_of(tx, 8, 21, 40, x=x0)
        due = np.cumsum(np.asarray(updates, np.float64).mean(1), axis=0)
        held = np.asarray(states.error.worker).mean(1) + np.asarray(
            states.error.owner
        ).sum(1)
        np.testing.assert_allclose(later[:, 0] - held, due, atol=2e-5)
        assert np.abs(held).max() > 1e-4


# --- gossip ---------------------------------------------------------------------------


def ring(n=8):
    return topologies.ring(n).mixing_matrix()


def lazy(n=8):
    return topologies.ring(n, self_weight=0.5)


after = alg.decentralized(axis_name=AXIS, combine="after")

MINMAX = compressors.minmax_uint8()
GOSSIP = {
    "choco_sgd": alg.choco_sgd(MINMAX, axis_name=AXIS, consensus_step_size=0.8),
    "choco_sgd-half": alg.choco_sgd(half(), axis_name=AXIS, consensus_step_size=0.4),
    "delayed_choco": alg.delayed_choco(
        MINMAX, axis_name=AXIS, consensus_step_size=0.3, staleness=2
    ),
    "exact_diffusion": alg.exact_diffusion(axis_name=AXIS),
    "d2": alg.d2(axis_name=AXIS, topology=lazy()),
    "deep_squeeze": alg.deep_squeeze(MINMAX, axis_name=AXIS, consensus_step_size=0.8),
    "stochastic_gradient_push": alg.stochastic_gradient_push(axis_name=AXIS),
}


@pytest.mark.parametrize("name", GOSSIP)
def test_mean_moves_by_the_mean_update(name):
    """Whatever is compressed or late.

    Methods with a memory remember rounding, too, and add it up twice.
    """
    remembers = name in ("d2", "exact_diffusion")
    assert_mean_moves_by_mean_update(GOSSIP[name], atol=1e-4 if remembers else 1e-5)


IS_DECENTRALIZED = {
    "choco_sgd": alg.choco_sgd(
        compressors.identity(), axis_name=AXIS, consensus_step_size=1.0
    ),
    "delayed_choco": alg.delayed_choco(
        compressors.identity(), axis_name=AXIS, consensus_step_size=1.0, staleness=0
    ),
    "deep_squeeze": alg.deep_squeeze(
        compressors.identity(), axis_name=AXIS, consensus_step_size=1.0
    ),
    "stochastic_gradient_push": alg.stochastic_gradient_push(
        axis_name=AXIS, topology="ring"
    ),
}


@pytest.mark.parametrize("name", IS_DECENTRALIZED)
def test_without_compression_it_is_decentralized_combining_after(name):
    same(IS_DECENTRALIZED[name], after)


def test_delayed_choco_without_delay_is_choco_sgd():
    options = {"axis_name": AXIS, "consensus_step_size": 0.4}
    same(
        alg.choco_sgd(half(), **options),
        alg.delayed_choco(half(), staleness=0, **options),
    )


def test_memory_methods_on_the_complete_graph_are_parallel_sgd():
    """D2 at once; exact diffusion after it has forgotten half of it at every step."""
    parallel = alg.local_sgd(axis_name=AXIS, local_steps=1)
    same(alg.d2(axis_name=AXIS, topology="complete"), parallel)


def test_the_aggregate_is_what_neighbours_published():
    tx = GOSSIP["choco_sgd"]
    *_, states = steps_of(tx, 8, 11, 60)
    public = np.asarray(states.public[-1], np.float64)
    np.testing.assert_allclose(states.aggregate[-1], ring() @ public, atol=1e-5)
    assert np.ptp(public, axis=0).max() > 0.1


class TestExactness:
    """Where workers differ, memory comes to the optimum and plain gossip does not."""

    h = np.linspace(0.5, 2.0, 8)
    b = np.array([3.0, -1, 2, 0, -2, 1, 4, -3])
    optimum = (h @ b) / h.sum()

    def distance(self, tx):
        tx = optax.chain(optax.sgd(0.2), tx)

        @functools.partial(jax.vmap, axis_name=AXIS)
        def train(h, b):
            def step(carry, _):
                x, opt = carry
                updates, opt = tx.update(h * (x - b), opt, x)
                return (x + updates, opt), None

            x = jnp.zeros(())
            return jax.lax.scan(step, (x, tx.init(x)), length=400)[0][0]

        found = train(jnp.asarray(self.h, "f4"), jnp.asarray(self.b, "f4"))
        return np.abs(np.asarray(found) - self.optimum).max()

    @pytest.mark.parametrize("combine", ["before", "after"])
    def test_decentralized_has_a_floor(self, combine):
        tx = alg.decentralized(axis_name=AXIS, topology=lazy(), combine=combine)
        assert self.distance(tx) > 0.3

    @pytest.mark.parametrize("name", ["d2", "exact_diffusion"])
    def test_memory_removes_it(self, name):
        assert self.distance(GOSSIP[name]) < 1e-5

    def test_d2_refuses_the_marginal_ring(self):
        """n even, weights 1/3: the smallest eigenvalue is exactly -1/3."""
        tx = alg.d2(axis_name=AXIS, topology="ring")
        with pytest.raises(ValueError, match=r"self_weight=0.5"):
            steps_of(tx, 8, 3, 1)
        steps_of(tx, 5, 3, 1)


def disagreement(x):
    """Distance from consensus at each of [T, n, d]."""
    return np.sqrt(((x - x.mean(1, keepdims=True)) ** 2).sum((1, 2)))


def agree(tx, steps, d=5):
    """Gossip without updates; the disagreement after each step."""
    *_, later, _ = steps_of(tx, 8, d, steps, updates=np.zeros((steps, 8, d), "f4"))
    return disagreement(later)


class TestConsensus:
    def test_choco_agrees_with_8_bits_and_deep_squeeze_up_to_its_error(self):
        choco = agree(GOSSIP["choco_sgd"], 200)
        squeeze = agree(GOSSIP["deep_squeeze"], 200)
        assert choco[-1] < 1e-4
        assert 1e-4 < squeeze[-100:].max() < 0.05

    def test_push_sum_agrees_on_the_mean_and_masses_add_up(self):
        w = shares(8)
        tx = alg.stochastic_gradient_push(
            axis_name=AXIS, topology=topologies.from_matrix(w, stochastic="column")
        )
        x, _, later, states = steps_of(tx, 8, 5, 120, updates=np.zeros((120, 8, 5)))
        mass = np.asarray(states.mass, np.float64)
        np.testing.assert_allclose(mass.sum(1), 8, atol=1e-5)
        np.testing.assert_allclose(later[-1], np.tile(x.mean(0), (8, 1)), atol=2e-6)
        values, vectors = np.linalg.eig(w)
        perron = vectors[:, np.argmax(values.real)].real
        np.testing.assert_allclose(mass[-1], 8 * perron / perron.sum(), atol=1e-5)
        assert np.ptp(mass[-1]) > 0.2, "x alone would be biased"

    def test_push_sum_moves_the_mass_weighted_mean_by_the_mean_update(self):
        push = topologies.from_matrix(shares(8), stochastic="column")
        tx = alg.stochastic_gradient_push(axis_name=AXIS, topology=push)
        x, updates, later, states = steps_of(tx, 8, 5, 60)
        biased = np.asarray(states.mass, np.float64)[..., None] * later
        due = x.mean(0) + np.cumsum(np.asarray(updates, np.float64).mean(1), axis=0)
        np.testing.assert_allclose(biased.mean(1), due, atol=1e-5)


def lifted_radius(w, gamma, staleness):
    """Spectral radius of x_{t+1} = x_t + gamma (W - I) x_{t-tau} off consensus."""
    n, depth = len(w), staleness + 1
    off = np.eye(n) - 1 / n
    lifted = np.zeros((n * depth, n * depth))
    lifted[:n, :n] = off
    lifted[:n, -n:] += gamma * (w - np.eye(n)) @ off
    lifted[n:, :-n] = np.eye(n * staleness)
    return np.abs(np.linalg.eigvals(lifted)).max()


def largest_step(w, staleness):
    """The consensus step size at which the lifted matrix stops to contract."""
    low, high = 0.01, 4.0
    for _ in range(50):
        middle = (low + high) / 2
        stable = lifted_radius(w, middle, staleness) < 1
        low, high = (middle, high) if stable else (low, middle)
    return low


@pytest.mark.parametrize("staleness", [0, 1, 3])
class TestDelayLimit:
    def test_closed_form(self, staleness):
        w = ring()
        smallest = np.linalg.eigvalsh(w).min()
        closed = 2 * np.sin(np.pi / (2 * (2 * staleness + 1))) / (1 - smallest)
        assert largest_step(w, staleness) == pytest.approx(closed, rel=1e-6)

    @pytest.mark.parametrize("factor", [0.95, 1.05])
    def test_from_both_sides(self, staleness, factor):
        """It shrinks below the limit and grows above, at the rate of the matrix."""
        gamma = factor * largest_step(ring(), staleness)
        rate = lifted_radius(ring(), gamma, staleness)
        tx = alg.delayed_choco(
            compressors.identity(),
            axis_name=AXIS,
            consensus_step_size=gamma,
            staleness=staleness,
        )
        apart = agree(tx, 240)
        grown = (apart[160:240].mean() / apart[80:160].mean()) ** (1 / 80)
        assert grown < 1 if factor < 1 else grown > 1
        if apart[-1] > 1e-4:  # else rounding is all there is
            assert grown == pytest.approx(rate, abs=3e-3)

    def test_codes_agree_well_below_it(self, staleness):
        tx = alg.delayed_choco(
            MINMAX,
            axis_name=AXIS,
            consensus_step_size=0.5 * largest_step(ring(), staleness),
            staleness=staleness,
        )
        assert agree(tx, 400)[-1] < 1e-4


# --- hierarchies ----------------------------------------------------------------------

HIERARCHICAL = [
    Row("local_sgd", {"local_steps": 3}, 0),
    Row("slowmo", {"local_steps": 3, "learning_rate": LEARNING_RATE}, 0),
    Row("diloco", {"local_steps": 3}, 0),
]


@pytest.mark.parametrize("row", HIERARCHICAL, ids=lambda row: row.id)
def test_averages_over_a_hierarchy_are_those_of_all_workers(row):
    flat = run(Workers.simulate(8), row, steps=20)[0]
    workers = Workers.simulate((2, 4))
    nested = run(workers, row, steps=20, tx=row.chain(workers.axis_name))[0]
    for one, other in zip(jax.tree.leaves(flat), jax.tree.leaves(nested), strict=True):
        np.testing.assert_allclose(one, other, rtol=0, atol=2e-6)


BETWEEN_NODES = {
    "choco_sgd": lambda axis: alg.choco_sgd(
        half(), axis_name=axis, consensus_step_size=0.4
    ),
    "delayed_choco": lambda axis: alg.delayed_choco(
        half(), axis_name=axis, consensus_step_size=0.2
    ),
    "deep_squeeze": lambda axis: alg.deep_squeeze(
        half(), axis_name=axis, consensus_step_size=0.5
    ),
    "d2": lambda axis: alg.d2(axis_name=axis, topology=lazy(NODES)),
    "stochastic_gradient_push": lambda axis: alg.stochastic_gradient_push(
        axis_name=axis
    ),
}


@pytest.mark.parametrize("name", BETWEEN_NODES)
def test_nodes_of_a_hierarchy_act_as_workers(name):
    assert_nodes_act_as_workers(BETWEEN_NODES[name])


def test_exact_diffusion_on_a_hierarchy_mixes_by_nodes_times_devices():
    """W of the nodes, with the mean inside each: a graph of all workers."""
    w = np.kron(ring(NODES), np.full((PER_NODE, PER_NODE), 1 / PER_NODE))
    whole = topologies.from_matrix(w)
    row = Row("exact_diffusion", {}, 0)
    workers = Workers.simulate((NODES, PER_NODE))
    nested = run(workers, row, steps=20, tx=row.chain(workers.axis_name))[0]
    flat = run(Workers.simulate(8), Row("exact_diffusion", {"topology": whole}, 0), 20)
    for one, other in zip(
        jax.tree.leaves(flat[0]), jax.tree.leaves(nested), strict=True
    ):
        np.testing.assert_allclose(one, other, rtol=0, atol=2e-6)
