"""BAGUA's public tables beside predictions: the counts, the model, the bounds to hold.

The bounds are those of the study that the model comes from; none is a time.
"""

import itertools
import json
import math
from pathlib import Path

import jax
import numpy as np
import pytest

from bagua_jax import buckets, network, wire
from bagua_jax.experiments.studies.models import WORKLOADS, parameters
from bagua_jax.experiments.studies.reproduce import compare, counts, model, page, tables
from bagua_jax.experiments.studies.reproduce import what_if as what_if_
from bagua_jax.experiments.studies.reproduce.cells import Table
from bagua_jax.experiments.tables import survey
from bagua_jax.network import GBIT, Link, Network

ROOT = Path(__file__).parents[2]
NODES, PER_NODE = counts.NODES, counts.PER_NODE


# --- what is sent ---------------------------------------------------------------------


@pytest.fixture(scope="module")
def numbers() -> dict:
    return counts.read()


def test_everything_is_counted(numbers):
    assert set(numbers["workloads"]) == set(numbers["programs"]) == set(WORKLOADS)
    for programs in numbers["programs"].values():
        assert set(programs) == set(counts.PROGRAMS)
    assert set(numbers["library"]) == {survey.label(row) for row in survey.SURVEY}, (
        "run python -m bagua_jax.experiments.studies.reproduce.counts again"
    )


@pytest.mark.parametrize(
    ("workload", "program", "megabytes"),
    [
        ("bert_large", "allreduce", 2651.9),
        ("bert_large", "allreduce, hierarchical", 2505.7),
        ("bert_large", "decentralized, shift_one", 1336.4),
        ("bert_large", "LPD", 668.2),
        ("bert_large", "ByteGrad", 626.4),
        ("bert_large", "QAdam, 1 bit", 78.3),
        ("vgg16", "allreduce", 1098.2),
        ("vgg16", "decentralized, all", 1037.7),
        ("vgg16", "LPD", 276.7),
        ("vgg16", "ByteGrad", 259.4),
    ],
)
def test_compiled_programs_send_what_the_study_counts(
    numbers, workload, program, megabytes
):
    """Ranges and scales, which the study leaves out, add at most 0.2 %."""
    counted = numbers["programs"][workload][program]["bytes"] / 1e6
    assert megabytes - 0.05 <= counted <= 1.002 * megabytes + 0.05


def test_programs_compiled_for_gpus_send_the_same_bytes(numbers):
    (cluster, programs), *_ = numbers["planned"].items()
    assert cluster == "16x8:h100" and set(programs) == set(counts.PROGRAMS)
    for label, sent in programs.items():
        here = numbers["programs"]["vgg16"][label]
        assert sent["bytes"] == pytest.approx(here["bytes"], rel=1e-12), label


@pytest.mark.parametrize("workload", WORKLOADS)
def test_exact_means_and_pairs_send_what_arithmetic_says(numbers, workload):
    size = 4 * numbers["workloads"][workload]["parameters"]
    sent = {k: v["bytes"] for k, v in numbers["programs"][workload].items()}
    assert sent["allreduce"] == pytest.approx(2 * 127 / 128 * size, rel=1e-9)
    shards = 8 * 4 * PER_NODE * len(buckets.plan(parameters(WORKLOADS[workload]))[2])
    for label, share in (
        ("allreduce, hierarchical", 2 * 15 / 16),
        ("decentralized, all", 2 * 15 / 16),
        ("decentralized, shift_one", 1),
        ("async", 2 * 15 / 16),
    ):  # shards are filled to whole elements
        assert share * size <= sent[label] <= share * size + 2 * shards


@pytest.mark.parametrize("workload", ["vgg16", "bert_large"])
def test_bytegrad_sends_its_codes_and_ranges_to_the_byte(numbers, workload):
    """From shapes alone: N -> shards of ceil(N/8) -> parts of ceil(N/8/16), 8 more."""
    sizes = buckets.plan(parameters(WORKLOADS[workload])).sizes
    parts = [math.ceil(math.ceil(size / PER_NODE) / NODES) for size in sizes]
    expected = PER_NODE * sum(2 * (NODES - 1) * (part + 8) for part in parts)
    sent = numbers["programs"][workload]["ByteGrad"]
    assert sent["bytes"] == expected
    assert sent["messages"] == 2 * len(sizes)
    assert sent["hops"] == (1 + NODES - 1) * len(sizes)
    phases = (1, NODES - 1)  # a peer gets one part, the next in the ring all but one
    assert sent["busiest"] == PER_NODE * sum(sum(phases) * (part + 8) for part in parts)


