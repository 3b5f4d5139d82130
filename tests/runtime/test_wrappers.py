"""accumulate: one exchange per optimizer step, equal to one large batch. varying."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P

import bagua_jax
from bagua_jax import Workers, primitives, topologies
from bagua_jax.algorithms import bytegrad, decentralized, gradient_allreduce

PLACES = {"simulate": Workers.simulate, "devices": Workers.devices}
both_places = pytest.mark.parametrize("place", PLACES)
AXIS = "workers"
N, K, STEPS = 4, 3, 4
PARAMS = {"w": jnp.linspace(-1, 1, 6).reshape(2, 3), "b": jnp.zeros(()), "none": None}


def targets(seed=0, steps=STEPS * K, n=N):
    """One micro-batch for each worker and call: [n, steps, 7]."""
    rng = np.random.default_rng(seed)
    return rng.standard_normal((n, steps, 7)).astype(np.float32)


def gradients(params, target):
    """Of a loss that is not quadratic, so that order and steps matter."""

    def loss(p):
        flat, _ = jax.flatten_util.ravel_pytree(p)
        return jnp.sum((flat - target) ** 2) / 2 + jnp.sum(jnp.cos(flat))

    return jax.grad(loss)(params)


def train(tx, params, targets, *, weight_side=False, axis_name=AXIS):
    """The whole run of one worker: a scan over micro-batches."""
    if weight_side:
        params = bagua_jax.worker_local(params, axis_name)
    opt_state = tx.init(params)

    def step(carry, target):
        params, opt_state = carry
        local = bagua_jax.worker_local(params, axis_name)
        if target.ndim == 2:  # one large batch of k micro-batches
            grads = jax.vmap(functools.partial(gradients, local))(target)
            grads = jax.tree.map(lambda g: jnp.mean(g, axis=0), grads)
        else:
            grads = gradients(local, target)
        updates, opt_state = tx.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), (params, updates)

    (params, opt_state), (visited, updates) = lax.scan(
        step, (params, opt_state), targets
    )
    return params, visited, updates, opt_state


def run(place, tx, targets, **kinds):
    workers = PLACES[place](N)
    program = workers.spmd(
        lambda p, t: train(tx, p, t, **kinds), in_specs=(P(), workers.spec)
    )
    return program(PARAMS, targets)


CHAINS = {
    "allreduce sgd": lambda: optax.chain(gradient_allreduce(axis_name=AXIS), sgd()),
    "allreduce momentum": lambda: optax.chain(
        gradient_allreduce(axis_name=AXIS), optax.sgd(0.1, momentum=0.9)
    ),
    "allreduce adam": lambda: optax.chain(
        gradient_allreduce(axis_name=AXIS), optax.adam(0.05)
    ),
    "bytegrad adam": lambda: optax.chain(bytegrad(axis_name=AXIS), optax.adam(0.05)),
    "bytegrad feedback": lambda: optax.chain(
        bytegrad(axis_name=AXIS, error_feedback="both"), optax.sgd(0.1, momentum=0.9)
    ),
    "decentralized": lambda: optax.chain(
        optax.sgd(0.1, momentum=0.9),
        decentralized(axis_name=AXIS, topology="one_peer_exponential"),
    ),
}


def sgd():
    return optax.sgd(0.1)


# --- accumulate ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "place, chain",
    [
        *[("simulate", chain) for chain in CHAINS],
        *[("devices", f"{side}") for side in ("bytegrad feedback", "decentralized")],
    ],
)
def test_accumulating_equals_one_large_batch(place, chain):
    weight_side = chain == "decentralized"
    small = targets()
    tx = bagua_jax.accumulate(CHAINS[chain](), K)
    got, visited, updates, state = run(place, tx, small, weight_side=weight_side)
    large = small.reshape(N, STEPS, K, 7)
    expected, *_ = run(place, CHAINS[chain](), large, weight_side=weight_side)
    for a, b, start in zip(*map(jax.tree.leaves, (got, expected, PARAMS)), strict=True):
        assert a.ndim == start.ndim + weight_side  # held once, or one for each worker
        np.testing.assert_allclose(a, b, atol=2e-6)
        assert np.abs(np.asarray(a) - np.asarray(start)).max() > 0.01
    axis = 1 if weight_side else 0
    for x, u in zip(*map(jax.tree.leaves, (visited, updates)), strict=True):
        x, u = np.moveaxis(np.asarray(x), axis, 0), np.moveaxis(np.asarray(u), axis, 0)
        waiting = np.arange(STEPS * K) % K != K - 1
        assert not u[waiting].any() and u[~waiting].any()
        assert (x[1:][waiting[:-1]] == x[:-1][waiting[:-1]]).all()
    assert int(state.micro_step) == 0 and state.micro_step.dtype == jnp.int32
    assert not any(np.asarray(a).any() for a in jax.tree.leaves(state.accumulated))


@both_places
def test_every_one_is_the_transform_itself(place):
    chain = CHAINS["bytegrad feedback"]
    plain = run(place, chain(), targets())
    wrapped = run(place, bagua_jax.accumulate(chain(), 1), targets())
    for a, b in zip(*map(jax.tree.leaves, (plain[:3], wrapped[:3])), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


def computations(text):
    """Split a compiled program; the entry computation is under 'ENTRY'."""
    found = {}
    for block in re.split(r"\n\}\n", text):
        head = re.search(r"^(ENTRY )?%?([\w.\-]+) \(", block, re.MULTILINE)
        if head:
            found["ENTRY" if head[1] else head[2]] = block[head.start() :]
    return found


def micro_step_program(tx):
    workers = Workers.devices(N)

    def fn(state, params, grads):
        return tx.update(grads, state, params)

    params, grads = jnp.ones(9), jnp.ones((N, 9))
    state = workers.spmd(tx.init)(params)
    specs = workers.specs(tx.init, params)
    run = workers.spmd(fn, in_specs=(specs, P(), workers.spec))
    return run.lower(state, params, grads).compile().as_text()


@pytest.mark.parametrize("chain", ["allreduce sgd", "bytegrad adam"])
def test_one_exchange_in_a_branch_with_its_share(chain):
    text = micro_step_program(bagua_jax.accumulate(CHAINS[chain](), 4))
    conditionals = [line for line in text.splitlines() if " conditional(" in line]
    assert len(conditionals) == 1
    assert "branch_shares(0.75,0.25)" in conditionals[0]
    collective = re.compile(r"\b(all-reduce|all-gather|all-to-all)(-start)?\(")
    talking = {k for k, block in computations(text).items() if collective.search(block)}
    assert talking and "ENTRY" not in talking
    branches = re.search(r"branch_computations=\{([^}]*)\}", conditionals[0])
    if branches:
        rest, act = (name.strip(" %") for name in branches[1].split(","))
    else:
        rest = re.search(r"false_computation=%?([\w.\-]+)", conditionals[0])[1]
        act = re.search(r"true_computation=%?([\w.\-]+)", conditionals[0])[1]
    assert rest not in talking and act in talking
    plain = micro_step_program(CHAINS[chain]())
    assert len(collective.findall(plain)) == len(collective.findall(text))


def test_every_one_has_no_branch():
    text = micro_step_program(bagua_jax.accumulate(CHAINS["allreduce sgd"](), 1))
    assert " conditional(" not in text and "branch_shares" not in text


@pytest.mark.parametrize("k", [1, 3])
def test_summed_gradients_are_still_refused(k):
    """The wrapper must not make a summed gradient look local: it is n times off."""
    workers = Workers.devices(N)
    tx = bagua_jax.accumulate(CHAINS["allreduce sgd"](), k)

    def fn(params, target):
        grads = gradients(params, target)  # of replicated params: summed by JAX
        return tx.update(grads, tx.init(params), params)[0]

    with pytest.raises(
        ValueError, match="already summed over 'workers'.*value_and_grad"
    ):
        workers.spmd(fn, in_specs=(P(), workers.spec))(PARAMS, targets()[:, 0])


@both_places
def test_gradients_averaged_before_may_be_accumulated(place):
    """Equal on all workers because they are a mean, not because JAX summed them."""
    tx = optax.chain(
        gradient_allreduce(axis_name=AXIS), bagua_jax.accumulate(optax.sgd(1.0), 2)
    )

    def program(params, grads):
        state = tx.init(params)
        for g in grads:
            updates, state = tx.update(g, state, params)
        return bagua_jax.worker_local(updates, AXIS)

    workers = PLACES[place](N)
    grads = np.random.default_rng(0).standard_normal((N, 2, 3)).astype(np.float32)
    out = workers.spmd(program, in_specs=(P(), workers.spec))(jnp.zeros(3), grads)
    expected = np.broadcast_to(-grads.mean((0, 1)), np.shape(out))
    np.testing.assert_allclose(out, expected, atol=1e-6)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("when", [0, 1, 2])
def test_a_bad_micro_batch_spoils_its_own_cycle_only(bad, when):
    tx = bagua_jax.accumulate(optax.sgd(1.0), 3)
    grads = np.ones((6, 2), np.float32)
    grads[when, 0] = bad
    update = jax.jit(tx.update)
    state, updates = tx.init(jnp.zeros(2)), []
    for g in grads:
        u, state = update(jnp.asarray(g), state)
        updates.append(np.asarray(u))
    for i in (0, 1, 3, 4):
        np.testing.assert_array_equal(updates[i], [0, 0])
    assert not np.isfinite(updates[2][0])  # seen, not hidden
    assert updates[2][1] == -1
    np.testing.assert_array_equal(updates[5], [-1, -1])
    assert np.isfinite(state.accumulated).all()


def test_narrow_gradients_are_averaged_in_float32():
    tx = bagua_jax.accumulate(optax.sgd(1.0), 4)
    params = {"w": jnp.zeros(2, jnp.bfloat16)}
    state = jax.jit(tx.init)(params)
    assert state.accumulated["w"].dtype == jnp.float32
    # 256 + 1 is 256 in bfloat16; the mean of these four is 65
    for value in (256.0, 1.0, 1.0, 2.0):
        grads = {"w": jnp.full(2, value, jnp.bfloat16)}
        updates, state = jax.jit(tx.update)(grads, state, params)
        assert updates["w"].dtype == jnp.bfloat16
    np.testing.assert_array_equal(np.float32(updates["w"]), [-65, -65])


def test_inner_schedules_count_optimizer_steps():
    tx = bagua_jax.accumulate(
        optax.chain(optax.scale_by_schedule(lambda t: t + 1.0)), 2
    )
    state, seen = tx.init(jnp.zeros(())), []
    for _ in range(6):
        updates, state = tx.update(jnp.float32(1), state)
        seen.append(float(updates))
    assert seen == [0, 1, 0, 2, 0, 3]
    assert int(optax.tree.get(state, "count")) == 3


def test_extra_arguments_masks_and_nones_pass():
    def scaled_update(updates, state, params=None, *, factor, **extra):
        assert extra == {"unknown": 3} and params["a"] is not None
        return jax.tree.map(lambda g: g * factor, updates), state

    inner = optax.GradientTransformationExtraArgs(lambda p: (), scaled_update)
    tx = bagua_jax.accumulate(inner, 2)
    assert isinstance(tx, optax.GradientTransformationExtraArgs)
    params = {"a": jnp.ones(2), "b": optax.MaskedNode(), "c": None}
    state = tx.init(params)
    for expected in (0, 5):
        updates, state = tx.update(params, state, params, factor=5.0, unknown=3)
        np.testing.assert_array_equal(updates["a"], [expected] * 2)
    assert jax.tree.structure(updates) == jax.tree.structure(params)


def test_init_works_outside_any_axis():
    tx = bagua_jax.accumulate(CHAINS["bytegrad feedback"](), 2)
    state = tx.init(PARAMS)
    shapes = jax.eval_shape(tx.init, PARAMS)
    assert jax.tree.map(jnp.shape, state) == jax.tree.map(jnp.shape, shapes)
    assert jax.tree.structure(state.accumulated) == jax.tree.structure(PARAMS)
    assert optax.tree.get(state, "micro_step") is state.micro_step


@pytest.mark.parametrize("k", [0, -1, 1.5, True, "2", None])
def test_every_k_must_be_a_positive_integer(k):
    with pytest.raises(ValueError, match="accumulate: every_k must be an integer >= 1"):
        bagua_jax.accumulate(sgd(), k)


def test_accumulating_in_a_hierarchy():
    names = ("node", "local")
    workers = Workers.devices((2, 2))
    tx = bagua_jax.accumulate(
        optax.chain(gradient_allreduce(axis_name=names), optax.sgd(0.1)), K
    )

    def program(p, t):
        return train(tx, p, t, axis_name=names)[0]

    assert set(
        jax.tree.leaves(
            workers.specs(program, PARAMS, targets(), in_specs=(P(), workers.spec))
        )
    ) == {P()}
    got = workers.spmd(program, in_specs=(P(), workers.spec))(PARAMS, targets())
    expected = run(
        "devices", bagua_jax.accumulate(CHAINS["allreduce sgd"](), K), targets()
    )
    for a, b in zip(*map(jax.tree.leaves, (got, expected[0])), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-6)


def test_params_stay_proved_equal():
    """Gradient side: replicated params leave through P(), by JAX's own types."""
    workers = Workers.devices(N)
    tx = bagua_jax.accumulate(CHAINS["bytegrad feedback"](), K)
    specs = workers.specs(
        lambda p, t: train(tx, p, t)[::3],
        PARAMS,
        targets(),
        in_specs=(P(), workers.spec),
    )
    params, state = specs
    assert set(jax.tree.leaves(params)) == {P()}
    assert state.micro_step == P()
    assert set(jax.tree.leaves(state.accumulated)) == {workers.spec}
    assert set(jax.tree.leaves(optax.tree.get(state, "trace"))) == {P()}


