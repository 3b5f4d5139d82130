"""Mixing matrices against the oracle, closed forms, and the rules of legality."""

import math

import jax.numpy as jnp
import numpy as np
import pytest
from oracles import topologies as oracle

from bagua_jax import topologies
from bagua_jax.topologies import MixingStep, Send, Topology

NAMES = list(oracle.MATRICES)
LEGAL = [
    (name, n)
    for name in NAMES
    for n in range(1, 18)
    if name != "shift_one" or n % 2 == 0
]
every_legal = pytest.mark.parametrize("name, n", LEGAL)


def make(name, n):
    return topologies.REGISTRY[name](n)


def factor(topology):
    """The contraction from scratch: |eigenvalues| of one period's product off 1."""
    product = np.eye(topology.n)
    for step in range(topology.period):
        product = oracle.MATRICES[topology.name](topology.n, step) @ product
    off = np.linalg.eigvals(product - 1 / topology.n)
    return np.abs(off).max() ** (1 / topology.period)


# --- every row of the registry -------------------------------------------------------


@pytest.mark.parametrize("name", topologies.REGISTRY)
def test_every_registered_topology_is_sound(name):
    """Doubly stochastic, made of partial permutations, a value; for each n it takes."""
    legal = []
    for n in range(1, 18):
        try:
            topology = make(name, n)
        except ValueError as refusal:
            assert str(refusal).startswith(f"{name}: ") and str(n) in str(refusal)
            continue
        legal.append(n)
        assert (topology.name, topology.n) == (name, n) and topology.period >= 1
        assert topology == make(name, n) and hash(topology) == hash(make(name, n))
        assert -1e-12 <= topology.contraction <= 1 + 1e-12
        for step, mixing in enumerate(topology.steps):
            w = topology.mixing_matrix(step)
            assert (w >= 0).all()
            np.testing.assert_allclose(w.sum(0), 1, rtol=1e-13)
            np.testing.assert_allclose(w.sum(1), 1, rtol=1e-13)
            assert len(mixing.self_weights) == n
            for send in mixing.sends:
                sources, destinations = zip(*send.pairs, strict=True)
                assert len(set(sources)) == len(set(destinations)) == len(sources)
                assert set(sources) | set(destinations) <= set(range(n))
                assert len(send.weights) == n
                silent = set(range(n)) - set(destinations)
                assert all(send.weights[i] == 0 for i in silent)
    assert legal  # some n of 1..17 is taken


# --- the five of BAGUA and the exponential graphs ------------------------------------


@every_legal
def test_matrices_are_doubly_stochastic_and_the_oracle_s(name, n):
    topology = make(name, n)
    assert (topology.name, topology.n) == (name, n)
    for step in range(2 * topology.period + 1):
        w = topology.mixing_matrix(step)
        assert w.shape == (n, n) and w.dtype == np.float64 and (w >= 0).all()
        np.testing.assert_allclose(w.sum(0), 1, rtol=1e-14)
        np.testing.assert_allclose(w.sum(1), 1, rtol=1e-14)
        np.testing.assert_allclose(w, oracle.MATRICES[name](n, step), atol=1e-15)


@every_legal
def test_sends_are_permutations(name, n):
    for mixing in make(name, n).steps:
        assert len(mixing.self_weights) == n
        for send in mixing.sends:
            sources, destinations = zip(*send.pairs, strict=True)
            assert sorted(sources) == sorted(destinations) == list(range(n))
            assert len(send.weights) == n


@every_legal
def test_period_is_the_shortest_and_steps_repeat(name, n):
    topology = make(name, n)
    period = {
        "one_peer_exponential": max(1, math.ceil(math.log2(n))),
        "shift_one": n // 2,
    }.get(name, 1)
    assert topology.period == period
    first = topology.mixing_matrix()
    np.testing.assert_array_equal(topology.mixing_matrix(period), first)
    np.testing.assert_array_equal(topology.mixing_matrix(-period), first)
    matrices = {topology.mixing_matrix(s).tobytes() for s in range(period)}
    assert len(matrices) == period


@every_legal
def test_contraction_and_gap(name, n):
    topology = make(name, n)
    assert topology.spectral_gap == 1 - topology.contraction
    assert 0 <= topology.contraction < 1
    exact = n == 1 or name == "complete" or n in {"ring": (3,)}.get(name, ())
    exact |= name == "static_exponential" and n in (2, 3)
    exact |= name == "one_peer_exponential" and n & (n - 1) == 0
    exact |= name == "shift_one" and n in (2, 4)
    if exact:
        assert topology.contraction <= 1e-12
    else:
        assert topology.contraction > 1e-3
        assert topology.contraction == pytest.approx(factor(topology), abs=1e-12)