def test_a_node_alone_sends_nothing(numbers):
    for programs in numbers["scaling"].values():
        assert programs["1"]["bytes"] == programs["1"]["hops"] == 0
        by_nodes = [programs[str(n)]["bytes"] * n / (n - 1) for n in counts.SCALES[1:]]
        assert np.ptp(by_nodes) < 1e-3 * by_nodes[0]  # 2(n-1)/n of the model


TREE = {"kernel": (40, 16), "bias": (16,)}
SHAPES = {k: jax.ShapeDtypeStruct(v, "float32") for k, v in TREE.items()}
SIZE = 40 * 16 + 16  # elements


@pytest.mark.parametrize(
    ("program", "bytes_", "busiest"),
    [  # two nodes of four devices; one bucket, shards of 164, parts of 82
        ("allreduce", 4 * SIZE * 2 * 7 / 8, 4 * SIZE * 2 * 7 / 8),
        ("allreduce, hierarchical", 4 * SIZE, 4 * SIZE),
        ("ByteGrad", 4 * 2 * (82 + 8), 4 * 2 * (82 + 8)),
        ("QAdam, 1 bit", 4 * 2 * (math.ceil(82 / 8) + 4), None),
        ("decentralized, shift_one", 4 * SIZE, 4 * SIZE),
        ("LPD", 4 * (164 + 8), 4 * (164 + 8)),  # a ring of two: one neighbour
        ("async", 4 * SIZE, None),
    ],
)
def test_counting_again_on_a_small_cluster(devices, program, bytes_, busiest):
    sent = counts.measure(counts.PROGRAMS[program], SHAPES, nodes=2, per_node=4)
    assert sent.bytes == bytes_
    if busiest is not None:
        assert sent.busiest == busiest


HLO = """HloModule step, replica_count=8
ENTRY %main (x: f32[400]) -> f32[400] {
  %x = f32[400]{0} parameter(0)
  ROOT %y = f32[400]{0} KIND(%x), replica_groups={GROUPS}
}"""


@pytest.mark.parametrize(
    ("kind", "groups"),
    [
        ("all-reduce", "{0,1,2,3,4,5,6,7}"),
        ("all-reduce", "{0,4},{1,5},{2,6},{3,7}"),
        ("all-reduce", "{0,1,2,3},{4,5,6,7}"),
        ("all-to-all", "{0,4},{1,5},{2,6},{3,7}"),
    ],
)
def test_between_nodes_agrees_with_the_wire_and_the_network(kind, groups):
    """Bytes as wire counts them; seconds as the alpha-beta model of `network`."""
    text = HLO.replace("KIND", kind).replace("GROUPS", groups)
    count, nodes = wire.count(text), np.repeat([0, 1], 4)
    sent = counts.between_nodes(count, nodes)
    assert sent.bytes == pytest.approx(4 * count.bytes_between(nodes))

    inside, between = Link(3e-6, 1e9), Link(50e-6, 1e8)
    machine, place = what_if_.Machine(1.0, inside), what_if_.Place(between, 4)
    net = Network.from_levels(2, 4, inside=inside, between=between, ports=4)
    expected = network.communication_time(count, net)
    costs = what_if_.communication(sent._asdict(), machine, place)
    assert sum(c.latency for c in costs) == pytest.approx(expected.latency)
    if groups != "{0,1,2,3,4,5,6,7}":  # there the ring's slow edges hide its fast ones
        assert sum(c.transfer for c in costs) == pytest.approx(expected.transfer)


def test_a_rotating_topology_loads_one_connection_a_step(devices):
    program = counts.Program("decentralized", {"topology": "shift_one"})
    sent = counts.measure(program, {"w": SHAPES["kernel"]}, nodes=4, per_node=2)
    assert sent.bytes == sent.busiest == 4 * 640