def test_multisteps_communicates_every_time_and_we_do_not():
    """What accumulate is for: optax's own wrapper has its collective outside."""
    inner = CHAINS["allreduce sgd"]()
    multi = optax.MultiSteps(bagua_jax.varying(inner, AXIS), 4)
    workers = Workers.devices(N)

    def fn(params, grads):
        params = bagua_jax.worker_local(params, AXIS)
        return multi.update(grads, multi.init(params), params)[0]

    text = (
        workers.spmd(fn, in_specs=(P(), workers.spec))
        .lower(jnp.ones(9), jnp.ones((N, 9)))
        .compile()
        .as_text()
    )
    assert "all-reduce(" in computations(text)["ENTRY"]


# --- varying -------------------------------------------------------------------------


def test_varying_changes_types_only():
    workers = Workers.devices(N)
    inner = CHAINS["allreduce momentum"]()

    def fn(params, target):
        grads = gradients(bagua_jax.worker_local(params, AXIS), target)
        plain, state = inner.update(grads, inner.init(params), params)
        tx = bagua_jax.varying(inner, AXIS)
        marked, same = tx.update(grads, tx.init(params), params, unknown=1)
        return plain, marked, state, same

    args = PARAMS, targets()[:, 0]
    specs = workers.specs(fn, *args, in_specs=(P(), workers.spec))
    assert set(jax.tree.leaves(specs[0])) == {P()} == set(jax.tree.leaves(specs[2]))
    assert set(jax.tree.leaves(specs[1])) == {workers.spec}
    assert specs[2] == specs[3]
    plain, marked, *_ = workers.spmd(fn, in_specs=(P(), workers.spec))(*args)
    for a, b in zip(*map(jax.tree.leaves, (plain, marked)), strict=True):
        np.testing.assert_array_equal(np.broadcast_to(a, b.shape), b)


