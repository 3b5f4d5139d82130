"""Workers: specs that are inferred, boundaries, and the same program in both places."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import bagua_jax
from bagua_jax import Workers, compressors, primitives, schedules, topologies
from bagua_jax.workers import make_mesh

PLACES = {"simulate": Workers.simulate, "devices": Workers.devices}
both_places = pytest.mark.parametrize("place", PLACES)
shapes = pytest.mark.parametrize("shape", [4, (2, 2)])


class State(NamedTuple):
    params: dict
    residual: dict
    count: jax.Array


def init(workers):
    def fn(key):
        params = {"w": jax.random.normal(key, (3,)), "b": jnp.zeros(())}
        residual = primitives.worker_local(
            optax.tree.zeros_like(params), workers.axis_name
        )
        return State(params, residual, jnp.int32(0))

    return fn


def step(workers):
    """Compressed mean with error feedback: every kind of state in a few lines."""

    def fn(state, batch):
        local = primitives.worker_local(state.params, workers.axis_name)
        grads = jax.grad(lambda p: jnp.sum((p["w"] - batch) ** 2) + p["b"] ** 2)(local)
        flat, unravel = jax.flatten_util.ravel_pytree(grads)
        error, _ = jax.flatten_util.ravel_pytree(state.residual)
        mean, error, _ = primitives.gather_mean(
            flat, compressors.cast("bfloat16"), error, axis_name=workers.axis_name
        )
        params = jax.tree.map(lambda p, g: p - 0.1 * g, state.params, unravel(mean))
        return State(params, unravel(error), state.count + 1), jnp.sum(flat)

    return fn


# --- inference -----------------------------------------------------------------------


@both_places
@shapes
def test_specs_of_params_residual_and_counter(place, shape):
    workers = PLACES[place](shape)
    specs = workers.specs(init(workers), jax.random.key(0))
    expected = State(
        params={"w": P(), "b": P()},
        residual={"w": workers.spec, "b": workers.spec},
        count=P(),
    )
    assert specs == expected
    batch = jnp.zeros((4, 3))
    state = jax.eval_shape(workers.spmd(init(workers)), jax.random.key(0))
    again, loss = workers.specs(
        step(workers), state, batch, in_specs=(specs, workers.spec)
    )
    assert again == expected and loss == workers.spec


@shapes
def test_a_value_that_varies_over_one_axis_varies(shape):
    workers = Workers.devices(shape)

    def fn():
        first = primitives.axis_index(workers.axes[0])
        return first, primitives.axis_index(workers.axes[-1]), jnp.ones(2), 1.0

    specs = workers.specs(fn)
    assert specs == (workers.spec, workers.spec, P(), P())
    first, last, ones, one = workers.spmd(fn)()
    simulated = Workers.simulate(shape).spmd(fn)()
    for a, b in zip((first, last, ones, one), simulated, strict=True):
        np.testing.assert_array_equal(a, b)
    assert first.shape == last.shape == (4,) and ones.shape == (2,)


def test_specs_run_nothing_and_take_shapes():
    workers = Workers.simulate(512)  # far more than there are devices

    def fn(x, shared):
        return {"sum": x + shared, "mean": primitives.c_fp_s(x, axis_name="workers")}

    like = jax.ShapeDtypeStruct((512, 2**24), jnp.float32)
    shared = jax.ShapeDtypeStruct((2**24,), jnp.float32)
    specs = workers.specs(fn, like, shared, in_specs=(P("workers"), P()))
    assert specs == {"sum": P("workers"), "mean": P()}


def test_specs_are_one_spec_for_all_or_a_prefix():
    workers = Workers.simulate(2)
    x = {"a": jnp.ones((2, 3)), "b": [jnp.ones(2), jnp.ones((2, 1))]}

    def fn(x, y):
        return x, y

    everything = workers.specs(fn, x, x, in_specs=workers.spec)
    assert set(jax.tree.leaves(everything)) == {workers.spec}
    prefix = ({"a": P("workers"), "b": P()}, P())
    first, second = workers.specs(fn, x, x, in_specs=prefix)
    assert first == {"a": P("workers"), "b": [P(), P()]}
    assert second == {"a": P(), "b": [P(), P()]}
    out, _ = workers.spmd(fn, in_specs=prefix)(x, x)
    assert jax.tree.map(jnp.shape, out) == jax.tree.map(jnp.shape, x)


# --- the same program in both places -------------------------------------------------


@shapes
def test_simulation_equals_devices(shape):
    batches = np.random.default_rng(0).standard_normal((5, 4, 3)).astype(np.float32)
    finals = []
    for place in PLACES:
        workers = PLACES[place](shape)
        specs = workers.specs(init(workers), jax.random.key(1))
        state = workers.spmd(init(workers))(jax.random.key(1))
        run = workers.spmd(step(workers), in_specs=(specs, workers.spec))
        for batch in batches:
            before = jax.tree.map(lambda x: (x.shape, x.dtype), state)
            state, loss = run(state, batch)
            assert jax.tree.map(lambda x: (x.shape, x.dtype), state) == before
        assert loss.shape == (4,) and state.params["w"].shape == (3,)
        assert state.residual["b"].shape == (4,)
        finals.append((state, loss))
    for a, b in zip(*map(jax.tree.leaves, finals), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


@both_places
@shapes
def test_workers_stand_in_row_major_order(place, shape):
    workers = PLACES[place](shape)
    x = np.arange(8.0).reshape(4, 2)

    def fn(x):
        return x, primitives.axis_index(workers.axis_name)

    out, index = workers.spmd(fn, in_specs=workers.spec)(x)
    np.testing.assert_array_equal(out, x)
    np.testing.assert_array_equal(index, np.arange(4))


# --- what crosses the boundary -------------------------------------------------------


@both_places
@shapes
def test_typed_keys_cross_both_ways(place, shape):
    workers = PLACES[place](shape)
    name = workers.axis_name

    def make(key):
        own = primitives.worker_key(key, name)
        return {"own": own, "shared": key, "pair": jax.random.split(own)}

    keys = workers.spmd(make)(jax.random.key(5))
    assert keys["own"].shape == (4,) and keys["shared"].shape == ()
    assert keys["pair"].shape == (4, 2)
    assert all(jnp.issubdtype(k.dtype, jax.dtypes.prng_key) for k in keys.values())
    specs = workers.specs(make, jax.random.key(5))
    assert specs == {"own": workers.spec, "shared": P(), "pair": workers.spec}

    def draw(keys):
        return jax.random.uniform(keys["own"]), jax.random.uniform(keys["shared"]), keys

    own, shared, back = workers.spmd(draw, in_specs=(specs,))(keys)
    expected = [
        jax.random.uniform(jax.random.fold_in(jax.random.key(5), i)) for i in range(4)
    ]
    np.testing.assert_allclose(own, expected)
    assert shared.shape == ()
    np.testing.assert_array_equal(
        jax.random.key_data(back["own"]), jax.random.key_data(keys["own"])
    )


@both_places
@shapes
def test_odd_leaves_cross_the_boundary(place, shape):
    """0-d, empty, None, masked, bool and narrow leaves; numbers; an aliased input."""
    workers = PLACES[place](shape)
    varying = {
        "scalar": np.arange(4.0, dtype=np.float32),
        "none": None,
        "empty": np.zeros((4, 0, 2), np.float32),
        "masked": optax.MaskedNode(),
        "bool": np.array([True, False, True, True]),
        "half": np.ones((4, 3), jnp.bfloat16),
        "byte": np.arange(4, dtype=np.uint8),
    }

    def fn(own, shared, nothing):
        assert nothing is None and own["none"] is None
        assert own["scalar"].shape == () and own["empty"].shape == (0, 2)
        return own, shared, nothing, 3, 2.5, True, own["scalar"] + shared, ()

    run = workers.spmd(fn, in_specs=(workers.spec, P(), P()))
    own, shared, nothing, three, number, true, total, unit = run(varying, 1.5, None)
    assert nothing is None and unit == ()
    assert jax.tree.structure(own) == jax.tree.structure(varying)
    for got, expected in zip(
        jax.tree.leaves(own), jax.tree.leaves(varying), strict=True
    ):
        np.testing.assert_array_equal(got, expected)
        assert got.dtype == expected.dtype
    assert (float(shared), int(three), float(number)) == (1.5, 3, 2.5)
    assert true.dtype == jnp.bool_ and true.shape == ()
    np.testing.assert_array_equal(total, np.arange(4.0) + 1.5)


@both_places
def test_a_function_of_nothing(place):
    workers = PLACES[place](3)
    index, one = workers.spmd(lambda: (primitives.axis_index("workers"), 1))()
    np.testing.assert_array_equal(index, [0, 1, 2])
    assert one.shape == ()


@both_places
def test_a_varying_branch_may_return_what_is_shared(place):
    """A sum with a varying number varies, though a simulator sees no batch axis."""
    workers = PLACES[place](4)

    def fn(x):
        return primitives.worker_local(x, "workers"), x

    declared, shared = workers.spmd(fn)(jnp.arange(3.0))
    assert declared.shape == (4, 3) and shared.shape == (3,)
    np.testing.assert_array_equal(declared, np.tile(np.arange(3.0), (4, 1)))


@pytest.mark.parametrize("names", ["w", ("outer", "inner")])
def test_axis_names_are_the_user_s(names):
    shape = 4 if isinstance(names, str) else (2, 2)
    for make in PLACES.values():
        workers = make(shape, axis_name=names)
        assert workers.axis_name == names and workers.spec == P(names)
        run = workers.spmd(
            lambda x: primitives.c_fp_s(x, axis_name=names), in_specs=workers.spec
        )
        np.testing.assert_allclose(run(np.arange(4.0)[:, None]), [1.5])


# --- compiling -----------------------------------------------------------------------


@both_places
def test_lower_and_compile(place):
    workers = PLACES[place](4)

    def fn(x):
        """Average."""
        return primitives.c_fp_s(x, axis_name="workers")

    program = workers.spmd(fn, in_specs=workers.spec)
    assert program.__name__ == "fn" and program.__doc__ == "Average."
    lowered = program.lower(jax.ShapeDtypeStruct((4, 3), jnp.float32))
    compiled = lowered.compile()
    assert "HloModule jit_fn" in compiled.as_text()
    assert ("all-reduce" in compiled.as_text()) == (place == "devices")
    np.testing.assert_allclose(program(np.ones((4, 3))), np.ones(3))


@both_places
def test_one_compilation_and_no_more(place):
    """Fed with its own results, a step settles: nothing is traced again."""
    workers = PLACES[place](4)
    traces = []
    inner = step(workers)

    def fn(state, batch):
        traces.append(None)
        return inner(state, batch)

    specs = workers.specs(init(workers), jax.random.key(1))
    run = workers.spmd(fn, in_specs=(specs, workers.spec))
    state = workers.spmd(init(workers))(jax.random.key(1))
    batch = jnp.ones((4, 3))
    state, _ = run(state, batch)
    state, _ = run(state, batch)  # inputs now carry the mesh's sharding
    settled = len(traces)
    assert settled <= 4  # each compilation traces twice: types, then the program
    for _ in range(3):
        state, _ = run(state, batch)
    assert len(traces) == settled


@both_places
def test_donated_arguments_are_donated(place):
    workers = PLACES[place](4)
    program = workers.spmd(
        lambda x, y: (x + y, y), in_specs=(workers.spec, P()), donate_argnums=0
    )
    text = program.lower(jnp.ones((4, 3)), jnp.ones(3)).compile().as_text()
    assert "input_output_alias={ {0}: (0," in text
    x = workers.spmd(lambda x: x + 0, in_specs=workers.spec)(jnp.ones((4, 3)))
    y = jnp.ones(3)
    out, _ = program(x, y)
    np.testing.assert_array_equal(out, 2 * np.ones((4, 3)))
    assert x.is_deleted() and not y.is_deleted()


@both_places
def test_static_switches_of_a_shared_counter_stay_conditionals(place):
    """In simulation too: the counter is held once, so vmap makes no select of it."""
    workers = PLACES[place](8)
    peers = topologies.one_peer_exponential(8)

    def fn(x, count):
        x = primitives.d_fp_s(x, peers, axis_name="workers", step=count)
        x = schedules.every(count % 3 == 0, 3, jnp.sin, jnp.cos, x)
        return x, count + 1

    lowered = workers.spmd(fn, in_specs=(workers.spec, P())).lower(
        jnp.ones((8, 3)), jnp.int32(0)
    )
    text = lowered.compile().as_text()
    conditionals = [line for line in text.splitlines() if " conditional(" in line]
    assert len(conditionals) == 2
    assert sum(f"({1 / 3},{1 / 3},{1 / 3})" in line for line in conditionals) == 1


@both_places
def test_a_scan_inside(place):
    workers = PLACES[place](4)

    def fn(x):
        def body(x, _):
            return x - 0.1 * (x - primitives.c_fp_s(x, axis_name="workers")), None

        return jax.lax.scan(body, x, length=3)[0]

    x = np.float32([[0], [1], [2], [3]])
    got = workers.spmd(fn, in_specs=workers.spec)(x)
    np.testing.assert_allclose(got, 1.5 + 0.9**3 * (x - 1.5), atol=1e-6)


@both_places
def test_programs_inside_jit(place):
    """spmd's result is a function like any other."""
    workers = PLACES[place](4)
    mean = workers.spmd(
        lambda x: primitives.c_fp_s(x, axis_name="workers"), in_specs=workers.spec
    )
    x = jnp.arange(8.0).reshape(4, 2)
    np.testing.assert_allclose(jax.jit(lambda x: 2 * mean(x))(x), [6, 8])
    grad = jax.grad(lambda x: mean(x).sum())(x)
    np.testing.assert_allclose(grad, np.full((4, 2), 0.25))


