"""What the tests' workers train: a small net on data of their own, one batch a step."""

import jax
import jax.numpy as jnp
import optax

from bagua_jax.algorithms import async_model_average, decentralized, diloco
from bagua_jax.compressors import minmax_uint8

OPTIMIZER = optax.sgd(0.05, momentum=0.9)
ALGORITHMS = {
    "full": lambda: async_model_average(axis_name="workers", local_steps=1),
    "low": lambda: diloco(
        axis_name="workers",
        local_steps=1,
        outer_learning_rate=1.0,
        outer_momentum=0.0,
        compressor=minmax_uint8(),
    ),
    "ring": lambda: decentralized(axis_name="workers", topology="ring"),
}


def initial():
    keys = jax.random.split(jax.random.key(0), 2)
    return {
        "in": jax.random.normal(keys[0], (4, 8)) / 2,
        "out": jax.random.normal(keys[1], (8,)) / 3,
    }


def _loss(params, worker, step):
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(1), worker), step)
    x = jax.random.normal(key, (16, 4))
    guess = jnp.tanh(x @ params["in"]) @ params["out"]
    return jnp.mean((guess - jnp.sin(x.sum(-1) + worker)) ** 2)


@jax.jit
def _step(params, state, worker, step):
    loss, grads = jax.value_and_grad(_loss)(params, worker, step)
    updates, state = OPTIMIZER.update(grads, state)
    return optax.apply_updates(params, updates), state, loss


class Trainer:
    """One worker's optimizer, which goes on from step to step."""

    def __init__(self, worker: int, start: int = 0):
        self.worker, self.steps, self.state = worker, start, OPTIMIZER.init(initial())
        jax.block_until_ready(_step(initial(), self.state, worker, 0))  # compiles

    def __call__(self, params):
        params, self.state, loss = _step(params, self.state, self.worker, self.steps)
        self.steps += 1
        return params, loss