def test_varying_works_outside_any_axis():
    tx = bagua_jax.varying(optax.sgd(0.5), AXIS)
    updates, _ = tx.update({"a": jnp.ones(2), "b": None}, tx.init({"a": jnp.ones(2)}))
    np.testing.assert_array_equal(updates["a"], [-0.5, -0.5])
    assert isinstance(tx, optax.GradientTransformationExtraArgs)


def multi_steps(inner):
    wrapped = optax.MultiSteps(bagua_jax.varying(inner, AXIS), 2)
    return wrapped.gradient_transformation()


def conditionally(inner):
    return optax.transforms.conditionally_transform(
        bagua_jax.varying(inner, AXIS), lambda step, **_: step % 2 == 0
    )


WRAPPERS = {
    "MultiSteps": multi_steps,
    "conditionally_transform": conditionally,
}


@pytest.mark.parametrize("chain", ["allreduce sgd", "bytegrad feedback"])
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_varying_inside_optax_wrappers(wrapper, chain):
    """With check_vma=True and a scan: branches and carries of equal types."""
    workers = Workers.devices(N)
    tx = WRAPPERS[wrapper](CHAINS[chain]())

    def program(params, targets):
        params = bagua_jax.worker_local(params, AXIS)
        state = bagua_jax.worker_local(tx.init(params), AXIS)

        def step(carry, target):
            params, state = carry
            updates, state = tx.update(gradients(params, target), state, params)
            state = bagua_jax.worker_local(state, AXIS)
            return (optax.apply_updates(params, updates), state), None

        return lax.scan(step, (params, state), targets)[0][0]

    out = workers.spmd(program, in_specs=(P(), workers.spec))(PARAMS, targets())
    for x, start in zip(*map(jax.tree.leaves, (out, PARAMS)), strict=True):
        x = np.asarray(x)
        assert np.isfinite(x).all() and np.abs(x[0] - np.asarray(start)).max() > 0.01
        # conditionally_transform passes the local gradient on in between
        assert (x == x[0]).all() == (wrapper != "conditionally_transform")


