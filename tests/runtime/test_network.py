"""Predictions against closed forms, simulations, brute force and wire counts."""

import itertools
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bagua_jax import network, topologies
from bagua_jax.network import GBIT, Cost, Link, Network, ShiftedExponential
from bagua_jax.wire import Collective, WireCount, count

ROOT = Path(__file__).parents[2]
FREE = Link(0.0, math.inf)
few = settings(max_examples=25, deadline=None)


def flat(n, latency=1e-3, rate=1e6):
    """Equal links, each device a node."""
    link = Link(latency, rate)
    return Network.from_levels(n, 1, inside=link, between=link)


def uneven(seed, n, *, nodes=None, ports=1):
    """Latencies and bandwidths over a decade, different each way."""
    rng = np.random.default_rng(seed)
    return Network.from_matrices(
        1e-3 * 10 ** rng.random((n, n)),
        1e6 * 10 ** rng.random((n, n)),
        nodes=nodes,
        ports=ports,
    )


def cycle(n):
    return [(i, (i + 1) % n) for i in range(n)]


# --- what a network is ----------------------------------------------------------------


def test_a_network_does_not_change():
    latency = np.ones((2, 2))
    net = Network.from_matrices(latency, np.ones((2, 2)), goodput=0.5)
    latency[0, 1] = 7
    assert net.latency[0, 1] == 1 and net.bandwidth[0, 1] == 0.5
    with pytest.raises(ValueError, match="read-only"):
        net.latency[0, 1] = 2
    with pytest.raises(AttributeError):
        net.ports = 2


def test_nodes_are_numbered_from_zero():
    net = uneven(0, 4, nodes=[7, 3, 7, 9])
    assert net.nodes.tolist() == [1, 0, 1, 2] and net.num_nodes == 3


@pytest.mark.parametrize("name", network.PRESETS)
def test_presets_say_that_they_are_stated(name):
    net = network.preset(name, 5, 2, ports=2)
    assert net.origin == "stated, not measured" and net.origin in str(net)
    assert (net.name, net.num_devices, net.num_nodes, net.ports) == (name, 10, 5, 2)
    np.testing.assert_array_equal(net.latency, net.latency.T)
    np.testing.assert_array_equal(net.bandwidth, net.bandwidth.T)


def test_presets_have_the_constants_of_their_names():
    for gbits in (10, 25, 100, 400):
        net = network.preset(f"{gbits}gbit", 2, 2)
        assert net.bandwidth[0, 2] == pytest.approx(gbits * GBIT * 1448 / 1538)
    wan, geo = network.preset("wan", 2), network.preset("geo", 10)
    assert wan.latency[0, 1] == 30e-3 and wan.bandwidth[0, 1] < GBIT
    assert geo.latency[0, 1] == 0.2e-3  # two nodes in each region
    assert geo.latency[6, 9] == 140e-3
    assert geo.bandwidth[6, 9] == pytest.approx(0.3 * GBIT * 1448 / 1538)


def test_importing_it_does_not_import_jax():
    code = "import sys, bagua_jax.network; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


# --- collectives on equal links: the textbook -----------------------------------------


@few
@given(
    st.integers(1, 33),
    st.floats(0, 1e9),
    st.floats(0, 0.1),
    st.floats(1e3, 1e12),
)
def test_equal_links_give_the_textbook_formulae(n, size, alpha, beta):
    net = flat(n, alpha, beta)
    depth = math.ceil(math.log2(n))
    link = np.array([alpha, size / beta])  # the latency and the transfer of S bytes
    part = np.array([alpha, size / n / beta])
    expected = [
        (network.all_reduce(net, size), 2 * (n - 1) * part),
        (network.all_reduce(net, size, algorithm="tree"), 2 * depth * link),
        (network.reduce_scatter(net, size), (n - 1) * part),
        (network.all_gather(net, size), (n - 1) * link),
        (network.all_to_all(net, size), part * [n > 1, n - 1]),
        (network.broadcast(net, size), link * [n - 1, n > 1]),
        (network.permute(net, size, cycle(n)), link * (n > 1)),
    ]
    for cost, textbook in expected:
        np.testing.assert_allclose(cost, textbook, rtol=1e-9, atol=1e-12)


