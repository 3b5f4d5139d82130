"""What every algorithm promises, row by row of one table."""

import inspect

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P
from table import (
    LEARNING_RATE,
    ONE_EACH,
    ROWS,
    ids,
    loss,
    params,
    run,
    stacked,
    targets,
    training,
)

import bagua_jax
from bagua_jax import Workers, testing
from bagua_jax import algorithms as alg

AXIS = "workers"
every_row = pytest.mark.parametrize("row", ROWS, ids=ids(ROWS))
every_algorithm = pytest.mark.parametrize("row", ONE_EACH, ids=ids(ONE_EACH))


def test_the_table_holds_every_algorithm():
    assert {row.algorithm for row in ROWS} == set(alg.REGISTRY)


@every_row
def test_unknown_extra_args_are_ignored(row):
    tx = row.chain(AXIS)

    def step(x):
        return tx.update(x, tx.init(x), x, value=1.0, nonsense=object())[0]

    out = jax.eval_shape(jax.vmap(step, axis_name=AXIS), jnp.ones((4, 3)))
    assert out.shape == (4, 3)


@every_row
def test_init_works_outside_any_axis_and_abstractly(row):
    tx = row.make(AXIS)
    if row.options.get("topology") not in (None, "ring") and "low" in row.algorithm:
        pytest.skip("the number of neighbours depends on n")
    state = tx.init(params())
    abstract = jax.eval_shape(tx.init, params())
    chex.assert_trees_all_equal_shapes_and_dtypes(state, abstract)
    for leaf in jax.tree.leaves(state):
        assert isinstance(leaf, jax.Array), f"state holds {type(leaf)}"


@every_row
def test_state_is_found_by_optax_as_params_like_where_it_is(row):
    """Sharding rules map over a state's params-like parts with map_params."""
    tx = row.make(AXIS)
    state = tx.init(params())
    marked = optax.tree.map_params(
        tx,
        lambda leaf: jnp.full_like(leaf, 7),
        state,
        transform_non_params=lambda leaf: leaf,
    )
    chex.assert_trees_all_equal_shapes_and_dtypes(state, marked)
    for name in ("error", "mu", "nu", "replicas", "correction"):
        if not hasattr(state, name):
            continue
        for leaf in jax.tree.leaves(getattr(marked, name)):
            np.testing.assert_array_equal(leaf, 7)


@every_algorithm
def test_no_recompilation(row):
    workers = Workers.simulate(8)
    loop = training(workers, row)
    state = loop.init()
    for _ in range(3):
        state = loop.step(state, targets(8))
    assert loop.step._cache_size() == 1


@every_row
def test_state_is_stable_through_scan_and_cond(row):
    """Types, too: a carry that changes from invariant to varying fails to trace."""
    workers = Workers.devices(4)
    tx = row.chain(AXIS)

    def program(target):
        x = params()
        if row.own_params:
            x = bagua_jax.worker_local(x, AXIS)
        opt = tx.init(x)

        def step(carry, t):
            x, opt = carry
            grads = jax.grad(loss)(bagua_jax.worker_local(x, AXIS), target)
            updates, new = tx.update(grads, opt, x)
            # A branch on a counter, equal on all workers.
            opt = jax.lax.cond(t < 100, lambda: new, lambda: opt)
            return (optax.apply_updates(x, updates), opt), None

        (x, new_opt), _ = jax.lax.scan(step, (x, opt), jnp.arange(3))
        chex.assert_trees_all_equal_shapes_and_dtypes(opt, new_opt)
        return x

    out = workers.spmd(program, in_specs=workers.spec)(targets(4))
    chex.assert_tree_all_finite(out)


@every_row
@pytest.mark.parametrize(
    "name",
    [
        "dtype_is_kept",
        "promotion_may_be_strict",
        "buffers_are_its_own",
        "any_class_of_parameters",
    ],
)
def test_parts_that_users_bring(row, name):
    """What is traced only, as users' own algorithms are checked."""
    entry = alg.REGISTRY[row.algorithm]
    case = testing.Case(entry.factory, entry.placement, row.options)
    found = {name: check for name, check, _ in testing.algorithm_checks(case, 4)}
    found[name]()