def test_without_varying_the_wrappers_fail():
    """The reason for varying: branches of unequal types."""
    workers = Workers.devices(N)
    always = lambda step, **_: step >= 0  # noqa: E731
    tx = optax.transforms.conditionally_transform(CHAINS["allreduce sgd"](), always)

    def fn(params, target):
        params = bagua_jax.worker_local(params, AXIS)
        grads = gradients(params, target)
        return tx.update(grads, tx.init(params), params)[0]

    with pytest.raises(TypeError, match="branches|cond"):
        workers.spmd(fn, in_specs=(P(), workers.spec))(PARAMS, targets()[:, 0])


def test_varying_in_a_hierarchy():
    names = ("node", "local")
    workers = Workers.devices((2, 2))
    tx = bagua_jax.varying(gradient_allreduce(axis_name=names), names)

    def fn(g):
        updates, _ = tx.update(g, tx.init(g))
        assert primitives.varying_axes(updates) == {"node", "local"}
        return updates

    x = np.arange(8.0).reshape(4, 2)
    out = workers.spmd(fn, in_specs=workers.spec)(x)
    np.testing.assert_allclose(out, np.tile(x.mean(0), (4, 1)))


def test_topologies_inside_accumulate_rotate_with_optimizer_steps():
    """One-peer averaging of four is exact after two optimizer steps, not two calls."""
    gossip = decentralized(axis_name=AXIS, topology=topologies.one_peer_exponential(4))
    tx = bagua_jax.accumulate(gossip, 3)
    x = np.float32([[0], [1], [2], [7]])

    def program(x):
        def step(carry, _):
            x, state = carry
            updates, state = tx.update(jnp.zeros_like(x), state, x)
            return (optax.apply_updates(x, updates), state), x

        (x, _), visited = lax.scan(step, (x, tx.init(x)), length=6)
        return jnp.concatenate([visited, x[None]])

    workers = Workers.simulate(4)
    seen = np.asarray(workers.spmd(program, in_specs=workers.spec)(x))[..., 0]
    np.testing.assert_array_equal(seen[:, 0], seen[:, 2])
    np.testing.assert_array_equal(seen[:, 3], [3.5, 0.5, 1.5, 4.5])
    np.testing.assert_array_equal(seen[:, 5], [3.5, 0.5, 1.5, 4.5])
    np.testing.assert_array_equal(seen[:, 6], [2.5] * 4)


