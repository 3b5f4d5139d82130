"""The table of algorithms that contract tests walk over: a new one is a new row."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

import bagua_jax
from bagua_jax import Workers, compressors, topologies
from bagua_jax import algorithms as alg
from bagua_jax.compressors import Compressor, blockwise, chain, topk

LEARNING_RATE = 0.1


# --- bytes and messages that a worker sends on a step, from the payload it states -----

Sizes = tuple[int, ...]  # elements of each bucket
Sends = Callable[[int, Sizes], tuple[float, float]]
CODES = compressors.minmax_uint8()


def payload(compressor: Compressor, elements: int) -> int:
    like = jax.ShapeDtypeStruct((elements,), jnp.float32)
    return compressor.facts.payload_bytes(like)


def allreduce(share: float = 1.0) -> Sends:
    """An exact mean on a share of the steps; XLA joins buckets in one all-reduce."""
    return lambda n, sizes: (share * 2 * (n - 1) / n * 4 * sum(sizes), share)


def scatter(compressor: Compressor = CODES, share: float = 1.0) -> Sends:
    """Parts to their owners, and means back: n - 1 payloads each way."""

    def sends(n, sizes):
        parts = sum(payload(compressor, math.ceil(d / n)) for d in sizes)
        return share * 2 * (n - 1) * parts, share * 2 * len(sizes)

    return sends


def around(compressor: Compressor) -> Sends:
    """Parts around a ring of all workers, and means back: n - 1 payloads each way."""

    def sends(n, sizes):
        parts = sum(payload(compressor, math.ceil(d / n)) for d in sizes)
        return 2 * (n - 1) * parts, n * len(sizes)

    return sends


def gather(compressor: Compressor, share: float = 1.0) -> Sends:
    """A payload to each of the others."""

    def sends(n, sizes):
        total = sum(payload(compressor, d) for d in sizes)
        return share * (n - 1) * total, share * len(sizes)

    return sends


def gossip(
    topology: str = "ring",
    compressor: Compressor | None = None,
    share: float = 1.0,
    extra: int = 0,
) -> Sends:
    """A message along each permutation of a graph; ``extra`` floats ride along."""
    sent = compressors.identity() if compressor is None else compressor

    def sends(n, sizes):
        graph = topologies.REGISTRY[topology](n)
        ways = share * sum(len(step.sends) for step in graph.steps) / graph.period
        each = sum(payload(sent, d) for d in sizes) + 4 * extra
        return ways * each, ways * len(sizes)

    return sends


def together(*kinds: Sends) -> Sends:
    """What steps of several kinds send, each on its share."""

    def sends(n, sizes):
        each = [kind(n, sizes) for kind in kinds]
        return sum(nbytes for nbytes, _ in each), sum(messages for _, messages in each)

    return sends


class Row(NamedTuple):
    """One configuration of an algorithm, and what the contracts must know of it.

    Attributes:
        algorithm: its name in the registry.
        options: keyword arguments of its factory.
        floor: distance to the optimum that compression or heterogeneity leaves; above 1
            it is the workers' spread, and their mean comes closer.
        sends: (n, sizes of buckets) -> bytes and messages of a worker on a step.
        plain: options that switch compression and outer optimizers off, after which one
            worker is the inner optimizer; ``None`` where it never is.
    """

    algorithm: str
    options: dict[str, Any]
    floor: float = 0.0
    sends: Sends = allreduce()
    plain: dict[str, Any] | None = {}

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
TOP = compressors.topk(0.25)
ROUNDED = compressors.blockwise(bits=8, rounding="stochastic")

ROWS = [
    Row("gradient_allreduce", {}, 1e-4),
    Row("bytegrad", {}, 0.1, scatter(), plain=None),
    Row("bytegrad", {"error_feedback": "both"}, 0.1, scatter(), plain=None),
    # A bucket for each leaf, so that sparse messages have something of every leaf.
    Row(
        "compressed_mean",
        {"compressor": TOP, "plan": "all_gather", "bucket_bytes": 4},
        0.1,
        gather(TOP),
        NO_CODEC,
    ),
    Row(
        "compressed_mean",
        {"compressor": compressors.sign("l1")},
        0.2,
        scatter(compressors.sign("l1")),
        NO_CODEC,
    ),
    Row(
        "compressed_mean",
        {"compressor": CODES, "plan": "ring"},
        0.1,
        around(CODES),
        NO_CODEC,
    ),
    Row("delayed_gradients", {"staleness": 2}, 1e-3, plain={"staleness": 0}),
    Row(
        "diana",
        {"compressor": compressors.qsgd(8)},
        0.1,
        gather(compressors.qsgd(8)),
        NO_CODEC,
    ),
    Row(
        "marina",
        {"compressor": compressors.qsgd(8), "probability": 0.25},
        0.1,
        together(allreduce(1 / 4), gather(compressors.qsgd(8), 3 / 4)),
        NO_CODEC,
    ),
    Row("ef21", {"compressor": TOP, "bucket_bytes": 4}, 0.05, gather(TOP), NO_CODEC),
    Row(
        "dgc",
        {"momentum": 0.5, "density": 0.25, "bucket_bytes": 4},
        0.2,
        gather(TOP),
        {"density": 1.0},
    ),
    Row(
        "powersgd",
        {"rank": 1, "min_compression": 1.0},
        0.05,
        # P with the exact leaves, then Q: rank 1 of a 301 x 7 matrix.
        lambda n, sizes: (2 * (n - 1) / n * 4 * (301 + 14 + 7), 2),
        {"rank": 5},
    ),
    Row(
        "adasum",
        {},
        1e-3,
        # An n-th of every leaf both ways; per level three products of pairs and leaves.
        lambda n, sizes: (
            2 * (n - 1) * 4 * (sum(math.ceil(d / n) for d in (301 * 7, 13, 1)))
            + 2 * (n - 1) / n * 4 * 3 * 3 * (n - 1),
            2 + math.log2(n),
        ),
    ),
    Row(
        "qadam",
        {"learning_rate": 0.05, "warmup_steps": 20},
        0.2,
        scatter(),
        NO_CODEC,
    ),
    Row(
        "qadam",
        {
            "learning_rate": 0.05,
            "warmup_steps": 20,
            "weight_decay": 1e-4,
            "error_feedback": "both",
        },
        0.2,
        scatter(),
        NO_CODEC,
    ),
    Row(
        "signum",
        {"learning_rate": 0.015, "weight_decay": 1e-4},
        0.3,
        # Eight signs a byte, and a byte that says that they are finite.
        lambda n, sizes: (2 * (n - 1) * (-(-math.ceil(sum(sizes) / n) // 8) + 1), 2),
        plain=None,
    ),
    Row(
        "one_bit_adam",
        {"learning_rate": 0.05, "warmup_steps": 20, "b2": 0.9},
        0.3,
        scatter(compressors.sign("l2")),
        plain=None,
    ),
    Row(
        "zero_one_adam",
        {
            "learning_rate": 0.05,
            "var_freeze_step": 20,
            "local_step_scaler": 10,
            "local_step_clipper": 4,
            "b2": 0.9,
        },
        0.2,
        scatter(compressors.sign("l2"), share=1 / 4),
        plain=None,
    ),
    Row(
        "one_bit_lamb",
        {"learning_rate": 0.05, "warmup_steps": 20, "b2": 0.9},
        0.2,
        scatter(compressors.sign("l2")),
        plain=None,
    ),
    Row(
        "demo",
        {"learning_rate": 0.015, "topk": 2},
        0.1,
        # Seven blocks of 43 x 7, one of 13, and a number: indices of 2, 1 and 1 bytes.
        lambda n, sizes: ((n - 1) * (7 * 2 * 6 + 2 * 5 + 5), 1),
        plain=None,
    ),
    Row(
        "gradient_tracking",
        {"learning_rate": LEARNING_RATE},
        1e-4,
        # Models and estimates in one message.
        lambda n, sizes: gossip()(n, (2 * sum(sizes),)),
        plain=None,
    ),
    Row("decentralized", {}, 2.0, gossip()),
    Row("decentralized", {"combine": "after"}, 2.0, gossip()),
    Row("decentralized", {"topology": "complete"}, 0.6),
    Row(
        "decentralized",
        {"topology": "shift_one", "communication_interval": 2},
        2.0,
        gossip("shift_one", share=1 / 2),
    ),
    Row(
        "decentralized",
        {"topology": "one_peer_exponential"},
        2.0,
        gossip("one_peer_exponential"),
    ),
    Row(
        "decentralized",
        {"topology": "static_exponential"},
        2.0,
        gossip("static_exponential"),
    ),
    Row("low_precision_decentralized", {}, 2.0, gossip("ring", CODES), NO_CODEC),
    Row(
        "low_precision_decentralized",
        {"communication_interval": 2},
        2.0,
        gossip("ring", CODES, share=1 / 2),
        NO_CODEC,
    ),
    Row(
        "quantized_gossip", {"compressor": CODES}, 2.0, gossip("ring", CODES), NO_CODEC
    ),
    Row(
        "async_model_average",
        {"period": 4, "staleness": 2, "warmup_steps": 3},
        2.0,
        allreduce(1 / 4),
    ),
    Row("async_model_average", {"period": 2}, 2.0, allreduce(1 / 2)),
    Row("local_sgd", {"local_steps": 4, "start_step": 3}, 2.0, allreduce(1 / 4)),
    Row(
        "slowmo",
        {"local_steps": 3, "learning_rate": LEARNING_RATE},
        2.0,
        allreduce(1 / 3),
        {"slow_momentum": 0.0, "slow_learning_rate": 1.0},
    ),
    Row(
        "diloco",
        {"local_steps": 3},
        2.0,
        allreduce(1 / 3),
        {"outer_momentum": 0.0, "outer_learning_rate": 1.0},
    ),
    Row(
        "diloco",
        {"local_steps": 2, "compressor": CODES},
        2.0,
        scatter(share=1 / 2),
        {"outer_momentum": 0.0, "outer_learning_rate": 1.0, "compressor": None},
    ),
    Row(
        "cocktail_sgd",
        {"mask_ratio": 0.5, "staleness": 1},
        0.3,
        # The default compressor on half of the places of each owner's part.
        lambda n, sizes: scatter(chain(topk(0.5), blockwise(8, 128)))(
            n, tuple(n * math.ceil(math.ceil(d / n) / 2) for d in sizes)
        ),
        {**NO_CODEC, "mask_ratio": 1.0, "staleness": 0},
    ),
    Row(
        "choco_sgd",
        {"compressor": CODES, "consensus_step_size": 0.8},
        2.0,
        gossip("ring", CODES),
        NO_CODEC,
    ),
    Row(
        "delayed_choco",
        {"compressor": CODES, "consensus_step_size": 0.3},
        2.0,
        gossip("ring", CODES),
        NO_CODEC,
    ),
    Row("exact_diffusion", {}, 0.01, gossip()),
    Row("d2", {"topology": "complete"}, 0.01),
    Row(
        "deep_squeeze",
        {"compressor": CODES, "mixing_rate": 0.8},
        2.0,
        gossip("ring", CODES),
        NO_CODEC,
    ),
    Row(
        "stochastic_gradient_push",
        {},
        2.0,
        gossip("one_peer_exponential", extra=1),  # the mass rides along
    ),
    Row(
        "overlapped_push",
        {"staleness": 2},
        2.0,
        gossip("one_peer_exponential", extra=1),
    ),
    Row(
        "ecd_psgd",
        {"compressor": ROUNDED},
        2.0,
        gossip("ring", ROUNDED),
        NO_CODEC,
    ),
    Row(
        "moniqua",
        {"theta": 4.0},
        2.0,
        # A byte an element, and one that says that they are finite.
        lambda n, sizes: (2 * (sum(sizes) + len(sizes)), 2 * len(sizes)),
    ),
    Row(
        "relay_sgd",
        {},
        0.01,
        # Each of n - 1 edges both ways; three rounds, as some have three neighbours.
        lambda n, sizes: (2 * (n - 1) / n * 4 * sum(sizes), 3 * len(sizes)),
    ),
    Row(
        "quasi_global_momentum",
        {"learning_rate": LEARNING_RATE, "momentum": 0.5, "smoothing": 0.5},
        2.0,
        gossip(),
        {"momentum": 0.0},
    ),
    Row(
        "hierarchical_averaging",
        {"periods": {2: 2, 4: None}},
        2.0,
        # Everybody after every fourth step, pairs in two halves after every other.
        lambda n, sizes: (
            (2 * (n - 1) / n * sum(sizes) + sum(2 * math.ceil(d / 2) for d in sizes)),
            (1 + 2 * len(sizes)) / 4,
        ),
        {"periods": {4: None}},
    ),
    Row(
        "streaming_diloco",
        {"local_steps": 4, "fragments": 2},
        2.0,
        # Two fragments, each after every fourth step.
        lambda n, sizes: (2 * (n - 1) / n * sum(sizes), 2 / 4),
        {
            "outer_momentum": 0.0,
            "outer_learning_rate": 1.0,
            "staleness": 0,
        },
    ),
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