@every_row
def test_simulation_equals_devices(row):
    n = 8
    simulated = run(Workers.simulate(n), row, steps=25)
    real = run(Workers.devices(n), row, steps=25)
    # Equal up to the last bits: XLA orders sums differently. A flipped code moves an
    # element by a step of the grid, of which there are 255 over a range of about 1.
    quantized = row.algorithm not in (
        "gradient_allreduce",
        "decentralized",
        "async_model_average",
    )
    tolerance = 5e-3 if quantized else 1e-5
    chex.assert_trees_all_close(simulated[0], real[0], atol=tolerance, rtol=0)


@every_algorithm
def test_bare_arrays_under_plain_vmap(row):
    """Without Workers: init and update called directly, every leaf batched."""
    tx = row.chain(AXIS)
    n = 4

    def init(x):
        return tx.init(x)

    @jax.jit
    @lambda f: jax.vmap(f, axis_name=AXIS)
    def step(x, opt, target):
        updates, opt = tx.update(x - target, opt, x)
        return optax.apply_updates(x, updates), opt

    x = jnp.tile(jnp.linspace(-1, 1, 9), (n, 1))
    opt = jax.vmap(init, axis_name=AXIS)(x)
    for _ in range(25):
        x, opt = step(x, opt, targets(n)[:, None])

    workers = Workers.simulate(n)
    expected = run(workers, row, steps=25, start=jnp.linspace(-1, 1, 9))[0]
    expected = stacked(workers, row, expected)
    np.testing.assert_allclose(x, expected, atol=5e-3, rtol=0)


@pytest.mark.parametrize("row", [r for r in ROWS if r.algorithm == "bytegrad"])
def test_pmap(row):
    tx = row.chain(AXIS)

    def step(x, opt, target):
        updates, opt = tx.update(x - target, opt, x)
        return optax.apply_updates(x, updates), opt

    n = 8
    x = jnp.tile(jnp.linspace(-1, 1, 9), (n, 1))
    opt = jax.vmap(tx.init)(x)
    mapped = jax.pmap(step, axis_name=AXIS)
    for _ in range(25):
        x, opt = jax.block_until_ready(mapped(x, opt, targets(n)))
    expected = run(Workers.simulate(n), row, steps=25, start=jnp.linspace(-1, 1, 9))[0]
    np.testing.assert_array_equal(x, np.broadcast_to(x[0], x.shape))
    np.testing.assert_allclose(x[0], expected, atol=5e-3, rtol=0)


@every_row
def test_converges_on_a_heterogeneous_quadratic(row):
    """The mean model comes to the optimum, mean b = 1, up to the stated floor."""
    workers = Workers.simulate(8)
    x, _ = run(workers, row, steps=200)
    x = stacked(workers, row, x)
    for leaf in jax.tree.leaves(x):
        if leaf.size:
            mean = np.asarray(leaf).mean(axis=0)
            assert np.max(np.abs(mean - 1)) < (row.floor if row.floor < 1 else 0.05)
            assert np.max(np.abs(np.asarray(leaf) - 1)) < max(row.floor, 0.05)


flat_and_nested = [(row, 8) for row in ROWS] + [(row, (2, 4)) for row in ONE_EACH]


@pytest.mark.parametrize(
    ("row", "shape"), flat_and_nested, ids=[f"{r.id}-{s}" for r, s in flat_and_nested]
)
def test_placement_is_typed_and_replicas_agree(row, shape):
    """Gradient side and optimizers: JAX proves that replicas agree, and they do."""
    workers = Workers.devices(shape)
    loop = training(workers, row)
    varies = row.own_params
    for spec in jax.tree.leaves(loop.specs[0], is_leaf=lambda s: isinstance(s, P)):
        assert spec == (workers.spec if varies else P())
    state = before = loop.init()
    for _ in range(3):
        state = loop.step(state, targets(8))
    chex.assert_trees_all_equal_shapes_and_dtypes(before, state)
    if varies:
        return
    # The devices' own buffers, bit for bit.
    for leaf in jax.tree.leaves(state[0]):
        copies = [np.asarray(shard.data) for shard in leaf.addressable_shards]
        assert len(copies) == 8
        for copy in copies:
            assert copy.tobytes() == copies[0].tobytes()


