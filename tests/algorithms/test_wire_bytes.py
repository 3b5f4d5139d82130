"""What each algorithm sends, read from its compiled program, is what it states."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from table import CODES, ROWS, Row, ids, targets, training

from bagua_jax import Workers, buckets, wire
from bagua_jax.traffic import payload

N = 8
START = {"w": jnp.zeros((301, 7)), "b": jnp.zeros(13), "s": jnp.zeros(())}
D = 301 * 7 + 13 + 1


def quadratic(tree, target):
    return sum(jnp.sum((leaf - target) ** 2) for leaf in jax.tree.leaves(tree))


def lowered(row, workers):
    loop = training(
        workers, row, start=START, loss=quadratic, tx=row.chain(workers.axis_name)
    )
    return loop.step.lower(loop.init(), targets(workers.num_workers))


def compiled(row, workers):
    return lowered(row, workers).compile()


@pytest.mark.parametrize("row", ROWS, ids=ids(ROWS))
def test_intended_and_compiled_bytes_are_the_stated_bytes(row):
    program = lowered(row, Workers.devices(N))
    compared = wire.compare(program, program.compile())
    size = row.options.get("bucket_bytes", buckets.DEFAULT_BUCKET_BYTES)
    nbytes, messages = row.sends(N, buckets.plan(START, size).sizes)
    for counted in (compared.intended, compared.compiled):
        assert counted.bytes_per_worker == pytest.approx(nbytes)
        assert counted.messages_per_worker == pytest.approx(messages)
    assert compared.differences == {}  # payloads are such that CPU widens nothing


@pytest.mark.parametrize(
    "row",
    [r for r in ROWS if r.algorithm in ("bytegrad", "low_precision_decentralized")],
    ids=lambda r: r.id,
)
def test_codes_travel_as_bytes(row):
    counted = wire.count(compiled(row, Workers.devices(N)))
    assert {c.dtype for c in counted.collectives} == {"u8"}


def test_buckets_are_messages():
    row = Row("gradient_allreduce", {"bucket_bytes": 64}, 0)
    counted = wire.count(compiled(row, Workers.devices(N)))
    plan = buckets.plan(START, 64)
    assert len(plan.buckets) == 2
    # XLA may combine all-reduces of several buckets into one; bytes stay.
    assert 1 <= counted.messages_per_worker <= len(plan.buckets)
    assert counted.bytes_per_worker == pytest.approx(2 * (N - 1) / N * 4 * D)


def test_hierarchy_sends_shards_between_nodes():
    """Two nodes of four: codes of a quarter of the vector cross between nodes.

    Inside the node gradients are added in float32, and codes gathered.
    """
    row = Row("bytegrad", {}, 0)
    counted = wire.count(compiled(row, Workers.devices((2, 4))))
    shard = math.ceil(D / 4)
    kinds = {(c.kind, c.dtype, c.group_size): c.bytes_sent for c in counted.collectives}
    part = payload(CODES, math.ceil(shard / 2))
    assert kinds["all-to-all", "u8", 2] == pytest.approx(part)
    assert kinds["all-gather", "u8", 2] == pytest.approx(part)
    assert kinds["reduce-scatter", "f32", 4] == pytest.approx(3 * 4 * shard)
    assert kinds["all-gather", "u8", 4] == pytest.approx(3 * 2 * part)
    assert len(kinds) == 4


def test_hierarchy_in_codes_sends_a_quarter_between_nodes():
    workers, nodes = Workers.devices((2, 4)), np.arange(8) // 4
    between = {
        name: wire.count(compiled(Row(name, {}, 0), workers)).bytes_between(nodes)
        for name in ("gradient_allreduce", "bytegrad")
    }
    ranges = 2 * 8  # of one part each way
    assert between["bytegrad"] - ranges == pytest.approx(
        between["gradient_allreduce"] / 4,
        abs=2,  # the shard's last part is filled up
    )
