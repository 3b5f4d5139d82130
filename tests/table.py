"""The table of algorithms that contract tests walk over: a new one is a new row."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import bagua_jax
from bagua_jax import Workers, compressors
from bagua_jax import algorithms as alg
from bagua_jax.compressors import Compressor
from bagua_jax.traffic import Sends, allreduce

LEARNING_RATE = 0.1


CODES = compressors.minmax_uint8()


class Row(NamedTuple):
    """A contract of the registry, with the name of its algorithm."""

    algorithm: str
    options: Mapping[str, Any]
    floor: float = 0.0
    sends: Sends = allreduce()
    plain: Mapping[str, Any] | None = {}

    @property
    def id(self) -> str:
        def name(value):
            return value.facts.name if isinstance(value, Compressor) else value

        parts = [f"{k}={name(v)}" for k, v in self.options.items()]
        return "-".join([self.algorithm, *parts])

    @property
    def placement(self) -> str:
        return alg.REGISTRY[self.algorithm].placement

    @property
    def is_optimizer(self) -> bool:
        return alg.REGISTRY[self.algorithm].is_optimizer

    @property
    def own_params(self) -> bool:
        return alg.REGISTRY[self.algorithm].own_params

    def make(self, axis_name, **overrides) -> optax.GradientTransformationExtraArgs:
        options = {**self.options, **overrides}
        factory: Callable = alg.REGISTRY[self.algorithm].factory
        return factory(axis_name=axis_name, **options)

    def chain(self, axis_name, inner=None, **overrides):
        """Put the transform where it stands in a training loop."""
        tx = self.make(axis_name, **overrides)
        inner = optax.sgd(LEARNING_RATE, momentum=0.5) if inner is None else inner
        if self.placement == "gradient":
            return optax.chain(tx, inner)
        return optax.chain(inner, tx) if self.placement == "weight" else tx


NO_CODEC = {"compressor": compressors.identity()}

ROWS = [
    Row(name, *contract)
    for name, entry in alg.REGISTRY.items()
    for contract in entry.contracts
]

ONE_EACH = list({row.algorithm: row for row in reversed(ROWS)}.values())[::-1]


def ids(rows: list[Row]) -> list[str]:
    return [row.id for row in rows]


# --- a small problem: f_i(x) = 1/2 |x - b_i|^2 over a tree of awkward leaves --------


def params(dtype=jnp.float32) -> dict[str, Any]:
    return {
        "nested": {"odd": jnp.linspace(-1, 1, 15, dtype=dtype).reshape(5, 3)},
        "scalar": jnp.asarray(0.5, dtype),
        "none": None,
        "empty": jnp.zeros((0, 2), dtype),
        "vector": jnp.full(7, 0.25, dtype),
    }


def targets(n: int) -> jax.Array:
    """b_i [n]: heterogeneous, mean 1."""
    b = jnp.arange(n, dtype=jnp.float32)
    return 1 + 0.25 * (b - b.mean())


def loss(tree: Any, target: jax.Array) -> jax.Array:
    leaves = jax.tree.leaves(tree)
    squares = [jnp.sum((x - target.astype(x.dtype)) ** 2) for x in leaves]
    return 0.5 * jnp.asarray(sum(squares))


class Training(NamedTuple):
    init: Callable
    step: Callable
    specs: Any


_loops: dict[Any, Training] = {}


def training(workers: Workers, row: Row, **kwargs) -> Training:
    """The training loop of a row, compiled once for all tests that ask for the same."""
    if kwargs:
        return _training(workers, row, **kwargs)
    key = (workers, row.id)
    if key not in _loops:
        _loops[key] = _training(workers, row)
    return _loops[key]


def _training(
    workers: Workers, row: Row, tx=None, start=None, loss=loss, own=False
) -> Training:
    """The loop itself: params vary where workers have their own, that is all."""
    axis = workers.axis_name
    tx = row.chain(axis) if tx is None else tx
    start = params() if start is None else start

    def init():
        x = start
        if own or row.own_params:
            x = bagua_jax.worker_local(x, axis)
        return x, tx.init(x)

    def step(state, target):
        x, opt = state
        local = bagua_jax.worker_local(x, axis)
        grads = jax.grad(loss)(local, target)
        updates, opt = tx.update(grads, opt, x)
        return optax.apply_updates(x, updates), opt

    specs = workers.specs(init)
    return Training(
        workers.spmd(init), workers.spmd(step, in_specs=(specs, workers.spec)), specs
    )


def run(workers: Workers, row: Row, steps: int, **kwargs):
    """Train, and give the state at the boundary."""
    loop = training(workers, row, **kwargs)
    state = loop.init()
    for _ in range(steps):
        state = loop.step(state, targets(workers.num_workers))
    return state


def stacked(workers: Workers, row: Row, tree: Any) -> Any:
    """Return parameters with a worker axis, whatever the placement."""
    if row.own_params:
        return tree
    n = workers.num_workers
    return jax.tree.map(lambda x: jnp.broadcast_to(x, (n, *x.shape)), tree)
