"""flax.nnx modules, which are changed in place, in every place that workers live."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax import lax
from jax.sharding import PartitionSpec as P

import bagua_jax
from bagua_jax import Workers
from bagua_jax.algorithms import gradient_allreduce

AXIS, ROWS, WIDTH, HIDDEN, STEPS = "workers", 8, 50, 100, 3
SGD = optax.sgd(0.1, momentum=0.5)
TX = optax.chain(gradient_allreduce(axis_name=AXIS), SGD)


class Net(nnx.Module):
    """5,110 parameters, running means, and two streams of random numbers."""

    def __init__(self, axis=None, rate=0.5, noise=0.1):
        rngs = nnx.Rngs(params=0, dropout=1, noise=2)
        self.first = nnx.Linear(WIDTH, HIDDEN, rngs=rngs, use_bias=False)
        self.norm = nnx.BatchNorm(HIDDEN, momentum=0.9, axis_name=axis, rngs=rngs)
        self.drop = nnx.Dropout(rate, rngs=rngs)
        self.last = nnx.Linear(HIDDEN, 1, rngs=rngs, use_bias=False)
        self.streams, self.noise = rngs, noise

    def __call__(self, x):
        with jax.numpy_rank_promotion("allow"):  # flax scales so
            x = self.norm(self.first(x))
        x = x + self.noise * jax.random.normal(self.streams.noise(), x.shape)
        return self.last(self.drop(jnp.tanh(x)))[:, 0]


def loss_fn(model, x, y):
    return jnp.mean((model(x) - y) ** 2)


def batches(n):
    rng = np.random.default_rng(n)
    x = rng.standard_normal((STEPS, n, ROWS, WIDTH)).astype(np.float32)
    return list(zip(x, x[..., :3].sum(-1), strict=True))


def split(model):
    return nnx.split(model, nnx.Param, ...)


def init():
    _, params, rest = split(Net())
    return params, rest, TX.init(params)


GRAPH = split(Net())[0]


def step(state, batch):
    params, rest, opt = state
    model = nnx.merge(GRAPH, params, rest)
    loss, grads = bagua_jax.nnx_value_and_grad(loss_fn, AXIS)(model, *batch)
    updates, opt = TX.update(grads, opt, params)
    return (optax.apply_updates(params, updates), split(model)[2], opt), loss


def plain(n):
    """n copies of the module, each on its batch, without any of our code."""
    models = [Net() for _ in range(n)]
    for k, model in enumerate(models[1:], start=1):
        for _, variable in nnx.iter_graph(model):
            if isinstance(variable, nnx.RngKey):
                variable[...] = jax.random.fold_in(variable[...], k)
    opt = SGD.init(split(models[0])[1])
    losses = []
    for x, y in batches(n):
        found = [
            nnx.value_and_grad(loss_fn)(*given)
            for given in zip(models, x, y, strict=True)
        ]
        losses.append([loss for loss, _ in found])
        mean = jax.tree.map(lambda *g: sum(g) / n, *(grads for _, grads in found))
        updates, opt = SGD.update(mean, opt)
        for model in models:
            params = optax.apply_updates(split(model)[1], updates)
            nnx.update(model, params)
    return models, np.asarray(losses)


def same(found, models):
    """Compare (params, rest) at the boundary with those of n modules."""
    params, rest = found
    _, expected, _ = split(models[0])
    for a, b in zip(*map(jax.tree.leaves, (params, expected)), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-6)
    for k, model in enumerate(models):
        np.testing.assert_allclose(
            rest["norm"]["mean"][...][k], model.norm.mean[...], atol=1e-6
        )
        np.testing.assert_allclose(
            rest["norm"]["var"][...][k], model.norm.var[...], atol=1e-6
        )
    streams = Net().streams
    for name in ("dropout", "noise"):
        count, key = rest["streams"][name]["count"], rest["streams"][name]["key"]
        assert np.all(np.asarray(count[...]) == getattr(models[0].streams, name).count)
        key, first = map(jax.random.key_data, (key[...], streams[name].key[...]))
        assert np.all(np.asarray(key) == np.asarray(first))


@pytest.mark.parametrize("n", [1, 3])
def test_statistics_and_streams_in_a_loop_of_workers(devices, n):
    models, expected = plain(n)
    assert len({float(m.norm.mean[...][0]) for m in models}) == n
    for place in (Workers.simulate, Workers.devices):
        loop = place(n).loop(init, step, inputs=(batches(n)[0],))
        assert all("'norm'" in name for name in loop.promoted), loop.promoted
        assert len(loop.promoted) == 2
        state, losses = loop.init(), []
        for batch in batches(n):
            state, loss = loop.step(state, batch)
            losses.append(loss)
        np.testing.assert_allclose(np.asarray(losses), expected, rtol=1e-5)
        same(state[:2], models)


def test_pmap(devices):
    n = 2
    models, expected = plain(n)
    state, losses = jax.pmap(lambda _: init(), axis_name=AXIS)(jnp.arange(n)), []
    mapped = jax.pmap(step, axis_name=AXIS)
    for batch in batches(n):
        state, loss = jax.block_until_ready(mapped(state, batch))
        losses.append(loss)
    np.testing.assert_allclose(np.asarray(losses), expected, rtol=1e-5)
    same((jax.tree.map(lambda x: x[0], state[0]), state[1]), models)


@pytest.mark.parametrize("is_typed", [True, False])
def test_in_place_in_a_shard_map_of_one_s_own(devices, is_typed):
    """``nnx.Optimizer`` and synchronized statistics, against the whole batch."""
    n = 4
    mesh = Workers.devices(n).mesh
    model, whole = Net(AXIS, rate=0.0, noise=0.0), Net(None, rate=0.0, noise=0.0)
    optimizer, plain = (
        nnx.Optimizer(m, tx, wrt=nnx.Param) for m, tx in ((model, TX), (whole, SGD))
    )

    @nnx.jit
    @nnx.shard_map(
        mesh=mesh,
        in_specs=(P(), P(), P(AXIS), P(AXIS)),
        out_specs=P(),
        check_vma=is_typed,
    )
    def train_step(model, optimizer, x, y):
        loss, grads = bagua_jax.nnx_value_and_grad(loss_fn, AXIS)(model, x, y)
        optimizer.update(model, grads)
        return lax.pmean(loss, AXIS)

    for x, y in batches(n):
        x, y = x.reshape(-1, WIDTH), y.reshape(-1)
        loss = jax.block_until_ready(train_step(model, optimizer, x, y))
        expected, grads = nnx.value_and_grad(loss_fn)(whole, x, y)
        plain.update(whole, grads)
        np.testing.assert_allclose(loss, expected, rtol=1e-5)
    assert float(jnp.abs(model.norm.mean[...]).max()) > 0.01
    for a, b in zip(
        *(jax.tree.leaves(nnx.state(m)) for m in (model, whole)), strict=True
    ):
        if jnp.issubdtype(a.dtype, jnp.floating):
            np.testing.assert_allclose(a, b, atol=2e-6)
        else:
            assert (a == b).all()


def test_weights_aux_and_what_to_differentiate(devices):
    """One worker with no sample; the gradient of a single layer."""

    def loss(model, x, y):
        out = model(x)
        return jnp.mean((out - y) ** 2), out

    def by_hand(model, x, y):
        return jax.tree.leaves(
            nnx.grad(lambda m: loss(m, x, y)[0], argnums=take)(model)
        )

    take = nnx.DiffState(0, nnx.PathContains("last"))
    batch, count = batches(2)[0], jnp.array([3.0, 0.0])

    def worker(x, y, count):
        model = Net(rate=0.0, noise=0.0)
        (value, out), grads = bagua_jax.nnx_value_and_grad(
            loss,
            AXIS,
            wrt=nnx.PathContains("last"),
            has_aux=True,
            weight=lambda model, x, y: count,
        )(model, x, y)
        return value, out, jax.tree.leaves(grads)

    value, out, grads = jax.vmap(worker, axis_name=AXIS)(*batch, count)
    model = Net(rate=0.0, noise=0.0)
    expected, own = loss(model, batch[0][0], batch[1][0])
    np.testing.assert_allclose(value, [2 * expected, 0], rtol=1e-6)
    np.testing.assert_allclose(out[0], own, rtol=1e-6)
    (found,), (wanted,) = grads, by_hand(model, batch[0][0], batch[1][0])
    np.testing.assert_allclose(found, jnp.stack([2 * wanted, 0 * wanted]), atol=1e-6)


def test_keys_of_any_kind_are_folded():
    from bagua_jax.gradients import _own_key

    typed = jax.random.split(jax.random.key(1), 3)
    for key in (typed, typed[0], jax.random.key_data(typed)):
        own = [_own_key(key, jnp.int32(k)) for k in range(3)]
        assert own[0].shape == key.shape and own[0].dtype == key.dtype
        assert bool((own[0] == key).all()) and not bool((own[1] == own[2]).any())
    np.testing.assert_array_equal(
        jax.random.key_data(_own_key(typed, jnp.int32(2))[1]),
        jax.random.key_data(jax.random.fold_in(typed[1], 2)),
    )


def test_modules_are_refused_where_they_would_be_copied():
    model = Net()
    for refuse in (
        lambda: bagua_jax.worker_local(model, AXIS),
        lambda: bagua_jax.worker_local({"inside": [model]}, AXIS),
        lambda: jax.vmap(
            lambda x: bagua_jax.value_and_grad(loss_fn, AXIS)(model, x, x[:, 0]),
            axis_name=AXIS,
        )(jnp.ones((2, ROWS, WIDTH))),
    ):
        with pytest.raises(ValueError, match=r"(?s)Net is .*nnx_value_and_grad"):
            refuse()
    _, params, rest = split(model)
    assert bagua_jax.worker_local((params, rest), AXIS)[0] is params
    with pytest.raises(
        ValueError, match="^nnx_value_and_grad: .* got State. For trees"
    ):
        bagua_jax.nnx_value_and_grad(loss_fn, AXIS)(params)


def test_another_key_is_refused():
    def loss(model, x):
        nnx.reseed(model, noise=7)
        return jnp.mean(model(x))

    step = lambda x: bagua_jax.nnx_value_and_grad(loss, AXIS)(Net(), x)  # noqa: E731
    with pytest.raises(ValueError, match="loss gives the module another key"):
        jax.vmap(step, axis_name=AXIS)(jnp.ones((2, ROWS, WIDTH)))
