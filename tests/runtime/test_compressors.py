"""Laws of identity, cast and minmax_uint8; then what is particular to each."""

import functools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import codec

from bagua_jax import compressors

PROPERTY = settings(derandomize=True, deadline=None, max_examples=100, database=None)
FORMATS = {
    "bfloat16": (
        jnp.uint16,
        8,
        2.0**-126,
    ),  # wire dtype, significand bits, least normal
    "float16": (jnp.uint16, 11, 2.0**-14),
    "float8_e4m3fn": (jnp.uint8, 4, 2.0**-6),
    "float8_e5m2": (jnp.uint8, 3, 2.0**-14),
}
ROWS = {
    "identity": compressors.identity(),
    "minmax_uint8": compressors.minmax_uint8(),
    **{f"cast({name})": compressors.cast(name) for name in FORMATS},
}
SIZES = [1, 2, 17, 64]
DTYPES = [jnp.float32, jnp.float16, jnp.bfloat16]
MINMAX = compressors.minmax_uint8()

every_row = pytest.mark.parametrize("row", ROWS)


def test_rows_are_registered_under_their_names():
    assert {row.split("(")[0] for row in ROWS} <= set(compressors.REGISTRY)
    for name, c in ROWS.items():
        assert c.facts.name == name


def there_and_back(row, x, key=None):
    c = ROWS[row]
    payload, state = c.compress(key, x, c.init(x))
    return payload, c.decompress(payload, x), state


compiled = {row: jax.jit(functools.partial(there_and_back, row)) for row in ROWS}


def bits(tree):
    return [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(tree)]


def relative_error(row, rounded=0.0):
    """The measured |C(x) - x|^2 / |x|^2 of vectors [k, d], in float64.

    Without what rounding a decoded element explains, ``rounded`` of its last place.
    """
    decode = jax.jit(jax.vmap(lambda x: there_and_back(row, x)[1]))

    def measure(x):
        wide, decoded = np.asarray(x, np.float64), np.asarray(decode(x))
        error = np.abs(decoded.astype(np.float64) - wide)
        if rounded:
            error = np.maximum(error - rounded * np.spacing(np.abs(decoded)), 0)
        return (error**2).sum(-1) / (wide**2).sum(-1)

    return measure


# --- laws of every row ---------------------------------------------------------------


@every_row
def test_facts_are_complete(row):
    facts = ROWS[row].facts
    assert (facts.omega is None) == (not facts.unbiased)
    assert facts.unbiased or facts.delta is not None
    assert facts.source and facts.padding in ("zero", "edge")
    for d in SIZES:
        if facts.unbiased:
            assert facts.omega(d) >= 0
        else:
            assert 0 < facts.delta(d) <= 1


@every_row
@pytest.mark.parametrize("dtype", DTYPES)
def test_round_trip_and_stated_bytes(row, dtype):
    c = ROWS[row]
    rng = np.random.default_rng(0)
    for d in SIZES:
        x = jnp.asarray(rng.standard_normal(d), dtype)
        payload, decoded, state = compiled[row](x)
        assert decoded.shape == x.shape and decoded.dtype == x.dtype
        real = sum(leaf.nbytes for leaf in jax.tree.leaves(payload))
        like = jax.ShapeDtypeStruct(x.shape, x.dtype)
        assert c.facts.payload_bytes(x) == c.facts.payload_bytes(like) == real
        assert isinstance(c.facts.payload_bytes(like), int)
        assert jax.tree.structure(state) == jax.tree.structure(c.init(like))
        again = jax.eval_shape(lambda p, like=like: c.decompress(p, like), payload)
        assert (again.shape, again.dtype) == (x.shape, x.dtype)
        # within a level of the range, or a few bits of the element
        assert np.abs(np.float32(decoded) - np.float32(x)).max() < 0.5


@every_row
@pytest.mark.parametrize("dtype", DTYPES)
def test_zero_to_zero(row, dtype):
    for d in (1, 2, 17):
        x = jnp.zeros(d, dtype)
        np.testing.assert_array_equal(compiled[row](x)[1], x)