@every_legal
def test_topologies_are_hashable_values(name, n):
    assert make(name, n) == make(name, n)
    assert len({make(name, n), make(name, n)}) == 1


@every_legal
def test_messages_of_a_step(name, n):
    expected = {
        "ring": 2,
        "complete": n - 1,
        "static_exponential": math.ceil(math.log2(n)),
        "one_peer_exponential": min(n - 1, 1),
        "shift_one": 1,
    }[name]
    assert {len(mixing.sends) for mixing in make(name, n).steps} == {expected}


# --- closed forms --------------------------------------------------------------------


@pytest.mark.parametrize("w0", [1 / 3, 0.5, 0.9, 0.05])
@pytest.mark.parametrize("n", range(1, 18))
def test_ring_eigenvalues(n, w0):
    topology = topologies.ring(n, self_weight=w0)
    w = topology.mixing_matrix()
    np.testing.assert_allclose(w, w.T, atol=1e-15)
    expected = w0 + (1 - w0) * np.cos(2 * np.pi * np.arange(n) / n)
    found = np.linalg.eigvalsh(w)
    np.testing.assert_allclose(found, np.sort(expected), atol=1e-14)
    others = np.abs(expected[1:]).max(initial=0)
    assert topology.contraction == pytest.approx(others, abs=1e-12)


@pytest.mark.parametrize("n, value", [(8, 0.8047), (16, 0.9493)])
def test_ring_published_values(n, value):
    assert topologies.ring(n).contraction == pytest.approx(value, abs=5e-5)


@pytest.mark.parametrize("n", range(2, 18))
def test_static_exponential_spectrum(n):
    topology = topologies.static_exponential(n)
    t = math.ceil(math.log2(n))
    k = np.arange(n)[:, None]
    roots = np.exp(2j * np.pi * k * 2.0 ** np.arange(t) / n)
    eigenvalues = (1 + roots.sum(1)) / (t + 1)
    radius = np.abs(eigenvalues[1:]).max()
    assert topology.contraction == pytest.approx(radius, abs=1e-12)
    w = topology.mixing_matrix()
    np.testing.assert_allclose(w @ w.T, w.T @ w, atol=1e-15)  # normal
    assert np.linalg.norm(w - 1 / n, 2) == pytest.approx(radius, abs=1e-12)
    if n % 2 == 0:
        assert topology.contraction == pytest.approx((t - 1) / (t + 1), abs=1e-12)
    else:
        assert topology.contraction < (t - 1) / (t + 1)


@pytest.mark.parametrize("n, value", [(9, 0.4418), (15, 0.4899)])
def test_static_exponential_published_values(n, value):
    assert topologies.static_exponential(n).contraction == pytest.approx(
        value, abs=5e-5
    )


@pytest.mark.parametrize("n", [2, 4, 8, 16])
@pytest.mark.parametrize("start", range(4))
def test_one_peer_is_exact_after_log2_n_consecutive_steps(n, start):
    topology = topologies.one_peer_exponential(n)
    product = np.eye(n)
    for step in range(start, start + topology.period):
        assert not np.allclose(product, 1 / n)
        product = topology.mixing_matrix(step) @ product
    np.testing.assert_array_equal(product, np.full((n, n), 1 / n))


@pytest.mark.parametrize("n", [3, 5, 6, 7, 12])
def test_one_peer_only_contracts_otherwise(n):
    topology = topologies.one_peer_exponential(n)
    assert 0.1 < topology.contraction < 1


@pytest.mark.parametrize("n", range(4, 17, 2))
def test_shift_one_contracts_by_its_cosine(n):
    topology = topologies.shift_one(n)
    expected = math.cos(2 * math.pi / n)
    assert topology.contraction == pytest.approx(expected, abs=1e-9)
    product = topology.mixing_matrix(0)
    for step in range(1, 5):
        product = topology.mixing_matrix(step) @ product
        norm = np.linalg.norm(product - 1 / n, 2)
        assert norm == pytest.approx(expected**step, abs=1e-12)


@pytest.mark.parametrize("n", range(2, 17, 2))
def test_shift_one_peers_are_bagua_s(n):
    topology = topologies.shift_one(n)
    for step in range(2 * n):
        (send,) = topology.steps[step % topology.period].sends
        heard = dict((to, source) for source, to in send.pairs)
        peers = [heard[r] for r in range(n)]
        assert peers == oracle.shift_one_peers(n, step)
        assert [peers[p] for p in peers] == list(range(n))