rows_with_equal_params = [row for row in ONE_EACH if not row.own_params]


@pytest.mark.parametrize("row", rows_with_equal_params, ids=ids(rows_with_equal_params))
def test_out_specs_say_replicated(row):
    """``out_specs=P()`` under ``check_vma=True``, spelled out as users write it."""
    tx = row.chain(AXIS)

    def step(target):
        x = params()
        grads = jax.grad(loss)(bagua_jax.worker_local(x, AXIS), target[0])
        return tx.update(grads, tx.init(x), x)[0]

    mesh = Workers.devices(8).mesh
    mapped = jax.shard_map(step, mesh=mesh, in_specs=P(AXIS), out_specs=P())
    jax.jit(mapped).lower(targets(8))


@pytest.mark.parametrize(
    "row", [r for r in ROWS if r.algorithm == "decentralized"], ids=lambda r: r.id
)
def test_consensus_contracts(row):
    """Without gradients, disagreement shrinks to nothing and the mean stays."""
    workers = Workers.simulate(8)
    tx = row.make(AXIS)

    def steps(x):
        def step(carry, _):
            x, opt = carry
            updates, opt = tx.update(jnp.zeros_like(x), opt, x)
            return (optax.apply_updates(x, updates), opt), None

        return jax.lax.scan(step, (x, tx.init(x)), length=80)[0][0]

    x = jax.random.normal(jax.random.key(0), (8, 5))
    y = workers.spmd(steps, in_specs=workers.spec)(x)
    np.testing.assert_allclose(y, np.tile(x.mean(0), (8, 1)), atol=2e-5)


STATIC = {"warmup_steps", "axis_name", "bucket_bytes", "seed", "topk", "chunk"} | {
    "var_freeze_step",
    "var_update_scaler",
    "local_step_scaler",
    "local_step_clipper",
}


@every_algorithm
def test_masked_named_and_injected(row):
    """The compositions that users of optax reach for."""
    workers = Workers.simulate(4)
    mask = {
        "nested": {"odd": True},
        "scalar": False,
        "none": None,
        "empty": True,
        "vector": True,
    }

    def named(sync, inner):
        sync, inner = ("sync", sync), ("opt", inner)
        parts = {"gradient": [sync, inner], "weight": [inner, sync]}
        return optax.named_chain(*parts.get(row.placement, [sync]))

    bare = row.make(AXIS)
    tx = named(bare, optax.sgd(LEARNING_RATE, momentum=0.5))
    out = run(workers, row, steps=3, tx=tx)
    plain = run(workers, row, steps=3)
    chex.assert_trees_all_equal(out[0], plain[0])

    # A hyperparameter can be injected, and changed without recompilation.
    sync, inner = bare, optax.inject_hyperparams(optax.sgd)(learning_rate=0.1)
    if row.is_optimizer:
        factory = alg.REGISTRY[row.algorithm].factory
        static = STATIC & set(inspect.signature(factory).parameters)
        injected = optax.inject_hyperparams(factory, static_args=static)
        sync = injected(axis_name=AXIS, **row.options)
    tx = named(optax.masked(sync, mask), inner)
    out = run(workers, row, steps=3, tx=tx, own=True)  # the scalar becomes so
    chex.assert_tree_all_finite(out[0])
    assert optax.tree.get(out[1], "learning_rate") == pytest.approx(
        row.options["learning_rate"] if row.is_optimizer else 0.1
    )


@every_algorithm
def test_inside_wrappers_with_branches(row):
    """Branches need equal types: ``varying`` gives them."""
    workers = Workers.devices(4)
    bare = row.chain(AXIS)

    wrapped = [
        optax.MultiSteps(
            bagua_jax.varying(bare, AXIS), every_k_schedule=2
        ).gradient_transformation(),
        bagua_jax.accumulate(bare, 2),
    ]
    for tx in wrapped:

        def program(target, tx=tx):
            def step(carry, _):
                x, opt = carry
                updates, opt = tx.update(jax.grad(loss)(x, target), opt, x)
                x = optax.apply_updates(x, updates)
                return bagua_jax.worker_local((x, opt), AXIS), None

            x = bagua_jax.worker_local(params(), AXIS)
            opt = bagua_jax.worker_local(tx.init(x), AXIS)
            return jax.lax.scan(step, (x, opt), length=4)[0][0]

        out = workers.spmd(program, in_specs=workers.spec)(targets(4))
        chex.assert_tree_all_finite(out)


