"""Golden relations: with the relaxation switched off, what must be left is left."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from table import (
    LEARNING_RATE,
    ONE_EACH,
    Row,
    ids,
    params,
    run,
    stacked,
    targets,
)

from bagua_jax import Workers, compressors, primitives, topologies
from bagua_jax import algorithms as alg

AXIS = "workers"
SGD = optax.sgd(LEARNING_RATE, momentum=0.5)


def parallel_sgd(n: int, steps: int, inner=SGD):
    """Synchronous SGD on the mean objective, written without any of our code."""
    x = params()
    state = inner.init(x)
    for _ in range(steps):
        mean = jnp.mean(targets(n))
        grads = jax.tree.map(lambda leaf, b=mean: leaf - b, x)
        updates, state = inner.update(grads, state, x)
        x = optax.apply_updates(x, updates)
    return x


def assert_close_to_all(workers, row, tree, expected, atol=2e-6):
    for got, want in zip(
        jax.tree.leaves(stacked(workers, row, tree)),
        jax.tree.leaves(expected),
        strict=True,
    ):
        np.testing.assert_allclose(
            got, np.broadcast_to(want, got.shape), atol=atol, rtol=0
        )


synchronous = [
    Row("gradient_allreduce", {}, 0),
    Row("decentralized", {"topology": "complete", "combine": "after"}, 0),
    Row("async_model_average", {"local_steps": 1, "staleness": 0}, 0),
    Row("async_model_average", {"local_steps": 7, "warmup_steps": 40}, 0),
    Row(
        "low_precision_decentralized",
        {"topology": "complete", "compressor": compressors.identity()},
        0,
    ),
]


@pytest.mark.parametrize("row", synchronous, ids=ids(synchronous))
@pytest.mark.parametrize("kind", ["simulate", "devices"])
def test_reduces_to_synchronous_sgd(row, kind):
    """SGD with momentum is linear, so that averaging x + u averages gradients."""
    workers = getattr(Workers, kind)(8)
    if row.algorithm == "low_precision_decentralized":
        # Combine, then adapt: workers differ by what they did since the last mixing,
        # and their mean is synchronous SGD.
        x, _ = run(workers, row, steps=30)
        x = jax.tree.map(lambda leaf: jnp.mean(leaf, axis=0, keepdims=True), x)
        expected = parallel_sgd(8, 30)
        chex.assert_trees_all_close(
            jax.tree.map(lambda leaf: leaf[0], x), expected, atol=5e-6
        )
        return
    x, _ = run(workers, row, steps=30)
    assert_close_to_all(workers, row, x, parallel_sgd(8, 30))


reducible = [("simulate", row) for row in ONE_EACH if row.plain is not None]
reducible += [("devices", row) for _, row in reducible[::5]]


@pytest.mark.parametrize(
    ("kind", "row"), reducible, ids=[f"{kind}-{row.id}" for kind, row in reducible]
)
def test_one_worker_is_the_inner_optimizer(kind, row):
    """Exactly, where nothing is quantized; else with the identity compressor."""
    options = {**row.options, **row.plain}
    row = row._replace(options=options)
    workers = getattr(Workers, kind)(1)
    x, _ = run(workers, row, steps=30)
    if row.algorithm == "qadam":
        reference = frozen_adam(targets(1), 30, options)
        # float32 against float64: 1 - 0.999^t loses digits to cancellation.
        assert_close_to_all(workers, row, x, reference, atol=2e-5)
        return
    atol = 0 if row.algorithm in ("gradient_allreduce", "decentralized") else 1e-6
    assert_close_to_all(workers, row, x, parallel_sgd(1, 30), atol=atol)


def test_one_worker_rounds_nothing_in_float64():
    """Trees that an algorithm computes in and keeps are as wide as the parameters."""
    rows = [row for kind, row in reducible if kind == "simulate"]
    # dgc's codec sends float32.
    rows = [row for row in rows if not row.is_optimizer and row.algorithm != "dgc"]
    assert len(rows) > 15
    with jax.enable_x64(True):
        start = np.linspace(-1, 1, 15).reshape(5, 3)

        def trained(tx, x):
            def step(carry, _):
                x, opt = carry
                updates, opt = tx.update(x - 1 / 3, opt, x)
                return (optax.apply_updates(x, updates), opt), None

            (x, _), _ = jax.lax.scan(step, (x, tx.init(x)), length=20)
            return x

        chains = {row.algorithm: row.chain(AXIS, **row.plain) for row in rows}
        program = lambda x: {k: trained(tx, x) for k, tx in chains.items()}  # noqa: E731
        found = jax.jit(jax.vmap(program, axis_name=AXIS))(start[None])
        expected = trained(SGD, jnp.asarray(start))
        far = {k: float(np.abs(x[0] - expected).max()) for k, x in found.items()}
    assert {k: off for k, off in far.items() if not off < 1e-14} == {}


def test_one_worker_bytegrad_rounds_twice():
    g = jax.random.normal(jax.random.key(0), (1, 1000))
    tx = alg.bytegrad(axis_name=AXIS)
    step = jax.vmap(lambda g: tx.update(g, tx.init(g))[0], axis_name=AXIS)
    out = jax.jit(step)(g)

    def code(x):
        c = compressors.minmax_uint8()
        return c.decompress(c.compress(None, x, ())[0], x)

    np.testing.assert_allclose(out[0], code(code(g[0])), atol=1e-7)


def frozen_adam(b, steps: int, options):
    """Adam on the mean objective whose corrected variance is frozen after W steps."""
    rate, warmup = options["learning_rate"], options["warmup_steps"]
    decay = options.get("weight_decay", 0.0)
    b1, b2, eps = 0.9, 0.999, 1e-8

    def leaf(x):
        x = np.asarray(x, np.float64)
        m, v, v_hat = np.zeros_like(x), np.zeros_like(x), None
        for t in range(1, steps + 1):
            g = x - float(np.mean(b))
            m = b1 * m + (1 - b1) * g
            if t <= warmup:
                v = b2 * v + (1 - b2) * g * g
                v_hat = v / (1 - b2**t)
            step = m / (1 - b1**t) / (np.sqrt(v_hat) + eps)
            x = x - rate * (step + decay * x)
        return x

    return jax.tree.map(leaf, params())


@pytest.mark.parametrize("n", [1, 4])
@pytest.mark.parametrize("decay", [0.0, 0.01])
def test_qadam_with_identity_is_adam_with_a_frozen_variance(n, decay):
    options = {
        "learning_rate": 0.05,
        "warmup_steps": 10,
        "weight_decay": decay,
        "compressor": compressors.identity(),
    }
    row = Row("qadam", options, 0)
    workers = Workers.simulate(n)
    x, _ = run(workers, row, steps=40)
    assert_close_to_all(workers, row, x, frozen_adam(targets(n), 40, options), 2e-5)


@pytest.mark.parametrize("decay", [0.0, 0.01])
def test_qadam_warm_up_is_optax_adamw(decay):
    """All W steps, the W-th included."""
    row = Row(
        "qadam",
        {"learning_rate": 0.05, "warmup_steps": 20, "weight_decay": decay},
        0,
    )
    workers = Workers.simulate(4)
    x, _ = run(workers, row, steps=20)
    expected = parallel_sgd(4, 20, optax.adamw(0.05, weight_decay=decay))
    assert_close_to_all(workers, row, x, expected, atol=2e-6)


def test_qadam_keeps_its_step_size_after_the_switch():
    """The original's step grows by 1/sqrt(1 - b2^W): 10 times at W = 10."""
    row = Row("qadam", {"learning_rate": 1e-3, "warmup_steps": 10}, 0)
    workers = Workers.simulate(4)
    big = {"x": jnp.full((64,), 50.0)}  # far off: gradients are about constant
    before = run(workers, row, steps=10, start=big)[0]["x"]
    at_switch = run(workers, row, steps=11, start=big)[0]["x"]
    much_later = [run(workers, row, steps=t, start=big)[0]["x"] for t in (200, 201)]
    first = np.abs(np.asarray(at_switch - before)).max()
    later = np.abs(np.asarray(much_later[1] - much_later[0])).max()
    assert first == pytest.approx(1e-3, rel=0.05)
    assert later == pytest.approx(1e-3, rel=0.05)


