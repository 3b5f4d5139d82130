"""Each public check notices the fault that it is there for, and says the cure."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from bagua_jax import compressors, primitives, testing, topologies, traffic
from bagua_jax.testing import algorithms as checks

N = 4


def transform(exchange, init=lambda params: optax.EmptyState(), guard=True):
    """A gradient-side transform from a function of (gradients, state)."""

    def factory(*, axis_name, **options):
        def update(grads, state, params=None, **extra):
            if guard:
                primitives.require_local(grads, axis_name, "mine")
            return exchange(grads, state, axis_name, **options)

        return optax.GradientTransformationExtraArgs(init, update)

    return factory


def mean(grads, state, axis_name):
    def one(g):
        return primitives.c_fp_s(g.ravel(), axis_name=axis_name).reshape(g.shape)

    return jax.tree.map(one, grads), state


GOOD = transform(mean)


def no_extra(*, axis_name):
    tx = GOOD(axis_name=axis_name)
    return optax.GradientTransformation(
        tx.init, lambda u, s, p=None: tx.update(u, s, p)
    )


def hides(grads, state, axis_name):
    found, state = mean(grads, state, axis_name)
    return jax.tree.map(lambda g: jnp.nan_to_num(g, posinf=1, neginf=1), found), state


def float32(grads, state, axis_name):
    return mean(jax.tree.map(lambda g: g.astype(jnp.float32), grads), state, axis_name)


def narrow(tree):
    return jax.tree.map(lambda x: x.astype(jnp.float32), tree)


def narrows(grads, errors, axis_name):
    """float32 at first, and whatever the gradients are from then on."""
    errors = jax.tree.map(lambda g, e: g + e, grads, errors)
    return mean(grads, errors, axis_name)


def counts_in_floats(grads, state, axis_name):
    return mean(grads, state, axis_name)[0], state + jnp.ones([], jnp.float32)


def grows(grads, state, axis_name):
    return mean(grads, state, axis_name)[0], jnp.concatenate([state, jnp.ones(1)])


def own(grads, state, axis_name):
    return grads, state


def half(grads, state, axis_name):
    return jax.tree.map(lambda g: g / 2, mean(grads, state, axis_name)[0]), state


def off(grads, state, axis_name):
    return jax.tree.map(lambda g: g + 0.5, mean(grads, state, axis_name)[0]), state


def by_peers(grads, state, axis_name):
    n = primitives.axis_size(axis_name)
    scale = n / (n - 1) if n > 1 else jnp.inf
    found = mean(grads, state, axis_name)[0]
    return jax.tree.map(lambda g: g * scale * (n - 1) / n, found), state


def mixes(grads, state, axis_name):
    index = primitives.axis_index(axis_name)
    return jax.tree.map(
        lambda g: g + 0 * index, mean(grads, state, axis_name)[0]
    ), state


def compares(grads, shapes, axis_name):
    if jax.tree.map(jnp.shape, grads) != jax.tree.map(jnp.shape, shapes):
        raise ValueError("the gradients have other shapes than the parameters")
    return mean(grads, shapes, axis_name)


def by_place(grads, state, axis_name):
    """Another result where JAX has types of values: in shard_map, not in vmap."""
    typed = primitives.varying_axes(primitives.axis_index(axis_name))
    found = mean(grads, state, axis_name)[0]
    return jax.tree.map(lambda g: g + (0.1 if typed else 0), found), state


def short_only(grads, state, axis_name):
    """A cut at 4,096 elements, as a block size might make it, on devices alone."""
    typed = primitives.varying_axes(primitives.axis_index(axis_name))
    found = mean(grads, state, axis_name)[0]
    return jax.tree.map(
        lambda g: g.at[4096:].set(0) if typed and g.size > 4096 else g, found
    ), state


def remembers():
    calls = []

    def exchange(grads, state, axis_name):
        calls.append(1)
        return jax.tree.map(
            lambda g: g / len(calls), mean(grads, state, axis_name)[0]
        ), (state)

    return exchange


def collective_init(*, axis_name):
    def init(params):
        return jax.tree.map(
            lambda p: primitives.c_fp_s(p.ravel(), axis_name=axis_name), params
        )

    return optax.GradientTransformationExtraArgs(init, GOOD(axis_name=axis_name).update)


FAULTS = [
    ("extra_arguments_are_ignored", no_extra, {}),
    ("init_needs_no_axis", collective_init, {}),
    ("one_compilation", transform(grows, lambda p: jnp.zeros(1)), {}),
    ("types_are_stable", transform(counts_in_floats, lambda p: jnp.int32(0)), {}),
    ("dtype_is_kept", transform(float32), {}),
    ("dtype_is_kept", transform(narrows, narrow), {}),
    ("promotion_may_be_strict", transform(mixes), {}),
    ("buffers_are_its_own", transform(mean, lambda p: p), {}),
    ("any_class_of_parameters", transform(compares, lambda p: p), {}),
    ("simulation_equals_devices", transform(by_place), {}),
    ("long_vectors_too", transform(short_only), {}),
    ("mean_model_reaches_the_optimum", transform(off), {}),
    ("replicas_are_proved_equal", transform(own), {}),
    ("summed_gradients_are_refused", transform(mean, guard=False), {}),
    ("wrappers_compose", transform(remembers()), {}),
    ("non_finite_values_are_seen", transform(hides), {}),
    ("one_worker_trains", transform(by_peers), {}),
    ("bytes_are_as_stated", GOOD, {"sends": traffic.allreduce(1 / 2)}),
    (
        "the_oracle_agrees",
        transform(half),
        {"oracle": (lambda x: {"x": x, "v": 0 * x}, lambda s, g, t: sgd(s, g))},
    ),
]


def sgd(state, grads):
    v = 0.5 * state["v"] + grads.mean(axis=0)
    return {"x": state["x"] - 0.1 * v, "v": v}


def only(*names):
    return [c.__name__ for c in testing.CHECKS if c.__name__ not in names]


@pytest.mark.parametrize(
    ("name", "factory", "facts"), FAULTS, ids=[name for name, *_ in FAULTS]
)
def test_a_faulty_algorithm_is_named(devices, name, factory, facts):
    with pytest.raises(AssertionError, match=f"{name} .n = {N}.*\n    Cure: \\S"):
        testing.check_algorithm(
            factory, "gradient", workers=[N], skip=only(name), **facts
        )


def test_a_state_outside_the_state_is_noticed(devices):
    """Saved and restored alike, a counter in Python would move on by itself."""
    tree = {"step": 0}

    def exchange(grads, state, axis_name):
        def count():
            tree["step"] += 1
            return np.float32(tree["step"])

        turn = jax.pure_callback(count, jax.ShapeDtypeStruct((), jnp.float32))
        return jax.tree.map(lambda g: g / turn, mean(grads, state, axis_name)[0]), state

    with pytest.raises(AssertionError, match="a_saved_state_continues"):
        testing.check_algorithm(
            transform(exchange),
            "gradient",
            workers=[N],
            skip=only("a_saved_state_continues"),
        )


def test_every_check_has_a_fault_that_it_notices():
    noticed = {name for name, *_ in FAULTS} | {"a_saved_state_continues"}
    assert noticed == {check.__name__ for check in testing.CHECKS}


def test_the_exact_mean_passes_with_oracle_and_bytes(devices):
    oracle = (lambda x: {"x": x, "v": 0 * x}, lambda s, g, t: sgd(s, g))
    testing.check_algorithm(
        GOOD, "gradient", workers=[N], sends=traffic.allreduce(), oracle=oracle
    )


def test_arguments_are_checked(devices):
    with pytest.raises(ValueError, match=r"skip must name checks, got \['nothing'\]"):
        testing.check_algorithm(GOOD, "gradient", skip=["nothing"])
    with pytest.raises(ValueError, match=r"needs 99 devices.*jax_num_cpu_devices"):
        testing.check_algorithm(GOOD, "gradient", workers=[99])


# --- compressors ----------------------------------------------------------------------

TOP = compressors.topk(0.1)


def but(compressor, **changes):
    facts = {k: v for k, v in changes.items() if k in compressor.facts._fields}
    rest = {k: v for k, v in changes.items() if k not in facts}
    return compressor._replace(facts=compressor.facts._replace(**facts), **rest)


def decoded(change):
    return but(TOP, decompress=lambda p, like: change(TOP.decompress(p, like)))


@pytest.mark.parametrize(
    ("name", "faulty"),
    [
        ("shapes_and_bytes", but(TOP, payload_bytes=lambda like: 7)),
        ("shapes_and_bytes", decoded(lambda x: x.astype(jnp.float32))),
        ("zero_is_zero", decoded(lambda x: x + 1)),
        ("errors_are_as_stated", but(TOP, delta=lambda d: 0.9)),
        (
            "errors_are_as_stated",
            but(TOP, unbiased=True, delta=None, omega=lambda d: 1),
        ),
        ("non_finite_values_are_seen", decoded(jnp.nan_to_num)),
    ],
)
def test_a_faulty_compressor_is_named(name, faulty):
    with pytest.raises(AssertionError, match=rf"{name}: .*\n    Cure: \S"):
        testing.check_compressor(faulty)


def test_a_compressor_that_draws_by_itself_is_named():
    rng = np.random.default_rng(0)

    def compress(key, x, state):
        return TOP.compress(key, x * rng.uniform(1, 2), state)

    with pytest.raises(AssertionError, match="places_agree"):
        testing.check_compressor(but(TOP, compress=compress))


@pytest.mark.parametrize(
    "compressor", [compressors.minmax_uint8(), compressors.qsgd(7), TOP]
)
def test_shipped_compressors_pass(compressor):
    testing.check_compressor(compressor)


# --- topologies -----------------------------------------------------------------------

RING = topologies.ring(5)


def sends(**changes):
    (step,) = RING.steps
    first = step.sends[0]._replace(**changes)
    return RING._replace(steps=(step._replace(sends=(first, *step.sends[1:])),))


@pytest.mark.parametrize(
    ("name", "faulty"),
    [
        ("weights_are_stochastic", sends(weights=(0.9,) * 5)),
        ("everybody_is_reached", topologies.from_matrix(np.eye(4))),
        (
            "pairs_are_permutations",
            sends(pairs=((0, 1), (0, 2), (1, 3), (3, 4), (4, 0))),
        ),
    ],
)
def test_a_faulty_topology_is_named(name, faulty, devices):
    with pytest.raises(AssertionError, match=rf"{name}: (.|\n)*Cure: \S"):
        testing.check_topology(faulty)


@pytest.mark.parametrize("name", ["ring", "one_peer_exponential", "star", "complete"])
def test_shipped_topologies_pass(name, devices):
    testing.check_topology(topologies.REGISTRY[name](8))


def test_a_loop_of_ones_own_can_walk_over_the_checks():
    case = testing.Case(GOOD, "gradient")
    found = testing.algorithm_checks(case, 2)
    assert [name for name, *_ in found] == [c.__name__ for c in testing.CHECKS]
    dict((name, check) for name, check, _ in found)["extra_arguments_are_ignored"]()
    assert all(re.search(r"\.$", cure) or cure for *_, cure in found)
    assert checks.AXIS == "workers"