# --- local ----------------------------------------------------------------------------

STOCK = {
    "trace": optax.trace(0.9),
    "lion": optax.scale_by_lion(b1=0.8, b2=0.9),
    "ema": optax.ema(0.5),
    "clip": optax.adaptive_grad_clip(0.1),
    "noise": optax.add_noise(0.1, 0.5, jax.random.key(3)),
    "injected": optax.inject_hyperparams(optax.trace)(decay=0.9),
}


def own_steps(tx, x, grads, axis=None):
    """Several steps in a scan on given gradients [steps, d], and all updates."""
    state = tx.init(x)

    def step(state, g):
        g = bagua_jax.worker_local(g, axis) if axis else g
        updates, state = tx.update(g, state, x)
        return state, updates

    return lax.scan(step, state, grads)


@pytest.mark.parametrize("n", [1, 2, 3, 8])
def test_local_transforms_keep_a_state_for_each_worker(devices, n):
    """Before an exchange, equal to stock transforms on n machines and their mean."""
    rng = np.random.default_rng(n)
    x = rng.standard_normal(5000).astype(np.float32)
    grads = rng.standard_normal((n, 3, 5000)).astype(np.float32)
    expected = {}
    for name, tx in STOCK.items():
        alone = [own_steps(tx, x, g)[1] for g in grads]
        expected[name] = np.mean(alone, axis=0)

    def all_of_them(grads):
        exchange = gradient_allreduce(axis_name=AXIS)
        chains = {
            k: optax.chain(bagua_jax.local(tx, AXIS), exchange)
            for k, tx in STOCK.items()
        }
        return {k: own_steps(tx, x, grads, AXIS) for k, tx in chains.items()}

    for make in PLACES.values():
        workers = make(n)
        found = workers.spmd(all_of_them, in_specs=workers.spec)(grads)
        for name, (state, updates) in found.items():
            np.testing.assert_allclose(updates, expected[name], atol=2e-6, err_msg=name)
            assert all(leaf.shape[0] == n for leaf in jax.tree.leaves(state)), name


def test_a_stock_transform_without_local_is_no_carry(devices):
    """What the wrapper is for: JAX's own refusal."""
    tx = optax.chain(optax.trace(0.9), gradient_allreduce(axis_name=AXIS))
    workers = Workers.devices(2)
    run = lambda g: own_steps(tx, jnp.zeros(3), g, AXIS)  # noqa: E731
    with pytest.raises(TypeError, match="carry"):
        workers.spmd(run, in_specs=workers.spec)(jnp.ones((2, 4, 3)))


def test_local_behind_an_exchange_is_refused(devices):
    workers = Workers.devices(2)
    tx = optax.chain(
        gradient_allreduce(axis_name=AXIS), bagua_jax.local(optax.trace(0.9), AXIS)
    )
    run = lambda g: own_steps(tx, jnp.zeros(3), g, AXIS)  # noqa: E731
    with pytest.raises(ValueError, match="^local: .* in front of the exchange"):
        workers.spmd(run, in_specs=workers.spec)(jnp.ones((2, 4, 3)))
    with pytest.raises(NameError, match=r"^local: no mapped axis is named 'workers'"):
        bagua_jax.local(optax.trace(0.9), AXIS).update(jnp.ones(3), None)