# --- the model ------------------------------------------------------------------------


def test_the_wire_hides_and_latency_does_not():
    exchange = model.Exchange(1e9, 2e8, hops=3, buckets=5, counted=True)
    link = Link(1e-3, 10 * GBIT, goodput=0.9)
    wire_time = 1e9 / link.rate
    assert model.seconds(exchange, compute=0.1, link=link) == wire_time
    work = 2.0 + 1e9 / 5e9 + 1e-3 * (5 * 3 + 2 * 2e8 / 4e6)
    slow = model.seconds(
        exchange, compute=2.0, link=link, processing=5e9, window=4e6, buckets=99
    )
    assert slow == pytest.approx(work)
    free = exchange._replace(buckets=None)
    more = model.seconds(free, compute=2.0, link=link, buckets=7, codec=0.25)
    assert more == pytest.approx(2.25 + 1e-3 * 7 * 3)
    nothing = model.seconds(tables.IDLE, compute=0.1, link=link, processing=1, window=1)
    assert nothing == 0.1


def test_a_fit_finds_constants_and_says_what_it_cannot_find():
    x = np.array([[1.0, 2.0], [4.0, 8.0]])
    truth = {"a": 2.5, "b": 0.03}

    def predict(c):
        return c["a"] * x + c["b"] * x**2

    found = model.fit(predict, predict(truth), {"a": 1.0, "b": 1.0})
    assert found.identified
    assert found.constants == pytest.approx(truth, rel=1e-6)
    same = model.fit(lambda c: c["a"] * c["b"] * x, x, {"a": 1.0, "b": 2.0})
    assert not same.identified
    alone = model.fit(predict, np.where(x > 1, np.nan, x), {"a": 1.0, "b": 1.0})
    assert not alone.identified


def test_hidden_cells_do_not_reach_a_fit():
    table = tables.load("bandwidth")
    cells = table.cells.copy()
    hidden = np.zeros(cells.shape, bool)
    hidden[:, 2] = True
    start = {"goodput": 0.8, "processing": 40.0}
    first = model.fit(table.predictions, np.where(hidden, np.nan, cells), start)
    cells[:, 2] *= 7
    again = model.fit(table.predictions, np.where(hidden, np.nan, cells), start)
    assert first == again


def test_crossings_and_orders():
    x = np.array([0.0, 1.0, 3.0])
    a, b = np.array([0.0, 2.0, 0.0]), np.array([1.0, 1.0, 1.0])
    assert compare.crossings(x, a, b) == pytest.approx((0.5, 2.0))
    table = tables.load("scaling")
    assert compare.orders(table, table.cells).wrong == ()
    reversed_ = compare.orders(table, -table.cells)
    assert reversed_.right == 0 and reversed_.pairs == len(reversed_.wrong) > 0


# --- the bounds -----------------------------------------------------------------------


def column(table: Table, *systems: str) -> list[int]:
    return [list(table.published).index(system) for system in systems]


@pytest.mark.parametrize("name", tables.TABLES)
def test_at_most_two_constants_and_all_of_them_determined(name):
    table, found = tables.load(name), tables.compared(name)
    assert set(found.constants) == set(table.constants)
    assert len(table.constants) <= 2
    assert all(0 < value < math.inf for value in found.constants.values())
    assert found.constants.get("goodput", 0.5) < 1
    kept = [system not in table.left_out for system in table.published]
    again = model.fit(
        table.predictions,
        np.where(kept, table.cells, np.nan),
        {name: 2 * value for name, value in found.constants.items()},
    )
    assert again.identified
    assert again.constants == pytest.approx(dict(found.constants), rel=1e-4)


@pytest.mark.parametrize("name", tables.TABLES)
def test_what_is_said_of_cells_is_about_cells_that_there_are(name):
    table = tables.load(name)
    for system, row in table.exceptions:
        assert system in table.published and (row is None or row in table.rows)
    for pair in table.crossovers:
        assert set(pair) <= set(table.published)
    assert set(table.left_out) <= set(table.published)
    assert set(itertools.chain(*table.held_out)) <= set(table.rows)
    assert table.choices and table.misses and table.stated and table.baselines