def test_c_lp_s_with_identity_is_the_exact_mean():
    x = jax.random.normal(jax.random.key(1), (8, 1003))

    def both(v):
        exact = primitives.c_fp_s(v, axis_name=AXIS)
        return primitives.c_lp_s(v, compressors.identity(), axis_name=AXIS)[0], exact

    low, exact = jax.vmap(both, axis_name=AXIS)(x)
    np.testing.assert_allclose(low, exact, atol=2e-7)


@pytest.mark.parametrize("name", list(topologies.REGISTRY))
def test_low_precision_mixing_with_identity_is_full_precision(name):
    graph = topologies.REGISTRY[name](8)
    x = jax.random.normal(jax.random.key(2), (8, 37))

    def both(v, t):
        args = {"axis_name": AXIS, "step": t}
        return (
            primitives.d_lp_s(v, compressors.identity(), graph, **args),
            primitives.d_fp_s(v, graph, **args),
        )

    for t in range(graph.period):
        low, full = jax.vmap(both, in_axes=(0, None), axis_name=AXIS)(x, t)
        np.testing.assert_allclose(low, full, atol=1e-6)


def test_low_precision_decentralized_with_identity_is_decentralized():
    """On any symmetric graph: x' = W x + u when replicas are exact."""
    for topology in ("ring", "complete"):
        exact = Row("decentralized", {"topology": topology}, 0)
        coded = Row(
            "low_precision_decentralized",
            {"topology": topology, "compressor": compressors.identity()},
            0,
        )
        workers = Workers.simulate(8)
        a, _ = run(workers, exact, steps=50)
        b, _ = run(workers, coded, steps=50)
        chex.assert_trees_all_close(a, b, atol=2e-5)


