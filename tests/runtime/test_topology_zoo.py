"""One table of topologies, and the laws that hold for each of its rows."""

import functools
import math
from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import networkx as nx
import numpy as np
import pytest
import scipy.sparse
from jax.sharding import PartitionSpec as P

from bagua_jax import Workers, primitives, topologies, wire
from bagua_jax.algorithms import decentralized
from bagua_jax.topologies import MixingStep, Send, Topology

MOST = 17  # workers


def log2(n):
    return max(0, math.ceil(math.log2(n)))


def power_of_two(n):
    return n & (n - 1) == 0


def sides(n):
    """Two factors of n, nearest to each other; (1, n) for a prime."""
    return max((a, n // a) for a in range(1, n + 1) if n % a == 0 and a * a <= n)


# --- closed forms, written down from the references' table ---------------------------


def circle(n):
    """Roots of unity w^k, k = 0..n-1."""
    return np.exp(2j * np.pi * np.arange(n) / n)


def ring_spectrum(n, w0=1 / 3):
    return w0 + (1 - w0) * circle(n).real


def torus_spectrum(shape):
    a, b = (2 * circle(side).real for side in shape)
    return (1 + np.add.outer(a, b).ravel()) / 5


def hypercube_spectrum(n):
    d = log2(n)
    return [1 - 2 * j / (d + 1) for j in range(d + 1) for _ in range(math.comb(d, j))]


def star_spectrum(n):
    return [1.0] if n == 1 else [1.0, *[1 - 1 / n] * (n - 2), 0.0]


def path_spectrum(n):
    if n == 2:
        return [1.0, 0.0]  # the Metropolis weight of their only edge is 1/2
    return (1 + 2 * np.cos(np.pi * np.arange(n) / n)) / 3


def static_exponential_spectrum(n):
    hops = 2 ** np.arange(log2(n))
    powers = circle(n)[:, None] ** hops
    return (1 + powers.sum(1)) / (log2(n) + 1)


# --- matrices for from_matrix --------------------------------------------------------


def permutations_mixed(n, count=3, seed=0):
    """A doubly stochastic matrix without symmetry: permutations with random shares."""
    rng = np.random.default_rng([seed, n])
    drawn = [np.arange(n), np.roll(np.arange(n), 1)]  # the ring connects it
    drawn += [rng.permutation(n) for _ in range(count - 1)]
    shares = rng.dirichlet(np.ones(len(drawn)))
    return sum(share * np.eye(n)[p] for share, p in zip(shares, drawn, strict=True))


def pushes(n, seed=0):
    """Columns sum to 1: a directed ring with chords and uneven shares."""
    rng = np.random.default_rng([seed, n])
    w = np.eye(n) + np.roll(np.eye(n), 1, 0) + (rng.random((n, n)) < 0.2)
    w = w * rng.uniform(0.5, 2, (n, n))
    return w / w.sum(0)


def de_bruijn(n):
    """Worker i hears 2i and 2i+1 mod n: exact after log2 n steps, by nilpotency."""
    w = np.zeros((n, n))
    for i in range(n):
        w[i, 2 * i % n] += 0.5
        w[i, (2 * i + 1) % n] += 0.5
    return w


# --- the table -----------------------------------------------------------------------


class Row(NamedTuple):
    """A topology and what is claimed of it."""

    name: str
    make: Callable[[int], Topology]
    id: str = ""  # the name, unless it is a variant
    legal: Callable[[int], bool] = lambda n: True
    period: Callable[[int], int] = lambda n: 1
    eigenvalues: Callable[[int], object] | None = None  # of step 0
    contraction: Callable[[int], float] | None = None
    messages: Callable[[int], float] | None = None
    degree: Callable[[int], int] | None = None
    exact: Callable[[int], int | None] = lambda n: None  # steps to it, where promised
    symmetric: bool = True
    stochastic: str = "double"


def registered(name, **claims):
    return Row(name, topologies.REGISTRY[name], name, **claims)


def variant(name, label, make, **claims):
    return Row(name, make, f"{name}-{label}", **claims)


def base_k_rows():
    for k in (1, 2, 3, 4):
        yield Row(
            "base_k",
            functools.partial(topologies.base_k, k=k),
            "base_k" if k == 1 else f"base_k-{k}",
            period=lambda n, k=k: topologies.base_k(n, k).period,  # its bound: below
            contraction=lambda n: 0.0,
            exact=lambda n, k=k: topologies.base_k(n, k).period if n > 1 else 0,
        )


def matching_contracts(n, pairs):
    return 1 - pairs / (n - 1)


TABLE = [
    registered(
        "ring",
        eigenvalues=ring_spectrum,
        contraction=lambda n: np.abs(ring_spectrum(n)[1:]).max(initial=0),
        messages=lambda n: 2.0 if n > 1 else 0.0,
    ),
    variant(
        "ring",
        "lazy",
        lambda n: topologies.ring(n, self_weight=0.6),
        eigenvalues=lambda n: ring_spectrum(n, 0.6),
    ),
    registered(
        "complete",
        eigenvalues=lambda n: [1.0] + [0.0] * (n - 1),
        contraction=lambda n: 0.0,
        messages=lambda n: n - 1.0,
        degree=lambda n: n - 1,
        exact=lambda n: min(n - 1, 1),
    ),
    registered(
        "static_exponential",
        eigenvalues=static_exponential_spectrum,
        contraction=lambda n: np.abs(static_exponential_spectrum(n)[1:]).max(initial=0),
        messages=lambda n: float(log2(n)),
        degree=log2,
        symmetric=False,
    ),
    registered(
        "one_peer_exponential",
        period=lambda n: max(1, log2(n)),
        messages=lambda n: float(n > 1),
        degree=lambda n: min(n - 1, 1),
        exact=lambda n: log2(n) if power_of_two(n) else None,
        symmetric=False,
    ),
    registered(
        "shift_one",
        legal=lambda n: n % 2 == 0,
        period=lambda n: n // 2,
        eigenvalues=lambda n: [1.0] * (n // 2) + [0.0] * (n // 2),
        contraction=lambda n: 0.0 if n == 2 else abs(math.cos(2 * math.pi / n)),
        messages=lambda n: 1.0,
        degree=lambda n: 1,
        exact=lambda n: {2: 1, 4: 2}.get(n),
    ),
    registered(
        "directed_ring",
        eigenvalues=lambda n: (1 + circle(n)) / 2,
        contraction=lambda n: math.cos(math.pi / n) if n > 1 else 0.0,
        messages=lambda n: float(n > 1),
        degree=lambda n: min(n - 1, 1),
        symmetric=False,
    ),
    registered(
        "path",
        eigenvalues=path_spectrum,
        contraction=lambda n: np.abs(path_spectrum(n)[1:]).max(initial=0),
        messages=lambda n: 2 * (n - 1) / n,
        degree=lambda n: min(n - 1, 2),
    ),
    registered(
        "star",
        eigenvalues=star_spectrum,
        contraction=lambda n: 1 - 1 / n if n > 2 else 0.0,
        messages=lambda n: 2 * (n - 1) / n,
        degree=lambda n: n - 1,
    ),
    registered(
        "binary_tree",
        messages=lambda n: 2 * (n - 1) / n,
        degree=lambda n: {1: 0, 2: 1, 3: 2, 4: 2}.get(n, 3),
    ),
    registered(
        "torus",
        legal=lambda n: sides(n)[0] > 1,
        eigenvalues=lambda n: torus_spectrum(sides(n)),
        messages=lambda n: sum(2.0 if side > 2 else 1.0 for side in sides(n)),
        degree=lambda n: sum(2 if side > 2 else 1 for side in sides(n)),
    ),
    variant(
        "torus",
        "tall",
        lambda n: topologies.torus(n, (n // 2, 2)),
        legal=lambda n: n % 2 == 0 and n > 2,
        eigenvalues=lambda n: torus_spectrum((n // 2, 2)),
    ),
    registered(
        "hypercube",
        legal=power_of_two,
        eigenvalues=hypercube_spectrum,
        contraction=lambda n: (log2(n) - 1) / (log2(n) + 1) if n > 1 else 0.0,
        messages=lambda n: float(log2(n)),
        degree=log2,
    ),
    *base_k_rows(),
    registered(
        "random_matching",
        legal=lambda n: n % 2 == 0,
        period=lambda n: 8,
        eigenvalues=lambda n: [1.0] * (n // 2) + [0.0] * (n // 2),
        messages=lambda n: 1.0,
        degree=lambda n: 1,
    ),
    variant(
        "random_matching",
        "one_pair",
        lambda n: topologies.random_matching(n, period=40, seed=2, pairs=1),
        legal=lambda n: n > 1,
        period=lambda n: 40,
        eigenvalues=lambda n: [1.0] * (n - 1) + [0.0],
        messages=lambda n: 2 / n,
        degree=lambda n: 1,
    ),
    registered("erdos_renyi"),
    variant("erdos_renyi", "dense", lambda n: topologies.erdos_renyi(n, 0.7, seed=5)),
    variant(
        "from_edges",
        "wheel",
        lambda n: topologies.from_edges(n, nx.wheel_graph(n).edges),
        messages=lambda n: 2 * nx.wheel_graph(n).number_of_edges() / n,
        degree=lambda n: max(n - 1, 0),
    ),
    variant(
        "from_networkx",
        "circular_ladder",
        lambda n: topologies.from_networkx(nx.circular_ladder_graph(n // 2)),
        legal=lambda n: n % 2 == 0 and n > 5,
        # Its degree is 3, so that all weights are 1/4: a ring times a pair.
        eigenvalues=lambda n: (
            (1 + np.add.outer(2 * circle(n // 2).real, [1, -1]).ravel()) / 4
        ),
        degree=lambda n: 3,
    ),
    variant(
        "from_matrix",
        "permutations",
        lambda n: topologies.from_matrix(permutations_mixed(n)),
        symmetric=False,
    ),
    variant(
        "from_matrix",
        "sequence",
        lambda n: topologies.from_matrix(
            [permutations_mixed(n, seed=s) for s in range(3)]
        ),
        period=lambda n: 3,
        symmetric=False,
    ),
    variant(
        "from_matrix",
        "de_bruijn",
        lambda n: topologies.from_matrix(de_bruijn(n)),
        legal=power_of_two,
        contraction=lambda n: 0.0,
        exact=log2,
        symmetric=False,
    ),
    variant(
        "from_matrix",
        "columns",
        lambda n: topologies.from_matrix(pushes(n), stochastic="column"),
        symmetric=False,
        stochastic="column",
    ),
    variant(
        "from_matrix",
        "rows",
        lambda n: topologies.from_matrix(pushes(n).T, stochastic="row"),
        symmetric=False,
        stochastic="row",
    ),
]

every_row = pytest.mark.parametrize("row", TABLE, ids=lambda row: row.id)


@functools.cache
def built(row):
    """Every legal topology of a row."""
    return [row.make(n) for n in range(1, MOST + 1) if row.legal(n)]


def matrices(topology):
    return [topology.mixing_matrix(step) for step in range(topology.period)]


def period_product(topology):
    """W_{T-1} ... W_1 W_0."""
    return functools.reduce(lambda p, w: w @ p, matrices(topology), np.eye(topology.n))


def assert_same_multiset(found, expected, atol, message=""):
    """Each expected number takes away the nearest one that is left."""
    left = list(np.asarray(found, complex))
    assert len(left) == len(list(expected)), message
    for value in np.asarray(expected, complex):
        nearest = min(left, key=lambda x, v=value: abs(x - v))
        assert abs(nearest - value) <= atol, (message, value, nearest)
        left.remove(nearest)


def test_every_name_has_a_row():
    assert set(topologies.REGISTRY) <= {row.id for row in TABLE}
    parametrized = {"from_edges", "from_matrix", "from_networkx"}
    assert parametrized <= {row.name for row in TABLE}
    assert set(topologies.REGISTRY) | parametrized == {row.name for row in TABLE}
    assert {name for name, f in vars(topologies).items() if callable(f)} >= parametrized
    assert all(len(built(row)) >= 3 for row in TABLE)


# --- laws ----------------------------------------------------------------------------


@every_row
def test_sends_are_partial_permutations(row):
    for topology in built(row):
        for mixing in topology.steps:
            assert len(mixing.self_weights) == topology.n
            for send in mixing.sends:
                sources, destinations = zip(*send.pairs, strict=True)
                workers = set(range(topology.n))
                assert len(send.weights) == topology.n
                assert len(set(sources)) == len(sources), topology.n
                assert len(set(destinations)) == len(destinations), topology.n
                assert workers.issuperset(sources) and workers.issuperset(destinations)
                for i in workers:
                    assert (send.weights[i] > 0) == (i in destinations)


@every_row
def test_topologies_are_hashable_values_of_python_numbers(row):
    for topology in built(row):
        assert topology == row.make(topology.n) and hash(topology) is not None
        for mixing in topology.steps:
            assert {type(w) for w in mixing.self_weights} == {float}
            for send in mixing.sends:
                assert {type(w) for w in send.weights} == {float}
                assert {type(i) for pair in send.pairs for i in pair} == {int}


@every_row
def test_name_period_and_sums(row):
    for topology in built(row):
        n = topology.n
        assert (topology.name, topology.period) == (row.name, row.period(n))
        rows = columns = True
        for w in matrices(topology):
            assert w.shape == (n, n) and w.dtype == np.float64 and (w >= 0).all()
            rows &= bool(np.abs(w.sum(1) - 1).max() < 1e-12)
            columns &= bool(np.abs(w.sum(0) - 1).max() < 1e-12)
        assert (topology.row_stochastic, topology.column_stochastic) == (rows, columns)
        assert topology.doubly_stochastic == (rows and columns)
        if row.stochastic == "double":
            assert rows and columns, n
        elif n > 2:  # and only those that are stated
            assert (rows, columns) == (row.stochastic == "row", row.stochastic != "row")


@every_row
def test_symmetry_is_as_stated(row):
    for topology in built(row):
        same = all(np.abs(w - w.T).max() < 1e-12 for w in matrices(topology))
        assert topology.symmetric == same
        assert same or not row.symmetric, topology.n
    assert row.symmetric or not same  # the largest shows that it is not


@every_row
def test_everybody_hears_of_everybody(row):
    for topology in built(row):
        graph = nx.DiGraph([(i, i) for i in range(topology.n)])
        for w in matrices(topology):
            graph.add_edges_from(np.argwhere(w.T > 0).tolist())
        assert topology.connected and nx.is_strongly_connected(graph), topology.n
        assert 0 <= topology.contraction < 1


@every_row
def test_rounds_degrees_and_messages(row):
    """As few permutations as the busiest worker needs; rings of two send twice."""
    for topology in built(row):
        degrees, links = [], 0
        for w, mixing in zip(matrices(topology), topology.steps, strict=True):
            off = (w > 0) & ~np.eye(topology.n, dtype=bool)
            degrees.append(max(off.sum(0).max(), off.sum(1).max()))
            links += off.sum()
            if "ring" not in row.name or topology.n > 2:
                assert len(mixing.sends) == degrees[-1], topology.n
        assert topology.max_degree == max(degrees)
        if row.degree is not None:
            assert topology.max_degree == row.degree(topology.n), topology.n
        if (row.name, topology.n) != ("ring", 2):
            mean = links / topology.n / topology.period
            assert topology.messages == pytest.approx(mean), topology.n
        if row.messages is not None:
            expected = pytest.approx(row.messages(topology.n))
            assert topology.messages == expected, topology.n


@every_row
def test_eigenvalues(row):
    for topology in built(row):
        for step in range(min(topology.period, 4)):
            w, found = topology.mixing_matrix(step), topology.eigenvalues(step)
            assert found.shape == (topology.n,) and found.dtype == np.complex128
            assert abs(found[0] - 1) < 1e-12
            assert (np.diff(np.abs(found)) < 1e-9).all()  # the largest first
            assert found.sum() == pytest.approx(np.trace(w), abs=1e-10)
            squares = pytest.approx(np.trace(w @ w), abs=1e-10)
            assert (found**2).sum() == squares
        if row.eigenvalues is not None:
            expected = row.eigenvalues(topology.n)
            found = topology.eigenvalues()
            assert_same_multiset(found, expected, 1e-12, f"n={topology.n}")


@every_row
def test_contraction_is_the_second_eigenvalue_of_the_period(row):
    for topology in built(row):
        # Of W itself, not W - J: the eigenvalue 1 is taken away by hand.
        found = np.sort(np.abs(np.linalg.eigvals(period_product(topology))))
        second = found[-2] if topology.n > 1 else 0.0
        power = topology.contraction**topology.period
        # A defective eigenvalue 0 (de Bruijn) is found as eps^(1/multiplicity).
        assert power == pytest.approx(second, rel=1e-6, abs=0 if power else 1e-3)
        assert topology.spectral_gap == 1 - topology.contraction
        if row.contraction is not None:
            expected = pytest.approx(row.contraction(topology.n), abs=1e-12)
            assert topology.contraction == expected, topology.n


@every_row
def test_exact_averaging_where_promised_and_nowhere_else(row):
    for topology in built(row):
        if not topology.doubly_stochastic:
            continue
        promised = row.exact(topology.n)
        product, found = np.eye(topology.n), None
        for step in range(topology.period + topology.n.bit_length()):
            if np.abs(product - 1 / topology.n).max() < 1e-14:
                found = step
                break
            product = topology.mixing_matrix(step) @ product
        if promised is not None:
            assert found == promised, topology.n
        assert (topology.contraction == 0) == (found is not None), topology.n
        assert topology.steps_to(0) == (math.inf if found is None else found)


@every_row
def test_steps_to_against_brute_force(row):
    for topology in built(row)[::3]:
        if not topology.doubly_stochastic:
            with pytest.raises(
                ValueError, match="not doubly stochastic, so .*push-sum"
            ):
                topology.steps_to(0.1)
            continue
        product, left = np.eye(topology.n), [0.9, 0.3, 1.1e-2, 1.1e-4]
        for step in range(2000):
            norm = np.linalg.norm(product - 1 / topology.n, 2)
            while left and norm <= left[0]:
                assert topology.steps_to(left.pop(0)) == step, topology.n
            if not left:
                break
            product = topology.mixing_matrix(step) @ product
        assert len(left) <= 1  # a path of 17 takes more than 1000


@every_row
def test_d_fp_s_is_the_matrix(row):
    """The permutations, in simulation, do what the matrix says."""
    topology = built(row)[-2]
    x = np.random.default_rng(0).standard_normal((topology.n, 5)).astype(np.float32)

    @jax.jit
    def mixed(x, step):
        def of_one(v):
            return primitives.d_fp_s(v, topology, axis_name="workers", step=step)

        return jax.vmap(of_one, axis_name="workers")(x)

    for step in range(min(topology.period, 9) + 1):
        expected = topology.mixing_matrix(step) @ x
        np.testing.assert_allclose(mixed(x, step), expected, atol=1e-6)


@pytest.mark.parametrize("kind", ["double", "row", "column"])
@pytest.mark.parametrize("n", [1, 2, 3, 8, 33])
def test_float32_weights_are_made_exact(n, kind):
    """Sums of a matrix in float32 are off by rounding; the graph is the same one."""
    exact = permutations_mixed(n) if kind == "double" else pushes(n)
    exact = exact.T if kind == "row" else exact
    narrow = np.asarray(exact, np.float32)
    topology = topologies.from_matrix(jnp.asarray(narrow), stochastic=kind)
    w = topology.mixing_matrix()
    assert topology.column_stochastic or kind == "row"
    assert topology.row_stochastic or kind == "column"
    np.testing.assert_array_equal(w == 0, exact == 0)
    np.testing.assert_allclose(w, exact, atol=2e-7 * n)
    ring = topologies.ring(max(n, 3)).mixing_matrix()
    assert topologies.from_matrix(ring.astype(np.float32)).symmetric
    with pytest.raises(ValueError, match="must sum to 1 within .*Normalize"):
        topologies.from_matrix(narrow * np.float32(1.001), stochastic=kind)


def test_graphs_and_matrices_of_networkx():
    graph = nx.petersen_graph()
    weights = topologies.from_networkx(graph)
    sparse = scipy.sparse.csr_array(weights.mixing_matrix())
    np.testing.assert_array_equal(
        topologies.from_matrix(sparse).mixing_matrix(), weights.mixing_matrix()
    )
    adjacency = nx.to_numpy_array(graph)
    for given in (adjacency, nx.adjacency_matrix(graph)):
        with pytest.raises(ValueError, match=r"adjacency matrix.*from_networkx"):
            topologies.from_matrix(given)
    with pytest.raises(ValueError, match=r"from_matrix: W must be a matrix.*networkx"):
        topologies.from_matrix(graph)
    for given, cure in ((graph, "from_networkx"), (adjacency, "from_matrix")):
        with pytest.raises(ValueError, match=f"^decentralized: .*{cure}"):
            decentralized(axis_name="workers", topology=given)


@pytest.mark.parametrize("name", ["path", "star", "torus", "base_k", "from_matrix"])
def test_compiled_bytes_are_the_messages(name, devices):
    """On devices, who stays out of a permutation sends nothing."""
    n, size = len(devices), 6
    columns = topologies.from_matrix(pushes(n), stochastic="column")
    topology = columns if name == "from_matrix" else topologies.REGISTRY[name](n)
    x = np.random.default_rng(0).standard_normal((n, size)).astype(np.float32)

    def of_one(v, step):
        return primitives.d_fp_s(v, topology, axis_name="workers", step=step)

    step = np.int32(topology.period - 1)
    mixed = Workers.devices(n).spmd(of_one, in_specs=(P("workers"), P()))
    counted = wire.count(mixed.lower(x, step).compile())
    assert counted.bytes_per_worker == pytest.approx(topology.messages * 4 * size)
    rounds = sum(len(s.sends) for s in topology.steps) / topology.period
    assert counted.messages_per_worker == pytest.approx(rounds)
    expected = topology.mixing_matrix(step) @ x
    np.testing.assert_allclose(mixed(x, step), expected, atol=1e-6)


# --- base_k --------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 2, 3, 4])
def test_base_k_is_exact_for_every_n(k):
    for n in range(1, 34):
        topology = topologies.base_k(n, k)
        assert np.abs(period_product(topology) - 1 / n).max() < 1e-15, n
        assert topology.period <= 2 * math.log(n, k + 1) + 2  # the paper's theorem
        assert topology.steps_to(0) == (topology.period if n > 1 else 0)
        assert topology.symmetric and topology.doubly_stochastic
        for w, mixing in zip(matrices(topology), topology.steps, strict=True):
            linked = (w > 0) & ~np.eye(n, dtype=bool)
            assert linked.sum(1).max() <= k and linked.sum(0).max() <= k
            assert len(mixing.sends) <= k


@pytest.mark.parametrize("n", [3, 5, 7, 11, 13, 17, 19, 23, 29, 31])
def test_base_k_leaves_at_most_one_worker_alone(n):
    """Who has nobody to meet averages with others who have not, as in the paper."""
    for k in range(1, min(n - 1, 5)):
        for w in matrices(topologies.base_k(n, k)):
            assert (np.diag(w) == 1).sum() <= 1


@pytest.mark.parametrize(
    "n, k, period",
    [
        (2, 1, 1),
        (3, 1, 3),
        (6, 1, 4),  # the simple graph takes 5: two sets of three, then pairs
        (8, 1, 3),
        (25, 1, 9),
        (9, 2, 2),
        (12, 3, 2),
        (22, 4, 4),  # two sets of eleven would take 5
        (25, 4, 2),
        (7, 6, 1),
        (33, 40, 1),
    ],
)
def test_base_k_periods(n, k, period):
    assert topologies.base_k(n, k).period == period


def test_base_2_of_powers_of_two_is_the_hypercube_one_dimension_a_step():
    for d in range(1, 5):
        topology = topologies.base_k(2**d)
        met = [{abs(a - b) for a, b in s.sends[0].pairs} for s in topology.steps]
        assert met == [{2**t} for t in range(d)]


@pytest.mark.parametrize("k", [0, -1, 1.5, True, None])
def test_base_k_refuses_k(k):
    with pytest.raises(ValueError, match="base_k: k must be a positive integer, got"):
        topologies.base_k(4, k)


# --- Metropolis-Hastings -------------------------------------------------------------


def metropolis(graph):
    """W from networkx's degrees, one edge at a time."""
    nodes = sorted(graph)
    w = np.zeros((len(nodes), len(nodes)))
    simple = nx.Graph(graph)
    simple.remove_edges_from(list(nx.selfloop_edges(simple)))
    for a, b in simple.edges:
        i, j = nodes.index(a), nodes.index(b)
        w[i, j] = w[j, i] = 1 / (1 + max(simple.degree[a], simple.degree[b]))
    return w + np.diag(1 - w.sum(1))


GRAPHS = {
    "petersen": nx.petersen_graph(),
    "barbell": nx.barbell_graph(4, 3),
    "lollipop": nx.lollipop_graph(5, 4),
    "karate": nx.karate_club_graph(),
    "random": nx.connected_watts_strogatz_graph(15, 4, 0.5, seed=3),
    "one": nx.empty_graph(1),
    "letters": nx.Graph([("d", "a"), ("a", "c"), ("c", "b"), ("c", "d")]),
    "grid": nx.grid_2d_graph(3, 4),
    "parallel": nx.MultiGraph([(0, 1), (0, 1), (1, 2), (1, 1)]),
}


@pytest.mark.parametrize("name", GRAPHS)
def test_networkx_is_the_oracle(name):
    topology = topologies.from_networkx(GRAPHS[name])
    expected = metropolis(GRAPHS[name])
    np.testing.assert_allclose(topology.mixing_matrix(), expected, atol=1e-15)
    assert topology.max_degree == len(topology.steps[0].sends)


@pytest.mark.parametrize("n", range(1, MOST + 1))
def test_named_graphs_are_networkx_s(n):
    for name, graph in (
        ("path", nx.path_graph(n)),
        ("star", nx.star_graph(n - 1)),
        ("binary_tree", nx.full_rary_tree(2, n)),
    ):
        w = topologies.REGISTRY[name](n).mixing_matrix()
        np.testing.assert_allclose(w, metropolis(graph), atol=1e-15)
    laplacian = np.diag([n - 1, *[1] * (n - 1)]) if n > 1 else np.zeros((1, 1))
    laplacian = laplacian - nx.to_numpy_array(nx.star_graph(n - 1))
    star = topologies.star(n).mixing_matrix()
    np.testing.assert_allclose(star, np.eye(n) - laplacian / n, atol=1e-15)


@pytest.mark.parametrize("shape", [(3, 3), (3, 5), (4, 4), (2, 3), (5, 2), (2, 2)])
def test_torus_is_networkx_s_grid(shape):
    graph = nx.grid_2d_graph(*shape, periodic=True)
    adjacency = nx.to_numpy_array(graph, nodelist=sorted(graph), dtype=bool)
    w = topologies.torus(math.prod(shape), shape).mixing_matrix()
    np.testing.assert_array_equal(w > 0, adjacency | np.eye(len(w), dtype=bool))
    np.testing.assert_array_equal(np.diag(w), 0.2)
    weights = {0.4 if side == 2 else 0.2 for side in shape}
    assert set(w[adjacency]) == weights


def test_torus_contraction_for_large_sides():
    for a, b in ((5, 5), (7, 3), (9, 5)):
        expected = (3 + 2 * math.cos(2 * math.pi / max(a, b))) / 5
        contraction = topologies.torus(a * b, (a, b)).contraction
        assert contraction == pytest.approx(expected, abs=1e-12)
    assert topologies.torus(16).eigenvalues()[1:3].real.round(12).tolist() == [0.6, 0.6]
    assert topologies.torus(16).eigenvalues().real.min() == pytest.approx(-0.6)
    assert topologies.torus(24) == topologies.torus(24, (4, 6))


def test_hypercube_is_networkx_s():
    for d in range(1, 5):
        graph = nx.hypercube_graph(d)
        adjacency = nx.to_numpy_array(graph, nodelist=sorted(graph))
        w = topologies.hypercube(2**d).mixing_matrix()
        expected = (adjacency + np.eye(2**d)) / (d + 1)
        np.testing.assert_allclose(w, expected, atol=1e-15)


def test_directed_messages_go_up():
    """Worker 0 hears the last one; in the ring both, in the exponential graph 3 too."""
    for name, heard in (
        ("directed_ring", [0, 4]),
        ("ring", [0, 1, 4]),
        ("static_exponential", [0, 1, 3, 4]),
    ):
        row = topologies.REGISTRY[name](5).mixing_matrix()[0]
        assert np.flatnonzero(row).tolist() == heard


# --- drawn graphs --------------------------------------------------------------------


@pytest.mark.parametrize("n, pairs", [(4, None), (8, None), (12, None), (9, 2), (7, 1)])
def test_energy_of_random_matchings(n, pairs):
    """What is left of the squared disagreement, within 5 standard errors."""
    x = np.arange(n) - (n - 1) / 2
    left = []
    for seed in range(40):
        topology = topologies.random_matching(n, period=50, seed=seed, pairs=pairs)
        left += [np.sum((w @ x) ** 2) / np.sum(x**2) for w in matrices(topology)]
    expected = matching_contracts(n, n // 2 if pairs is None else pairs)
    if pairs is None:
        assert expected == pytest.approx((n - 2) / (2 * (n - 1)))
    error = np.std(left) / math.sqrt(len(left))
    assert abs(np.mean(left) - expected) < 5 * error
    assert error < 0.01


def test_matchings_are_drawn_alike():
    """The 15 perfect matchings of six: chi-square below its 1 - 1e-6 quantile."""
    drawn = topologies.random_matching(6, period=3000, seed=7)
    counts = Counter(step.sends[0].pairs for step in drawn.steps)
    assert len(counts) == 15
    assert sum((c - 200) ** 2 / 200 for c in counts.values()) < 54.6
    assert topologies.random_matching(6, seed=1) != topologies.random_matching(
        6, seed=2
    )


def test_long_periods_do_not_underflow():
    """The product of 3000 matchings is below 1e-400; its rate per step is not."""
    topology = topologies.random_matching(10, period=3000)
    assert 0.5 < topology.contraction < 0.7  # 2/3 is the root mean square
    assert topology.steps_to(0) == math.inf
    assert 5 < topology.steps_to(1e-3) < 60


def test_erdos_renyi_edges_and_seeds():
    n, p = 14, 0.5
    means = [topologies.erdos_renyi(n, p, seed=s).messages for s in range(100)]
    pairs = math.comb(n, 2)
    error = 2 / n * math.sqrt(pairs * p * (1 - p) / len(means))
    assert abs(np.mean(means) - p * (n - 1)) < 5 * error
    assert topologies.erdos_renyi(n) == topologies.erdos_renyi(n, 2 * math.log(n) / n)
    assert topologies.erdos_renyi(n, seed=1) != topologies.erdos_renyi(n, seed=2)
    full = topologies.erdos_renyi(6, 1.0).mixing_matrix()
    np.testing.assert_allclose(full, topologies.complete(6).mixing_matrix(), atol=1e-15)


def test_erdos_renyi_draws_again_until_connected():
    """At this p fewer than a third of the graphs are; all that come out are."""
    n, p = 10, 0.2
    rng = np.random.default_rng(0)
    first = [nx.gnp_random_graph(n, p, seed=int(s)) for s in rng.integers(1e6, size=60)]
    assert sum(map(nx.is_connected, first)) < 20
    assert all(topologies.erdos_renyi(n, p, seed=s).connected for s in range(30))


# --- matrices ------------------------------------------------------------------------


def test_any_matrix_comes_back_from_as_many_sends_as_its_degree():
    rng = np.random.default_rng(0)
    for _ in range(300):
        n = int(rng.integers(2, 13))
        w = rng.random((n, n)) * (rng.random((n, n)) < rng.random()) + np.eye(n)
        w /= w.sum(1, keepdims=True)
        topology = topologies.from_matrix(w, stochastic="row")
        off = (w > 0) & ~np.eye(n, dtype=bool)
        np.testing.assert_array_equal(topology.mixing_matrix(), w)
        assert len(topology.steps[0].sends) == max(off.sum(0).max(), off.sum(1).max())


def test_matrices_of_topologies_make_the_same_topologies():
    for name, n in (("ring", 9), ("base_k", 11), ("star", 5), ("shift_one", 6)):
        topology = topologies.REGISTRY[name](n)
        again = topologies.from_matrix(matrices(topology), name=name)
        assert again.period == topology.period
        for step in range(topology.period):
            np.testing.assert_allclose(
                again.mixing_matrix(step), topology.mixing_matrix(step), atol=1e-15
            )
        assert topologies.resolve(again, n, "f") is again


@pytest.mark.parametrize("n", [2, 5, 12])
def test_push_sum_finds_the_mean_on_columns(n):
    """The ratio forgets Perron's bias, which the values alone keep."""
    topology = topologies.from_matrix(pushes(n, seed=4), stochastic="column")
    w = topology.mixing_matrix()
    x = np.random.default_rng(1).standard_normal(n)
    y, mass = x.copy(), np.ones(n)
    for _ in range(400):
        y, mass = w @ y, w @ mass
        assert y.sum() == pytest.approx(x.sum(), abs=1e-12)
        assert mass.sum() == pytest.approx(n, abs=1e-12)
    np.testing.assert_allclose(y / mass, x.mean(), atol=1e-12)
    perron = np.linalg.svd(w - np.eye(n))[2][-1]
    np.testing.assert_allclose(mass / n, perron / perron.sum(), atol=1e-12)
    assert np.abs(mass - 1).max() > 0.05


def test_disconnected_matrices_are_told():
    apart = topologies.from_matrix(np.kron(np.eye(2), np.full((2, 2), 0.5)))
    assert not apart.connected and apart.contraction == pytest.approx(1)
    assert apart.steps_to(0.9) == math.inf
    one_way = topologies.from_matrix([[0.5, 0], [0.5, 1]], stochastic="column")
    assert not one_way.connected


W = np.full((3, 3), 1 / 3)
UNEVEN = np.array([[0.5, 0.5, 0], [0.25, 0.5, 0.25], [0, 0.5, 0.5]])


@pytest.mark.parametrize(
    "w, options, words",
    [
        (UNEVEN, {}, "every column must sum to 1 within 1e-12, and column 1 of step 0"
         " sums to 1.5. Normalize in float64; .*stochastic='row'"),
        (UNEVEN.T, {}, "every row must sum to 1 .*row 1 of step 0 .*'column'"),
        (UNEVEN, {"stochastic": "column"}, "every column must"),
        (UNEVEN.T, {"stochastic": "row"}, "every row must"),
        ([W, W, UNEVEN.T], {}, "row 1 of step 2"),
        (W.astype(np.float16), {}, "sum to 1 within 1e-12.*Normalize in float64"),
        (np.eye(3) * 1.5 - W / 2, {}, r"numbers >= 0, and W\[0, 1\] of step 0 is -0.1"),
        (W * np.nan, {}, "numbers >= 0, and .* nan"),
        (W * np.inf, {}, "sums to inf"),
        (W[:2], {}, r"one matrix \[n, n\], or several .*shape \(2, 3\)"),
        (W[0], {}, r"the shape \(3,\)"),
        ([], {}, r"the shape \(0,\)"),
        ([[1.0], [0.5, 0.5]], {}, "must be an array of real numbers"),
        (W * 1j, {}, "must be an array of real numbers: they are complex"),
        ("ring", {}, "must be an array of real numbers"),
        (W, {"stochastic": "both"}, "one of 'double', 'row', 'column'; got 'both'"),
        (UNEVEN, {"name": "mine"}, "^mine: every column"),
    ],
)  # fmt: skip
def test_from_matrix_refuses(w, options, words):
    with pytest.raises(ValueError, match=words):
        topologies.from_matrix(w, **options)


# --- refusals ------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(topologies.REGISTRY))
@pytest.mark.parametrize("n", [0, -1, 2.5, True, "4", None, 4.0])
def test_what_is_no_number_of_workers_is_refused(name, n):
    with pytest.raises(
        ValueError, match=f"^{name}: n must be a positive integer, got "
    ):
        topologies.REGISTRY[name](n)


@pytest.mark.parametrize("name", list(topologies.REGISTRY))
def test_numpy_integers_are_integers(name):
    topology = topologies.REGISTRY[name](np.int64(8))
    assert topology == topologies.REGISTRY[name](8) and topology.contraction >= 0


CURES = {
    "shift_one": "one_peer_exponential' or 'ring'",
    "torus": "Use 'ring', which takes any n",
    "hypercube": "Use 'static_exponential' or 'base_k', which take any n",
    "random_matching": "Use an even n, .*'base_k' or 'ring'",
}


@every_row
def test_illegal_n_is_refused_with_the_cure(row):
    illegal = [n for n in range(1, MOST + 1) if not row.legal(n)]
    if row.id not in topologies.REGISTRY:
        return
    assert bool(illegal) == (row.name in CURES)
    for n in illegal:
        with pytest.raises(ValueError, match=f"{row.name}: .*got n={n}.*"):
            row.make(n)
        with pytest.raises(ValueError, match=CURES[row.name]):
            topologies.resolve(row.name, n, "f")


@pytest.mark.parametrize(
    "shape", [(1, 12), (12, 1), (3, 5), (2, 2, 3), (12,), (-3, -4), (0, 12)]
)
def test_torus_refuses_shapes(shape):
    with pytest.raises(ValueError, match="shape must be two sides .*n=12, got .*Leave"):
        topologies.torus(12, shape)


@pytest.mark.parametrize(
    "options, words",
    [
        ({"period": 0}, "period must be an integer at least 1, got 0"),
        ({"period": 1.5}, "period must be an integer at least 1, got 1.5"),
        ({"pairs": 0}, "pairs must be an integer from 1 to n/2 = 4, got 0"),
        ({"pairs": 5}, "pairs must be an integer from 1 to n/2 = 4, got 5"),
        ({"pairs": True}, "pairs must be an integer .*got True"),
    ],
)
def test_random_matching_refuses(options, words):
    with pytest.raises(ValueError, match=f"random_matching: {words}"):
        topologies.random_matching(8, **options)


@pytest.mark.parametrize("p", [0, -0.5, 1.01, float("nan")])
def test_erdos_renyi_refuses_p(p):
    with pytest.raises(ValueError, match=r"erdos_renyi: p must be in \(0, 1\], got"):
        topologies.erdos_renyi(5, p)


def test_erdos_renyi_gives_up_on_hopeless_p():
    with pytest.raises(ValueError, match="none of 1000 .*n=8 and p=0.01.*above ln"):
        topologies.erdos_renyi(8, 0.01)


@pytest.mark.parametrize(
    "edges, words",
    [
        ([(0, 1), (1, 3)], r"edges must join workers 0..2, got \(1, 3\)"),
        ([(0, -1)], r"edges must join workers 0..2, got \(0, -1\)"),
        ([(0, 1)], "the graph must be connected, .*its 3 workers"),
        ([(0, 0), (1, 1), (2, 2)], "the graph must be connected"),
        ([], "the graph must be connected"),
    ],
)
def test_from_edges_refuses(edges, words):
    with pytest.raises(ValueError, match=f"from_edges: {words}"):
        topologies.from_edges(3, edges)


@pytest.mark.parametrize(
    "graph, words",
    [
        (nx.DiGraph([(0, 1), (1, 0)]), "must be undirected.*stochastic='column'"),
        (nx.Graph(), "at least one node"),
        (nx.Graph([(0, 1), (2, 3)]), "the graph must be connected"),
        (nx.Graph([(0, "a")]), "nodes must sort.*convert_node_labels_to_integers"),
    ],
)
def test_from_networkx_refuses(graph, words):
    with pytest.raises(ValueError, match=f"from_networkx: .*{words}"):
        topologies.from_networkx(graph)


@pytest.mark.parametrize("graph", [np.eye(3), [(0, 1)], None, "ring"])
def test_from_networkx_refuses_what_is_no_graph(graph):
    with pytest.raises(
        TypeError, match="from_networkx: graph must be a networkx.Graph"
    ):
        topologies.from_networkx(graph)


@pytest.mark.parametrize("eps", [1, -1e-3, 2.0, float("nan")])
def test_steps_to_refuses_eps(eps):
    with pytest.raises(ValueError, match=r"steps_to: eps must be in \[0, 1\), got"):
        topologies.ring(4).steps_to(eps)


def test_theory_s_numbers():
    """Values printed in the table of mixing matrices."""
    assert topologies.path(8).contraction == pytest.approx(0.9493, abs=5e-5)
    assert topologies.ring(16).contraction == pytest.approx(0.9493, abs=5e-5)
    for n, cosine in ((6, 0.5), (8, 0.7071), (16, 0.9239), (32, 0.9808)):
        found = topologies.shift_one(n).contraction
        assert found == pytest.approx(cosine, abs=5e-5)
        assert topologies.directed_ring(n // 2).contraction == pytest.approx(found)
    for n in range(4, MOST + 1, 2):
        assert topologies.ring(n).eigenvalues().real.min() == pytest.approx(-1 / 3)
    assert matching_contracts(8, 4) == pytest.approx(0.4286, abs=5e-5)


def test_exactness_is_told_from_fast_decay():
    """W = a I + (1-a) J leaves a of every disagreement, however small a is."""
    for a in (1e-3, 1e-6):
        topology = topologies.from_matrix(a * np.eye(5) + (1 - a) / 5)
        assert topology.contraction == pytest.approx(a, rel=1e-6)
        assert topology.steps_to(0) == math.inf
        assert topology.steps_to(a**20 * 1.1) == 20
    assert topologies.from_matrix(W).steps_to(0) == 1
    e = 1e-7  # of a weight short of the exact mean in two steps
    pairs = np.kron(np.eye(2), np.full((2, 2), 0.5))
    almost = np.kron([[0.5 + e, 0.5 - e], [0.5 - e, 0.5 + e]], np.eye(2))
    topology = topologies.from_matrix([pairs, almost])
    assert topology.contraction == pytest.approx(math.sqrt(2 * e), rel=1e-6)
    assert topology.steps_to(0) == math.inf and topology.steps_to(3 * e) == 2


def test_negative_weights_are_not_stochastic():
    swap = Send(((0, 1), (1, 0)), (-0.5, -0.5))
    topology = Topology("signed", 2, (MixingStep((1.5, 1.5), (swap,)),))
    assert topology.symmetric and not topology.doubly_stochastic
    assert not topology.row_stochastic and not topology.column_stochastic


# --- large graphs ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "messages"),
    [
        (lambda: topologies.complete(1_025), "1,049,600"),
        (lambda: topologies.shift_one(1_450), "1,051,250"),
        (lambda: topologies.random_matching(4_096, 1_000), "4,096,000"),
        (lambda: topologies.base_k(4_096, 4_095), "16,773,120"),
        (lambda: topologies.erdos_renyi(1_100, 0.99), "1,19"),
        (lambda: topologies.from_matrix(np.full((1_100,) * 2, 1 / 1_100)), "1,208,900"),
    ],
)
def test_more_messages_than_can_be_listed_are_refused(make, messages):
    with pytest.raises(ValueError, match=f"at most 1,048,576 messages.*has {messages}"):
        make()


@pytest.mark.parametrize("name", ["path", "star", "binary_tree", "erdos_renyi"])
def test_metropolis_weights_of_thousands_of_workers(name):
    n = 2_500  # more than the rows of W that are made at a time, and no multiple
    (step,) = topologies.REGISTRY[name](n).steps
    w = np.diag(step.self_weights)
    for send in step.sends:
        for source, destination in send.pairs:
            w[destination, source] += send.weights[destination]
    linked = w * ~np.eye(n, dtype=bool) > 0
    degrees = linked.sum(0)
    expected = linked / (1 + np.maximum.outer(degrees, degrees))
    np.testing.assert_array_equal(w * ~np.eye(n, dtype=bool), expected)
    np.testing.assert_allclose(w.sum(0), 1, atol=1e-12)
    assert nx.is_connected(nx.from_numpy_array(linked))
    assert len(step.sends) == degrees.max()


def test_base_k_of_4096_workers_is_the_hypercube():
    steps = topologies.base_k(4_096).steps
    for k, step in enumerate(steps):
        assert set(step.self_weights) == {0.5}
        (send,) = step.sends
        assert set(send.weights) == {0.5}
        assert set(send.pairs) == {(i, i ^ 2**k) for i in range(4_096)}
    assert len(steps) == 12


def test_a_graph_that_is_nearly_symmetric_is_not():
    w = np.array([[0.5, 0.5, 0], [0, 0.5, 0.5], [0.5, 0, 0.5]])
    assert not topologies.from_matrix(w).symmetric
    tilted = np.full((3, 3), 1 / 3) + 1e-9 * np.array(
        [[0, 1, -1], [-1, 0, 1], [1, -1, 0]]
    )
    graph = topologies.from_matrix(tilted)
    assert graph.doubly_stochastic and not graph.symmetric