@every_row
def test_eager_jit_and_vmap_agree(row):
    rng = np.random.default_rng(1)
    x = (
        rng.standard_normal((5, 33)).astype(np.float32)
        * 10.0 ** np.arange(-2, 3)[:, None]
    )
    x = jnp.asarray(x, jnp.float32)
    both = functools.partial(there_and_back, row)
    batched = jax.jit(jax.vmap(both))(x)
    for i, v in enumerate(x):
        row_ = jax.tree.map(lambda a, i=i: a[i], batched)
        for one in (both(v), compiled[row](v)):
            assert bits(one[0]) == bits(row_[0])
            # a compiler may turn a division into a multiplication by the inverse
            np.testing.assert_allclose(one[1], row_[1], rtol=1e-6)


@every_row
def test_deterministic_without_and_with_keys(row):
    x = jnp.asarray(np.random.default_rng(2).standard_normal(100), jnp.float32)
    keys = (None, jax.random.key(0), jax.random.key(1))
    payloads = [compiled[row](x, key)[0] for key in keys]
    assert bits(payloads[0]) == bits(payloads[1]) == bits(payloads[2])


@every_row
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_non_finite_element_is_seen(row, dtype, bad):
    for d, where in ((1, 0), (7, 0), (7, 3), (7, 6)):
        x = np.linspace(-1, 1, d)
        x[where] = bad
        decoded = np.float32(compiled[row](jnp.asarray(x, dtype))[1])
        assert not np.isfinite(decoded[where])
        if row == "minmax_uint8":
            assert np.isnan(decoded).all()
        else:
            assert np.isfinite(np.delete(decoded, where)).all()
        if np.isinf(bad) and row not in ("minmax_uint8", "cast(float8_e4m3fn)"):
            assert decoded[where] == bad


def bound(row, d):
    facts = ROWS[row].facts
    return facts.omega(d) if facts.unbiased else 1 - facts.delta(d)


SLACK = 1 + 1e-5  # float32 rounding of what is decoded


@every_row
@pytest.mark.parametrize("d", [1, 2, 3, 16, 400])
def test_contraction_on_random_inputs(row, d):
    rng = np.random.default_rng(3)
    normal = rng.standard_normal((400, d))
    sparse = normal * (rng.random((400, d)) < 0.1)
    sparse[:, 0] += sparse[:, 0] == 0
    x = np.concatenate([normal, sparse, normal + 5, np.sign(normal), normal**3])
    x *= 2.0 ** rng.integers(0, 3, (len(x), 1))
    # the stated range: cast needs normal numbers, minmax a range well above 1e-7
    x = np.where(np.abs(x) < 0.02, 0, x).astype(np.float32)
    x[:, 0] += (np.abs(x).max(-1) == 0) * np.float32(1)
    # minmax decodes to a quotient, rounded once; at 1/255 of the element that is more
    # than SLACK.
    measured = relative_error(row, 0.5 * (row == "minmax_uint8"))(jnp.asarray(x))
    assert measured.max() <= bound(row, d) * SLACK
    if row == "identity":
        assert measured.max() == 0


@pytest.mark.parametrize("d", [2, 3, 64, 1000])
def test_minmax_attains_its_delta(d):
    """Ends half a level beyond the grid, everybody else half way between levels."""
    x = np.full((1, d), 0.5, np.float32)
    x[0, :2] = -127.5, 127.5
    assert relative_error("minmax_uint8")(x)[0] == pytest.approx(
        bound("minmax_uint8", d), rel=1e-6
    )


@pytest.mark.parametrize("name", FORMATS)
def test_cast_attains_its_delta(name):
    u = 2.0 ** -FORMATS[name][1]
    x = np.array([[(1 + u) * 2, -(1 + u)]], np.float32)
    expected = (u / (1 + u)) ** 2
    row = f"cast({name})"
    assert bound(row, 2) == pytest.approx(expected, rel=1e-9)
    assert relative_error(row)(x)[0] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("row", [row for row in ROWS if row != "identity"])