def test_interval_longer_than_the_run_is_local_training():
    """Only step 0 communicates, when all workers are still equal."""
    workers = Workers.simulate(4)
    row = Row("decentralized", {"local_steps": 1000}, 0)
    x, _ = run(workers, row, steps=20)
    for i, target in enumerate(targets(4)):
        alone = params()
        state = SGD.init(alone)
        for _ in range(20):
            grads = jax.tree.map(lambda leaf, b=target: leaf - b, alone)
            updates, state = SGD.update(grads, state, alone)
            alone = optax.apply_updates(alone, updates)
        chex.assert_trees_all_close(
            jax.tree.map(lambda leaf, i=i: leaf[i], x), alone, atol=1e-6
        )


def test_the_schedule_counts_communications_not_steps():
    """With interval 3, shift_one's pairs move on at steps 0, 3, 6."""
    tx = alg.decentralized(axis_name=AXIS, topology="shift_one", local_steps=3)
    graph = topologies.shift_one(8)
    x = np.asarray(jax.random.normal(jax.random.key(3), (8, 5)))

    @jax.jit
    @lambda f: jax.vmap(f, axis_name=AXIS)
    def step(x, opt):
        updates, opt = tx.update(jnp.zeros_like(x), opt, x)
        return x + updates, opt

    opt = jax.vmap(tx.init)(x)
    for t in range(12):
        expected = graph.mixing_matrix(t // 3) @ x if t % 3 == 0 else x
        x, opt = step(x, opt)
        np.testing.assert_allclose(x, expected, atol=1e-6)
        x = np.asarray(x)


class TestConservation:
    """The mean over workers moves by the mean update alone."""

    @pytest.mark.parametrize(
        "row",
        [
            Row("decentralized", {"topology": "one_peer_exponential"}, 0),
            Row("decentralized", {"combine": "after"}, 0),
            Row("async_model_average", {"local_steps": 3, "staleness": 3}, 0),
            Row("async_model_average", {"local_steps": 5, "staleness": 2}, 0),
        ],
        ids=lambda row: row.id,
    )
    def test_mean_moves_by_the_mean_update(self, row):
        tx = row.make(AXIS)
        x = jax.random.normal(jax.random.key(4), (8, 11))
        opt = jax.vmap(tx.init, axis_name=AXIS)(x)

        @jax.jit
        @lambda f: jax.vmap(f, axis_name=AXIS)
        def step(x, opt, u):
            updates, opt = tx.update(u, opt, x)
            return x + updates, opt

        mean = np.asarray(x.mean(0), np.float64)
        for t in range(40):
            u = 0.1 * jax.random.normal(jax.random.key(100 + t), x.shape)
            mean = mean + np.asarray(u, np.float64).mean(0)
            x, opt = step(x, opt, u)
            np.testing.assert_allclose(np.asarray(x).mean(0), mean, atol=1e-5)

    def test_bytegrad_with_feedback_at_both_ends_loses_no_mass(self):
        tx = alg.bytegrad(axis_name=AXIS, error_feedback="both")
        d, n = 103, 8
        state = jax.vmap(tx.init, axis_name=AXIS)(jnp.zeros((n, d)))

        @jax.jit
        @lambda f: jax.vmap(f, axis_name=AXIS)
        def step(g, state):
            return tx.update(g, state)

        sent, due = np.zeros(d), np.zeros(d)
        for t in range(60):
            g = jax.random.normal(jax.random.key(t), (n, d))
            out, state = step(g, state)
            sent += np.asarray(out[0], np.float64)
            due += np.asarray(g, np.float64).mean(0)
        worker = np.asarray(state.error.worker, np.float64).mean(0)
        owner = np.asarray(state.error.owner, np.float64).sum(0)
        np.testing.assert_allclose(sent + worker + owner, due, atol=2e-5)


class TestReplicas:
    """My copy of a neighbour equals its own, bit for bit."""

    @pytest.mark.parametrize("kind", ["simulate", "devices"])
    @pytest.mark.parametrize("topology", ["ring", "complete"])
    def test_after_hundreds_of_steps(self, kind, topology):
        n = 8
        workers = getattr(Workers, kind)(n)
        row = Row("low_precision_decentralized", {"topology": topology}, 0)
        _, opt = run(workers, row, steps=300)
        replicas = optax.tree.get(opt, "replicas")
        graph = topologies.REGISTRY[topology](n)
        for send, copies in zip(graph.steps[0].sends, replicas[1:], strict=True):
            for own, copy in zip(
                jax.tree.leaves(replicas[0]), jax.tree.leaves(copies), strict=True
            ):
                own, copy = np.asarray(own), np.asarray(copy)
                for source, destination in send.pairs:
                    assert own[source].tobytes() == copy[destination].tobytes()
        assert np.ptp(np.asarray(replicas[0]["vector"])[:, 0]) > 0.1, "workers differ"

    def test_params_are_the_public_model(self):
        workers = Workers.simulate(8)
        row = Row("low_precision_decentralized", {}, 0)
        x, opt = run(workers, row, steps=50)
        chex.assert_trees_all_close(x, optax.tree.get(opt, "replicas")[0], atol=5e-7)


class TestHierarchy:
    """Two axes: the node averages exactly, nodes run the relaxation."""

    @pytest.mark.parametrize("kind", ["simulate", "devices"])
    def test_gradient_allreduce_is_the_same_mean(self, kind):
        row = Row("gradient_allreduce", {}, 0)
        flat = run(getattr(Workers, kind)(8), row, steps=20)[0]
        workers = getattr(Workers, kind)((2, 4))
        nested = run(workers, row, steps=20, tx=row.chain(workers.axis_name))[0]
        chex.assert_trees_all_close(flat, nested, atol=2e-6)

    def test_nodes_of_one_device_are_flat(self):
        for row in (Row("bytegrad", {}, 0), Row("low_precision_decentralized", {}, 0)):
            flat = run(Workers.simulate(4), row, steps=20)[0]
            workers = Workers.simulate((4, 1))
            nested = run(workers, row, steps=20, tx=row.chain(workers.axis_name))[0]
            chex.assert_trees_all_close(flat, nested, atol=5e-3)

    def test_devices_of_a_node_stay_together(self):
        """Gossip between nodes: devices differ by their own last update alone."""
        workers = Workers.simulate((4, 2))
        row = Row("decentralized", {}, 0)
        inner = optax.sgd(LEARNING_RATE)
        tx = row.chain(workers.axis_name, inner=inner)
        before = run(workers, row, steps=9, tx=tx)[0]["vector"]
        after = run(workers, row, steps=10, tx=tx)[0]["vector"]
        update = -LEARNING_RATE * (np.asarray(before) - np.asarray(targets(8))[:, None])
        mixed = (np.asarray(after) - update).reshape(4, 2, -1)
        np.testing.assert_allclose(mixed[:, 0], mixed[:, 1], atol=1e-5)
        nodes = np.asarray(before).reshape(4, 2, -1).mean(1)
        expected = topologies.ring(4).mixing_matrix() @ nodes
        np.testing.assert_allclose(mixed[:, 0], expected, atol=1e-5)