@both_places
def test_public_names(place):
    workers = PLACES[place]((2, 3) if place == "simulate" else (2, 4))
    assert workers.num_workers == (6 if place == "simulate" else 8)
    assert workers.axes == workers.axis_name == ("node", "local")
    assert workers.spec == P(("node", "local"))
    assert bagua_jax.Workers is Workers


# --- values --------------------------------------------------------------------------


def test_workers_are_frozen_hashable_values():
    for make in PLACES.values():
        assert make(4) == make(4) and hash(make(4)) == hash(make(4))
        assert make(4) != make(3) and make(4) != make((2, 2))
        assert make(4) != make(4, axis_name="other")
        with pytest.raises(dataclasses.FrozenInstanceError):
            make(4).shape = (3,)
    assert Workers.simulate(4) != Workers.devices(4)
    assert len({Workers.simulate(4), Workers.simulate(4), Workers.devices(4)}) == 2


def test_devices_default_to_all_and_may_be_given(devices):
    assert Workers.devices().num_workers == 8
    assert Workers.devices(devices=devices[2:5]).num_workers == 3
    chosen = Workers.devices(2, devices=devices[5:])
    assert list(chosen.mesh.devices.flat) == devices[5:7]
    assert Workers.devices(np.int64(4)) == Workers.devices(4)
    assert Workers.simulate([2, 4]) == Workers.simulate((2, 4))