@every_row
def test_non_finite_on_one_worker_is_seen_on_all(row):
    """At the latest after as many communications as the graph is wide."""
    workers = Workers.simulate(8)
    loop = training(workers, row)
    for bad in (jnp.nan, jnp.inf, -jnp.inf):
        state = loop.init()
        for t in range(24):
            target = targets(8)
            state = loop.step(state, target.at[3].set(bad) if t == 0 else target)
        x = stacked(workers, row, state[0])
        for leaf in jax.tree.leaves(x):
            if leaf.size:
                seen = (~np.isfinite(np.asarray(leaf))).reshape(8, -1).any(axis=1)
                assert seen.all(), f"after {bad} these workers see it: {seen}"


@every_algorithm
def test_tied_weights_and_zero_gradients(row):
    """A leaf used twice, and one not used at all."""
    workers = Workers.devices(4)

    def tied(tree, target):
        twice = jnp.sum((tree["a"] * tree["a"][::-1] - target) ** 2)
        return twice  # tree["unused"] has a zero gradient

    start = {"a": jnp.ones(5), "unused": jnp.full(3, 2.0)}
    x, _ = run(workers, row, steps=3, start=start, loss=tied)
    chex.assert_tree_all_finite(x)
    unused = stacked(workers, row, x)["unused"]
    assert np.max(np.abs(np.asarray(unused) - 2.0)) < 0.05


@every_algorithm
def test_saved_and_restored_state_continues_equally(row):
    workers = Workers.simulate(8)
    loop = training(workers, row)
    state = loop.init()
    for _ in range(3):
        state = loop.step(state, targets(8))

    def pack(leaf):
        typed_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        return np.asarray(jax.random.key_data(leaf) if typed_key else leaf)

    def unpack(saved, like):
        typed_key = jnp.issubdtype(like.dtype, jax.dtypes.prng_key)
        return jax.random.wrap_key_data(saved) if typed_key else jnp.asarray(saved)

    restored = jax.tree.map(unpack, jax.tree.map(pack, state), loop.init())
    for _ in range(25):
        state = loop.step(state, targets(8))
        restored = loop.step(restored, targets(8))
    chex.assert_trees_all_equal(state[0], restored[0])


class TestRefusals:
    """Gradients that JAX has already summed over the workers."""

    rows = [row for row in ONE_EACH if not row.own_params]

    @pytest.mark.parametrize("n", [1, 8])
    @pytest.mark.parametrize("row", rows, ids=ids(rows))
    def test_summed_gradients_are_refused(self, row, n):
        workers = Workers.devices(n)
        tx = row.chain(AXIS)

        def step(target):
            x = params()
            grads = jax.grad(loss)(x, target)  # x is replicated: summed by JAX
            return tx.update(grads, tx.init(x), x)[0]

        with pytest.raises(ValueError, match=r"already summed over 'workers'") as info:
            workers.spmd(step, in_specs=workers.spec)(targets(n))
        assert row.algorithm in str(info.value)
        assert "bagua_jax.value_and_grad(loss_fn, 'workers')" in str(info.value)

    @pytest.mark.parametrize("row", rows, ids=ids(rows))
    def test_they_are_local_under_vmap_and_without_types(self, row):
        tx = row.chain(AXIS)

        def step(target):
            x = params()
            grads = jax.grad(loss)(x, target.reshape(()))
            return tx.update(grads, tx.init(x), x)[0]

        simulate = jax.jit(jax.vmap(step, axis_name=AXIS, out_axes=None))
        simulated = simulate(targets(4))
        mesh = Workers.devices(4).mesh
        mapped = jax.shard_map(
            step, mesh=mesh, in_specs=P(AXIS), out_specs=P(), check_vma=False
        )
        unchecked = jax.jit(mapped)(targets(4))
        chex.assert_trees_all_close(simulated, unchecked, atol=1e-6)
