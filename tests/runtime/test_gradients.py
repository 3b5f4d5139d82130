"""value_and_grad: one rule in every place, whatever collectives the loss holds."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax
from jax.sharding import PartitionSpec as P

import bagua_jax
from bagua_jax import Workers
from bagua_jax.algorithms import bytegrad, decentralized, gradient_allreduce, local_sgd

AXIS = "workers"
ROWS, WIDTH, HIDDEN = 6, 5, 1000  # 6,000 parameters: over 4,096, several buckets
TOLERANCE = 2e-6  # float32 sums in another order; gradients are of order 1
RATE = 1e-3


class Batch(NamedTuple):
    x: Any
    y: Any
    real: Any  # 1 for a sample, 0 for padding


def params():
    rng = np.random.default_rng(1)
    draw = lambda *shape: rng.standard_normal(shape).astype(np.float32)  # noqa: E731
    return {"in": draw(WIDTH, HIDDEN), "out": draw(HIDDEN) / HIDDEN, "unused": draw(2)}


def batch(n) -> Batch:
    """The whole batch; worker 2 (or 0 of two) has no sample, worker 1 two of six."""
    rng = np.random.default_rng(n)
    real = np.ones((n, ROWS), np.float32)
    if n > 1:
        real[1, 2:] = 0
        real[2 % n] = 0
    x = rng.standard_normal((n * ROWS, WIDTH)).astype(np.float32)
    y = rng.standard_normal(n * ROWS).astype(np.float32)
    return Batch(x, y, real.ravel())


# --- losses: what a worker computes, and the same on the whole batch -----------------


def squares(p, b, normalize=lambda h: h):
    return (jnp.tanh(normalize(b.x @ p["in"])) @ p["out"] - b.y) ** 2


def penalty(p):
    return 0.1 * sum(jnp.sum(x**2) for x in jax.tree.leaves(p))


def normalizer(b, total):
    """Batch normalization whose statistics are sums through ``total``."""

    def normalize(h):
        count = total(jnp.sum(b.real))
        mean = total(jnp.sum(h * b.real[:, None], 0, keepdims=True)) / count
        deviation = (h - mean) * b.real[:, None]
        variance = total(jnp.sum(deviation**2, 0, keepdims=True)) / count
        return (h - mean) * lax.rsqrt(variance + 1e-3)

    return normalize


def over_workers(x):
    return lax.psum(x, AXIS)


def here(x):
    return x


def mean_loss(p, b, total):
    del total
    return squares(p, b).mean()


def regularized(p, b, total):
    return mean_loss(p, b, total) + penalty(p)


def per_token(p, b, total):
    return total(jnp.sum(squares(p, b) * b.real)) / total(jnp.sum(b.real))


def normalized(p, b, total):
    everyone = b._replace(real=jnp.ones_like(b.real))
    return squares(p, everyone, normalizer(everyone, total)).mean()


def own_tokens(p, b, total):
    del total
    return jnp.sum(squares(p, b) * b.real) / jnp.sum(b.real)


def normalized_tokens(p, b, total):
    losses = squares(p, b, normalizer(b, total)) * b.real
    return jnp.sum(losses) / jnp.maximum(jnp.sum(b.real), 1)


def pmean(loss):
    return lambda p, b, total: lax.pmean(loss(p, b, total), AXIS)


def normalized_per_token(p, b, total):
    losses = squares(p, b, normalizer(b, total)) * b.real
    return total(jnp.sum(losses)) / total(jnp.sum(b.real))


class Case(NamedTuple):
    worker: Callable  # (params, this worker's batch, sum over workers) -> loss
    whole: Callable  # (params, whole batch, identity) -> loss
    is_weighted: bool = False


CASES = {
    "own": Case(mean_loss, mean_loss),
    "averaged": Case(pmean(mean_loss), mean_loss),
    "averaged, and a penalty": Case(
        lambda p, b, total: pmean(mean_loss)(p, b, total) + penalty(p), regularized
    ),
    "sum over sum": Case(per_token, per_token),
    "normalized": Case(normalized, normalized),
    "normalized, averaged": Case(pmean(normalized), normalized),
    "weighted": Case(own_tokens, per_token, True),
    "weighted, averaged": Case(per_token, per_token, True),
    "weighted, normalized": Case(normalized_tokens, normalized_per_token, True),
}


# --- places ---------------------------------------------------------------------------


def split(n, b):
    return jax.tree.map(lambda x: x.reshape(n, -1, *x.shape[1:]), b)


def on_vmap(body, n, p, b):
    mapped = jax.vmap(body, in_axes=(None, 0), axis_name=AXIS)
    return jax.tree.map(lambda x: x[0], jax.jit(mapped)(p, split(n, b)))


def on_pmap(body, n, p, b):
    mapped = jax.pmap(
        body, in_axes=(None, 0), axis_name=AXIS, devices=jax.devices()[:n]
    )
    return jax.tree.map(lambda x: x[0], mapped(p, split(n, b)))


def on_shard_map(check_vma):
    def run(body, n, p, b):
        mapped = jax.shard_map(
            body,
            mesh=Workers.devices(n).mesh,
            in_specs=(P(), P(AXIS)),
            out_specs=P(),
            check_vma=check_vma,
        )
        return jax.jit(mapped)(p, b)

    return run


PLACES = {
    "vmap": on_vmap,
    "pmap": on_pmap,
    "shard_map": on_shard_map(True),
    "shard_map without types": on_shard_map(False),
}
everywhere = pytest.mark.parametrize("place", PLACES)
WORKERS = {"simulate": Workers.simulate, "devices": Workers.devices}
both_places = pytest.mark.parametrize("place", WORKERS)


def tokens(p, b):
    del p
    return jnp.sum(b.real)


def taken(case):
    """Value and gradient of this worker, then their means."""

    def fn(p, b):
        loss = lambda p, b: case.worker(p, b, over_workers)  # noqa: E731
        weight = tokens if case.is_weighted else None
        own = bagua_jax.value_and_grad(loss, AXIS, weight=weight)(p, b)
        return jax.tree.map(lambda x: lax.pmean(x, AXIS), own)

    return fn


@pytest.mark.parametrize(
    ("place", "n"),
    [(place, n) for place in ("vmap", "shard_map") for n in (1, 2, 3, 8)]
    + [("pmap", 3), ("shard_map without types", 3)],
)
def test_the_mean_gradient_is_that_of_the_whole_batch(place, n):
    def body(p, b):
        return {name: taken(case)(p, b) for name, case in CASES.items()}

    @jax.jit
    def whole(p, b):
        return {
            name: jax.value_and_grad(lambda p, case=case: case.whole(p, b, here))(p)
            for name, case in CASES.items()
        }

    ours = PLACES[place](body, n, params(), batch(n))
    expected = whole(params(), batch(n))
    for name in CASES:
        largest = max(float(jnp.abs(g).max()) for g in expected[name][1].values())
        assert largest > 1e-3, name  # far above the tolerance
        np.testing.assert_allclose(ours[name][0], expected[name][0], rtol=1e-5)
        for leaf, gradient in expected[name][1].items():
            np.testing.assert_allclose(
                ours[name][1][leaf], gradient, rtol=0, atol=TOLERANCE, err_msg=name
            )


# --- inside a training step -----------------------------------------------------------


def train(workers, tx, loss, own_params=False, steps=4, **options):
    """Parameters after a few steps, averaged where workers have their own."""
    data = split(workers.num_workers, batch(workers.num_workers))

    def init():
        p = jax.tree.map(jnp.asarray, params())
        p = bagua_jax.worker_local(p, AXIS) if own_params else p
        return p, tx.init(p)

    def step(state, b):
        p, opt_state = state
        _, grads = bagua_jax.value_and_grad(loss, AXIS, **options)(p, b)
        updates, opt_state = tx.update(grads, opt_state, p)
        return optax.apply_updates(p, updates), opt_state

    specs = workers.specs(init)
    run = workers.spmd(step, in_specs=(specs, workers.spec))
    state = workers.spmd(init)()
    for _ in range(steps):
        state = run(state, data)
    mean = lambda x: x.mean(0)  # noqa: E731
    return jax.tree.map(mean, state[0]) if own_params else state[0]


TRANSFORMS = {
    "gradient_allreduce": lambda: (gradient_allreduce(axis_name=AXIS), False),
    "bytegrad": lambda: (bytegrad(axis_name=AXIS, error_feedback="both"), False),
    "decentralized": lambda: (decentralized(axis_name=AXIS), True),
    "local_sgd": lambda: (local_sgd(local_steps=2, axis_name=AXIS), True),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_an_averaged_loss_trains_alike_simulated_and_on_devices(name):
    finals = []
    for make in WORKERS.values():
        transform, own = TRANSFORMS[name]()
        pair = (optax.sgd(RATE), transform) if own else (transform, optax.sgd(RATE))
        loss = lambda p, b: pmean(normalized)(p, b, over_workers)  # noqa: E731
        finals.append(train(make(3), optax.chain(*pair), loss, own))
    moved = float(jnp.abs(finals[0]["out"] - params()["out"]).max())
    assert moved > 100 * TOLERANCE
    for leaf in finals[0]:
        # A code of 8 bits may fall on the other side of a rounding.
        atol = 1e-2 * moved if name == "bytegrad" else TOLERANCE
        np.testing.assert_allclose(
            finals[0][leaf], finals[1][leaf], rtol=0, atol=atol, err_msg=leaf
        )


@both_places
def test_exact_averages_train_as_the_one_device_program(place):
    p = params()
    whole = jax.jit(jax.grad(lambda p: normalized_per_token(p, batch(3), here)))
    for _ in range(4):
        p = jax.tree.map(lambda x, g: x - RATE * g, p, whole(p))
    tx = optax.chain(gradient_allreduce(axis_name=AXIS), optax.sgd(RATE))
    loss = lambda p, b: normalized_tokens(p, b, over_workers)  # noqa: E731
    ours = train(WORKERS[place](3), tx, loss, weight=tokens)
    for leaf in p:
        np.testing.assert_allclose(ours[leaf], p[leaf], rtol=0, atol=TOLERANCE)


# --- its arguments --------------------------------------------------------------------


@both_places
def test_argnums_aux_and_keywords(place):
    def fun(a, x, b, *, scale):
        return scale * lax.pmean(jnp.sum(a["w"] * x) * b, AXIS), {"x": x}

    def body(a, x):
        take = bagua_jax.value_and_grad(fun, AXIS, argnums=(0, 2), has_aux=True)
        return take(a, x, 3.0, scale=2.0)  # a Python number is one of the arguments

    workers = WORKERS[place](4)
    x = np.arange(8.0, dtype=np.float32).reshape(4, 2)
    run = workers.spmd(body, in_specs=(P(), workers.spec))
    (value, aux), (first, last) = run({"w": jnp.ones(2)}, x)
    np.testing.assert_allclose(value, np.full(4, 6 * x.sum(1).mean()))
    np.testing.assert_array_equal(aux["x"], x)
    np.testing.assert_allclose(first["w"], 6 * x)
    np.testing.assert_allclose(last, 2 * x.sum(1))


@both_places
@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32"])
def test_a_hierarchy_is_weighed_over_both_axes_in_the_dtype_of_the_loss(place, dtype):
    workers = WORKERS[place]((2, 2))
    weights = np.float32([1, 0, 3, 4])

    def body(x, w):
        take = bagua_jax.value_and_grad(
            lambda p: p * x, workers.axis_name, weight=lambda p: w
        )
        return take(jnp.ones([], dtype))

    value, grad = workers.spmd(body, in_specs=workers.spec)(
        jnp.arange(4, dtype=dtype), weights
    )
    assert value.dtype == grad.dtype == dtype
    np.testing.assert_array_equal(value, np.arange(4) * weights / 2)
    np.testing.assert_array_equal(grad, np.arange(4) * weights / 2)


@both_places
def test_no_worker_has_a_sample(place):
    workers = WORKERS[place](3)
    take = bagua_jax.value_and_grad(lambda p, w: p / w, AXIS, weight=lambda p, w: w)
    value, grad = workers.spmd(lambda w: take(1.0, w), in_specs=workers.spec)(
        jnp.zeros(3)
    )
    np.testing.assert_array_equal([value, grad], np.zeros((2, 3)))


@both_places
def test_a_fault_is_not_hidden(place):
    """A NaN in the loss of a worker that counts, or in a number of samples, shows."""
    workers = WORKERS[place](3)

    def run(x, w):
        take = bagua_jax.value_and_grad(
            lambda p, x, w: p * x, AXIS, weight=lambda p, x, w: w
        )
        return workers.spmd(lambda x, w: take(1.0, x, w), in_specs=workers.spec)(x, w)

    ones, bad = jnp.ones(3), jnp.float32([1, np.nan, 1])
    for out in run(bad, ones):
        np.testing.assert_array_equal(jnp.isnan(out), [False, True, False])
    for out in run(ones, bad):
        assert jnp.isnan(out).all()
    for out in run(bad, jnp.float32([1, 0, 1])):  # the fault of a worker without any
        np.testing.assert_array_equal(out, [1.5, 0, 1.5])


def test_refusals_name_the_function():
    with pytest.raises(NameError, match="value_and_grad: no mapped axis is named 'w'"):
        bagua_jax.value_and_grad(lambda p: p, "w")(1.0)
    take = bagua_jax.value_and_grad(lambda p: p, AXIS, weight=lambda p: jnp.ones(2))
    with pytest.raises(ValueError, match=r"value_and_grad: weight .* got shape \(2,\)"):
        jax.vmap(lambda x: take(x), axis_name=AXIS)(jnp.ones(2))


# --- what cannot be right is refused where types show it ------------------------------


def mistaken(tx, own_params, grads_of):
    """Trace one step in a shard_map of the user's own."""

    def body(p, b):
        p = bagua_jax.worker_local(p, AXIS) if own_params else p
        updates, _ = tx.update(grads_of(p, b), tx.init(p), p)
        return lax.pmean(bagua_jax.worker_local(updates, AXIS), AXIS)

    mapped = jax.shard_map(
        body,
        mesh=Workers.devices(2).mesh,
        in_specs=(P(), P(AXIS)),
        out_specs=P(),
        check_vma=True,
    )
    p = jax.tree.map(jnp.asarray, params())
    jax.eval_shape(mapped, p, batch(2))


