"""Batch statistics, dropout keys and averages of parameters in loops of workers."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P
from sklearn.datasets import load_digits

import bagua_jax
from bagua_jax import Workers
from bagua_jax.algorithms import bytegrad, decentralized, gradient_allreduce, local_sgd

AXIS, N, ROWS, STEPS = "workers", 2, 16, 4
PLACES = {"simulate": Workers.simulate, "devices": Workers.devices}


class ResNet(nn.Module):
    """Two residual blocks with batch normalization and dropout."""

    synchronized: bool = False
    rate: float = 0.0

    @nn.compact
    def __call__(self, x, train=True):
        def norm(x):
            axis = AXIS if self.synchronized and not self.is_initializing() else None
            layer = nn.BatchNorm(
                use_running_average=not train, momentum=0.9, axis_name=axis
            )
            return layer(x)

        def conv(x):
            return nn.Conv(8, (3, 3), use_bias=False)(x)

        with jax.numpy_rank_promotion("allow"):  # flax adds biases so
            x = nn.relu(norm(conv(x)))
            for _ in range(2):
                x = nn.relu(x + norm(conv(nn.relu(norm(conv(x))))))
            x = nn.Dropout(self.rate, deterministic=not train)(x.mean((1, 2)))
            return nn.Dense(10)(x)


def batches():
    images, labels = load_digits(return_X_y=True)
    rows = np.random.default_rng(0).integers(0, len(images), (STEPS, N, ROWS))
    images = np.float32(images.reshape(-1, 8, 8, 1) / 16)
    return [(images[k], np.int32(labels[k])) for k in rows]


def functions(model, tx, axis=AXIS):
    """``init`` and ``step`` of a worker; of one device where there is no axis."""

    def init(key):
        params, drawn = jax.random.split(key)
        variables = model.init(params, jnp.ones((1, 8, 8, 1)), train=False)
        p, stats = variables["params"], variables["batch_stats"]
        return {"params": p, "stats": stats, "opt": tx.init(p), "ema": p, "key": drawn}

    def loss_fn(p, stats, key, images, labels):
        logits, new = model.apply(
            {"params": p, "batch_stats": stats},
            images,
            mutable=["batch_stats"],
            rngs={"dropout": key},
        )
        losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return losses.mean(), new["batch_stats"]

    def step(state, batch):
        key, drawn = jax.random.split(state["key"])
        if axis is None:
            take = jax.value_and_grad(loss_fn, has_aux=True)
        else:
            drawn = bagua_jax.worker_key(drawn, axis)
            take = bagua_jax.value_and_grad(loss_fn, axis, has_aux=True)
        (loss, stats), grads = take(state["params"], state["stats"], drawn, *batch)
        updates, opt = tx.update(grads, state["opt"], state["params"])
        p = optax.apply_updates(state["params"], updates)
        ema = optax.incremental_update(p, state["ema"], 0.1)
        return {"params": p, "stats": stats, "opt": opt, "ema": ema, "key": key}, loss

    return init, step


def train(workers, model, tx):
    init, step = functions(model, tx)
    key = jax.random.key(0)
    loop = workers.loop(init, step, init_args=(key,), inputs=(batches()[0],))
    state = loop.init(key)
    shapes = jax.tree.map(jnp.shape, state)
    losses = []
    for batch in batches():
        state, loss = loop.step(state, batch)
        assert jax.tree.map(jnp.shape, state) == shapes
        losses.append(loss)
    return loop, state, np.asarray(losses)


def specs_in(tree):
    return set(jax.tree.leaves(tree, is_leaf=lambda s: isinstance(s, P)))


SGD = optax.sgd(0.02)
TRANSFORMS = {
    "gradient side": lambda: optax.chain(
        bytegrad(axis_name=AXIS, error_feedback="both"), SGD
    ),
    "gossip": lambda: optax.chain(SGD, decentralized(axis_name=AXIS)),
    "local steps": lambda: optax.chain(SGD, local_sgd(local_steps=2, axis_name=AXIS)),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_a_resnet_with_statistics_of_each_worker_s_own(name):
    """Statistics differ, keep their shapes; simulation and devices agree."""
    found = {}
    for place, make in PLACES.items():
        loop, state, losses = train(make(N), ResNet(rate=0.2), TRANSFORMS[name]())
        own = name != "gradient side"
        assert specs_in(loop.specs["stats"]) == {P(AXIS)}
        assert specs_in(loop.specs["params"]) == {P(AXIS) if own else P()}
        assert specs_in(loop.specs["ema"]) == specs_in(loop.specs["params"])
        assert loop.specs["key"] == P()
        mean = state["stats"]["BatchNorm_0"]["mean"]
        assert mean.shape == (N, 8) and not np.allclose(mean[0], mean[1])
        found[place] = loop.average(state), losses
        assert found[place][0]["stats"]["BatchNorm_0"]["mean"].shape == (8,)
    (ours, losses), (theirs, others) = found.values()
    np.testing.assert_allclose(losses, others, rtol=0, atol=1e-2)
    for part in ("params", "stats", "ema"):
        for a, b in zip(*map(jax.tree.leaves, (ours[part], theirs[part])), strict=True):
            np.testing.assert_allclose(a, b, rtol=0, atol=5e-3)


@pytest.mark.parametrize("place", PLACES)
def test_synchronized_statistics_are_those_of_one_device(place):
    """Loss, parameters and statistics, with collectives in the backward pass."""
    tx = optax.chain(gradient_allreduce(axis_name=AXIS), SGD)
    loop, state, losses = train(PLACES[place](N), ResNet(synchronized=True), tx)
    assert loop.promoted == ()
    init, step = functions(ResNet(), SGD, axis=None)
    expected, whole = init(jax.random.key(0)), jax.jit(step)
    for batch, own in zip(batches(), losses, strict=True):
        joined = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), batch)
        expected, loss = whole(expected, joined)
        np.testing.assert_allclose(own.mean(), loss, rtol=1e-4)
    for part in ("params", "stats", "ema"):
        pairs = zip(*map(jax.tree.leaves, (state[part], expected[part])), strict=True)
        for a, b in pairs:
            np.testing.assert_allclose(a, b, rtol=0, atol=2e-5)


def test_a_worker_key_drops_other_units_everywhere():
    workers = Workers.simulate(8)

    def masks(key):
        own = bagua_jax.worker_key(key, AXIS)
        return [jax.random.bernoulli(k, 0.5, (64,)) for k in (key, own)]

    shared, own = workers.spmd(masks)(jax.random.key(0))
    assert shared.shape == (64,)
    assert len({tuple(row) for row in np.asarray(own).tolist()}) == 8
