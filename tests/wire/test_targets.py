# ruff: noqa: E501 (tables are wide)
"""Real programs: what XLA makes of them for CPU here, for H100s and for a TPU slice."""

import re
from pathlib import Path

import numpy as np
import pytest
import wire_programs
from wire_programs import ELSEWHERE, WORKERS, D, lower, lower_here, path_of

from bagua_jax import planning, wire

F32 = 4 * D

# Messages and bytes of a worker that a program of n workers asks for, by hand.
INTENDED = {
    "four_sums": lambda n: (
        4,
        8 * sum(len(range(k, D, k + 2)) for k in range(1, 5)) * (n - 1) / n,
    ),
    "four_gathers": lambda n: (4, 4 * 64 * 4 * (n - 1)),
    "two_shifts": lambda n: (2, 2 * F32),
    "repeated": lambda n: (2, 2 * 2 * F32 * (n - 1) / n),
    "scatter_gather": lambda n: (2, 2 * F32 * (n - 1) / n),
    "quantized": lambda n: (2, 2 * (D + 8 * n) * (n - 1) / n),
    "shift_bf16": lambda n: (1, F32 / 2),
    "shift_bf16_as_f32": lambda n: (1, F32),
    "scanned": lambda n: (5, 5 * F32),
    "scanned_twice": lambda n: (12, 12 * F32),
    "unrolled": lambda n: (7, 7 * F32),
    "unchanging": lambda n: (7, 7 * F32 * (n - 1)),
    "rotating": lambda n: (6, 6 * F32),
    "every_fourth": lambda n: (1.25, (8 + 2 * F32 / 4) * (n - 1) / n),
    "overlapped": lambda n: (1, F32 * (n - 1) / n),
    "two_levels": lambda n: (
        3,
        2 * F32 * (n[1] - 1) / n[1] + 2 * F32 / n[1] * (n[0] - 1) / n[0],
    ),
}
# What a compiler changes: words, and the bytes that come on top. The rest it leaves.
CHANGES = {
    ("cpu", "four_sums"): {"combined 4 -> 1": 0},
    ("cpu", "repeated"): {"removed (another like it stays)": -2 * F32 * 7 / 8},
    ("cpu", "shift_bf16"): {"widened bf16 -> f32": F32 / 2},
    ("cpu", "unchanging"): {"moved 7 -> 1 runs": -6 * 7 * F32},
    ("8:h100", "four_sums"): {"combined 4 -> 1": 0},
    ("8:h100", "four_gathers"): {"combined 4 -> 1": 0},
    ("8:h100", "two_shifts"): {"combined 2 -> 1": 0},
    ("8:h100", "shift_bf16_as_f32"): {"narrowed f32 -> bf16": -F32 / 2},
    ("v5e:2x2", "four_sums"): {"combined 4 -> 1": 0},
    ("v5e:2x2", "four_gathers"): {
        "rewritten all-gather -> all-reduce, combined 4 -> 1": 4 * 64 * 4 * 3
    },
    ("v5e:2x2", "scatter_gather"): {
        "rewritten reduce-scatter -> all-reduce": F32 * 3 / 4
    },
    ("v5e:2x2", "shift_bf16_as_f32"): {"narrowed f32 -> bf16": -F32 / 2},
}
ELSEWHERE_ROWS = [
    (c, fn.__name__) for c, programs in ELSEWHERE.items() for fn in programs
]


def program(name):
    return getattr(wire_programs, name)


def check(comparison, target, name, n):
    messages, nbytes = INTENDED[name](n)
    assert comparison.intended.messages_per_worker == pytest.approx(messages)
    assert comparison.intended.bytes_per_worker == pytest.approx(nbytes)
    changes = CHANGES.get((target, name), {})
    assert comparison.differences == pytest.approx(changes)
    assert comparison.compiled.bytes_per_worker == pytest.approx(
        nbytes + sum(changes.values())
    )


@pytest.mark.parametrize("name", [k for k in INTENDED if k != "two_levels"])
def test_here(name):
    lowered = lower_here(program(name))
    compiled = lowered.compile()
    comparison = wire.compare(lowered, compiled)
    check(comparison, "cpu", name, 8)
    assert sorted(comparison.intended.collectives) == sorted(
        wire.intended(lowered).collectives
    )
    assert sorted(comparison.compiled.collectives) == sorted(
        wire.count(compiled).collectives
    )


@pytest.mark.parametrize("cluster, name", ELSEWHERE_ROWS)
def test_elsewhere(cluster, name):
    fn, n = program(name), WORKERS[cluster]
    comparison = wire.compare(lower(fn, n), path_of(fn, cluster).read_text())
    check(comparison, cluster, name, n)