def test_meshes_leave_sharding_to_shard_map(devices):
    for workers in (Workers.devices(4), Workers.devices((2, 4))):
        assert set(workers.mesh.axis_types) == {AxisType.Auto}
        assert workers.mesh.axis_names == workers.axes
        assert list(workers.mesh.devices.flat) == devices[: workers.num_workers]
    assert make_mesh((2,), ("x",), devices[3:]).devices.tolist() == devices[3:5]


# --- refusals ------------------------------------------------------------------------


@pytest.mark.parametrize("make", [*PLACES.values()], ids=[*PLACES])
@pytest.mark.parametrize(
    "n, names",
    [
        (0, None),
        (-1, None),
        ((2, 0), None),
        ((1, 1, 2), None),
        ((), None),
        (4, ("node", "local")),
        ((2, 2), "workers"),
        (2.5, None),
        ((1.5, 2), None),
        ("four", None),
        (True, None),
        (4, 3),
        ((2, 2), ("same", "same")),
    ],
)
def test_impossible_workers_are_refused(make, n, names):
    with pytest.raises(ValueError, match=r"Workers\.\w+: n must be a positive number"):
        make(n, axis_name=names)


@pytest.mark.parametrize("n", [9, 16, (3, 3), (4, 4)])
def test_too_few_devices_are_refused_with_the_cure(n):
    needed = int(np.prod(n))
    with pytest.raises(ValueError) as error:
        Workers.devices(n)
    text = str(error.value)
    wanted = f"{n} workers" if np.ndim(n) == 0 else f"{n[0]} node x {n[1]} local"
    assert text.startswith(f"Workers.devices: {wanted} need {needed} devices")
    assert "there are 8 (cpu)" in text and "Workers.simulate" in text
    assert f'jax.config.update("jax_num_cpu_devices", {needed})' in text