def test_bandwidth():
    table, found = tables.load("bandwidth"), tables.compared("bandwidth")
    assert found.fitted.cells == 35
    assert found.fitted.median <= 0.03
    assert found.fitted.percentile_90 <= 0.09
    assert found.fitted.maximum <= 0.18
    assert found.algorithm_out.median <= 0.03 and found.algorithm_out.cells == 35
    (free,) = found.baseline_errors.values()
    rings = free[:4][:, column(table, "DDP", "Horovod")]
    assert np.abs(rings).max() <= 0.02, "nothing fitted, 1 to 8 Gbit/s"
    low = compare.orders(table, found.predicted, slice(0, 4))
    assert low.right == low.pairs > 80


def test_latency():
    table, found = tables.load("latency"), tables.compared("latency")
    assert found.fitted.median <= 0.12
    assert found.fitted.percentile_90 <= 0.26
    assert found.fitted.maximum <= 0.38
    assert found.by_system["LPD"].maximum <= 0.06
    slope = found.predicted[-1] - found.predicted[0]
    (async_,) = column(table, "async")
    assert slope[async_] == 0
    synchronous = np.delete(slope, async_)
    (flattest,) = column(table, "LPD")
    assert slope[flattest] == synchronous.min() > 0
    assert found.orders.right >= 0.95 * found.orders.pairs
    ddp, horovod, byteps = found.predicted[
        1:, column(table, "DDP", "Horovod", "BytePS")
    ].T
    assert (ddp > horovod).all() and (horovod > byteps).all()
    (published,), _ = found.crossovers["LPD / QAdam"]
    assert published == pytest.approx(1.28, abs=0.01)
    # Little power out of sample: it must stay in sight.
    assert found.telling.cells == found.algorithm_out.cells == 28
    assert found.algorithm_out.median > found.telling.median > 0.09


def test_throughput():
    table, found = tables.load("throughput"), tables.compared("throughput")
    assert found.fitted.median <= 0.06
    assert found.fitted.maximum <= 0.36
    others = [s for s in table.published if s != "BytePS"]
    assert np.abs(found.errors[1, column(table, *others)]).max() <= 0.10
    at_10 = dict(zip(table.published, found.predicted[1], strict=True))
    assert at_10["allreduce"] == pytest.approx(at_10["DDP"], rel=1e-3)
    assert at_10["decentralized"] == pytest.approx(at_10["allreduce"], rel=0.10)
    for system in ("LPD", "QAdam", "ByteGrad"):
        assert at_10[system] >= 3.5 * at_10["allreduce"]


def test_scaling():
    table, found = tables.load("scaling"), tables.compared("scaling")
    assert found.fitted.cells == 15, "BytePS is left out"
    assert found.fitted.median <= 0.03
    assert found.fitted.maximum <= 0.15
    (free,) = found.baselines.values()
    assert free.median <= 0.08 and free.maximum <= 0.21
    (bagua,) = column(table, "ByteGrad")
    assert (found.predicted[1:].argmax(axis=1) == bagua).all()


# --- what people see ------------------------------------------------------------------


def test_the_page_is_the_one_that_the_numbers_give():
    assert (ROOT / "docs" / "reproduce.md").read_text("utf-8") == page.to_markdown()


def test_the_what_if_page_is_the_one_that_the_numbers_give():
    assert (ROOT / "docs" / "what_if.md").read_text("utf-8") == what_if_.to_markdown()


def test_reproduce_prints_cells_and_writes_them(lab, monkeypatch):
    monkeypatch.setattr(page, "draw", lambda table, found, path: path.touch())
    out = lab.root / "out"
    status, text, _ = lab.main("reproduce", "scaling", "--output", str(out))
    assert status == 0
    assert "18300" in text and "hierarchical" in text and "BytePS" in text
    written = json.loads((out / "scaling.json").read_text())
    found = tables.compared("scaling")
    assert written["predicted"]["ByteGrad"] == found.predicted[:, 3].tolist()
    assert written["source"] in " ".join(text.split())
    assert (out / "scaling.png").exists()