@pytest.mark.parametrize("cluster, name", ELSEWHERE_ROWS)
def test_what_is_left_alone_keeps_names_groups_and_weights(cluster, name):
    fn, n = program(name), WORKERS[cluster]
    comparison = wire.compare(lower(fn, n), path_of(fn, cluster).read_text())
    for change in comparison.changes:
        if not change.differences:
            (meant,), (sent,) = change.intended, change.compiled
            # the names of loops depend on jax, and XLA names loops in loops once
            assert sent.path.split("/")[-1] == meant.path.split("/")[-1]
            like = {"asynchronous": False, "name": "", "path": ""}
            assert sent._replace(**like) == meant._replace(**like)


@pytest.mark.parametrize("name", ["rotating", "scanned_twice", "every_fourth"])
def test_paths_are_those_of_the_compiled_program(name):
    lowered = lower_here(program(name))
    meant, sent = wire.intended(lowered), wire.count(lowered.compile())
    paths = [  # of loops in loops, jax 0.10 names only the innermost
        {re.sub(r"(while/body/\w+/)\1+", r"\1", c.path) for c in counted.collectives}
        for counted in (meant, sent)
    ]
    assert paths[0] == paths[1]


def test_loops_state_their_trips_on_tpu_too():
    """XLA for TPU writes no trip count; the loop itself says where it ends."""
    text = path_of(wire_programs.scanned_twice, "v5e:2x2").read_text()
    assert " while(" in text and "known_trip_count" not in text
    assert [c.weight for c in wire.count(text).collectives] == [12]


def test_links_of_a_real_program_for_128_gpus():
    text = path_of(wire_programs.two_levels, "16x8:h100").read_text()
    counted, nodes = wire.count(text), np.repeat(np.arange(16), 8)
    assert {c.group_size for c in counted.collectives} == {8, 16}
    assert not any(c.asynchronous for c in counted.collectives)  # nothing lies between
    assert counted.bytes_between(nodes) == 2 * F32 / 8 * 15 / 16
    assert counted.bytes_inside(nodes) == 2 * F32 * 7 / 8


@pytest.mark.plan
@pytest.mark.parametrize(
    "cluster, plugin", [("8:h100", "jax_cuda13_plugin"), ("v5e:2x2", "libtpu")]
)
def test_stored_programs_are_what_xla_makes(cluster, plugin, monkeypatch, tmp_path):
    reason = "the extra bagua-jax[plan] is not installed"
    pytest.importorskip(plugin, reason=reason)
    monkeypatch.setenv("BAGUA_JAX_CACHE", str(tmp_path))
    target = planning.Cluster.parse(cluster)
    for fn in (wire_programs.four_gathers, wire_programs.scatter_gather):
        lowered = lower(fn, WORKERS[cluster], target.platform)
        compiled = planning.compile_lowered(lowered, target)
        check(wire.compare(lowered, compiled), cluster, fn.__name__, WORKERS[cluster])


def test_asynchronous_forms():
    for cluster in ("8:h100", "v5e:2x2"):
        text = path_of(wire_programs.overlapped, cluster).read_text()
        (c,) = wire.count(text).collectives
        assert c.asynchronous
    assert text.count(" all-gather(") == 4  # one collective, shown in four fusions


def test_changes_hold_every_collective_once():
    fn = wire_programs.four_sums
    comparison = wire.compare(lower(fn, 8), path_of(fn, "8:h100").read_text())
    (change,) = comparison.changes
    assert [len(change.intended), len(change.compiled)] == [4, 1]


def test_table():
    fn = wire_programs.scatter_gather
    compared = wire.compare(lower(fn, 4), path_of(fn, "v5e:2x2").read_text())
    assert (
        str(compared)
        == """\
                              intended           compiled
kind            dtype  group  messages    bytes  messages    bytes  difference
reduce-scatter  f32        4         1  196,608         1  393,216  rewritten reduce-scatter -> all-reduce
all-gather      f32        4         1  196,608         1  196,608
total                                2  393,216         2  589,824  +196,608 bytes"""
    )
    page = Path(__file__).parents[2] / "docs" / "wire.md"
    assert str(compared) in page.read_text(encoding="utf-8")
    lines = compared.table([0, 0, 1, 1]).splitlines()
    assert lines[1].split()[3:9] == ["messages", "inside", "between"] * 2
    # a ring of four over two nodes crosses at two of its four edges
    halves = "total 2 196,608 196,608 2 294,912 294,912 +196,608 bytes"
    assert lines[-1].split() == halves.split()
