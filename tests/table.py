"""The table of algorithms that contract tests walk over: a new one is a new row."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import bagua_jax
from bagua_jax import Workers, compressors
from bagua_jax import algorithms as alg
from bagua_jax.compressors import Compressor

LEARNING_RATE = 0.1


class Row(NamedTuple):
    """One configuration of an algorithm.

    ``make(axis_name, **overrides)`` gives the bare transform, ``exact`` says that its
    fixed point is the exact optimum for every worker (else only up to ``floor``, the
    distance that compression or heterogeneity leaves).
    """

    algorithm: str
    options: dict[str, Any]
    floor: float

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


ROWS = [
    Row("gradient_allreduce", {}, 1e-4),
    Row("bytegrad", {}, 0.1),
    Row("bytegrad", {"error_feedback": "both"}, 0.1),
    # A bucket for each leaf, so that sparse messages have something of every leaf.
    Row(
        "compressed_mean",
        {
            "compressor": compressors.topk(0.25),
            "plan": "all_gather",
            "bucket_bytes": 4,
        },
        0.1,
    ),
    Row("compressed_mean", {"compressor": compressors.sign("l1")}, 0.2),
    Row("delayed_gradients", {"staleness": 2}, 1e-3),
    Row("diana", {"compressor": compressors.qsgd(8)}, 0.1),
    Row("ef21", {"compressor": compressors.topk(0.25), "bucket_bytes": 4}, 0.05),
    Row("dgc", {"momentum": 0.5, "density": 0.25, "bucket_bytes": 4}, 0.2),
    Row("powersgd", {"rank": 1, "min_compression": 1.0}, 0.05),
    Row("qadam", {"learning_rate": 0.05, "warmup_steps": 20}, 0.2),
    Row(
        "qadam",
        {
            "learning_rate": 0.05,
            "warmup_steps": 20,
            "weight_decay": 1e-4,
            "error_feedback": "both",
        },
        0.2,
    ),
    Row("signum", {"learning_rate": 0.015, "weight_decay": 1e-4}, 0.3),
    Row("one_bit_adam", {"learning_rate": 0.05, "warmup_steps": 20, "b2": 0.9}, 0.3),
    Row("decentralized", {}, 2.0),
    Row("decentralized", {"combine": "after"}, 2.0),
    Row("decentralized", {"topology": "complete"}, 0.6),
    Row("decentralized", {"topology": "shift_one", "communication_interval": 2}, 2.0),
    Row("decentralized", {"topology": "one_peer_exponential"}, 2.0),
    Row("decentralized", {"topology": "static_exponential"}, 2.0),
    Row("low_precision_decentralized", {}, 2.0),
    Row("low_precision_decentralized", {"communication_interval": 2}, 2.0),
    Row("async_model_average", {"period": 4, "staleness": 2, "warmup_steps": 3}, 2.0),
    Row("async_model_average", {"period": 2}, 2.0),
    Row("local_sgd", {"local_steps": 4, "start_step": 3}, 2.0),
    Row("slowmo", {"local_steps": 3, "learning_rate": LEARNING_RATE}, 2.0),
    Row("diloco", {"local_steps": 3}, 2.0),
    Row("diloco", {"local_steps": 2, "compressor": compressors.minmax_uint8()}, 2.0),
    Row(
        "choco_sgd",
        {"compressor": compressors.minmax_uint8(), "consensus_step_size": 0.8},
        2.0,
    ),
    Row(
        "delayed_choco",
        {"compressor": compressors.minmax_uint8(), "consensus_step_size": 0.3},
        2.0,
    ),
    Row("exact_diffusion", {}, 0.01),
    Row("d2", {"topology": "complete"}, 0.01),
    Row(
        "deep_squeeze",
        {"compressor": compressors.minmax_uint8(), "mixing_rate": 0.8},
        2.0,
    ),
    Row("stochastic_gradient_push", {}, 2.0),
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


def _training(workers: Workers, row: Row, tx=None, start=None, loss=loss) -> Training:
    """The loop itself: params vary where workers have their own, that is all."""
    axis = workers.axis_name
    tx = row.chain(axis) if tx is None else tx
    start = params() if start is None else start

    def init():
        x = start
        if row.own_params:
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
    """Give parameters with a worker axis, whatever the placement."""
    if row.own_params:
        return tree
    n = workers.num_workers
    return jax.tree.map(lambda x: jnp.broadcast_to(x, (n, *x.shape)), tree)


def identity_like(row: Row) -> dict[str, Any]:
    """Options that switch compression and outer optimizers off, where there are any."""
    outer = {
        "slowmo": {"slow_momentum": 0.0, "slow_learning_rate": 1.0},
        "diloco": {"outer_momentum": 0.0, "outer_learning_rate": 1.0},
        "delayed_gradients": {"staleness": 0},
        "dgc": {"density": 1.0},
        "powersgd": {"rank": 5},
    }
    compressed = (
        "qadam",
        "low_precision_decentralized",
        "choco_sgd",
        "delayed_choco",
        "deep_squeeze",
        "compressed_mean",
        "one_bit_adam",
        "diana",
        "ef21",
    )
    if row.algorithm in compressed:
        return {"compressor": compressors.identity()}
    return outer.get(row.algorithm, {})