def test_hill_climbing_never_exceeds_the_bound(row):
    d, climbers = (6 if row == "minmax_uint8" else 2), 512
    rng = np.random.default_rng(4)
    measure = relative_error(row)

    def into_the_stated_range(x):  # normal numbers of all formats; a range above 1e-7
        x = np.where(np.abs(x) < 0.02, 0.02, np.clip(x, -400, 400))
        x[:, 0] = np.where(np.ptp(x, axis=1) < 1e-2, x[:, 0] + 1, x[:, 0])
        return x.astype(np.float32)

    x = into_the_stated_range(rng.uniform(-100, 100, (climbers, d)))
    best = measure(x)
    for step in range(150):
        moves = rng.standard_normal(x.shape) * 10.0 ** -(step % 5)
        moved = into_the_stated_range(x * (1 + moves) + moves * (step % 2))
        ratio = measure(moved)
        better = ratio > best
        x[better], best = moved[better], np.maximum(best, ratio)
    assert best.max() <= bound(row, d) * SLACK
    assert best.max() >= 0.9 * bound(row, d)  # the climb got somewhere


# --- identity ------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.uint32, np.uint16])
def test_identity_keeps_every_bit(dtype):
    patterns = np.random.default_rng(5).integers(
        0, np.iinfo(dtype).max, 3000, dtype, endpoint=True
    )
    kinds = {4: [np.float32], 2: [np.float16, ml_dtypes.bfloat16]}
    for kind in kinds[patterns.itemsize]:
        x = jnp.asarray(patterns.view(kind))
        payload, decoded, _ = there_and_back("identity", x)
        np.testing.assert_array_equal(np.asarray(decoded).view(dtype), patterns)
        assert payload.dtype == x.dtype
    assert ROWS["identity"].facts.linear


# --- cast ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", FORMATS)
def test_cast_equals_numpy_bit_for_bit(name):
    wire, _, least = FORMATS[name]
    target = np.dtype(getattr(ml_dtypes, name, name))
    rng = np.random.default_rng(6)
    limit = float(ml_dtypes.finfo(target).max)
    x = rng.standard_normal(5000) * np.exp(rng.uniform(np.log(least), 3, 5000))
    x = np.where(np.abs(x) < least, least, x).astype(np.float32)
    x = np.concatenate([x, [limit, -limit, 0.0, -0.0, 1.0]]).astype(np.float32)
    payload, decoded, _ = compiled[f"cast({name})"](jnp.asarray(x))
    assert payload.dtype == wire
    rounded = x.astype(target)
    np.testing.assert_array_equal(payload, rounded.view(wire))
    np.testing.assert_array_equal(decoded, rounded.astype(np.float32))


@pytest.mark.parametrize("name", FORMATS)
@PROPERTY
@given(data=st.data())
def test_cast_error_of_an_element(name, data):
    _, bits_, least = FORMATS[name]
    limit = float(ml_dtypes.finfo(getattr(ml_dtypes, name, name)).max)
    x = np.float32(data.draw(st.floats(least, limit, width=32)))
    x = x if data.draw(st.booleans()) else -x
    u = 2.0**-bits_
    decoded = compiled[f"cast({name})"](jnp.full(1, x))[1][0]
    assert abs(float(decoded) - float(x)) <= u / (1 + u) * abs(float(x))


@pytest.mark.parametrize("name", FORMATS)
def test_cast_overflow_is_visible(name):
    finfo = ml_dtypes.finfo(getattr(ml_dtypes, name, name))
    limit = float(finfo.max)
    x = jnp.asarray([limit, 1.0, -3.4e38, 3.4e38, -limit], jnp.float32)
    decoded = np.asarray(there_and_back(f"cast({name})", x)[1])
    assert not np.isfinite(decoded[[2, 3]]).any()
    np.testing.assert_array_equal(decoded[[0, 1, 4]], [limit, 1, -limit])


@pytest.mark.parametrize(
    "dtype", ["float32", "bf16", "uint8", jnp.float32, np.int8, "float8_e4m3", None]
)
def test_cast_refuses_other_formats(dtype):
    with pytest.raises(
        ValueError, match=r"cast: dtype must be one of bfloat16, float16"
    ):
        compressors.cast(dtype)
    with pytest.raises(ValueError, match=r"float8_e5m2, got .*identity\(\)"):
        compressors.cast(dtype)


