"""Diagnostics against NumPy, and against the changes that they must see."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import bagua_jax
from bagua_jax import compressors
from bagua_jax.algorithms import bytegrad
from bagua_jax.diagnostics import (
    averaged_params,
    compression_error,
    consensus_distance_sq,
    differing_replicas,
    replica_checksum,
)

PROPERTY = settings(derandomize=True, deadline=None, max_examples=100, database=None)
MAKE = {"simulate": bagua_jax.Workers.simulate, "devices": bagua_jax.Workers.devices}
WHERE = [(place, n) for place in MAKE for n in (1, 3, 8, (2, 4))]
everywhere = pytest.mark.parametrize("place, n", WHERE)


def random_tree(n, dtype=np.float32, seed=0):
    rng = np.random.default_rng(seed)
    total = int(np.prod(n))
    make = lambda *shape: (1 + rng.standard_normal((total, *shape))).astype(dtype)  # noqa: E731
    return {"w": make(5, 3), "b": [make(7), None], "s": make()}


def exact_distance(tree):
    total = 0.0
    for leaf in jax.tree.leaves(tree):
        x = np.asarray(leaf, np.float64).reshape(len(leaf), -1)
        total += ((x - x.mean(0)) ** 2).sum() / len(x)
    return total


# --- the average and the distance to it ----------------------------------------------


@everywhere
def test_averaged_params(place, n):
    workers, tree = MAKE[place](n), random_tree(n)
    program = workers.spmd(
        lambda p: averaged_params(p, axis_name=workers.axis_name), in_specs=workers.spec
    )
    mean = program(tree)
    assert jax.tree.structure(mean) == jax.tree.structure(tree)
    for got, x in zip(jax.tree.leaves(mean), jax.tree.leaves(tree), strict=True):
        assert got.shape == x.shape[1:] and got.dtype == x.dtype  # held once
        np.testing.assert_allclose(got, x.mean(0), rtol=1e-6, atol=1e-7)


@everywhere
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_consensus_distance(place, n, dtype):
    """The formula holds whatever the dtype of params: measured wider than they are."""
    workers, tree = MAKE[place](n), random_tree(n, dtype)
    program = workers.spmd(
        lambda p: consensus_distance_sq(p, axis_name=workers.axis_name),
        in_specs=workers.spec,
    )
    got = program(tree)
    assert got.shape == () and got.dtype == jnp.float32
    np.testing.assert_allclose(got, exact_distance(tree), rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_a_small_disagreement_is_measured(dtype):
    """Narrow replicas one unit in the last place apart, which float32 resolves."""
    n, size = 8, 64
    x = np.ones((n, size), dtype)
    x[::2] += ml_dtypes.finfo(dtype).eps
    workers = bagua_jax.Workers.simulate(n)
    program = workers.spmd(
        lambda p: consensus_distance_sq(p, axis_name="workers"), in_specs=workers.spec
    )
    np.testing.assert_allclose(program(x), exact_distance([x]), rtol=1e-3)


@pytest.mark.parametrize("n", [1, 2, 3, 7, 8])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_equal_replicas_have_distance_zero(n, dtype):
    """To the rounding of a float32 mean, whatever the dtype of params."""
    x = np.random.default_rng(1).standard_normal(500).astype(dtype)
    workers = bagua_jax.Workers.simulate(n)

    def program(p):
        return consensus_distance_sq(p, axis_name="workers")

    stacked = np.broadcast_to(x, (n, 500))
    rounding = np.finfo(np.float32).eps ** 2 * (np.float64(x) ** 2).sum()
    assert float(workers.spmd(program, in_specs=workers.spec)(stacked)) <= rounding
    assert float(workers.spmd(program)(x)) <= rounding  # params held once
    if n in (1, 2):
        assert float(workers.spmd(program)(x)) == 0


def test_distance_is_invariant_by_type():
    workers = bagua_jax.Workers.devices(4)

    def both(p):
        return (
            consensus_distance_sq(p, axis_name="workers"),
            averaged_params(p, axis_name="workers"),
        )

    assert workers.specs(both, jnp.ones((4, 3)), in_specs=workers.spec) == (P(), P())


@pytest.mark.parametrize("f", [averaged_params, consensus_distance_sq])
def test_a_missing_axis_is_named(f):
    with pytest.raises(NameError, match="no mapped axis is named 'workers'"):
        f(jnp.ones(3), axis_name="workers")


# --- checksums -----------------------------------------------------------------------

checksum = jax.jit(replica_checksum)
NAN = np.uint32(0x7FC00000)


def base():
    x = np.random.default_rng(2).standard_normal(50).astype(np.float32)
    x[3], x[4], x[5] = 0, np.nan, 1
    return {"f": x, "h": x.astype(ml_dtypes.bfloat16), "i": np.arange(9), "b": x > 0}


def edit(name, change):
    tree = base()
    tree[name] = change(tree[name].copy())
    return tree


def put(index, value):
    def change(x):
        x[index] = value
        return x

    return change


CHANGES = {
    "permuted": edit("f", lambda x: x[::-1].copy()),
    "two swapped": edit("f", lambda x: x[[1, 0, *range(2, 50)]]),
    "rolled": edit("f", lambda x: np.roll(x, 1)),
    "sign of zero": edit("f", put(3, -0.0)),
    "nan payload": edit("f", put(4, np.array(NAN + 1).view(np.float32))),
    "nan sign": edit("f", put(4, np.array(NAN | 2**31).view(np.float32))),
    "nan to inf": edit("f", put(4, np.inf)),
    "all negated": edit("f", np.negative),
    "next float": edit("f", put(5, np.nextafter(np.float32(1), np.float32(2)))),
    "bfloat16 sign of zero": edit("h", put(3, -0.0)),
    "bfloat16 permuted": edit("h", lambda x: x[::-1].copy()),
    "integer": edit("i", put(0, 256)),
    "integers swapped": edit("i", lambda x: x[[1, 0, *range(2, 9)]]),
    "bool": edit("b", np.logical_not),
    "one bool": edit("b", lambda x: put(0, ~x[0])(x)),
}


@pytest.mark.parametrize("what", CHANGES)
def test_checksum_sees(what):
    first, other = checksum(base()), checksum(CHANGES[what])
    assert first.dtype == jnp.uint32 and first.shape == ()
    assert int(first) != int(other)
    assert int(first) == int(checksum(base()))


@PROPERTY
@given(st.integers(0, 49), st.integers(0, 31))
def test_checksum_sees_one_flipped_bit(index, bit):
    x = base()["f"]
    flipped = x.copy()
    flipped.view(np.uint32)[index] ^= np.uint32(1 << bit)
    assert int(checksum(x)) != int(checksum(flipped))


@PROPERTY
@given(
    st.lists(
        st.tuples(st.integers(0, 255), st.integers(0, 31)),
        min_size=2,
        max_size=2,
        unique=True,
    )
)
def test_checksum_sees_two_flipped_bits(flips):
    x = np.random.default_rng(3).standard_normal(256).astype(np.float32)
    flipped = x.copy()
    for index, bit in flips:
        flipped.view(np.uint32)[index] ^= np.uint32(1 << bit)
    assert int(checksum(x)) != int(checksum(flipped))


def test_checksum_sees_leaves_exchanged():
    a, b = jnp.arange(4.0), jnp.arange(4.0) + 1
    assert int(checksum([a, b])) != int(checksum([b, a]))
    assert int(checksum([a, a])) != int(checksum([b, b]))


def test_checksum_does_not_collide_on_many_neighbours():
    """One value changed a little, everywhere: 4000 trees, no two sums equal."""
    rng = np.random.default_rng(4)
    x = rng.standard_normal(40).astype(np.float32)
    trees = np.tile(x, (4000, 1))
    words = trees.view(np.uint32)
    words[np.arange(4000), np.arange(4000) % 40] += np.arange(4000, dtype=np.uint32)
    sums = np.asarray(jax.jit(jax.vmap(replica_checksum))(jnp.asarray(trees)))
    assert len(np.unique(sums)) >= len(np.unique(trees, axis=0)) - 2


def test_checksum_of_typed_keys():
    keys = [
        jax.random.key(0),
        jax.random.key(1),
        jax.random.split(jax.random.key(0))[0],
    ]
    assert len({int(checksum({"key": key})) for key in keys}) == 3
    assert int(checksum(keys[0])) == int(checksum(jax.random.key(0)))


@pytest.mark.parametrize("tree", [(), {}, None, [None, {}], {"a": np.zeros((0, 3))}])
def test_checksum_of_trees_without_elements(tree):
    got = replica_checksum(tree)
    assert got.dtype == jnp.uint32 and got.shape == ()
    assert int(got) == int(replica_checksum(tree))


@pytest.mark.parametrize(
    "dtype", ["int8", "uint8", "int16", "int32", "uint32", "float16", "bfloat16",
              "float8_e4m3fn", "bool", "int4", "uint4"]
)  # fmt: skip
def test_checksum_of_every_dtype(dtype):
    a, b = jnp.asarray([0, 1, 1, 0], dtype), jnp.asarray([0, 1, 0, 1], dtype)
    assert int(checksum(a)) == int(checksum(a)) != int(checksum(b))


def test_checksum_of_complex_numbers():
    a = np.array([1 + 2j, 3 - 1j], np.complex64)
    assert int(checksum(a)) != int(checksum(a.conj()))


def test_replicas_that_say_they_are_equal_are_found(devices):
    """Error feedback leaves an untyped shard_map as if it were equal on all workers."""
    tx = optax.chain(bytegrad(axis_name="w", error_feedback="both"), optax.sgd(0.1))
    mesh = jax.make_mesh((4,), ("w",), axis_types=(AxisType.Auto,))

    def step(params, state, x):
        updates, state = tx.update({"p": x[0] * params["p"]}, state, params)
        return optax.apply_updates(params, updates), state, jax.random.key(0)

    params = {"p": jnp.linspace(-1, 1, 5000)}
    state, x = tx.init(params), jnp.arange(4.0)
    specs = {"mesh": mesh, "in_specs": (P(), P(), P("w"))}
    untyped = jax.shard_map(step, out_specs=P(), check_vma=False, **specs)
    out = jax.block_until_ready(jax.jit(untyped)(params, state, x))
    names = differing_replicas(out)
    assert names and all(".error" in name for name in names), names
    assert differing_replicas(jax.device_put(x, NamedSharding(mesh, P("w")))) == ()
    with pytest.raises(ValueError, match="out_specs"):  # the types know it
        jax.jit(jax.shard_map(step, out_specs=P(), **specs)).lower(params, state, x)


@pytest.mark.parametrize("place", MAKE)
def test_checksums_of_workers(place):
    workers = MAKE[place](8)
    tree = random_tree(8)
    tree["w"][5] = tree["w"][2]
    tree["b"][0][5], tree["s"][5] = tree["b"][0][2], tree["s"][2]
    sums = workers.spmd(replica_checksum, in_specs=workers.spec)(tree)
    assert sums.shape == (8,) and sums[5] == sums[2]
    assert len(np.unique(sums)) == 7
    held_once = jax.tree.map(lambda x: x[0], tree)
    assert workers.specs(replica_checksum, held_once) == P()
    assert int(workers.spmd(replica_checksum)(held_once)) == int(sums[0])


# --- compression error ---------------------------------------------------------------


@pytest.mark.parametrize("name", ["minmax_uint8", "bfloat16", "identity"])
def test_compression_error_against_numpy(name):
    c = {
        "minmax_uint8": compressors.minmax_uint8(),
        "bfloat16": compressors.cast("bfloat16"),
        "identity": compressors.identity(),
    }[name]
    x = jnp.asarray(np.random.default_rng(5).standard_normal(300), jnp.float32)
    payload, _ = c.compress(None, x, c.init(x))
    error = np.float64(c.decompress(payload, x)) - np.float64(x)
    expected = (error**2).sum() / (np.float64(x) ** 2).sum()
    got = compression_error(c, x)
    assert got.dtype == jnp.float32 and got.shape == ()
    np.testing.assert_allclose(got, expected, rtol=1e-4)
    assert (float(got) == 0) == (name == "identity")


@pytest.mark.parametrize(
    "c", [f() for n, f in compressors.REGISTRY.items() if n != "cast"]
)
def test_compression_error_of_zero_is_zero(c):
    assert float(compression_error(c, jnp.zeros(5), jax.random.key(0))) == 0


def test_compression_error_is_not_hidden():
    c = compressors.minmax_uint8()
    assert not np.isfinite(float(compression_error(c, jnp.asarray([1.0, jnp.nan]))))
    overflowing = compressors.cast("float16")
    assert not np.isfinite(float(compression_error(overflowing, jnp.full(2, 1e6))))


@pytest.mark.parametrize("exponent", [-80, -40, 0, 40, 80])
def test_compression_error_is_scale_free(exponent):
    """Cast commutes with powers of two, so the relative error must not change."""
    c = compressors.cast("bfloat16")
    x = jnp.asarray(np.random.default_rng(6).uniform(1, 2, 100), jnp.float32)
    got = compression_error(c, x * jnp.float32(2.0**exponent))
    np.testing.assert_allclose(got, compression_error(c, x), rtol=1e-4)


def test_compression_error_of_what_is_lost_entirely():
    """minmax_uint8 sends multiples of 1e-7/255: of 1e-24 nothing is left."""
    x = jnp.asarray([1e-24, -1e-24, 2e-24])
    np.testing.assert_allclose(compression_error(compressors.minmax_uint8(), x), 1.0)