# --- sends that share links and ports -------------------------------------------------


def slowest_send(net, sends, size):
    """Each send waits for all that its ends do with it: the rule, in plain loops."""
    worst = 0.0
    for s, t in sends:
        cross = net.nodes[s] != net.nodes[t]
        ends = [[], [], [], []]
        for a, b in sends:
            if cross != (net.nodes[a] != net.nodes[b]):
                continue
            seconds = size / net.bandwidth[a, b]
            ends[0] += [seconds] * (a == s)
            ends[1] += [seconds] * (b == t)
            if cross:
                ends[2] += [seconds / net.ports] * bool(net.nodes[a] == net.nodes[s])
                ends[3] += [seconds / net.ports] * bool(net.nodes[b] == net.nodes[t])
        worst = max(worst, net.latency[s, t] + max(map(sum, ends)))
    return worst


@few
@given(st.integers(0, 999), st.integers(1, 3), st.sampled_from([2, 3, 4, 6]))
def test_sends_at_once_share_ports(seed, ports, width):
    rng = np.random.default_rng(seed)
    net = uneven(seed, 12, nodes=rng.integers(0, 4, 12), ports=ports)
    groups = rng.permutation(12).reshape(-1, width)
    pairs = [p for g in groups.tolist() for p in itertools.permutations(g, 2)]
    found = network.all_to_all(net, width * 1e4, groups).seconds
    assert found == pytest.approx(slowest_send(net, pairs, 1e4))
    pairs = list(enumerate(rng.permutation(12).tolist()))
    found = network.permute(net, 1e4, pairs).seconds
    moved = [(s, t) for s, t in pairs if s != t]
    assert found == pytest.approx(slowest_send(net, moved, 1e4))


def ring_event_times(net, order, size, hops):
    """A ring where each chunk leaves as soon as it is there and the edge is free."""
    source, target = np.array(order), np.roll(order, -1)
    seconds = size / net.bandwidth[source, target]
    free = np.zeros(len(order))  # when each edge has sent its last chunk
    there = np.zeros(len(order))  # when each device has its next chunk
    for _ in range(hops):
        free = np.maximum(free, there) + seconds
        there = np.roll(free + net.latency[source, target], 1)
    return there.max()


@few
@given(st.integers(0, 999), st.integers(2, 9))
def test_a_ring_is_bounded_by_its_simulation(seed, n):
    net = uneven(seed, n)
    order = np.random.default_rng(seed).permutation(n)
    for cost, hops in (
        (network.all_reduce(net, n * 1e4, [order]), 2 * (n - 1)),
        (network.all_gather(net, 1e4, [order]), n - 1),
    ):
        simulated = ring_event_times(net, order, 1e4, hops)
        assert simulated <= cost.seconds * (1 + 1e-9)
        assert cost.seconds <= 2 * simulated
    equal = flat(n)
    cost = network.all_reduce(equal, n * 1e4)
    assert cost.seconds == pytest.approx(
        ring_event_times(equal, range(n), 1e4, 2 * (n - 1))
    )


def test_latency_adds_only_along_a_chunk_s_way():
    """Of 254 hops of a flat ring over 16 nodes of 8, 32 at most are between nodes."""
    net = Network.from_levels(16, 8, inside=FREE, between=Link(1e-3, math.inf))
    assert network.all_reduce(net, 1e6) == Cost(pytest.approx(0.032), 0.0)


