"""The primitives against NumPy, in simulation and on devices, flat and hierarchical."""

import functools
import re
import warnings

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P
from oracles import gradient_side
from oracles import topologies as matrices
from oracles.codec import minmax_uint8
from oracles.gradient_side import ring_reduced, sign_l1
from oracles.scatter_reduce import bounds
from oracles.scatter_reduce import c_lp_s as oracle_c_lp_s

import bagua_jax
from bagua_jax import Workers, compressors, primitives, topologies, wire
from bagua_jax.compressors import REGISTRY
from bagua_jax.compressors.base import Compressor, CompressorFacts, stateless
from bagua_jax.primitives import Errors
from bagua_jax.topologies import MixingStep, Send, Topology
from bagua_jax.workers import make_mesh

PLACES = {"simulate": bagua_jax.Workers.simulate, "devices": bagua_jax.Workers.devices}
MINMAX, IDENTITY = compressors.minmax_uint8(), compressors.identity()
STOCHASTIC, SIGN = compressors.qsgd(3), compressors.sign("l1")
BF16, F16 = compressors.cast("bfloat16"), compressors.cast("float16")
both_places = pytest.mark.parametrize("place", PLACES)


def everywhere(workers, fn, *args, **kinds):
    """Run fn; every output has a leading worker axis, that of invariant values too."""

    def shown(*args):
        return primitives.worker_local(fn(*args), workers.axis_name)

    out = workers.spmd(shown, in_specs=workers.spec, **kinds)(*args)
    return jax.tree.map(
        lambda x: (
            np.broadcast_to(x, (workers.num_workers, *x.shape))
            if workers.mesh is None and x.shape[:1] != (workers.num_workers,)
            else np.asarray(x)
        ),
        out,
    )


def random(n, size, dtype=np.float32, seed=0, offset=0.3):
    rng = np.random.default_rng([seed, n, size])
    return (rng.standard_normal((n, size)) + offset).astype(dtype)


# --- against NumPy -------------------------------------------------------------------


def vectors(n, row):
    """Sizes below, at and above n, and narrow dtypes: all of them where n is 3 or 8."""
    sizes = {5}
    if row in ("c_fp_s", "c_lp_s", "ring_mean") and n in (3, 8):
        sizes = {1, 5, n, 8 * n + 3, 1000}
    found = {f"{size}": random(n, size) for size in sizes}
    narrow = ("c_fp_s", "c_lp_s", "ring_mean", "d_fp_s ring", "d_lp_s", "gather_mean")
    if row in narrow and n == 3:
        found["float16"] = random(n, 27, np.float16)
        found["bfloat16"] = random(n, 27, ml_dtypes.bfloat16)
    return found


def codec(x):
    return np.stack([minmax_uint8(np.float32(row)) for row in x])


def bf16(x):
    return np.float32(x).astype(ml_dtypes.bfloat16).astype(np.float32)


def exact_mean(x):
    return np.broadcast_to(np.float64(x).mean(0), x.shape)


def scatter_reduced(compress, x):
    """C_LP_S with any compressor of one chunk, partition by partition."""
    n, size = x.shape
    out = np.zeros(size)
    for part in bounds(size, n):
        if x[:, part].size:
            mean = np.float32(np.mean([compress(row) for row in x[:, part]], axis=0))
            out[part] = compress(mean)
    return np.broadcast_to(out, x.shape)