@pytest.mark.parametrize(
    "dtype", ["float16", np.float16, np.dtype("float16"), jnp.float16, jnp.dtype("f2")]
)
def test_cast_takes_a_dtype_in_any_form(dtype):
    assert compressors.cast(dtype).facts.name == "cast(float16)"


# --- minmax_uint8 --------------------------------------------------------------------

D = 12


@jax.jit
def minmax(x):
    payload, _ = MINMAX.compress(None, x, ())
    return payload, MINMAX.decompress(payload, x)


def run(values, dtype=np.float32):
    """Encode and decode up to D values; copies of the last fill up, as padding does."""
    x = np.asarray(values, np.float64)
    with np.errstate(over="ignore"):
        x = np.concatenate([x, np.repeat(x[-1:], D - len(x))]).astype(dtype)
    payload, decoded = minmax(jnp.asarray(x))
    return x, np.asarray(payload.codes), np.asarray(decoded)


def step_of(x):
    """One level of the grid in units of x: (range + 1e-7) / 255."""
    return (float(x.max()) - float(x.min()) + 1e-7) / 255


def float32_spacing(x):
    return float(np.spacing(np.float32(np.abs(np.float64(x)).max())))


def test_minmax_table_of_the_original():
    _, codes, decoded = run([-0.5, 0, 0.5])
    np.testing.assert_array_equal(codes[:3], [1, 128, 255])
    np.testing.assert_allclose(decoded[:3], [-0.49803928, 0, 0.49803928], rtol=1e-6)
    _, codes, decoded = run([0, 0, 0])
    np.testing.assert_array_equal(codes[:3], [255] * 3)
    np.testing.assert_array_equal(decoded[:3], [0] * 3)
    # the original's first code is -1, which wraps to the maximum; ours is clamped
    _, codes, decoded = run([-1, 0, 0.25, 1])
    np.testing.assert_array_equal(codes[:4], [0, 127, 159, 255])
    np.testing.assert_allclose(decoded[:4], [-0.99608, 0, 0.25098, 1.00392], atol=1e-5)


unit = st.floats(-1, 1, width=32)
ranges = st.builds(
    lambda values, offset, exponent, tens: (
        (np.array(values) + offset) * 2.0**exponent * 10.0**tens
    ),
    st.lists(unit, min_size=1, max_size=D),
    st.one_of(st.just(0.0), st.just(1.0), st.floats(-3, 3), st.floats(-1e5, 1e5)),
    st.integers(-20, 20),
    st.integers(-3, 3),
)


@settings(PROPERTY, max_examples=400)
@given(ranges)
def test_minmax_codes_equal_the_original_where_it_is_defined(values):
    x, codes, decoded = run(values)
    original = codec.bagua_codec(x)
    span = x.max() - x.min()
    reach = np.abs(x).max() * (np.float32(255) / (span + np.float32(1e-7)))
    if original.well_defined and reach <= 2**24:
        np.testing.assert_array_equal(codes, original.codes)
        np.testing.assert_allclose(decoded, original.decoded, rtol=1e-6)


@settings(PROPERTY, max_examples=400)
@given(ranges)
def test_minmax_error_of_an_element_is_at_most_a_step(values):
    x, codes, decoded = run(values)
    assert np.isfinite(decoded).all()
    error = np.abs(decoded.astype(np.float64) - x).max()
    assert error <= step_of(x) + 2 * float32_spacing(x)
    # a larger element never has a smaller code
    order = np.argsort(x, kind="stable")
    assert (np.diff(codes[order].astype(int)) >= 0).all()
    if (x == 0).any():
        assert (decoded[x == 0] == 0).all()


@settings(PROPERTY, max_examples=200)
@given(st.lists(unit, min_size=1, max_size=D), st.integers(0, 20))
def test_minmax_half_a_step_where_float32_has_room(values, exponent):
    """Documented: 1/(2s), and half a step more only where an end was clamped."""
    x, _, decoded = run(np.array(values) * 2.0**exponent)
    error = np.abs(decoded.astype(np.float64) - x)
    inner = (x > x.min()) & (x < x.max())
    if step_of(x) > 1e-4 and inner.any():
        assert error[inner].max() <= step_of(x) * 0.5001 + 2 * float32_spacing(x)