def test_complete_is_the_mean():
    for n in range(1, 18):
        w = topologies.complete(n).mixing_matrix()
        np.testing.assert_array_equal(w, np.full((n, n), 1 / n))


def test_contraction_is_the_rate_that_is_measured():
    """Iterate the matrices; the disagreement shrinks by the stated factor a step."""
    rng = np.random.default_rng(0)
    for name, n in (("ring", 7), ("one_peer_exponential", 6), ("shift_one", 10)):
        topology = make(name, n)
        x = rng.standard_normal(n)
        shrunk = []
        for _ in range(400):
            x = (x - x.mean()) / np.linalg.norm(x - x.mean())
            for step in range(topology.period):
                x = topology.mixing_matrix(step) @ x
            shrunk.append(np.linalg.norm(x - x.mean()))
        rate = np.exp(np.mean(np.log(shrunk[200:])) / topology.period)
        assert rate == pytest.approx(topology.contraction, abs=1e-3)


def test_matrix_of_a_topology_with_missing_pairs():
    """A path of three: the ends hear one neighbour only."""
    right = Send(((0, 1), (1, 2)), (0.0, 0.25, 0.5))
    left = Send(((1, 0), (2, 1)), (0.5, 0.25, 0.0))
    path = Topology("path", 3, (MixingStep((0.5, 0.5, 0.5), (right, left)),))
    np.testing.assert_array_equal(
        path.mixing_matrix(), [[0.5, 0.5, 0], [0.25, 0.5, 0.25], [0, 0.5, 0.5]]
    )


# --- refusals ------------------------------------------------------------------------


@pytest.mark.parametrize("name", topologies.REGISTRY)
@pytest.mark.parametrize("n", [0, -1, 2.5, True, "4", None, 4.0])
def test_illegal_n_is_refused(name, n):
    with pytest.raises(ValueError, match=f"{name}: n must be a positive integer, got "):
        make(name, n)


@pytest.mark.parametrize("name", topologies.REGISTRY)
def test_numpy_integers_are_integers(name):
    topology = make(name, np.int64(4))
    assert topology == make(name, 4) and topology.contraction >= 0


@pytest.mark.parametrize("n", [1, 3, 17])
def test_shift_one_refuses_odd_n(n):
    with pytest.raises(ValueError, match=f"even, got n={n}.*one_peer_exponential"):
        topologies.shift_one(n)


@pytest.mark.parametrize("w0", [0, 1, -0.1, 1.5, float("nan")])
def test_ring_refuses_weights_outside_0_1(w0):
    with pytest.raises(ValueError, match=r"ring: self_weight must be in \(0, 1\), got"):
        topologies.ring(4, self_weight=w0)


@pytest.mark.parametrize(
    "name, near",
    [
        ("rng", "ring"),
        ("Ring", "ring"),
        ("shift1", "shift_one"),
        ("exponential", "exp"),
    ],
)
def test_unknown_names_get_a_suggestion(name, near):
    with pytest.raises(ValueError, match=f"some_caller: .*got '{name}'.*mean .*{near}"):
        topologies.resolve(name, 4, "some_caller")


def test_hopeless_names_list_the_known_ones():
    with pytest.raises(ValueError, match="one of ring, complete, .*; got '#'.$"):
        topologies.resolve("#", 4, "some_caller")


@pytest.mark.parametrize("what", [None, 3, ["ring"], {"ring": 1}])
def test_what_is_no_topology_is_refused(what):
    with pytest.raises(ValueError, match="must be a Topology or one of ring, complete"):
        topologies.require_known(what, "some_caller")


def test_a_matrix_is_told_its_function():
    words = r"^some_caller: topology must be a Topology or a name, .*from_matrix\(W\)"
    for matrix in (jnp.ones((2, 2)), np.ones((2, 2))):
        with pytest.raises(ValueError, match=words):
            topologies.require_known(matrix, "some_caller")


def test_resolve():
    assert topologies.resolve("ring", 6, "f") == topologies.ring(6)
    lazy = topologies.ring(6, self_weight=0.5)
    assert topologies.resolve(lazy, 6, "f") is lazy
    with pytest.raises(ValueError, match="f: .*'ring' was made for n=6.*has 8.*for 8"):
        topologies.resolve(lazy, 8, "f")
    with pytest.raises(ValueError, match="shift_one: .*even, got n=5"):
        topologies.resolve("shift_one", 5, "f")