def test_what_a_network_card_carries_on_sixteen_nodes_of_eight():
    """MB through the card of one GPU: what exchanges of 235 MB of gradients send."""
    net = Network.from_levels(16, 8, inside=FREE, between=Link(0.0, 1.0), ports=8)
    rails = np.arange(128).reshape(16, 8).T
    size = 234.9
    codes = size / 4
    carried = {
        "flat all-reduce": network.all_reduce(net, size),
        "flat u8 all-to-all": network.all_to_all(net, codes),
        "flat u8 all-gather": network.all_gather(net, codes / 128),
        "levels f32": network.hierarchical_all_reduce(net, size),
        "levels u8 all-to-all": network.all_to_all(net, codes / 8, rails),
        "levels u8 all-gather": network.all_gather(net, codes / 128, rails),
    }
    mb = {key: cost.transfer for key, cost in carried.items()}
    assert mb["flat all-reduce"] == pytest.approx(2 * size / 8 * 127 / 128)
    assert mb["flat u8 all-to-all"] == pytest.approx(55.1, abs=0.05)
    assert mb["flat u8 all-gather"] == pytest.approx(7.3, abs=0.05)
    assert mb["levels f32"] == pytest.approx(55.1, abs=0.05)
    both = mb["levels u8 all-to-all"] + mb["levels u8 all-gather"]
    assert both == pytest.approx(13.8, abs=0.05)