def ringed(compress, x):
    """A ring all-reduce that compresses at every hop; filled up with its last entry."""
    n, size = x.shape
    length = -(-size // n)
    filled = np.pad(x, ((0, 0), (0, n * length - size)), mode="edge")
    out = np.zeros((n, length))
    for k in range(n):
        share = np.zeros(1, np.float32)
        for hop in range(1, n + 1):
            own = filled[(k + hop) % n, k * length : (k + 1) * length]
            share = compress(share + own / np.float32(n))
        out[k] = share
    return np.broadcast_to(out.reshape(-1)[:size], x.shape)


def mixed(name, step, x):
    return matrices.MATRICES[name](len(x), step) @ np.float64(x)


def d_fp_s(name, step):
    def apply(x, n):
        topology = topologies.REGISTRY[name](n)
        return primitives.d_fp_s(x, topology, axis_name="workers", step=step)

    return apply, lambda x: mixed(name, step, x)


def axis(primitive, *args):
    """Bind a centralized primitive to the axis and keep its mean."""

    def apply(x, n):
        del n
        out = primitive(x, *args, axis_name="workers")
        return out[0] if isinstance(out, tuple) else out

    return apply


def d_lp_s(compressor):
    def apply(x, n):
        topology = topologies.ring(n)
        return primitives.d_lp_s(x, compressor, topology, axis_name="workers")

    return apply


ROWS = {
    "c_fp_s": (axis(primitives.c_fp_s), exact_mean),
    "c_lp_s identity": (axis(primitives.c_lp_s, IDENTITY), exact_mean),
    "c_lp_s cast": (
        axis(primitives.c_lp_s, BF16),
        lambda x: scatter_reduced(bf16, np.float32(x)),
    ),
    "gather_mean": (
        axis(primitives.gather_mean, MINMAX),
        lambda x: exact_mean(codec(x)),
    ),
    "linear_mean": (axis(primitives.linear_mean, IDENTITY), exact_mean),
    "ring_mean": (
        axis(primitives.ring_mean, BF16),
        lambda x: ringed(bf16, np.float32(x)),
    ),
    "ring_mean identity": (axis(primitives.ring_mean, IDENTITY), exact_mean),
    "d_fp_s ring": d_fp_s("ring", 3),
    "d_fp_s static_exponential": d_fp_s("static_exponential", 0),
    "d_fp_s one_peer_exponential": d_fp_s("one_peer_exponential", 1),
    "d_fp_s complete": d_fp_s("complete", 7),
    "d_lp_s": (d_lp_s(MINMAX), lambda x: mixed("ring", 0, codec(x))),
}
COUNTS = [1, 2, 3, 4, 8]


@functools.cache
def outputs(place, n):
    """Every row on every vector, and the 8-bit C_LP_S, as one program."""
    rows = {name: apply for name, (apply, _) in ROWS.items()}
    rows["c_lp_s"] = axis(primitives.c_lp_s, MINMAX)

    def program(xs):
        return {
            name: {k: apply(x, n) for k, x in xs[name].items()}
            for name, apply in rows.items()
        }

    return everywhere(PLACES[place](n), program, {row: vectors(n, row) for row in rows})


@both_places
@pytest.mark.parametrize("n", COUNTS)
@pytest.mark.parametrize("row", ROWS)
def test_equals_numpy(place, n, row):
    for name, x in vectors(n, row).items():
        got, expected = outputs(place, n)[row][name], ROWS[row][1](x)
        assert got.dtype == x.dtype and got.shape == x.shape
        # narrow vectors: sums of n of them, each addition rounded
        eps = float(ml_dtypes.finfo(x.dtype).eps)
        atol = eps * (n + 1) * np.abs(np.float64(x)).max()
        # a sum that rounds the other way flips one bf16
        if row in ("c_lp_s cast", "ring_mean"):
            atol = max(atol, 2.0**-8 * np.abs(expected).max())
        np.testing.assert_allclose(
            np.float64(got), expected, rtol=0, atol=atol, err_msg=name
        )


@both_places
@pytest.mark.parametrize("n", COUNTS)
def test_c_lp_s_equals_numpy(place, n):
    """Up to one level of the second phase where an owner's sum lies at a tie."""
    same, total = 0, 0
    for name, x in vectors(n, "c_lp_s").items():
        got = np.float64(outputs(place, n)["c_lp_s"][name])
        assert outputs(place, n)["c_lp_s"][name].dtype == x.dtype
        expected, _, _ = oracle_c_lp_s(np.float32(x))
        difference = np.abs(got - expected).max(0)
        fine = 1e-5 + 2 * float(ml_dtypes.finfo(x.dtype).eps) * np.abs(expected).max()
        step = (np.ptp(codec(np.float32(x)).mean(0)) + 1e-7) / 255
        assert difference.max() <= step + fine, name
        same += (difference <= fine).sum()
        total += difference.size
    assert same >= 0.99 * total


@both_places
@pytest.mark.parametrize("n", COUNTS)
@pytest.mark.parametrize(
    "row", ["c_lp_s", *(row for row in ROWS if row[0] == "c" or "_mean" in row)]
)
def test_results_are_equal_bit_for_bit_on_all_workers(place, n, row):
    for name, got in outputs(place, n)[row].items():
        for worker in range(1, n):
            assert got[worker].tobytes() == got[0].tobytes(), (name, worker)


def test_plain_vmap_needs_no_workers():
    x = random(5, 13)
    ring = topologies.ring(5)

    def program(x):
        return (
            primitives.c_fp_s(x, axis_name="any"),
            primitives.c_lp_s(x, MINMAX, axis_name="any")[0],
            primitives.d_fp_s(x, ring, axis_name="any"),
        )

    exact, coded, gossip = jax.jit(jax.vmap(program, axis_name="any"))(x)
    np.testing.assert_allclose(exact, exact_mean(x), atol=1e-6)
    np.testing.assert_allclose(coded, exact_mean(x), atol=0.05)
    np.testing.assert_allclose(gossip, mixed("ring", 0, x), atol=1e-6)


@both_places
def test_steps_of_a_rotating_topology(place):
    n, x = 8, random(8, 5)
    rotating = topologies.shift_one(n)

    def program(x, step):
        return primitives.d_fp_s(x, rotating, axis_name="workers", step=step)

    workers = PLACES[place](n)
    run = workers.spmd(program, in_specs=(workers.spec, P()))
    for step in (0, 1, 3, 4, 11):
        expected = mixed("shift_one", step, x)
        np.testing.assert_allclose(run(x, jnp.int32(step)), expected, atol=1e-6)


@both_places
@pytest.mark.parametrize("name", topologies.REGISTRY)
def test_every_registered_topology_mixes_as_its_matrix(place, name):
    """Irregular graphs too, where some workers hear fewer neighbours than others."""
    topology = topologies.REGISTRY[name](8)
    x = random(8, 6)
    workers = PLACES[place](8)
    run = workers.spmd(
        lambda x, step: primitives.d_fp_s(x, topology, axis_name="workers", step=step),
        in_specs=(workers.spec, P()),
    )
    for step in range(min(topology.period + 1, 6)):
        expected = topology.mixing_matrix(step) @ np.float64(x)
        np.testing.assert_allclose(run(x, jnp.int32(step)), expected, atol=1e-6)


@both_places
def test_vectors_that_are_equal_on_all_workers(place):
    """P() in, as a constant gradient is: every primitive takes it."""
    n, x = 4, random(1, 11)[0]
    workers = PLACES[place](n)
    ring = topologies.ring(n)
    programs = {
        "c_fp_s": lambda x: primitives.c_fp_s(x, axis_name="workers"),
        "gather_mean": lambda x: primitives.gather_mean(x, BF16, axis_name="workers")[
            0
        ],
        "linear_mean": lambda x: primitives.linear_mean(
            x, IDENTITY, axis_name="workers"
        )[0],
        "ring_mean": lambda x: primitives.ring_mean(x, BF16, axis_name="workers")[0],
        "d_fp_s": lambda x: primitives.d_fp_s(x, ring, axis_name="workers"),
        "d_lp_s": lambda x: primitives.d_lp_s(x, BF16, ring, axis_name="workers"),
        "c_lp_s": lambda x: primitives.c_lp_s(x, MINMAX, axis_name="workers")[0],
    }
    for name, fn in programs.items():
        got = np.asarray(workers.spmd(fn)(x))
        assert got.shape == ((n, 11) if name[0] == "d" else (11,)), name
        expected = np.broadcast_to(x, got.shape)
        np.testing.assert_allclose(got, expected, rtol=0, atol=0.05, err_msg=name)


@both_places
def test_empty_vectors(place):
    workers = PLACES[place](4)
    ring = topologies.ring(4)

    def program(x):
        return (
            primitives.c_fp_s(x, axis_name="workers"),
            primitives.c_lp_s(x, MINMAX, axis_name="workers")[0],
            primitives.gather_mean(x, MINMAX, axis_name="workers")[0],
            primitives.linear_mean(x, IDENTITY, axis_name="workers")[0],
            primitives.ring_mean(x, MINMAX, axis_name="workers")[0],
            primitives.d_fp_s(x, ring, axis_name="workers"),
            primitives.d_lp_s(x, MINMAX, ring, axis_name="workers"),
        )

    x = jnp.zeros((4, 0), jnp.bfloat16)
    out = workers.spmd(program, in_specs=workers.spec)(x)
    assert [y.shape for y in out] == [(0,)] * 5 + [(4, 0)] * 2
    assert {y.dtype for y in out} == {x.dtype}


@both_places
@pytest.mark.parametrize("n", [1, 3, 8])
def test_rows_go_to_their_owners_and_come_back_to_all(place, n):
    """Scattered they are transposed; gathered they are equal by their type, too."""
    x = np.arange(n * n * 2, dtype=np.int16).reshape(n, n, 2)
    workers = PLACES[place](n)

    def program(rows):
        mine = primitives.scatter_rows(rows, axis_name="workers")
        empty = primitives.scatter_rows(rows[:, :0], axis_name="workers")
        return (
            mine,
            primitives.gather_rows(mine, axis_name="workers"),
            primitives.gather_rows(empty[0], axis_name="workers"),
        )

    mine, all_rows, nothing = workers.spmd(program, in_specs=workers.spec)(x)
    np.testing.assert_array_equal(mine, x.swapaxes(0, 1))
    np.testing.assert_array_equal(all_rows, x.swapaxes(0, 1))
    assert all_rows.dtype == x.dtype and nothing.shape == (n, 0)


@both_places
@pytest.mark.parametrize("shape", [5, (4, 2)])
def test_a_long_ring_is_a_loop_of_the_same_hops(place, shape, monkeypatch):
    workers = PLACES[place](shape)
    x, key = random(workers.num_workers, 37), jax.random.key(0)
    hops = (shape if isinstance(shape, int) else shape[0]) - 1

    def program(x, key):
        zeros, name = jnp.zeros_like(x), workers.axis_name
        return primitives.ring_mean(x, STOCHASTIC, zeros, axis_name=name, key=key)

    def run():
        compiled = workers.spmd(program, in_specs=(workers.spec, P())).lower(x, key)
        compiled = compiled.compile()
        return compiled(x, key), compiled

    (mean, error), unrolled = run()
    monkeypatch.setattr(primitives, "_LONGEST_UNROLLED", 2)
    (looped, same), loop = run()
    np.testing.assert_allclose(looped, mean, rtol=0, atol=1e-6)
    np.testing.assert_allclose(same, error, rtol=0, atol=1e-5)
    if place == "devices":
        counts = [wire.count(program) for program in (unrolled, loop)]
        assert counts[0].bytes_per_worker == counts[1].bytes_per_worker > 0
        assert len(counts[0].collectives) - len(counts[1].collectives) == hops - 1


def test_the_error_of_a_ring_grows_with_its_length():
    """Equal vectors, C of variance omega |v|^2: sum of (j/n)^2; c_lp_s: 1 + 1/n."""
    found = {}
    for n in (4, 16):
        one = random(1, 256)[0]
        x = np.tile(one, (200, n))  # every part is the same vector, 200 draws

        def program(x, key, n=n):
            share = {"axis_name": "workers", "key": key}

            def worker(x):
                ring, _ = primitives.ring_mean(x, STOCHASTIC, **share)
                return ring, primitives.c_lp_s(x, STOCHASTIC, **share)[0]

            ring, parts = jax.vmap(worker, axis_name="workers")(jnp.tile(x, (n, 1)))
            return ring[0], parts[0]

        keys = jax.random.split(jax.random.key(1), len(x))
        ring, parts = jax.jit(jax.vmap(program))(x, keys)
        found[n] = [np.mean((np.float64(y) - x) ** 2) for y in (ring, parts)]
    for n, (ring, parts) in found.items():
        expected = (n + 1) * (2 * n + 1) / (6 * n) / (1 + 1 / n)
        assert 0.8 * expected < ring / parts < 1.25 * expected, n


# --- narrow dtypes at their ends -----------------------------------------------------


@pytest.mark.parametrize("top", [40000.0, 65504.0])
def test_float16_stays_finite_where_the_result_is_representable(top):
    """Means of representable numbers are representable; codes may lie above the top."""
    n = 8
    x = np.tile(np.float16([-top, top, 0, top, -top, 1, top, top] * 2), (n, 1))
    ring, complete = topologies.ring(n), topologies.complete(n)

    def program(x):
        return {
            "c_lp_s": primitives.c_lp_s(x, MINMAX, axis_name="workers")[0],
            "gather_mean": primitives.gather_mean(x, MINMAX, axis_name="workers")[0],
            "linear_mean": primitives.linear_mean(x, IDENTITY, axis_name="workers")[0],
            "ring_mean": primitives.ring_mean(x, F16, axis_name="workers")[0],
            "d_lp_s": primitives.d_lp_s(x, MINMAX, ring, axis_name="workers"),
            "d_fp_s ring": primitives.d_fp_s(x, ring, axis_name="workers"),
            "d_fp_s complete": primitives.d_fp_s(x, complete, axis_name="workers"),
            "c_fp_s": primitives.c_fp_s(x, axis_name="workers"),
        }

    out = everywhere(bagua_jax.Workers.simulate(n), program, x)
    overflowed = [name for name, y in out.items() if not np.isfinite(y).all()]
    assert overflowed == []
    for name, y in out.items():
        error = np.abs(np.float64(y) - np.float64(x)).max()
        assert error <= 2.1 * top / 255, name


# --- invariance, proved by JAX -------------------------------------------------------

PAIRS = [(2, 4), (4, 2), (1, 8), (8, 1)]
SHAPES = [4, *PAIRS]


def centralized(axis_name):
    errors = lambda x: Errors(jnp.zeros_like(x), jnp.zeros_like(x))  # noqa: E731

    def program(x):
        return {
            "c_fp_s": primitives.c_fp_s(x, axis_name=axis_name),
            "c_lp_s": primitives.c_lp_s(x, MINMAX, errors(x), axis_name=axis_name)[0],
            "gather_mean": primitives.gather_mean(x, MINMAX, axis_name=axis_name)[0],
            "linear_mean": primitives.linear_mean(x, IDENTITY, axis_name=axis_name)[0],
            "ring_mean": primitives.ring_mean(x, MINMAX, axis_name=axis_name)[0],
        }

    return program


@pytest.mark.parametrize("shape", [4, (2, 4)])
def test_results_of_centralized_primitives_leave_as_invariant(shape):
    """out_specs=P() with check_vma=True: the compiler has proved it."""
    names = ("workers",) if isinstance(shape, int) else ("node", "local")
    sizes = (shape,) if isinstance(shape, int) else shape
    n = int(np.prod(sizes))
    axis_name = names[0] if len(names) == 1 else names
    mesh = make_mesh(sizes, names)
    x = random(n, 13)

    def body(x):
        return centralized(axis_name)(x[0])

    mapped = jax.shard_map(body, mesh=mesh, in_specs=P(names), out_specs=P())
    out = jax.block_until_ready(jax.jit(mapped)(x))
    for name, y in out.items():
        np.testing.assert_allclose(y, x.mean(0), atol=0.05, err_msg=name)


@pytest.mark.parametrize("shape", SHAPES)
def test_types_of_results_and_errors(shape):
    workers = bagua_jax.Workers.devices(shape)
    n = topologies.ring(shape if isinstance(shape, int) else shape[0])
    x = jnp.zeros((workers.num_workers, 13))
    program = centralized(workers.axis_name)
    found = workers.specs(program, x, in_specs=workers.spec)
    assert set(found.values()) == {P()}

    def rest(x):
        zeros = jnp.zeros_like(x)
        name = workers.axis_name
        _, errors = primitives.c_lp_s(x, MINMAX, Errors(zeros, zeros), axis_name=name)
        _, error, _ = primitives.gather_mean(x, MINMAX, zeros, axis_name=name)
        _, unsent = primitives.ring_mean(x, MINMAX, zeros, axis_name=name)
        fp = primitives.d_fp_s(x, n, axis_name=name)
        lp = primitives.d_lp_s(x, MINMAX, n, axis_name=name)
        return errors, error, unsent, fp, lp

    for spec in jax.tree.leaves(
        workers.specs(rest, x, in_specs=workers.spec),
        is_leaf=lambda s: isinstance(s, P),
    ):
        assert spec == workers.spec


# --- hierarchy -----------------------------------------------------------------------


def node_means(x, shape):
    nodes, local = shape
    return np.float32(x.reshape(nodes, local, -1).mean(1))


def shards(m, local):
    """Cut [nodes, N] into each device's shard, filled up with the last element."""
    length = -(-m.shape[1] // local)
    padded = np.pad(m, ((0, 0), (0, local * length - m.shape[1])), mode="edge")
    return [padded[:, k * length : (k + 1) * length] for k in range(local)]


def by_shards(fn, x, shape):
    """Run a flat NumPy primitive over nodes on each shard; [nodes, N] again."""
    size = x.shape[1]
    return np.concatenate(
        [fn(shard) for shard in shards(node_means(x, shape), shape[1])], axis=1
    )[:, :size]


HIERARCHICAL = {
    "c_fp_s": lambda m: exact_mean(m),
    "c_lp_s": lambda m: np.broadcast_to(oracle_c_lp_s(m)[0], m.shape),
    "gather_mean": lambda m: exact_mean(codec(m)),
    "linear_mean": exact_mean,
    "ring_mean": lambda m: ringed(lambda row: codec(row[None])[0], m),
    "d_fp_s": lambda m: mixed("one_peer_exponential", 1, m),
    "d_lp_s": lambda m: mixed("ring", 0, codec(m)),
}


@functools.cache
def hierarchical(place, shape):
    workers = PLACES[place](shape)
    name, nodes = workers.axis_name, shape[0]
    sizes = {(2, 4): (5, 37), (4, 2): (37,)}.get(shape, (13,))
    xs = {size: random(8, size) for size in sizes}

    def program(xs):
        def decentralized(x):
            peers, ring = topologies.one_peer_exponential(nodes), topologies.ring(nodes)
            return {
                "d_fp_s": primitives.d_fp_s(x, peers, axis_name=name, step=1),
                "d_lp_s": primitives.d_lp_s(x, MINMAX, ring, axis_name=name),
            }

        return {k: {**centralized(name)(x), **decentralized(x)} for k, x in xs.items()}

    return xs, everywhere(workers, program, xs)


@both_places
@pytest.mark.parametrize("shape", PAIRS)
@pytest.mark.parametrize("row", HIERARCHICAL)
def test_hierarchy_equals_the_flat_primitive_over_node_means(place, shape, row):
    xs, out = hierarchical(place, shape)
    for size, x in xs.items():
        expected = np.repeat(by_shards(HIERARCHICAL[row], x, shape), shape[1], axis=0)
        got = np.float64(out[size][row])
        # a mean that lies at a tie of the codec may flip a level; these do not
        atol = 5e-6 if row == "ring_mean" else 2e-6  # rounded at every hop
        np.testing.assert_allclose(got, expected, rtol=0, atol=atol, err_msg=f"{size}")
        equal = got.reshape(*shape, -1)
        assert (equal == equal[:, :1]).all()  # inside a node, to the bit
        if row[0] != "d":
            assert (got == got[0]).all()


@both_places
def test_hierarchical_gossip_is_w_kron_mean(place):
    """d_fp_s = (W kron J/L) x, on a directed graph that changes with the step."""
    shape, size = (4, 2), 6
    x = random(8, size)
    workers = PLACES[place](shape)
    topology = topologies.one_peer_exponential(4)
    for step in range(2):
        w = np.kron(topology.mixing_matrix(step), np.full((2, 2), 0.5))
        got = everywhere(
            workers,
            lambda x, step=step: primitives.d_fp_s(
                x, topology, axis_name=workers.axis_name, step=step
            ),
            x,
        )
        np.testing.assert_allclose(got, w @ np.float64(x), atol=1e-6)


# --- padding -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "place, shape", [("simulate", 8), ("devices", (2, 4)), ("simulate", (8, 1))]
)
def test_padding_takes_no_part_in_a_range(place, shape):
    """In [100, 101] a level is 1/255; with a zero in the range it would be 101/255."""
    workers = PLACES[place](shape)
    rng = np.random.default_rng(0)
    xs = {size: np.float32(100 + rng.random((8, size))) for size in (3, 9, 67)}

    def program(xs):
        name = workers.axis_name
        return {
            "c_lp_s": {
                k: primitives.c_lp_s(x, MINMAX, axis_name=name)[0]
                for k, x in xs.items()
            },
            "ring_mean": {
                k: primitives.ring_mean(x, MINMAX, axis_name=name)[0]
                for k, x in xs.items()
            },
            "gather_mean": {
                9: primitives.gather_mean(xs[9], MINMAX, axis_name=name)[0]
            },
        }

    for name, out in everywhere(workers, program, xs).items():
        for size, got in out.items():
            error = np.abs(got - xs[size].mean(0)).max()
            levels = 1.0
            if name == "ring_mean":  # half a level of j/n at each hop j = 1..n
                n = shape if isinstance(shape, int) else shape[0]
                levels = (n + 1) / 4
            assert error <= 1.1 * levels / 255, (name, size)


@both_places
@pytest.mark.parametrize("size", [3, 9, 13])
def test_zeros_that_fill_up_take_no_part_in_a_scale(place, size):
    """A sign of nothing is +1: what fills up is zero again before the next hop."""
    workers, x = PLACES[place](8), random(8, size)
    zeros = np.zeros((8, size), np.float32)
    got = everywhere(
        workers,
        lambda x, d: primitives.ring_mean(x, SIGN, d, axis_name="workers"),
        x,
        zeros,
    )
    expected = ring_reduced(sign_l1, np.float64(x), zeros, None)
    np.testing.assert_allclose(got[0], np.broadcast_to(expected[0], x.shape), atol=1e-6)
    np.testing.assert_allclose(got[1], expected[1], atol=1e-5)


@both_places
@pytest.mark.parametrize("size", [3, 9, 13, 5003])
def test_zeros_that_fill_up_take_no_part_in_an_owners_scale(place, size):
    """What nothing decodes to is no value of the mean that owners compress again."""
    n = 8
    workers, x = PLACES[place](n), random(n, size)
    zeros = np.zeros((n, size), np.float32)
    mean, errors = everywhere(
        workers,
        lambda x, d, e: primitives.c_lp_s(x, SIGN, Errors(d, e), axis_name="workers"),
        x,
        zeros,
        zeros,
    )
    expected, _, owner = gradient_side.scatter_reduced(
        sign_l1, np.float64(x), zeros, zeros
    )
    np.testing.assert_allclose(mean, np.broadcast_to(expected, x.shape), atol=1e-5)
    np.testing.assert_allclose(errors.owner, owner, atol=1e-5)


def test_filling_up_is_compiled_into_the_packing():
    """Where any filling would do: of zeros XLA makes a copy of the whole vector."""
    workers, like = Workers.devices(4), jnp.zeros((4, 1001))

    def program(compressor):
        def mean(x):
            vector = jnp.concatenate([x, 2 * x])
            return primitives.ring_mean(vector, compressor, axis_name="workers")[0]

        run = workers.spmd(mean, in_specs=workers.spec)
        return run.lower(like).compile().as_text()

    assert " pad(" in program(SIGN)
    for compressor in (IDENTITY, F16):
        assert " pad(" not in program(compressor), compressor.facts.name


def test_padding_takes_no_part_with_error_feedback():
    """Offsets of the errors too: the tail part is filled with its own last value."""
    workers, n, size = bagua_jax.Workers.simulate(8), 8, 11
    x = np.float32(100 + np.random.default_rng(0).random((n, size)))
    worker = np.float32(50 + np.zeros((n, size)))
    owner = np.zeros((n, size), np.float32)
    for k, part in enumerate(bounds(size, n)):
        owner[k, part] = 25
    mean, errors = everywhere(
        workers,
        lambda x, d, e: primitives.c_lp_s(x, MINMAX, Errors(d, e), axis_name="workers"),
        x,
        worker,
        owner,
    )
    assert np.abs(mean - (x.mean(0) + 75)).max() <= 1.1 / 255
    assert np.abs(errors.worker).max() <= 0.6 / 255
    assert np.abs(errors.owner).max() <= 0.6 / 255


# --- error feedback ------------------------------------------------------------------


def halves(kept):
    """A compressor that keeps every second element: contractive and idempotent."""

    def compress(key, x, state):
        del key
        mask = jnp.arange(x.shape[0]) % 2 == kept
        return jnp.where(mask, x, 0), state

    facts = CompressorFacts(
        "halves", False, lambda like: 4 * like.size, "test", delta=lambda d: 0.0
    )
    return Compressor(stateless, compress, lambda p, like: p.astype(like.dtype), facts)


STEPS = 50


@functools.cache
def feedback(place, shape, sides, compressor):
    """Run 50 steps; (inputs [T, n, N], outputs [T, n, N], errors at the end)."""
    workers, size = PLACES[place](shape), 19
    n = workers.num_workers
    x = random(n, STEPS * size).reshape(n, STEPS, size)

    def program(xs):
        zeros = primitives.worker_local(jnp.zeros(size), workers.axis_name)
        first = Errors(
            zeros if "worker" in sides else None, zeros if "owner" in sides else None
        )

        def step(errors, x):
            mean, errors = primitives.c_lp_s(
                x, compressor, errors, axis_name=workers.axis_name
            )
            return errors, mean

        return lax.scan(step, first, xs)

    errors, means = everywhere(workers, program, x)
    return np.moveaxis(x, 1, 0), np.moveaxis(means, 1, 0), errors


@both_places
@pytest.mark.parametrize("shape", [4, (2, 2)])
def test_feedback_at_both_ends_telescopes(place, shape):
    """sum of outputs = sum of mean inputs - mean d - sum e."""
    x, means, errors = feedback(place, shape, ("worker", "owner"), MINMAX)
    nodes = shape if isinstance(shape, int) else shape[0]
    # in a hierarchy each device of a node holds its shard's error, zero elsewhere
    held = errors.worker.sum(0) / nodes + errors.owner.sum(0)
    expected = np.float64(x).mean(1).sum(0) - held
    np.testing.assert_allclose(np.float64(means)[:, 0].sum(0), expected, atol=5e-5)
    assert 1e-4 < np.abs(errors.worker).max() < 0.05
    assert 1e-4 < np.abs(errors.owner).max() < 0.05


@both_places
@pytest.mark.parametrize("shape", [4, (2, 2)])
def test_feedback_at_the_worker_telescopes(place, shape):
    """With an owner that loses nothing more: sum of outputs = sum of means - mean d."""
    x, means, errors = feedback(place, shape, ("worker",), halves(0))
    nodes = shape if isinstance(shape, int) else shape[0]
    expected = np.float64(x).mean(1).sum(0) - errors.worker.sum(0) / nodes
    np.testing.assert_allclose(np.float64(means)[:, 0].sum(0), expected, atol=5e-5)
    assert errors.owner is None and np.abs(errors.worker).max() > 1


@both_places
@pytest.mark.parametrize("shape", [4, (2, 2)])
def test_feedback_at_the_owner_telescopes(place, shape):
    """sum of outputs = sum of the means of what workers sent - sum e."""
    x, means, errors = feedback(place, shape, ("owner",), MINMAX)
    nodes, local = (shape, 1) if isinstance(shape, int) else shape
    sent = np.zeros(x.shape[2])
    for row in x:
        for k, shard in enumerate(shards(node_means(row, (nodes, local)), local)):
            start = k * shard.shape[1]
            for part in bounds(shard.shape[1], nodes):
                decoded = codec(shard[:, part]).mean(0)
                where = slice(start + part.start, start + part.start + len(decoded))
                sent[where] += decoded[: max(0, len(sent) - where.start)]
    expected = sent - errors.owner.sum(0)
    np.testing.assert_allclose(np.float64(means)[:, 0].sum(0), expected, atol=5e-5)
    assert errors.worker is None and np.abs(errors.owner).max() > 1e-4


@both_places
@pytest.mark.parametrize("shape", [4, (2, 2)])
def test_errors_are_zero_outside_the_own_part(place, shape):
    _, _, errors = feedback(place, shape, ("worker", "owner"), MINMAX)
    nodes, local = (shape, 1) if isinstance(shape, int) else shape
    size = errors.worker.shape[1]
    length = -(-size // local)
    for node in range(nodes):
        for device in range(local):
            own = np.arange(device * length, min((device + 1) * length, size))
            k = node * local + device
            assert not np.delete(errors.worker[k], own).any()
            assert errors.worker[k, own].any()
            part = bounds(length, nodes)[node]
            own = np.arange(device * length + part.start, device * length + part.stop)
            own = own[own < size]
            assert not np.delete(errors.owner[k], own).any()
            assert errors.owner[k, own].any()


@both_places
@pytest.mark.parametrize("primitive", ["gather_mean", "linear_mean", "ring_mean"])
@pytest.mark.parametrize("shape", [4, (2, 2)])
def test_feedback_of_other_means_telescopes(place, primitive, shape):
    workers, size, steps = PLACES[place](shape), 19, 20
    n = workers.num_workers
    nodes = shape if isinstance(shape, int) else shape[0]
    compressor = halves(1)
    compressor = compressor._replace(facts=compressor.facts._replace(linear=True))
    x = random(n, steps * size).reshape(n, steps, size)

    def program(xs):
        zeros = primitives.worker_local(jnp.zeros(size), workers.axis_name)

        def step(error, x):
            mean, error, *_ = getattr(primitives, primitive)(
                x, compressor, error, axis_name=workers.axis_name
            )
            return error, mean

        return lax.scan(step, zeros, xs)

    error, means = everywhere(workers, program, x)
    expected = np.float64(x).mean(0).sum(0) - error.sum(0) / nodes
    np.testing.assert_allclose(np.float64(means)[0].sum(0), expected, atol=5e-5)
    assert np.abs(error).max() > 1


def test_state_of_a_compressor_is_carried():
    """A compressor that counts: gather_mean and linear_mean return its new state."""

    def compress(key, x, state):
        del key
        return x * (state + 1), state + 1

    counting = Compressor(
        lambda x: jnp.zeros(()), compress, lambda p, like: p, IDENTITY.facts
    )
    x = random(3, 4)

    def program(x):
        state = counting.init(x)
        for mean in (primitives.gather_mean, primitives.linear_mean):
            out, _, state = mean(x, counting, axis_name="workers", state=state)
        return out, state

    out, state = everywhere(bagua_jax.Workers.simulate(3), program, x)
    np.testing.assert_allclose(out, 2 * exact_mean(x), rtol=1e-6)
    np.testing.assert_array_equal(state, [2, 2, 2])


# --- what travels --------------------------------------------------------------------

COLLECTIVE = re.compile(
    r"= \(?(\w+)\[.*?\s(all-reduce|all-gather|all-to-all|collective-permute|"
    r"reduce-scatter)(?:-start)?\("
)


def sent(shape, fn, size=37, dtype=np.float32):
    workers = PLACES["devices"](shape)
    program = workers.spmd(
        lambda x: fn(x, workers.axis_name), in_specs=workers.spec
    ).lower(np.zeros((workers.num_workers, size), dtype))
    lines = program.compile().as_text().splitlines()
    found = [match.groups() for line in lines if (match := COLLECTIVE.search(line))]
    return sorted((kind, dtype) for dtype, kind in found)


def tx(primitive, *args):
    return lambda x, name: primitive(x, *args, axis_name=name)


INSIDE = [("all-gather", "f32"), ("reduce-scatter", "f32")]
TRAFFIC = {
    "c_fp_s": (tx(primitives.c_fp_s), [("all-reduce", "f32")]),
    "c_lp_s": (
        tx(primitives.c_lp_s, MINMAX),
        [("all-gather", "u8"), ("all-to-all", "u8")],
    ),
    "c_lp_s cast": (
        tx(primitives.c_lp_s, BF16),
        [("all-gather", "u16"), ("all-to-all", "u16")],
    ),
    "gather_mean": (tx(primitives.gather_mean, MINMAX), [("all-gather", "u8")]),
    "linear_mean": (tx(primitives.linear_mean, IDENTITY), [("all-reduce", "f32")]),
    "ring_mean": (
        tx(primitives.ring_mean, MINMAX),
        [("all-gather", "u8"), *[("collective-permute", "u8")] * 3],
    ),
    "d_fp_s": (
        tx(primitives.d_fp_s, topologies.ring(4)),
        [("collective-permute", "f32")] * 2,
    ),
    "d_fp_s complete": (
        tx(primitives.d_fp_s, topologies.complete(4)),
        [("all-reduce", "f32")],
    ),
    "d_lp_s": (
        tx(primitives.d_lp_s, MINMAX, topologies.ring(4)),
        [("collective-permute", "u8")] * 2,
    ),
}


@pytest.mark.parametrize("row", TRAFFIC)
def test_one_collective_for_each_phase(row):
    primitive, expected = TRAFFIC[row]
    assert sent(4, primitive) == expected


@pytest.mark.parametrize("row", ["c_fp_s", "c_lp_s", "d_fp_s", "d_lp_s"])
def test_one_collective_for_each_phase_of_a_hierarchy(row):
    primitive, expected = TRAFFIC[row]
    scatter, gather = sorted(INSIDE, reverse=True)
    if row == "c_lp_s":  # codes are gathered inside the node, too
        gather = ("all-gather", "u8")
    assert sent((4, 2), primitive) == sorted([*expected, scatter, gather])


def test_every_payload_is_one_message_for_each_phase():
    """All compressors in one program: no two messages of it are of one exchange."""
    built = [factory() for name, factory in REGISTRY.items() if name != "cast"]
    built = [
        c for c in built if not jax.tree.leaves(jax.eval_shape(c.init, jnp.ones(9)))
    ]
    assert len(built) > 10

    def exchange(x, name):
        key = jax.random.key(0)
        return [
            primitives.c_lp_s(x + k, c, axis_name=name, key=key)[0]
            for k, c in enumerate(built)
        ]

    kinds = [kind for kind, _ in sent(4, exchange)]
    assert kinds == ["all-gather"] * len(built) + ["all-to-all"] * len(built)


@pytest.mark.parametrize(
    "nodes, warns",
    [
        ([0] * 64, False),  # one node
        (range(64), False),  # one device a node
        (np.arange(64) // 4, False),  # few enough in a node: it saves half
        (np.arange(64) // 16, True),
    ],
)
def test_a_flat_exchange_over_nodes_warns_once(nodes, warns):
    workers = Workers.abstract(64)

    def program(x):
        return [
            primitives.c_lp_s(x + k, MINMAX, axis_name="workers")[0] for k in (0, 1)
        ]

    def trace():
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            with primitives.on_nodes(nodes):
                traced = workers.spmd(program, in_specs=workers.spec)
                traced.trace(jax.ShapeDtypeStruct((64, 64 * 1024), jnp.float32))
        return [str(w.message) for w in caught]

    primitives._warn_once.cache_clear()
    messages = trace()
    assert len(messages) == warns and trace() == []
    if warns:
        # By hand: (48 + 63/16) parts of 1032 bytes; 2 x 63/64 x 4/16; 2 x 3 parts.
        assert re.search(
            r"4 nodes of 16 devices.* 0\.82 bytes.* all-reduce, 0\.49\..* 0\.09: "
            r"Workers\.devices\(\(4, 16\)\)",
            messages[0],
        )


def test_feedback_sends_nothing_more():
    def with_errors(x, name):
        zeros = jnp.zeros_like(x)
        return primitives.c_lp_s(x, MINMAX, Errors(zeros, zeros), axis_name=name)

    assert sent(4, with_errors) == TRAFFIC["c_lp_s"][1]


def test_a_rotating_topology_is_a_conditional_with_shares():
    workers = bagua_jax.Workers.devices(4)
    peers = topologies.one_peer_exponential(4)

    def program(x, step):
        return primitives.d_fp_s(x, peers, axis_name="workers", step=step)

    lowered = workers.spmd(program, in_specs=(workers.spec, P())).lower(
        np.zeros((4, 5), np.float32), jnp.int32(0)
    )
    (line,) = [
        line
        for line in lowered.compile().as_text().splitlines()
        if " conditional(" in line
    ]
    assert "branch_shares(0.5,0.5)" in line


# --- non-finite values ---------------------------------------------------------------


@functools.cache
def all_primitives(place, shape):
    workers = PLACES[place](shape)
    ring = topologies.ring(shape if isinstance(shape, int) else shape[0])

    def program(x):
        out = {
            **centralized(workers.axis_name)(x),
            "d_fp_s": primitives.d_fp_s(x, ring, axis_name=workers.axis_name),
            "d_lp_s": primitives.d_lp_s(x, MINMAX, ring, axis_name=workers.axis_name),
        }
        return primitives.worker_local(out, workers.axis_name)

    return workers.spmd(program, in_specs=workers.spec)


@both_places
@pytest.mark.parametrize("shape", [4, (2, 2)])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_one_bad_value_reaches_everybody(place, shape, bad):
    x = random(4, 21)
    x[2, 20] = bad
    for name, out in all_primitives(place, shape)(x).items():
        out = np.broadcast_to(out, (4, 21))
        heard = np.ones(4, bool)
        if name[0] == "d" and shape == 4:
            heard[0] = False  # opposite on the ring of four
        assert not np.isfinite(out[heard, 20]).any(), name
        if name in ("c_fp_s", "linear_mean", "d_fp_s"):
            assert np.isfinite(out[:, :20]).all(), name
        assert np.isfinite(out[~heard]).all(), name


def test_opposite_infinities_do_not_cancel():
    x = random(4, 21)
    x[1, 3], x[2, 3] = np.inf, -np.inf
    for name, y in all_primitives("simulate", 4)(x).items():
        y = np.broadcast_to(y, (4, 21))
        assert not np.isfinite(y[1:3, 3]).any(), name


# --- refusals ------------------------------------------------------------------------

AXIS_NEEDED = {
    **{name: fn for name, (fn, _) in TRAFFIC.items()},
    "axis_size": lambda x, name: primitives.axis_size(name),
    "axis_index": lambda x, name: primitives.axis_index(name),
    "worker_key": lambda x, name: primitives.worker_key(jax.random.key(0), name),
    "node_shard": lambda x, name: primitives.node_shard(x, name, "node_shard").value,
}


@pytest.mark.parametrize("row", AXIS_NEEDED)
def test_a_missing_axis_is_named_with_the_cure(row):
    caller = row.split(" ")[0]
    for run in (lambda f: f(jnp.ones(8)), lambda f: jax.jit(f)(jnp.ones(8))):
        with pytest.raises(NameError) as error:
            run(lambda x: AXIS_NEEDED[row](x, "nowhere"))
        text = str(error.value)
        assert text.startswith(f"{caller}: no mapped axis is named 'nowhere' here.")
        assert "jax.shard_map" in text and "axis_name='nowhere'" in text


@pytest.mark.parametrize("row", [row for row in AXIS_NEEDED if row[:2] in ("c_", "d_")])
def test_half_a_hierarchy_is_named(row):
    with pytest.raises(NameError, match="no mapped axis is named 'local' here"):
        jax.vmap(lambda x: AXIS_NEEDED[row](x, ("node", "local")), axis_name="node")(
            jnp.ones((4, 8))
        )


@pytest.mark.parametrize("name", [(), ("a", "b", "c"), (1, 2), 3, None])
def test_names_of_axes(name):
    with pytest.raises(ValueError, match="a mapped axis's name or a pair of names"):
        primitives.peer_axis(name)


def test_axis_index_is_row_major_over_pairs():
    workers = bagua_jax.Workers.simulate((2, 3))
    index = workers.spmd(lambda: primitives.axis_index(workers.axis_name))()
    np.testing.assert_array_equal(index, np.arange(6))
    assert index.dtype == jnp.int32


def stateful():
    return IDENTITY._replace(init=lambda x: jnp.zeros(x.shape))


@pytest.mark.parametrize(
    "row, fn",
    [
        ("c_lp_s", lambda x: primitives.c_lp_s(x, stateful(), axis_name="w")[0]),
        ("ring_mean", lambda x: primitives.ring_mean(x, stateful(), axis_name="w")[0]),
        (
            "compressed_neighbours",
            lambda x: primitives.d_lp_s(
                x, stateful(), topologies.ring(4), axis_name="w"
            ),
        ),
    ],
)
def test_stateful_compressors_are_refused(row, fn):
    with pytest.raises(ValueError, match=f"{row}: identity keeps state .*gather_mean"):
        jax.vmap(fn, axis_name="w")(jnp.ones((4, 8)))


def test_non_linear_compressors_are_refused_in_a_sum():
    with pytest.raises(
        ValueError, match=r"linear_mean: payloads of minmax_uint8 cannot"
    ):
        jax.vmap(
            lambda x: primitives.linear_mean(x, MINMAX, axis_name="w")[0], axis_name="w"
        )(jnp.ones((4, 8)))


@pytest.mark.parametrize("n, shape", [(3, 4), (5, 4), (8, (4, 2)), (2, (4, 2))])
@pytest.mark.parametrize("name", ["d_fp_s", "d_lp_s"])
def test_a_topology_of_another_size_is_refused(n, shape, name):
    workers = bagua_jax.Workers.simulate(shape)
    ring = topologies.ring(n)
    fn = {
        "d_fp_s": lambda x: primitives.d_fp_s(x, ring, axis_name=workers.axis_name),
        "d_lp_s": lambda x: primitives.d_lp_s(
            x, MINMAX, ring, axis_name=workers.axis_name
        ),
    }[name]
    x = jnp.ones((workers.num_workers, 3))
    with pytest.raises(
        ValueError, match=f"{name}: .*'ring' was made for n={n} .*has 4"
    ):
        workers.spmd(fn, in_specs=workers.spec)(x)


# --- types of workers' values --------------------------------------------------------


def summed_gradient(params, batch):
    return jax.grad(lambda p: jnp.sum(p["w"] * batch))(params)


@pytest.mark.parametrize("n", [1, 4, (2, 2), (1, 1)])
def test_summed_gradients_are_refused(n):
    """On a mesh of one worker too, so that the error shows on a laptop."""
    workers = bagua_jax.Workers.devices(n)

    def program(params, batch):
        grads = summed_gradient(params, batch)
        primitives.require_local(grads, workers.axis_name, "some_transform")
        return grads

    run = workers.spmd(program, in_specs=(P(), workers.spec))
    with pytest.raises(ValueError) as error:
        run({"w": jnp.ones(3)}, jnp.ones((workers.num_workers, 3)))
    text = str(error.value)
    assert text.startswith("some_transform: the gradients are already summed over ")
    assert "['w']" in text
    assert f"bagua_jax.value_and_grad(loss_fn, {workers.axis_name!r})" in text


def test_local_gradients_are_not_refused():
    def program(params, batch, name):
        local = primitives.worker_local(params, name)
        grads = summed_gradient(local, batch)
        primitives.require_local(grads, name, "f")
        return grads

    for shape in (1, 4, (2, 2)):
        workers = bagua_jax.Workers.devices(shape)
        batch = np.arange(3.0 * workers.num_workers).reshape(-1, 3)
        run = workers.spmd(
            lambda p, b, name=workers.axis_name: program(p, b, name),
            in_specs=(P(), workers.spec),
        )
        np.testing.assert_array_equal(run({"w": jnp.ones(3)}, batch)["w"], batch)


def test_nothing_is_refused_where_types_are_not_checked():
    batch = np.arange(12.0).reshape(4, 3)
    params = {"w": jnp.ones(3)}

    def program(params, batch):
        params = primitives.worker_local(params, "workers")
        grads = summed_gradient(params, batch)
        primitives.require_local(grads, "workers", "f")
        return grads["w"]

    mapped = jax.vmap(program, in_axes=(None, 0), axis_name="workers")(params, batch)
    np.testing.assert_array_equal(mapped, batch)
    program(params, batch[0])  # outside any axis
    unchecked = jax.shard_map(
        lambda p, b: program(p, b[0])[None],
        mesh=make_mesh((4,), ("workers",)),
        in_specs=(P(), P("workers")),
        out_specs=P("workers"),
        check_vma=False,
    )
    out = jax.block_until_ready(jax.jit(unchecked)(params, batch))
    np.testing.assert_array_equal(out, batch)


def test_primitives_run_where_types_are_not_checked():
    x = random(4, 9)

    def body(x):
        out = centralized("workers")(x[0])
        out["d_fp_s"] = primitives.d_fp_s(x[0], topologies.ring(4), axis_name="workers")
        out["d_lp_s"] = primitives.d_lp_s(
            x[0], MINMAX, topologies.ring(4), axis_name="workers"
        )
        return jax.tree.map(lambda y: y[None], out)

    mapped = jax.shard_map(
        body,
        mesh=make_mesh((4,), ("workers",)),
        in_specs=P("workers"),
        out_specs=P("workers"),
        check_vma=False,
    )
    out = jax.block_until_ready(jax.jit(mapped)(x))
    for name in ("c_fp_s", "c_lp_s", "gather_mean", "linear_mean", "ring_mean"):
        np.testing.assert_allclose(out[name], exact_mean(x), atol=0.05, err_msg=name)
    np.testing.assert_allclose(out["d_fp_s"], mixed("ring", 0, x), atol=1e-6)


TREE = {
    "a": jnp.ones(3),
    "n": None,
    "key": jax.random.key(0),
    "python": 1.5,
    "numpy": np.ones(2),
    "masked": optax.MaskedNode(),
    "int": jnp.int32(3),
}


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit])
def test_worker_local_is_the_identity_outside_shard_map(wrap):
    out = wrap(lambda: primitives.worker_local(TREE, "workers"))()
    assert jax.tree.structure(out) == jax.tree.structure(TREE)
    np.testing.assert_array_equal(out["a"], TREE["a"])
    assert primitives.worker_local(TREE, "workers")["python"] is TREE["python"]
    mapped = jax.vmap(
        lambda x: primitives.worker_local({"x": x, "s": 2.0}, "workers"),
        axis_name="workers",
    )(jnp.arange(4.0))
    np.testing.assert_array_equal(mapped["x"], np.arange(4.0))
    shapes = jax.eval_shape(lambda: primitives.worker_local(TREE["a"], "workers"))
    assert shapes.shape == (3,)


@pytest.mark.parametrize("shape", [4, (2, 2)])
def test_worker_local_marks_what_is_not_marked_yet(shape):
    workers = bagua_jax.Workers.devices(shape)

    def program(shared, own):
        marked = primitives.worker_local(
            {"shared": shared, "own": own, "key": jax.random.key(1), "none": None},
            workers.axis_name,
        )
        again = primitives.worker_local(marked, workers.axis_name)
        for leaf in jax.tree.leaves(again):
            assert primitives.varying_axes(leaf) == set(workers.axes)
        inner = jax.jit(lambda x: primitives.worker_local(x, workers.axis_name))(shared)
        assert primitives.varying_axes(inner) == set(workers.axes)
        return again

    specs = workers.specs(
        program, jnp.ones(2), jnp.ones((4, 2)), in_specs=(P(), workers.spec)
    )
    assert set(jax.tree.leaves(specs, is_leaf=lambda s: isinstance(s, P))) == {
        workers.spec
    }
    out = workers.spmd(program, in_specs=(P(), workers.spec))(
        jnp.ones(2), jnp.ones((4, 2))
    )
    assert out["key"].shape == (4,) and out["shared"].shape == (4, 2)


def test_worker_local_passes_python_numbers_inside_shard_map():
    workers = bagua_jax.Workers.devices(2)

    def program():
        out = primitives.worker_local({"lr": 0.5, "flag": True, "s": "name"}, "workers")
        assert out == {"lr": 0.5, "flag": True, "s": "name"}
        return out["lr"]

    assert float(workers.spmd(program)()) == 0.5


def test_worker_local_marks_numpy_arrays():
    """Else the gradient with respect to them is refused, with this very cure."""
    workers = bagua_jax.Workers.devices(2)
    params = {"w": np.ones(3, np.float32)}

    def program(batch):
        grads = summed_gradient(primitives.worker_local(params, "workers"), batch)
        primitives.require_local(grads, "workers", "f")
        return grads["w"]

    batch = np.arange(6.0).reshape(2, 3)
    out = workers.spmd(program, in_specs=workers.spec)(batch)
    np.testing.assert_array_equal(out, batch)


@both_places
@pytest.mark.parametrize("shape", [8, (2, 4)])
def test_worker_keys_differ_and_are_reproducible(place, shape):
    workers = PLACES[place](shape)
    run = workers.spmd(lambda key: primitives.worker_key(key, workers.axis_name))
    keys = jax.random.key_data(run(jax.random.key(7)))
    assert len(np.unique(np.asarray(keys), axis=0)) == 8
    np.testing.assert_array_equal(keys, jax.random.key_data(run(jax.random.key(7))))
    other = jax.random.key_data(run(jax.random.key(8)))
    assert len(np.unique(np.concatenate([keys, other]), axis=0)) == 16
    expected = [jax.random.fold_in(jax.random.key(7), i) for i in range(8)]
    np.testing.assert_array_equal(keys, [jax.random.key_data(k) for k in expected])


def keyed():
    """A compressor that only adds the number that its key is, in [0, 1)."""

    def compress(key, x, state):
        return x + jax.random.key_data(key)[0].astype(jnp.float32) / 2.0**32, state

    return IDENTITY._replace(compress=compress)


@both_places
def test_keys_of_workers_parts_and_phases_differ(place):
    n, size = 4, 8
    workers = PLACES[place](n)

    def program(x, key):
        zeros = primitives.worker_local(jnp.zeros(size), "workers")
        _, errors = primitives.c_lp_s(
            x, keyed(), Errors(zeros, zeros), axis_name="workers", key=key
        )
        _, own, _ = primitives.gather_mean(
            x, keyed(), zeros, axis_name="workers", key=key
        )
        _, shared, _ = primitives.linear_mean(
            x, keyed(), zeros, axis_name="workers", key=key
        )
        _, hops = primitives.ring_mean(x, keyed(), zeros, axis_name="workers", key=key)
        return errors, own, shared, hops

    run = workers.spmd(program, in_specs=(workers.spec, P()))
    x = np.zeros((n, size), np.float32)
    errors, own, shared, hops = run(x, jax.random.key(3))
    owned = [errors.owner[k, bounds(size, n)[k]][0] for k in range(n)]
    draws = [*np.asarray(errors.worker[:, :: size // n]).ravel(), *owned]
    assert len(set(map(float, draws))) == n * n + n
    assert len(np.unique(hops)) == n * n  # of each worker for each part
    assert len(np.unique(own)) == n  # each worker its own
    assert len(np.unique(shared)) == 1  # common to all, as a sum requires
    other, *_ = run(x, jax.random.key(4))
    assert not np.isin(other.worker, errors.worker).any()
    again, *_ = run(x, jax.random.key(3))
    np.testing.assert_array_equal(again.worker, errors.worker)


# --- replicas ------------------------------------------------------------------------


def one_way(n):
    """A path: worker i hears i - 1 only, worker 0 nobody."""
    pairs = tuple((i, i + 1) for i in range(n - 1))
    weights = (0.0,) + (0.5,) * (n - 1)
    return Topology(
        "path", n, (MixingStep((1.0,) + (0.5,) * (n - 1), (Send(pairs, weights),)),)
    )


@both_places
@pytest.mark.parametrize("graph", ["ring", "static_exponential", "path"])
def test_rows_equal_what_the_sender_holds_bit_for_bit(place, graph):
    """A thousand random vectors: replicas must never drift by a single bit."""
    n, size, rounds = 8, 13, 1000
    topology = one_way(n) if graph == "path" else topologies.REGISTRY[graph](n)
    mixing = topology.steps[0]
    workers = PLACES[place](n)
    rng = np.random.default_rng(0)
    scale = 10.0 ** rng.uniform(-6, 6, (n, rounds, 1))
    offset = rng.standard_normal((n, rounds, 1)) * 10.0 ** rng.uniform(
        -3, 4, (n, rounds, 1)
    )
    x = np.float32(scale * (rng.standard_normal((n, rounds, size)) + offset))

    def program(xs):
        def one(x):
            return primitives.compressed_neighbours(
                x, MINMAX, mixing, axis_name="workers"
            )

        return lax.map(one, xs)

    rows = np.asarray(workers.spmd(program, in_specs=workers.spec)(x))
    assert rows.shape == (n, rounds, 1 + len(mixing.sends), size)
    for k, send in enumerate(mixing.sends, start=1):
        heard = dict((to, source) for source, to in send.pairs)
        for i in range(n):
            if i in heard:
                assert rows[i, :, k].tobytes() == rows[heard[i], :, 0].tobytes()
            else:
                assert not rows[i, :, k].any()
    step = (np.ptp(x, axis=-1) + 1e-7) / 255
    error = np.abs(np.float64(rows[:, :, 0]) - x).max(-1)
    assert (error <= step + 2 * np.spacing(np.abs(x).max(-1))).all()


def test_rows_of_an_empty_vector():
    mixing = topologies.ring(4).steps[0]
    out = jax.vmap(
        lambda x: primitives.compressed_neighbours(x, MINMAX, mixing, axis_name="w"),
        axis_name="w",
    )(jnp.zeros((4, 0)))
    assert out.shape == (4, 3, 0)


def test_neighbours_and_mix():
    n = 5
    mixing = topologies.ring(n, self_weight=0.5).steps[0]
    x = random(n, 3)

    def program(x):
        received = primitives.neighbours(x, mixing, axis_name="w")
        return received, primitives.mix(x, received, mixing, axis_name="w")

    (left, right), out = jax.vmap(program, axis_name="w")(x)
    np.testing.assert_array_equal(left, np.roll(x, 1, axis=0))
    np.testing.assert_array_equal(right, np.roll(x, -1, axis=0))
    w = topologies.ring(n, self_weight=0.5).mixing_matrix()
    np.testing.assert_allclose(out, w @ np.float64(x), atol=1e-6)


@both_places
def test_mixing_with_unequal_weights(place):
    """The path's own matrix: weights and silences that differ from worker to worker."""
    n, x = 4, random(4, 6)
    topology = one_way(n)
    got = everywhere(
        PLACES[place](n),
        lambda x: primitives.d_fp_s(x, topology, axis_name="workers"),
        x,
    )
    np.testing.assert_allclose(got, topology.mixing_matrix() @ np.float64(x), atol=1e-6)


@both_places
@pytest.mark.parametrize("name", ["minmax_uint8", "cast(bfloat16)"])
def test_mean_and_own(place, name):
    """The mean of what all sent, and what I sent, as everybody decoded it."""
    n, x = 4, random(4, 37)
    compressor, decode = {"minmax_uint8": (MINMAX, codec)}.get(name, (BF16, bf16))
    mean, own = everywhere(
        PLACES[place](n),
        lambda x: primitives.mean_and_own(x, compressor, axis_name="workers"),
        x,
    )
    np.testing.assert_allclose(own, decode(x), atol=1e-6)
    np.testing.assert_allclose(mean, exact_mean(own), atol=1e-6)
    assert (mean == mean[0]).all()


def test_mean_and_own_sums_what_may_be_summed():
    """A shared mask: all draw the same positions, and one all-reduce does."""
    x, shared = random(4, 40), compressors.randk(0.25)

    @functools.partial(jax.vmap, axis_name="w", in_axes=(0, None))
    def program(x, key):
        return primitives.mean_and_own(x, shared, axis_name="w", key=key)

    mean, own = program(x, jax.random.key(3))
    sent = np.asarray(own) != 0
    assert (sent == sent[0]).all() and sent[0].sum() == 10
    np.testing.assert_allclose(own, np.where(sent, 4 * x, 0), rtol=1e-6)
    np.testing.assert_allclose(mean, exact_mean(np.asarray(own)), atol=1e-6)
