"""Bytes per link class: inside a node and between nodes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bagua_jax import Workers, compressors, primitives, topologies, wire

CODEC = compressors.minmax_uint8()
D = 58_725_376  # float32 elements: 234.9 MB, the gradients of the overlap study
NODES, PER_NODE = 16, 8
AT = np.repeat(np.arange(NODES), PER_NODE)
MB = 1e6


def count(exchange, workers, d=D):
    """Count a per-worker function of a vector [d], over an axis or a pair of axes."""
    x = jax.ShapeDtypeStruct((workers.num_workers, d), jnp.float32)
    program = workers.spmd(
        lambda x: exchange(x, workers.axis_name), in_specs=workers.spec
    )
    (x,) = workers.placed((x,), workers.spec)
    return wire.intended(program.trace(x).lower(lowering_platforms=("cpu",)))


def exact(x, axis):
    return primitives.c_fp_s(x, axis_name=axis)


def quantized(x, axis):
    return primitives.c_lp_s(x, CODEC, axis_name=axis)[0]


FLAT, TWO_LEVELS = Workers.abstract(128), Workers.abstract((NODES, PER_NODE))
S = 4 * D
U8 = D / 128 + 8  # one row of codes with its range

# What one GPU sends through its NIC, by hand; and as the study states it, in MB.
ROWS = {
    # a ring of 128 leaves each node once; what passes is 2S/n in n - 1 rounds, over 8
    "flat mean": (FLAT, exact, 2 * S * 127 / 128 / 8, 58.7),
    # 120 of 128 peers are on other nodes, then a ring of rows
    "flat u8": (FLAT, quantized, 120 * U8 + 127 * U8 / 8, 62.4),
    # rings of 16 nodes, each edge between nodes, over an eighth of the vector
    "two levels": (TWO_LEVELS, exact, 2 * S / 8 * 15 / 16, 55.1),
    "two levels u8": (TWO_LEVELS, quantized, 2 * 15 * (D / 8 / 16 + 8), 13.8),
}


@pytest.mark.parametrize("row", ROWS)
def test_what_leaves_a_node_of_eight(row):
    """Flat u8 sends no less between nodes than the exact mean; two levels do."""
    workers, exchange, between, stated = ROWS[row]
    counted = count(exchange, workers)
    assert counted.bytes_between(AT) == pytest.approx(between)
    assert counted.bytes_between(AT) / MB == pytest.approx(stated, rel=0.01)
    inside = counted.bytes_per_worker - between
    assert counted.bytes_inside(AT) == pytest.approx(inside)
    if workers is TWO_LEVELS:  # a reduce-scatter, and a gather: of floats, or of codes
        gathered = 7 * 16 * (D / 8 / 16 + 8) if exchange is quantized else S * 7 / 8
        assert inside == pytest.approx(S * 7 / 8 + gathered)


def test_the_flat_count_ranks_them_otherwise():
    """Of bytes sent at all, flat u8 sends least: links must be told apart."""
    counts = {row: count(exchange, w) for row, (w, exchange, *_) in ROWS.items()}
    least = min(counts, key=lambda row: counts[row].bytes_per_worker)
    assert least == "flat u8"
    assert min(counts, key=lambda row: counts[row].bytes_between(AT)) == "two levels u8"


def test_gossip_between_nodes_and_between_all():
    ring = lambda x, axis: primitives.d_fp_s(  # noqa: E731
        x, topologies.ring(128 if axis == FLAT.axis_name else NODES), axis_name=axis
    )
    # on a ring of all, two workers of a node have a neighbour elsewhere
    assert count(ring, FLAT).bytes_between(AT) == pytest.approx(2 * S / 8)
    # on a ring of nodes, each device sends its eighth to both
    assert count(ring, TWO_LEVELS).bytes_between(AT) == pytest.approx(2 * S / 8)


def test_compiled_programs_have_the_same_links():
    workers, at = Workers.devices((2, 4)), np.repeat([0, 1], 4)
    d = 8192
    program = workers.spmd(
        lambda x: quantized(x, workers.axis_name), in_specs=workers.spec
    )
    x = jax.ShapeDtypeStruct((8, d), jnp.float32)
    compiled = wire.count(program.lower(x).compile())
    between = 2 * (d / 8 + 8)
    assert compiled.bytes_between(at) == pytest.approx(between)
    assert compiled.bytes_inside(at) == pytest.approx(
        4 * d * 3 / 4 + 3 * 2 * (d / 4 / 2 + 8)
    )
    meant = count(quantized, Workers.abstract((2, 4)), d)
    assert meant.bytes_between(at) == pytest.approx(between)
    lines = [line.split() for line in compiled.table(at).splitlines()]
    assert lines[0][5:7] == ["inside", "between"]
    rows = {(row[0], row[1]): row[5:7] for row in lines[1:-1]}
    assert rows["reduce-scatter", "f32"] == ["24,576", "0"]
    assert rows["all-to-all", "u8"] == ["0", "1,032"]
    assert lines[-1][-3:] == ["2,064", "between", "nodes"]


@pytest.mark.parametrize("nodes", [[0, 0, 1], [[0, 0], [1, 1]], 3])
def test_a_node_for_every_device(nodes):
    counted = count(exact, Workers.abstract(4), 100)
    with pytest.raises(ValueError, match="node of each of 4 devices or more"):
        counted.bytes_between(nodes)