@pytest.mark.parametrize(
    "kind", ["all-reduce", "all-gather", "reduce-scatter", "all-to-all"]
)
@pytest.mark.parametrize("ports", [1, 4])
def test_transfer_is_what_the_wire_count_says_leaves_a_node(kind, ports):
    net = Network.from_levels(3, 4, inside=FREE, between=Link(0.0, 1e6), ports=ports)
    rails = "{" + ",".join(f"{{{i},{i + 4},{i + 8}}}" for i in range(4)) + "}"
    for groups in ("{}", rails):
        n = 12 if groups == "{}" else 3
        shape = {"all-gather": 12 * n, "reduce-scatter": 12 // n}.get(kind, 12)
        counted = count(
            "HloModule step, replica_count=12\n"
            "ENTRY %main (x: f32[12]) -> f32[12] {\n"
            "  %x = f32[12]{0} parameter(0)\n"
            f"  ROOT %y = f32[{shape}]{{0}} {kind}(%x), replica_groups={groups}\n"
            "}"
        )
        leaves = 4 * counted.bytes_between(net.nodes)  # bytes of a node
        predicted = network.communication_time(counted, net)
        assert predicted.transfer == pytest.approx(leaves / 1e6 / ports)


def test_gossip_is_its_slowest_edge_on_average_over_the_period():
    net = uneven(1, 8)
    seconds = net.seconds(1e5)
    ring = network.gossip(net, 1e5, topologies.ring(8))
    there = max(seconds[i, (i + 1) % 8] for i in range(8))
    back = max(seconds[i, i - 1] for i in range(8))
    assert ring.seconds == pytest.approx(there + back)
    one_peer = network.gossip(net, 1e5, topologies.one_peer_exponential(8))
    hops = [max(seconds[i, (i + h) % 8] for i in range(8)) for h in (1, 2, 4)]
    hops_back = [max(seconds[i, (i - h) % 8] for i in range(8)) for h in (1, 2, 4)]
    means = (np.mean(hops), np.mean(hops_back))
    assert any(one_peer.seconds == pytest.approx(mean) for mean in means)
    order = [3, 1, 4, 0, 5, 2, 7, 6]
    placed = network.gossip(net, 1e5, topologies.ring(8), order)
    inner = uneven(1, 8)
    moved = Network(
        inner.latency[np.ix_(order, order)],
        inner.bandwidth[np.ix_(order, order)],
        np.arange(8),
    )
    assert placed == network.gossip(moved, 1e5, topologies.ring(8))


# --- a program's step -----------------------------------------------------------------


def site(kind, groups, size=1000, weight=1.0):
    return Collective(
        kind, "f32", 1, size, len(groups[0]), 1.0, weight, False, "path", "name", groups
    )


def test_each_collective_is_priced_by_its_formula():
    net = uneven(2, 4, nodes=[0, 0, 1, 1])
    one, two, pairs = ((0, 1, 2, 3),), ((0, 2), (1, 3)), ((0, 1), (1, 0))
    table = {
        site("all-reduce", two, weight=0.25): network.all_reduce(net, 1000, two),
        site("all-gather", one): network.all_gather(net, 1000, one),
        site("reduce-scatter", two): network.reduce_scatter(net, 1000, two),
        site("all-to-all", one, weight=3.0): network.all_to_all(net, 1000, one),
        site("ragged-all-to-all", one): network.all_to_all(net, 1000, one),
        site("collective-broadcast", two): network.broadcast(net, 1000, two),
        site("collective-permute", pairs): network.permute(net, 1000, pairs),
        site("send", pairs): network.permute(net, 1000, pairs),
    }
    predicted = network.communication_time(WireCount(tuple(table)), net)
    assert [part.cost for part in predicted.collectives] == list(table.values())
    weighted = math.fsum(c.weight * cost.seconds for c, cost in table.items())
    assert predicted.seconds == pytest.approx(weighted)
    assert "predicted" in str(predicted) and "stated, not measured" in str(predicted)
    tree = network.communication_time(
        WireCount((site("all-reduce", one),)), net, algorithm="tree"
    )
    expected = network.all_reduce(net, 1000, one, algorithm="tree")
    assert tree.collectives[0].cost == expected
    assert network.communication_time(WireCount(()), net).seconds == 0


def test_a_placement_moves_the_mesh():
    net = uneven(3, 5)
    program = WireCount((site("all-reduce", ((0, 1, 2),)),))
    placed = network.communication_time(program, net, placement=[4, 0, 2])
    assert placed.collectives[0].cost == network.all_reduce(net, 1000, [[4, 0, 2]])


def test_rules_of_overlap():
    def step(compute, transfer, rule):
        return network.step_time(
            compute, transfer, latency=0.25, host=0.5, overlap=rule
        )

    assert step(1, 4, "none") == 5.75
    assert step(1, 4, "transfer") == 4 and step(4, 1, "transfer") == 4.75
    assert step(1, 4, "all") == 4.75 and step(8, 4, "all") == 8


def test_two_constants_give_a_known_epoch():
    """BERT-Large under a ring all-reduce of 128: 116 steps; hand-computed cells."""
    net = network.preset("10gbit", 16, 8)
    sent = network.all_reduce(net, 334_094_336 * 4).transfer * net.bandwidth[0, 8]
    assert sent / 1e6 == pytest.approx(2651.9, abs=0.1)
    for gbits, epoch in ((1, 2614), (2, 1307), (4, 653), (8, 327), (100, 116)):
        wire, host = sent / (gbits * GBIT * 1448 / 1538), sent / (44.7 * GBIT)
        step = network.step_time(0.526, wire, host=host, overlap="transfer")
        assert 116 * step == pytest.approx(epoch, abs=1)


# --- stragglers -----------------------------------------------------------------------


@pytest.mark.parametrize(("n", "fastest"), [(1, None), (16, None), (16, 12), (16, 1)])
def test_waiting_for_the_fastest_agrees_with_simulation(n, fastest):
    steps, draws = ShiftedExponential(shift=2.0, scale=0.5), 20_000
    times = np.sort(steps.sample(np.random.default_rng(n), (draws, n)), axis=1)
    waited = times[:, (fastest or n) - 1]
    error = steps.deviation(n, fastest) / math.sqrt(draws)
    assert abs(waited.mean() - steps.synchronous(n, fastest)) < 4 * error
    square = (waited - waited.mean()) ** 2
    error = square.std() / math.sqrt(draws)
    assert abs(square.mean() - steps.deviation(n, fastest) ** 2) < 4 * error
    alone = times.mean() - steps.asynchronous
    assert abs(alone) < 4 * steps.scale / math.sqrt(times.size)


def test_waiting_grows_with_the_harmonic_numbers():
    steps = ShiftedExponential(1.0, 0.1)
    assert steps.synchronous(1) == steps.asynchronous == 1.1
    assert steps.synchronous(4) == pytest.approx(1 + 0.1 * (1 + 1 / 2 + 1 / 3 + 1 / 4))
    assert ShiftedExponential(1.0, 0.0).synchronous(100) == 1


# --- calibration ----------------------------------------------------------------------


@pytest.mark.parametrize("noise", ["absolute", "relative"])
def test_errors_of_a_fit_are_those_of_repeated_fits(noise):
    """The squares of (estimate - truth) / error average to those of Student's t."""
    rng = np.random.default_rng(5)
    size = np.geomspace(1e3, 1e7, 12)
    truth = 2e-3 + size / 1e8
    spread = 1e-3 if noise == "absolute" else 0.05 * truth
    repeats, freedom = 300, len(size) - 2
    scores = []
    for _ in range(repeats):
        seconds = np.maximum(truth + spread * rng.standard_normal(size.size), 1e-6)
        rows = zip(size, seconds, strict=True)
        fit = network.calibrate({"link": rows}, noise=noise)["link"]
        scores.append(
            [
                (fit.latency - 2e-3) / fit.latency_error,
                (1 / fit.bandwidth - 1e-8) * fit.bandwidth**2 / fit.bandwidth_error,
            ]
        )
    squares = np.square(scores)
    mean = freedom / (freedom - 2)
    error = math.sqrt(2 * mean**2 * (freedom - 1) / (freedom - 4) / repeats)
    assert (abs(squares.mean(axis=0) - mean) < 4 * error).all()


def test_exact_measurements_are_recovered_and_make_a_network():
    rows = {
        "inside": [(b, 1e-6 + b / 1e11) for b in (0, 1e6, 1e8)],
        "between": [(b, 0 + b / 1e9) for b in (1e3, 1e6, 1e8, 1e9)],
    }
    fit = network.calibrate(rows, noise="relative")
    assert fit["inside"].latency == pytest.approx(1e-6)
    assert fit["between"].bandwidth == pytest.approx(1e9)
    assert fit["between"].link.latency >= 0
    assert (fit["inside"].measurements, fit["between"].measurements) == (3, 4)
    levels = {key: found.link for key, found in fit.items()}
    net = Network.from_levels(2, 2, **levels, origin="calibrated")
    assert net.bandwidth[0, 1] == pytest.approx(1e11) and "calibrated" in str(net)


# --- placement ------------------------------------------------------------------------


def best_ring(seconds):
    """(slowest, total) of the best ring for either objective, by subsets."""
    n = len(seconds)

    def tour(limit):
        ways = {(1, 0): 0.0}
        for _ in range(n - 1):
            grown = {}
            for (seen, last), length in ways.items():
                for to in range(1, n):
                    if not seen >> to & 1 and seconds[last, to] <= limit:
                        key = seen | 1 << to, to
                        longer = length + seconds[last, to]
                        grown[key] = min(grown.get(key, math.inf), longer)
            ways = grown
        closed = [d + seconds[k, 0] for (_, k), d in ways.items() if k]
        closed = [
            d for d, (_, k) in zip(closed, ways, strict=True) if seconds[k, 0] <= limit
        ]
        return min(closed, default=math.inf)

    limit = next(x for x in np.unique(seconds) if x > 0 and tour(x) < math.inf)
    return limit, tour(limit), tour(math.inf)


@pytest.mark.parametrize("seed", range(4))
def test_small_rings_are_placed_exactly(seed):
    n = 5 + seed
    net = uneven(seed, n)
    slowest, total_then, total = best_ring(net.seconds(1e5))
    placed = network.embed(net, cycle(n), 1e5)
    assert placed.exact and sorted(placed.device_of) == list(range(n))
    assert placed.slowest == pytest.approx(slowest)
    assert placed.total == pytest.approx(total_then)
    placed = network.embed(net, cycle(n), 1e5, objective="total")
    assert placed.total == pytest.approx(total)


def evaluate(seconds, order, edges):
    costs = [seconds[order[u], order[v]] for u, v in edges]
    return max(costs), sum(costs)


@few
@given(st.integers(0, 999), st.integers(1, 5), st.sampled_from(["slowest", "total"]))
def test_small_graphs_are_placed_exactly(seed, n, objective):
    rng = np.random.default_rng(seed)
    net, edges = uneven(seed, n), list(itertools.permutations(range(n), 2))
    edges = [edge for edge in edges if rng.random() < 0.5] or edges
    placed = network.embed(net, edges, 1e5, objective=objective)
    if not edges:
        assert placed == ((0,), 0.0, 0.0, True)
        return
    way = 1 if objective == "slowest" else -1
    found = evaluate(net.seconds(1e5), placed.device_of, edges)
    assert found == pytest.approx((placed.slowest, placed.total))
    orders = itertools.permutations(range(n))
    best = min(evaluate(net.seconds(1e5), p, edges)[::way] for p in orders)
    assert found[::way] == pytest.approx(best)


@pytest.mark.parametrize("objective", ["slowest", "total"])
def test_large_rings_end_where_no_move_helps(objective):
    n, way = 10, 1 if objective == "slowest" else -1
    net = uneven(7, n)
    seconds, edges = net.seconds(1e5), cycle(n)
    placed = network.embed(net, edges, 1e5, objective=objective)
    assert not placed.exact and sorted(placed.device_of) == list(range(n))
    assert placed == network.embed(net, edges, 1e5, objective=objective)
    found = evaluate(seconds, placed.device_of, edges)[::way]
    assert found <= evaluate(seconds, range(n), edges)[::way]
    order = list(placed.device_of)
    for i, j in itertools.combinations(range(n), 2):
        swapped = order.copy()
        swapped[i], swapped[j] = order[j], order[i]
        turned = order[:i] + order[i : j + 1][::-1] + order[j + 1 :]
        for moved in (swapped, turned):
            key = evaluate(seconds, moved, edges)[::way]
            assert key >= tuple(x * (1 - 1e-9) for x in found)
    slowest, total_then, total = best_ring(seconds)
    best = slowest if objective == "slowest" else total
    assert best * (1 - 1e-9) <= found[0] <= 1.25 * best


@pytest.mark.parametrize("objective", ["slowest", "total"])
def test_islands_are_kept_together(objective):
    """Two islands in alternating order: a good ring crosses only twice."""
    n = 16
    far = (np.arange(n)[:, None] - np.arange(n)) % 2 != 0
    net = Network.from_matrices(np.where(far, 50e-3, 1e-3), np.full((n, n), 1e9))
    placed = network.embed(net, topologies.ring(n), 0, objective=objective)
    assert placed.total == pytest.approx(2 * (14 * 1e-3 + 2 * 50e-3))


# --- ratios ---------------------------------------------------------------------------


@few
@given(
    st.integers(0, 999),
    st.integers(1, 10**6),
    st.floats(1, 1e4),
    st.sampled_from([0, 2, 4, 8]),
)
def test_slow_edges_compress_and_the_step_takes_no_longer(seed, d, ratio, index_bytes):
    n, entry = 6, 4 + index_bytes
    rate = uneven(seed, n).bandwidth
    net = Network.from_matrices(np.zeros((n, n)), rate)
    edges = list(itertools.permutations(range(n), 2))
    k = network.topk_per_edge(net, edges, d, ratio, index_bytes=index_bytes)
    assert list(k) == edges and all(1 <= kept <= d for kept in k.values())
    size = {e: 4 * d if kept == d else entry * kept for e, kept in k.items()}
    slowest = min(edges, key=lambda e: rate[e])
    limit = max(4 * d / ratio, min(entry, 4 * d))  # bytes of a uniform ratio
    assert size[slowest] <= limit * (1 + 1e-9)
    for e in edges:
        assert k[e] >= k[slowest] and size[e] <= 4 * d
        assert size[e] / rate[e] <= limit / rate[slowest] * (1 + 1e-9)


def test_equal_edges_compress_alike_and_a_ratio_of_one_is_dense():
    net = flat(4)
    assert set(network.topk_per_edge(net, cycle(4), 1000, 10).values()) == {50}
    assert set(network.topk_per_edge(net, cycle(4), 1000, 1).values()) == {1000}
    assert network.topk_per_edge(net, [], 1000, 10) == {}


# --- refusals -------------------------------------------------------------------------

NET = flat(4)
RING = cycle(4)
EXACT_ROWS = [(0, 1e-3), (1e6, 2e-3), (2e6, 3e-3)]


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: Link(-1, 1), "Link: latency .* -1"),
        (lambda: Link(math.nan, 1), "Link: latency .* nan"),
        (lambda: Link(0, 0), "Link: bandwidth .* 0"),
        (lambda: Link(0, 1, goodput=1.1), "Link: goodput .* 1.1"),
        (lambda: Network([[0, 1]], [[1, 1]], [0]), "Network: .* square"),
        (lambda: Network.from_matrices(np.ones((2, 2)), np.ones((3, 3))), "square"),
        (lambda: Network.from_matrices(-np.ones((2, 2)), np.ones((2, 2))), "latencies"),
        (lambda: Network.from_matrices(np.ones((2, 2)), np.zeros((2, 2))), "route"),
        (lambda: uneven(0, 2, nodes=[0]), "nodes must hold"),
        (lambda: uneven(0, 2, nodes=[0.5, 1]), "nodes must hold"),
        (lambda: uneven(0, 2, ports=0), "ports .* 0"),
        (lambda: network.preset("10gbit", 0), "num_nodes .*0, 1"),
        (lambda: NET.seconds(-1), "num_bytes .* -1"),
        (lambda: network.all_reduce(NET, math.nan), "num_bytes .* nan"),
        (lambda: network.preset("11gbit", 2), "preset: .*'25gbit'.*'11gbit'"),
        (lambda: network.all_reduce(NET, 1, [[0, 4]]), "groups .* below 4"),
        (lambda: network.all_reduce(NET, 1, [[0, 1], [1, 2]]), "at most once"),
        (lambda: network.all_gather(NET, 1, [[0, 1], [2]]), "equal length"),
        (lambda: network.all_reduce(NET, 1, algorithm="star"), "'star'"),
        (lambda: network.permute(NET, 1, [(0, 1, 2)]), "source, target"),
        (
            lambda: network.hierarchical_all_reduce(uneven(0, 3, nodes=[0, 0, 1]), 1),
            "equally many",
        ),
        (lambda: network.gossip(NET, 1, topologies.ring(8)), "8 workers"),
        (lambda: network.gossip(NET, 1, topologies.ring(4), [0, 1, 2, 2]), "its own"),
        (
            lambda: network.communication_time(
                WireCount((site("all-fold", ((0, 1),)),)), NET
            ),
            "all-fold",
        ),
        (
            lambda: network.communication_time(
                WireCount((site("all-reduce", ((0, 1),)),)), NET, placement=[0]
            ),
            "each of 2 workers",
        ),
        (lambda: network.step_time(1, -1, overlap="none"), "at least 0"),
        (lambda: network.step_time(1, 1, overlap="some"), "'some'"),
        (lambda: ShiftedExponential(1, -1), "scale .* -1"),
        (lambda: ShiftedExponential(1, 1).synchronous(0), "n >= 1"),
        (lambda: ShiftedExponential(1, 1).synchronous(4, 5), "fastest"),
        (lambda: network.calibrate({"a": EXACT_ROWS[:2]}), "'a' .* 3 measurements"),
        (lambda: network.calibrate({"a": []}), "'a' .* 3 measurements"),
        (lambda: network.calibrate({"a": [(5, 1), (5, 2), (5, 3)]}), "two sizes"),
        (lambda: network.calibrate({"a": [(0, 1), (1, 2), (2, -3)]}), "above 0"),
        (lambda: network.calibrate({"a": [(0, 3), (1, 2), (2, 1)]}), "bandwidth"),
        (lambda: network.calibrate({"a": [(1, 1), (2, 3), (3, 1)]}), "bandwidth"),
        (lambda: network.calibrate({"a": [(2, 1), (3, 2), (4, 3)]}), "latency"),
        (lambda: network.calibrate({"a": EXACT_ROWS}, noise="loud"), "'loud'"),
        (lambda: network.embed(NET, topologies.ring(5), 1), "4 devices"),
        (lambda: network.embed(NET, [(0, 4)], 1), "4 devices"),
        (lambda: network.embed(NET, RING, 1, objective="mean"), "'mean'"),
        (lambda: network.topk_per_edge(NET, RING, 10, 0.5), "ratio .* 0.5"),
        (lambda: network.topk_per_edge(NET, RING, 0, 2), "num_elements .* 0"),
        (lambda: network.topk_per_edge(NET, [(0, 4)], 10, 2), "4 devices"),
    ],
)
def test_refusals(call, text):
    with pytest.raises(ValueError, match=text):
        call()
