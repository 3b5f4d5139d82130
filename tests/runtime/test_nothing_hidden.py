"""A value that is not finite is seen by all: every compressor and every algorithm.

All of it is compiled, with vectors around 4,096 elements, where XLA's CPU reductions by
max and min begin to drop NaN, and with values made in the same program.
"""

import functools
import inspect
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P
from table import ONE_EACH, ROWS, Row, ids

import bagua_jax
from bagua_jax import Workers, compressors, primitives
from bagua_jax.compressors import REGISTRY, numerics

N, BAD = 4, 1  # workers, and the one with the bad value
SIZES = (1, 7, 512, 4095, 4096, 5000, 32768)
PLACES = ("first", "middle", "last")
VALUES = (np.nan, np.inf, -np.inf)
WORKERS = {"simulate": Workers.simulate, "devices": Workers.devices}
both_places = pytest.mark.parametrize("place", WORKERS)


def position(where: str, size):
    return {"first": 0, "middle": size // 2, "last": size - 1}[where]


def spoilt(x: jax.Array, where: jax.Array, value: jax.Array) -> jax.Array:
    """Put the value at the first (0), middle (1) or last (2) place, in the program."""
    flat = x.reshape(-1)
    at = jnp.asarray([position(place, flat.size) for place in PLACES])[where]
    flat = jnp.where(jnp.arange(flat.size) == at, value.astype(x.dtype), flat)
    return flat.reshape(x.shape)


# --- numerics ------------------------------------------------------------------------

DTYPES = ("float32", "float16", "bfloat16")


def decided(x):
    """Everything that says whether x is finite, made of it in one program."""
    x = x * 2 - x
    low, high = numerics.extrema(x)
    rows = x[None].astype(jnp.float32)
    unit, scale = numerics.unit_scale(rows)
    return {
        "low": low,
        "high": high,
        "largest": numerics.largest_magnitude(x),
        "largest of all": numerics.largest_magnitude(x[None], axis=None),
        "unit": unit,
        "scale": scale,
        "poisoned": numerics.poisoned(jnp.ones(3), x),
        "all": jnp.where(numerics.all_finite(x), 0.0, jnp.nan),
        "each": jnp.where(numerics.is_finite(x), 0.0, jnp.nan),
        "sent": x[numerics.largest_places(x, 1)],
    }


def assert_seen_in(name, leaf, why):
    finite = np.isfinite(leaf)
    assert finite.sum() == (finite.size - 1 if name == "each" else 0), (name, why)


FEW = (7, 4095, 4096, 5000)


@pytest.mark.parametrize(
    ("dtype", "level", "sizes"),
    [
        ("float32", 0, (*SIZES, 10**6)),
        ("float32", 3, FEW),  # of LLVM's optimizations, which conftest leaves out
        ("float16", 0, FEW),
        ("bfloat16", 0, FEW),
    ],
)
def test_numerics_see_every_value_that_is_not_finite(dtype, level, sizes):
    def run(xs, where, value):
        return [decided(spoilt(x, where, value)) for x in xs]

    options = {"xla_backend_optimization_level": level}
    run = jax.jit(run, compiler_options=options)
    xs = [jnp.linspace(-1, 1, d).astype(dtype) for d in sizes]
    for where in range(3):
        for value in (*VALUES, -np.nan):
            for x, found in zip(xs, run(xs, where, jnp.float32(value)), strict=True):
                for name, leaf in found.items():
                    assert_seen_in(name, np.float32(leaf), (x.size, where, value))


def test_numerics_see_them_in_float64():
    with jax.enable_x64(True):
        x = jnp.linspace(-1, 1, 5000, dtype=jnp.float64)
        for value in (*VALUES, -np.nan):
            for name, leaf in jax.jit(decided)(x.at[3].set(value)).items():
                assert_seen_in(name, leaf, value)
        assert float(numerics.largest_magnitude(x * 1e300)[0]) == 1e300


def test_numerics_see_them_under_vmap_and_in_shard_map():
    x = np.ones((8, 5000), np.float32)
    x[3, 77], x[6, 0] = np.nan, np.inf
    want = np.array([True] * 8)
    want[[3, 6]] = False
    workers = Workers.devices(8)
    mapped = workers.spmd(numerics.all_finite, in_specs=workers.spec)
    for found in (jax.jit(jax.vmap(numerics.all_finite))(x), mapped(x)):
        np.testing.assert_array_equal(found, want)


@pytest.mark.parametrize("dtype", DTYPES)
def test_numerics_are_exact_on_finite_values(dtype):
    rng = np.random.default_rng(5)
    for shape in ((1,), (7,), (4096,), (3, 5000), (500, 64)):
        x = jnp.asarray(rng.standard_normal(shape) * 10.0 ** rng.integers(-3, 4), dtype)
        wide = np.asarray(x, np.float32)
        low, high = jax.jit(numerics.extrema)(x)
        np.testing.assert_array_equal(low, wide.min(-1, keepdims=True))
        np.testing.assert_array_equal(high, wide.max(-1, keepdims=True))
        size = jax.jit(numerics.largest_magnitude)(x)
        np.testing.assert_array_equal(size, np.abs(wide).max(-1, keepdims=True))
        k = min(5, shape[-1])
        places = jax.jit(numerics.largest_places, static_argnums=1)(x, k)
        order = np.argsort(-np.abs(wide), axis=-1, kind="stable")
        np.testing.assert_array_equal(places, order[..., :k])
        assert numerics.is_finite(x).all() and numerics.all_finite(x)


def test_an_empty_vector_is_finite():
    empty = jnp.zeros((3, 0))
    assert numerics.all_finite(empty)
    np.testing.assert_array_equal(numerics.largest_magnitude(empty), np.zeros((3, 1)))


def test_places_are_drawn_without_repetition():
    for d, k in ((1, 1), (10, 3), (300, 299), (64, 64)):
        places = numerics.draw_places(jax.random.key(d), d, k)
        assert len(set(places.tolist())) == k and int(places.max()) < d


# --- every compressor ----------------------------------------------------------------

C = compressors
COMPRESSORS = {
    c.facts.name: c
    for c in (
        *(factory() for name, factory in REGISTRY.items() if name != "cast"),
        *map(C.cast, ("bfloat16", "float16", "float8_e4m3fn", "float8_e5m2")),
        C.blockwise(4, 64, "stochastic"),
        C.qsgd(7, "max", bucket=512),
        C.terngrad(2.5),
        C.natural_dithering(5, "max", bucket=16),
        C.sign("l2"),
        C.threshold(0.1, 0.001),
        C.randk(0.01, "private", scaled=False),
        C.hadamard(C.blockwise(4, 16), randomized=False),
        C.hadamard(C.topk(0.01)),
        C.chain(C.randk(0.01), C.qsgd(7, "max")),
    )
}
every_compressor = pytest.mark.parametrize("name", COMPRESSORS)
one_of_each_factory = pytest.mark.parametrize(
    "name", list({n.partition("(")[0]: n for n in reversed(COMPRESSORS)}.values())[::-1]
)


def round_trip(name, dtype, sizes):
    """Compress and decompress vectors of all sizes, made in the same program."""
    c = COMPRESSORS[name]

    @jax.jit
    def run(where, value):
        out = {}
        for size in sizes:
            x = jnp.linspace(-1, 1, size).astype(dtype)
            x = spoilt(x * 2 - x, where, value)
            payload, _ = c.compress(jax.random.key(1), x, c.init(x))
            out[size] = c.decompress(payload, x)
        return out

    return run


def mean(name):
    """Average vectors by payloads to all, and by parts to owners."""
    c, key = COMPRESSORS[name], jax.random.key(0)

    def program(axis_name, target, where, value):
        out, how = {}, {"axis_name": axis_name, "key": key}
        own = primitives.axis_index(axis_name) == BAD
        for size in (7, 5000):
            v = (jnp.linspace(-1, 1, size) - target) * 0.3
            v, state = jnp.where(own, spoilt(v, where, value), v), c.init(v)
            out["all", size] = primitives.gather_mean(v, c, state=state, **how)[0]
            if size > 7 and not jax.tree.leaves(state):
                out["owners", size] = primitives.c_lp_s(v, c, **how)[0]
        return out

    return program


def test_every_factory_is_here():
    assert {name.partition("(")[0] for name in COMPRESSORS} == set(REGISTRY)


@every_compressor
@pytest.mark.parametrize(
    ("dtype", "sizes"),
    [("float32", SIZES), ("float16", (5000,)), ("bfloat16", (5000,))],
)
def test_a_receiver_sees_it(name, dtype, sizes):
    run = round_trip(name, dtype, sizes)
    for where in range(3):
        for value in VALUES:
            for size, decoded in run(where, jnp.float32(value)).items():
                assert decoded.dtype == dtype
                finite = np.isfinite(np.float32(decoded))
                assert not finite.all(), (size, PLACES[where], value)


@both_places
@one_of_each_factory
def test_every_worker_sees_it_in_a_compressed_mean(place, name):
    workers = WORKERS[place](N)
    program = functools.partial(mean(name), workers.axis_name)
    run = workers.spmd(program, in_specs=(workers.spec, P(), P()))
    target = jnp.arange(float(N)) / N
    for found in run(target, -1, jnp.float32(0)).values():
        assert np.isfinite(found).all()
    for where in range(3):
        for value in VALUES:
            # The mean is one array, equal on all workers by its type.
            for what, found in run(target, where, jnp.float32(value)).items():
                assert not np.isfinite(found).all(), (what, PLACES[where], value)


def test_a_float16_mean_that_overflows_is_seen():
    """What errors add up to may exceed the dtype: no largest value instead of it."""
    x = jnp.full((2, 4097), 40000.0, jnp.float16)
    error = jnp.full((2, 4097), 60000.0)

    @jax.jit
    @functools.partial(jax.vmap, axis_name="workers")
    def run(x, error):
        where = {"axis_name": "workers"}
        parts = primitives.Errors(worker=error)
        return {
            "c_lp_s": primitives.c_lp_s(x, C.minmax_uint8(), parts, **where)[0],
            "gather": primitives.gather_mean(x, C.topk(0.5), error, **where)[0],
            "linear": primitives.linear_mean(x, C.identity(), error, **where)[0],
            "ring": primitives.ring_mean(x, C.blockwise(), error, **where)[0],
        }

    for name, mean in run(x, error).items():
        assert np.isinf(mean).any(), name
    for name, mean in run(x, 0.0 * error).items():
        assert np.isfinite(mean).all(), name


# --- every algorithm -----------------------------------------------------------------

# The first three leaves share a bucket, the others have one each.
LEAVES = ((), (7,), (16, 32), (63, 65), (64, 64), (100, 50), (256, 128))
TOGETHER, BUCKET_BYTES = 3, 8192
WARM = 3  # steps before the bad one
SHORT = {"warmup_steps": 2, "var_freeze_step": 2}


def defaults(row: Row) -> dict:
    """Everything that a row's factory takes, with the row's choices."""
    factory = bagua_jax.algorithms.REGISTRY[row.algorithm].factory
    known = inspect.signature(factory).parameters
    return {k: p.default for k, p in known.items()} | dict(row.options)


def steps_until_heard(row: Row) -> int:
    """Steps after which it has arrived, at the latest, as the algorithm documents."""
    given = row.options
    late = given.get("staleness", 0)
    if not row.own_params:
        return 1 + late
    intervals = ("local_steps",)
    periods = [given.get(name, 1) for name in (*intervals, "local_step_clipper")]
    interval = max(*periods, 4 if "periods" in given else 1)
    # A message is made of what the step before left; from peer to peer it takes two.
    return 2 * (interval + late) + 1


def told(row: Row) -> list[int]:
    """Whom one worker of four reaches: its neighbours on a ring, or everybody."""
    graph = defaults(row).get("topology", "complete")
    return [BAD - 1, BAD, BAD + 1] if graph in ("ring", "shift_one") else [*range(N)]


def loop(workers: Workers, row: Row, shapes, bucket_bytes: int):
    """Return a step that takes one bad value into chosen leaves, and a state for it."""
    axis, changed = (
        workers.axis_name,
        {k: v for k, v in SHORT.items() if k in row.options},
    )
    if "bucket_bytes" in defaults(row):
        changed["bucket_bytes"] = bucket_bytes
    tx = row.chain(axis, **changed)

    def init():
        x = [jnp.linspace(-1, 1, math.prod(shape)).reshape(shape) for shape in shapes]
        if row.own_params:
            x = bagua_jax.worker_local(x, axis)
        return x, tx.init(x)

    def step(state, target, chosen, where, value):
        x, opt = state
        bad = chosen & (primitives.axis_index(axis) == BAD)
        grads = [(leaf - target) * 0.2 for leaf in bagua_jax.worker_local(x, axis)]
        grads = [
            jnp.where(bad[i], spoilt(g, where, value), g) for i, g in enumerate(grads)
        ]
        updates, opt = tx.update(grads, opt, x)
        return optax.apply_updates(x, updates), opt

    specs = workers.specs(init)
    run = workers.spmd(step, in_specs=(specs, workers.spec, P(), P(), P()))
    targets, nothing = jnp.arange(float(N)) / N, np.zeros(len(shapes), bool)

    def go(state, chosen=nothing, where=0, value=0.0):
        return run(state, targets, chosen, np.int32(where), np.float32(value))

    state = workers.spmd(init)()
    for _ in range(WARM):
        state = go(state)
    assert all(np.isfinite(leaf).all() for leaf in state[0]), "it trains without"
    return go, state


def spoilt_leaves(row: Row, x, workers) -> set[int]:
    """Leaves in which each of these workers sees something."""
    found = set()
    for i, leaf in enumerate(x):
        finite = np.isfinite(leaf).reshape(N if row.own_params else 1, -1).all(1)
        if not finite[workers if row.own_params else [0]].any():
            found.add(i)
    return found


def assert_seen(workers, row, shapes, bucket_bytes, together, cases):
    """Let one worker have it in a leaf of each bucket; all must see it in each bucket.

    Args:
        together: number of leaves of the first bucket.
        cases: the leaf of the first bucket, the place, and the value.
    """
    go, warm = loop(workers, row, shapes, bucket_bytes)
    alone = set(range(together, len(shapes)))
    for first, where, value in cases:
        chosen = np.array([i == first or i in alone for i in range(len(shapes))])
        case = f"leaf {first}, {PLACES[where]} place, {value}"
        state = go(warm, chosen, where, value)
        if row.own_params and not row.options.get("staleness"):
            own = spoilt_leaves(row, state[0], [BAD])
            assert alone <= own and own & set(range(together)), ("own", case, own)
        for _ in range(steps_until_heard(row) - 1):
            state = go(state)
        seen = spoilt_leaves(row, state[0], told(row))
        assert alone <= seen and seen & set(range(together)), (case, seen)


@pytest.mark.parametrize("row", ROWS, ids=ids(ROWS))
def test_all_see_it(row):
    cases = itertools.product(range(TOGETHER), range(3), VALUES)
    assert_seen(Workers.simulate(N), row, LEAVES, BUCKET_BYTES, TOGETHER, cases)


@pytest.mark.parametrize("row", ONE_EACH, ids=ids(ONE_EACH))
def test_all_see_it_on_devices(row):
    places = itertools.product(range(TOGETHER), range(3))
    cases = [(leaf, where, VALUES[(leaf + where) % 3]) for leaf, where in places]
    shapes = ((7,), (64, 64), (100, 50))
    assert_seen(Workers.devices(N), row, shapes, 2**20, TOGETHER, cases)


LARGE = ("bytegrad", "compressed_mean", "signum", "demo", "one_bit_adam", "choco_sgd")


@pytest.mark.slow
@pytest.mark.parametrize("name", LARGE)
def test_all_see_it_in_a_million_elements(name):
    row = next(row for row in ONE_EACH if row.algorithm == name)
    cases = [(0, i, value) for i, value in enumerate(VALUES)]
    assert_seen(Workers.simulate(N), row, ((1000, 1000),), 2**20, 1, cases)


def test_an_entry_without_a_variance_hides_nothing():
    """A NaN where no gradient has been so far: v = 0, and nothing moves there."""
    for name in ("qadam", "one_bit_adam", "one_bit_lamb", "zero_one_adam"):
        row = next(row for row in ONE_EACH if row.algorithm == name)
        tx = row.make("workers", **{k: 2 for k in SHORT if k in row.options})
        bad = np.zeros((5, N, 4099), np.float32)
        bad[-1, BAD, 4098] = np.nan

        def run(grads, tx=tx):
            def step(carry, g):
                x, opt = carry
                updates, opt = tx.update(g, opt, x)
                return (x + updates, opt), None

            x = bagua_jax.worker_local(jnp.ones(grads.shape[1]), "workers")
            return jax.lax.scan(step, (x, tx.init(x)), grads)[0][0]

        x = jax.jit(jax.vmap(run, axis_name="workers"))(bad.swapaxes(0, 1))
        assert not np.isfinite(x)[BAD].all(), name
        if not row.own_params:
            assert not np.isfinite(x).all(axis=1).any(), name


def test_clipping_by_a_norm_that_overflows_is_seen():
    tx = bagua_jax.algorithms.dgc(axis_name="workers", ratio=1.0, clip=1.0)
    grads = jnp.full((2, 4096), 1e30)
    run = jax.jit(jax.vmap(lambda g: tx.update(g, tx.init(g))[0], axis_name="workers"))
    assert not np.isfinite(run(grads)).any()
    assert math.isclose(
        float(jnp.linalg.norm(run(grads / 1e30)[0])), 2**-0.5, rel_tol=1e-3
    )


# --- no other place decides ----------------------------------------------------------

DROPS_NAN = {"reduce_max", "reduce_min", "argmax", "argmin", "cummax", "cummin"}


def is_jaxpr(value) -> bool:
    return hasattr(value, "eqns")  # closed ones, too


def float_extrema(jaxpr) -> list[str]:
    """Reductions of floats by max or min, in all branches and bodies."""
    found = []
    for eqn in jaxpr.eqns:
        reads = [v.aval.dtype for v in eqn.invars if hasattr(v.aval, "dtype")]
        floats = any(jnp.issubdtype(dtype, jnp.floating) for dtype in reads)
        if floats and eqn.primitive.name in DROPS_NAN:
            found.append(str(eqn))
        for value in jax.tree.leaves(tuple(eqn.params.values()), is_leaf=is_jaxpr):
            if is_jaxpr(value):
                found += float_extrema(getattr(value, "jaxpr", value))
    return found


def test_a_reduction_by_max_is_found():
    def hiding(x):
        return jax.lax.cond(x[0] > 0, jax.jit(jnp.max), jnp.min, x)

    assert len(float_extrema(jax.make_jaxpr(hiding)(jnp.ones(3)).jaxpr)) == 2
    assert not float_extrema(jax.make_jaxpr(numerics.extrema)(jnp.ones(3)).jaxpr)


@every_compressor
def test_no_compressor_reduces_floats_by_max(name):
    c = COMPRESSORS[name]

    def run(x):
        payload, state = c.compress(jax.random.key(0), x, c.init(x))
        return c.decompress(payload, x), state

    assert float_extrema(jax.make_jaxpr(run)(jnp.ones(600)).jaxpr) == []


@pytest.mark.parametrize("row", ROWS, ids=ids(ROWS))
def test_no_algorithm_reduces_floats_by_max(row):
    tx = row.make("workers")

    def run(x):
        return tx.update(x, tx.init(x), x)

    x = {"a": jnp.ones((N, 20, 30)), "b": jnp.ones((N, 7))}
    traced = jax.make_jaxpr(jax.vmap(run, axis_name="workers"))(x)
    assert float_extrema(traced.jaxpr) == []