@pytest.mark.parametrize("scale", [1.0, 2.0, 3.7, 1e3, 1e20, 1e-3])
def test_minmax_symmetric_ranges_do_not_wrap(scale):
    for half in np.linspace(1, 2, 100) * scale:
        x, codes, decoded = run([-half, half, 0, half / 3, -half / 7])
        assert codes[0] in (0, 1) and codes[1] == 255  # 127.5 may round either way
        assert np.abs(np.float64(decoded) - x).max() <= step_of(x) * 0.501
        assert decoded[2] == 0


@pytest.mark.parametrize(
    "value", [1.0, -1.0, 0.3, 7.1, 50.0, 1e3, 1e6, -1e6, 2e29, 1e30, -1e30, 3.4e38]
)
def test_minmax_equal_values_are_exact(value):
    x, codes, decoded = run([value] * D)
    np.testing.assert_array_equal(decoded, x)


@pytest.mark.parametrize("value", [1e-3, -1e-9, 6e-3, 1e-20])
def test_minmax_small_equal_values(value):
    x, _, decoded = run([value] * D)
    assert np.abs(np.float64(decoded) - x).max() <= 0.51e-7 / 255


@pytest.mark.parametrize("offset", [1e3, -1e3, 1e6, 1e30])
def test_minmax_large_offset_small_range(offset):
    """A range of 1e-3 on 1e3, and of 16 units in the last place elsewhere."""
    unit_ = float(np.spacing(np.float32(abs(offset))))
    x, codes, decoded = run(offset + unit_ * np.linspace(0, 16, D).round())
    np.testing.assert_array_equal(decoded, x)
    assert codes.max() == 255 and codes.min() == 0


@pytest.mark.parametrize("top", [1.8e38, 3e38, 3.4028235e38])
def test_minmax_ranges_that_overflow_float32(top):
    x, _, decoded = run([-top, top, 0, top / 2, -top / 3])
    assert np.isfinite(decoded).all()
    error = np.abs(decoded.astype(np.float64) - x.astype(np.float64)).max()
    assert error <= step_of(x) * 0.501


def test_minmax_subnormals():
    x, _, decoded = run([1e-39, -1e-40, 1e-45, 0, 5e-39])
    assert np.isfinite(decoded).all()
    assert np.abs(np.float64(decoded) - x).max() <= 0.51e-7 / 255


@pytest.mark.parametrize("value", [0.0, 1.0, -3.5, 1e-3, 1e30, 65504.0])
def test_minmax_one_element(value):
    decoded = there_and_back("minmax_uint8", jnp.full(1, value))[1]
    np.testing.assert_allclose(decoded, [np.float32(value)], rtol=0, atol=0.51e-7 / 255)


@pytest.mark.parametrize(
    "kind", [np.float16, ml_dtypes.bfloat16], ids=["float16", "bfloat16"]
)
def test_minmax_narrow_dtypes_stay_finite_at_their_ends(kind):
    top = float(ml_dtypes.finfo(kind).max)
    for values in ([top] * 3, [-top, top, 0, 1], [top, top / 2, 0], [-top, 0, 3]):
        x, _, decoded = run(values, kind)
        assert decoded.dtype == x.dtype and np.isfinite(np.float32(decoded)).all()
        error = np.abs(np.float64(decoded) - np.float64(x)).max()
        assert error <= step_of(np.float64(x)) + top * float(ml_dtypes.finfo(kind).eps)


def test_minmax_payload_is_codes_and_a_float32_range():
    for dtype in DTYPES:
        x = jnp.asarray([0.5, -2.0, 1.0], dtype)
        payload, _, _ = there_and_back("minmax_uint8", x)
        assert payload.codes.dtype == jnp.uint8 and payload.range.dtype == jnp.float32
        np.testing.assert_array_equal(payload.range, [-2, 1])
    assert MINMAX.facts.padding == "edge" and not MINMAX.facts.linear