def test_reproduce_refuses_a_page_of_one_table(lab):
    status, _, complaint = lab.main("reproduce", "latency", "--docs", str(lab.root))
    assert status == 2 and "--docs" in complaint and "latency" in complaint


def test_figures_are_drawn(tmp_path):
    page.draw(
        tables.load("throughput"), tables.compared("throughput"), tmp_path / "a.png"
    )
    assert (tmp_path / "a.png").read_bytes()[:4] == b"\x89PNG"


# --- what if --------------------------------------------------------------------------


def test_families_say_how_often_is_communicated(numbers):
    for row in survey.SURVEY:
        messages = numbers["library"][survey.label(row)]["messages"]
        rarely = row.entry.family == "local steps"
        assert (messages < 1) == rarely, survey.label(row)


def test_what_waits_and_what_does_not():
    machine, place = what_if_.MACHINES["H100"], what_if_.PLACES["10 Gbit/s a node"]
    sent = counts.Sent(1e9, 1e9, 2, 16, inside=1e9, inside_hops=14)._asdict()
    work, at = what_if_.compute(machine), (sent, machine, place)
    between, inside = what_if_.communication(*at)
    assert between == pytest.approx((16 * 20e-6, 1e9 / (10e9 / 8 * 1448 / 1538)))
    assert inside == pytest.approx((14 * 3e-6, 1e9 / 360e9))
    both = between.seconds + inside.seconds
    assert what_if_.seconds(*at) == pytest.approx(work + both)
    bytes_ = between.transfer + inside.transfer
    rest = between.latency + inside.latency
    hides = what_if_.seconds(*at, overlap="transfer")
    assert hides == pytest.approx(max(bytes_, work + rest))
    all_late = what_if_.seconds(*at, late=what_if_.Late(1, 1))
    assert all_late == pytest.approx(max(work, both))
    prompt = what_if_.seconds(*at, late=what_if_.Late(1, 1, inside=False))
    assert prompt == pytest.approx(max(work + inside.seconds, between.seconds))
    rarely = what_if_.seconds(*at, late=what_if_.Late(8, 4))
    assert rarely == pytest.approx((8 * work + max(0, 8 * both - 4 * work)) / 8)
    assert what_if_.seconds(*at, codec=0.5) == pytest.approx(0.5 + work + both)


def test_lateness_is_read_from_the_arguments():
    late, Late = what_if_.lateness, what_if_.Late
    assert late("delayed_gradients", {"staleness": 3}) == Late(1, 3)
    assert late("delayed_choco", {"compressor": "sign(l1)"}) == Late(1, 1, inside=False)
    assert late("overlapped_push", {"staleness": 0}) is None
    assert late("decentralized", {"local_steps": 5}) == Late(5, 1)
    assert late("decentralized", {"combine": "after"}) is None
    streaming = {"local_steps": 100, "fragments": 4}
    assert late("streaming_diloco", streaming) == Late(25, 1)


def test_faster_networks_are_never_slower():
    for overlap in ("none", "transfer"):
        found = what_if_.predict(overlap)
        assert (found.slowdown >= 1 - 1e-12).all()
        for machine in what_if_.MACHINES:
            at = [j for j, c in enumerate(found.columns) if c[0] == machine]
            assert (np.diff(found.seconds[:, at[:5]], axis=1) <= 1e-12).all()
    assert (what_if_.predict("none").seconds >= found.seconds - 1e-12).all()


def test_what_if_prints_and_writes(lab, monkeypatch):
    monkeypatch.setattr(what_if_, "draw", lambda found, path: path.touch())
    out = lab.root / "out"
    status, text, _ = lab.main("what-if", "--overlap", "transfer", "--output", str(out))
    assert status == 0 and "predicted" in text and "bytegrad" in text
    written = json.loads((out / "what_if.json").read_text())
    assert written["prediction"] is True and written["overlap"] == "transfer"
    found = what_if_.predict("transfer")
    assert written["step_s"]["bytegrad"] == pytest.approx(
        found.seconds[found.labels.index("bytegrad")].tolist()
    )