def test_no_devices_are_too_few():
    with pytest.raises(ValueError, match="2 workers need 2 devices, and there are 0"):
        Workers.devices(2, devices=[])


@both_places
@shapes
@pytest.mark.parametrize("leaf", [np.ones((3, 4)), np.ones(5), np.ones(()), 1.0])
def test_a_wrong_leading_axis_is_refused(place, shape, leaf):
    workers = PLACES[place](shape)
    run = workers.spmd(lambda t: t, in_specs=workers.spec)
    with pytest.raises(ValueError) as error:
        run({"x": leaf})
    text = str(error.value)
    assert text.startswith("Workers.spmd: argument [0]['x'] is ")
    assert f"must hold the 4 workers; got shape {np.shape(leaf)}" in text


@both_places
@pytest.mark.parametrize("spec", [P("model"), P(None, "workers"), P("node")])
def test_unknown_specs_are_refused(place, spec):
    workers = PLACES[place](4)
    for call in (
        lambda: workers.spmd(lambda x: x, in_specs=spec)(jnp.ones((4, 4))),
        lambda: workers.specs(lambda x: x, jnp.ones((4, 4)), in_specs=(spec,)),
    ):
        with pytest.raises(
            ValueError, match=r"specs are P\(\) or .*got .* argument \[0"
        ):
            call()


@both_places
@pytest.mark.parametrize(
    "in_specs",
    [(P(), P()), (), ({"b": P()},), ([P()],), None, "workers"],
    ids=["too many", "too few", "other keys", "other container", "None", "a name"],
)
def test_specs_of_another_structure_are_refused(place, in_specs):
    workers = PLACES[place](4)
    with pytest.raises(ValueError, match=r"Workers\.spmd: .*in_specs"):
        workers.spmd(lambda t: t, in_specs=in_specs)({"a": jnp.ones(3)})


def test_an_unknown_axis_inside_is_named():
    workers = Workers.simulate(4)
    with pytest.raises(NameError, match="c_fp_s: no mapped axis is named 'other' here"):
        workers.spmd(lambda x: primitives.c_fp_s(x, axis_name="other"))(jnp.ones(3))


@both_places
def test_errors_of_the_function_come_through(place):
    workers = PLACES[place](2)

    def fn(x):
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        workers.spmd(fn)(jnp.ones(3))