def own_gradient(p, b):
    return bagua_jax.value_and_grad(lambda p, b: mean_loss(p, b, here), AXIS)(p, b)[1]


def averaged_gradient(p, b):
    return lax.pmean(own_gradient(p, b), AXIS)


def summed_gradient(p, b):
    return jax.grad(lambda p: mean_loss(p, b, here))(p)


@pytest.mark.parametrize("name", TRANSFORMS)
def test_a_forgotten_average_is_refused(name):
    transform, own = TRANSFORMS[name]()
    pair = (optax.sgd(RATE), transform) if own else (transform, optax.sgd(RATE))
    with pytest.raises(ValueError) as error:
        mistaken(optax.chain(*pair), own, averaged_gradient)
    text = str(error.value)
    assert text.startswith(f"{name}: ") and "pmean" in text
    assert "bagua_jax.value_and_grad(loss_fn, 'workers')" in text


@pytest.mark.parametrize("name", ["decentralized", "local_sgd"])
def test_gradients_of_replicated_params_are_refused_before_a_weight_side_one(name):
    transform, _ = TRANSFORMS[name]()
    with pytest.raises(ValueError, match=f"{name}: the updates are equal on all"):
        mistaken(optax.chain(optax.sgd(RATE), transform), False, summed_gradient)


def test_a_frozen_leaf_before_a_weight_side_one_is_not():
    frozen = {"in": True, "out": False, "unused": True}
    tx = optax.chain(
        optax.sgd(RATE),
        optax.masked(optax.stateless(lambda u, _: jax.tree.map(zeros, u)), frozen),
        decentralized(axis_name=AXIS),
    )
    mistaken(tx, True, own_gradient)


def zeros(x):
    return jnp.zeros(x.shape, x.dtype)
