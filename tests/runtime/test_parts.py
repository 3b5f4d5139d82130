"""A step in several programs: the same numbers, the same wire, exchanges apart."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

from bagua_jax import Workers, compressors, parts, primitives, wire, worker_local
from bagua_jax.algorithms import REGISTRY

N, STEPS = 4, 5
CASES = {  # algorithm, options, whether XLA contracts alike on both sides
    "gradient_allreduce": ("gradient_allreduce", {}, True),
    "f16": ("compressed_mean", {"compressor": compressors.cast("float16")}, True),
    "bytegrad": ("bytegrad", {"bucket_bytes": 256, "error_feedback": "both"}, True),
    "qadam": ("qadam", {"learning_rate": 0.01, "warmup_steps": 2}, False),
    "decentralized": ("decentralized", {"topology": "one_peer_exponential"}, True),
    "local_sgd": ("local_sgd", {"local_steps": 2}, True),
    "powersgd": ("powersgd", {"rank": 2}, True),
}


def prepare(name):
    """Return the workers, the first state, the step and its specs."""
    algorithm, options, _ = CASES[name]
    workers, entry = Workers.devices(N), REGISTRY[algorithm]
    tx = entry.factory(axis_name="workers", **options)
    if not entry.is_optimizer:
        both = [tx, optax.sgd(0.1, momentum=0.9)]
        tx = optax.chain(*(both[::-1] if entry.own_params else both))

    def init():
        keys = jax.random.split(jax.random.key(0), 3)
        shapes = {"a": (8, 16), "b": (16,), "c": (16, 4)}
        params = {
            k: jax.random.normal(key, shape)
            for key, (k, shape) in zip(keys, shapes.items(), strict=True)
        }
        if entry.own_params:
            params = worker_local(params, "workers")
        return params, tx.init(params)

    def loss_fn(params, x):
        hidden = jnp.tanh(x @ params["a"] + params["b"][None])
        return jnp.mean((hidden @ params["c"] - x[:, :4]) ** 2)

    def step(state, x):
        params, inner = state
        loss, grads = jax.value_and_grad(loss_fn)(worker_local(params, "workers"), x)
        updates, inner = tx.update(grads, inner, params)
        return (optax.apply_updates(params, updates), inner), loss

    specs = (workers.specs(init), workers.spec)
    return workers, workers.spmd(init)(), step, specs


def batch(t):
    return np.random.default_rng(t).standard_normal((N, 5, 8)).astype(np.float32)


def raw(x):
    is_key = jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
    return np.asarray(jax.random.key_data(x) if is_key else x)


IN_ROUNDS = [(name, 10) for name in ("f16", "bytegrad", "qadam")]  # of all-to-alls


@pytest.mark.parametrize(
    ("name", "message_bytes", "donated"),
    [
        *((name, None, ()) for name in CASES),
        *((name, None, 0) for name in CASES),
        *((name, message_bytes, ()) for name, message_bytes in IN_ROUNDS),
    ],
)
def test_same_numbers_and_bytes_as_one_program(name, message_bytes, donated):
    workers, state, step, specs = prepare(name)
    one = workers.spmd(step, in_specs=specs)
    many = parts.split(
        workers,
        step,
        in_specs=specs,
        message_bytes=message_bytes,
        donate_argnums=donated,
    )
    expected, got, sent = state, jax.tree.map(jnp.copy, state), []
    for t in range(STEPS):
        if t >= STEPS - 2:  # a whole period
            sent.append(many.count(got, batch(t)).bytes_per_worker)
        expected, expected_loss = one(expected, batch(t))
        got, loss = many(got, batch(t))
        pairs = zip(
            jax.tree.leaves((expected, expected_loss)),
            jax.tree.leaves((got, loss)),
            strict=True,
        )
        for a, b in pairs:
            assert a.sharding == b.sharding and a.dtype == b.dtype
            if CASES[name][2]:
                np.testing.assert_array_equal(raw(a), raw(b))
            else:
                np.testing.assert_allclose(raw(a), raw(b), rtol=1e-5, atol=1e-6)
    counted = wire.count(one.lower(state, batch(0)).compile())
    assert np.mean(sent) == pytest.approx(counted.bytes_per_worker)


@pytest.mark.parametrize(
    ("name", "donated"), [*((name, ()) for name in CASES), ("f16", 0)]
)
def test_a_loop_of_steps_is_the_steps_one_by_one(name, donated):
    workers, state, step, specs = prepare(name)
    turns = [batch(t) for t in range(4)]
    one = parts.split(workers, step, in_specs=specs)
    many = parts.split(
        workers,
        lambda state, batches: jax.lax.scan(step, state, batches),
        in_specs=specs,
        donate_argnums=donated,
    )
    expected, got, losses, counted = state, jax.tree.map(jnp.copy, state), [], 0
    for x in turns:
        counted += one.count(expected, x).bytes_per_worker
        expected, loss = one(expected, x)
        losses.append(loss)
    stacked = np.stack(turns, 1)
    assert many.count(got, stacked).bytes_per_worker == counted > 0
    got, losses_got = many(got, stacked)
    np.testing.assert_array_equal(losses_got, np.stack(losses, 1))
    for a, b in zip(*map(jax.tree.leaves, (expected, got)), strict=True):
        assert a.sharding == b.sharding and a.dtype == b.dtype
        np.testing.assert_array_equal(raw(a), raw(b))


def test_turns_of_a_loop_share_programs():
    workers, state, step, specs = prepare("bytegrad")
    loop = lambda state, batches: jax.lax.scan(step, state, batches)  # noqa: E731
    many = parts.split(workers, loop, in_specs=specs)
    programs = {}
    for turns in (4, 8):
        found = many.parts(state, np.stack([batch(0)] * turns, 1))
        programs[turns] = len(found), len({id(part.program) for part in found})
    assert programs[8][0] > 1.9 * programs[4][0]
    assert programs[8][1] <= programs[4][1] + 2  # of rows and losses, 4 or 8 of them


def test_next_forward_pass_starts_under_the_last_messages():
    workers = Workers.devices(N)
    tx = REGISTRY["compressed_mean"].factory(
        axis_name="workers",
        compressor=compressors.cast("float16"),
        plan="ring",
        error_feedback="none",
        bucket_bytes=4 * 64,
    )
    weights = [np.full((8, 8), 0.1, np.float32)] * 4  # a bucket each

    def step(weights, x):
        def loss_fn(weights):
            y = x
            for w in weights:
                y = jnp.tanh(y @ w)
            return jnp.mean(y)

        loss, grads = jax.value_and_grad(loss_fn)(worker_local(weights, "workers"))
        updates, _ = tx.update(grads, tx.init(weights))
        return jax.tree.map(jnp.subtract, weights, updates), loss

    loop = lambda weights, xs: jax.lax.scan(step, weights, xs)  # noqa: E731
    xs = np.ones((N, 2, 3, 8), np.float32)
    many = parts.split(workers, loop, (P(), workers.spec)).parts(weights, xs)
    gathers = [k for k, part in enumerate(many) if has(part, "all_gather")]
    assert len(gathers) == 2 * 4  # a turn's buckets
    (last,) = many[gathers[3]].makes
    is_read = next(k for k, part in enumerate(many) if last in part.reads)
    between = range(gathers[3], is_read)
    # Three of four layers, before the last bucket has come.
    assert sum(count_dots(many[k]) for k in between) == 3


def test_a_vector_is_packed_and_filled_up_by_one_program():
    workers = Workers.devices(N)
    tx = REGISTRY["bytegrad"].factory(axis_name="workers")

    def step(a, b):
        updates, _ = tx.update([a, b], tx.init([a, b]))
        return updates

    arguments = np.ones((N, 5), np.float32), np.ones((N, 6), np.float32)
    specs = (workers.spec, workers.spec)
    many = parts.split(workers, step, specs).parts(*arguments)
    first = [part.kind for part in many].index("exchange")
    pack, encode = many[first - 2 : first]
    assert [a.shape for a in encode.arguments] == [(N * 12,)]  # 11, filled up to 12
    assert has(pack, "concatenate") and has(pack, "_pad")
    assert has(encode, "reduce[") and not has(encode, "_pad")


def has(part, name):
    return name in str(part.program.trace(*part.arguments).jaxpr)


def loop_backwards(x, rows):
    def turn(x, row):
        mean = primitives.c_fp_s(x * row["a"], axis_name="workers")
        return worker_local(mean + row["b"], "workers"), (jnp.sum(x), row["a"] - mean)

    return jax.lax.scan(turn, x, rows, reverse=True)


def loop_without_rows(x, rows):
    def turn(x, _):
        return worker_local(
            primitives.c_fp_s(x + 1, axis_name="workers"), "workers"
        ), {}

    return jax.lax.scan(turn, x, length=3)


def loop_that_counts(x, rows):
    def turn(k, x):
        scaled = x * k + rows["b"][k]
        return worker_local(primitives.c_fp_s(scaled, axis_name="workers"), "workers")

    return jax.lax.fori_loop(0, 3, turn, x)


def loop_in_a_loop(x, rows):
    def turn(x, row):
        x, sums = loop_backwards(x, {"a": rows["a"] * row["a"][None], "b": rows["b"]})
        return x, sums[0]

    return jax.lax.scan(turn, x, rows)


@pytest.mark.parametrize(
    "loop", [loop_backwards, loop_without_rows, loop_that_counts, loop_in_a_loop]
)
def test_loops_are_unrolled_as_they_run(loop):
    workers = Workers.devices(N)
    rng = np.random.default_rng(0)
    x = rng.standard_normal((N, 5)).astype(np.float32)
    rows = {k: rng.standard_normal((N, 3, 5)).astype(np.float32) for k in "ab"}
    specs = (workers.spec, workers.spec)
    many = parts.split(workers, loop, in_specs=specs)
    expected, got = workers.spmd(loop, in_specs=specs)(x, rows), many(x, rows)
    chex.assert_trees_all_close(got, expected, rtol=1e-6, atol=1e-6)
    turns = 9 if loop is loop_in_a_loop else 3
    kinds = [part.kind for part in many.parts(x, rows)]
    assert kinds.count("exchange") == turns


def test_a_long_loop_stays_one_part():
    workers = Workers.devices(N)

    def step(x):
        def turn(x, _):
            mean = primitives.c_fp_s(x, axis_name="workers")
            return x - worker_local(mean, "workers"), mean

        return jax.lax.scan(turn, 2 * x, length=33)

    x = np.arange(2.0 * N, dtype=np.float32).reshape(N, 2)
    many = parts.split(workers, step, in_specs=workers.spec)
    assert [part.kind for part in many.parts(x)].count("exchange") == 1
    chex.assert_trees_all_equal(many(x), workers.spmd(step, workers.spec)(x))


def count_dots(part):
    return str(part.program.trace(*part.arguments).jaxpr).count("dot_general[")


def test_exchange_starts_before_the_backward_pass_ends():
    workers, state, step, specs = prepare("bytegrad")
    many = parts.split(workers, step, in_specs=specs).parts(state, batch(0))
    first = [part.kind for part in many].index("exchange")
    dots = [count_dots(part) for part in many]
    assert sum(dots) == count_dots_of_one(workers, state, step, specs)
    assert 0 < sum(dots[:first]) < sum(dots)
    assert all(d == 0 for d, p in zip(dots, many, strict=True) if p.kind == "exchange")


def count_dots_of_one(workers, state, step, specs):
    text = str(workers.spmd(step, in_specs=specs).lower(state, batch(0)).as_text())
    return text.count("stablehlo.dot_general")


def test_arguments_are_not_copied_from_program_to_program():
    workers = Workers.devices(N)

    def step(row, same):
        product = row.reshape(-1) * worker_local(same, "workers")
        mean = primitives.c_fp_s(jnp.sum(product), axis_name="workers")
        return product + mean * row.reshape(-1) * worker_local(same, "workers")

    arguments = np.ones((N, 8, 16), np.float32), np.ones(128, np.float32)
    many = parts.split(workers, step, in_specs=(workers.spec, P()))
    compiled = [
        part.program.lower(*part.arguments).compile().as_text()
        for part in many.parts(*arguments)
    ]
    assert len(compiled) == 3 and not any(" copy(" in text for text in compiled)
    np.testing.assert_array_equal(many(*arguments), np.full((N, 128), 129.0))


def test_a_donated_argument_is_written_over_and_no_other():
    workers, state, step, specs = prepare("gradient_allreduce")
    kept, given = (jax.tree.map(jnp.copy, state) for _ in range(2))
    parts.split(workers, step, in_specs=specs)(kept, batch(0))
    assert not any(x.is_deleted() for x in jax.tree.leaves(kept))
    x = jnp.asarray(batch(0))
    many = parts.split(workers, step, in_specs=specs, donate_argnums=(0,))
    many(given, x)
    assert all(x.is_deleted() for x in jax.tree.leaves(given[0])) and given[0]
    assert not x.is_deleted()


def test_what_an_exchange_reads_is_not_written_over():
    workers = Workers.devices(1)  # its exchanges run on a thread

    def step(x):
        mean = primitives.c_fp_s(x, axis_name="workers")
        return 2 * x, 3 * mean

    many = parts.split(workers, step, in_specs=workers.spec, donate_argnums=0)
    for k in range(20):
        x = jnp.full((1, 1000), 1.0 + k)
        double, mean = many(x)
        assert not x.is_deleted()
        np.testing.assert_array_equal(double, np.full((1, 1000), 2.0 + 2 * k))
        np.testing.assert_array_equal(mean, np.full(1000, 3.0 + 3 * k))


@pytest.mark.parametrize("wrong", [1, -1, (0, 3)])
def test_donated_arguments_must_be_there(wrong):
    workers = Workers.devices(1)
    many = parts.split(workers, lambda x: x, workers.spec, donate_argnums=wrong)
    with pytest.raises(ValueError, match="donate_argnums must name some of the 1 argu"):
        many(jnp.ones((1, 3)))


def test_a_result_may_be_an_argument_under_another_name():
    workers = Workers.devices(N)

    def step(x, y):
        mean = primitives.c_fp_s(x.reshape(-1), axis_name="workers")
        return mean, x.reshape(3, 2), worker_local(y, "workers"), y

    x, y = np.arange(6.0 * N).reshape(N, 2, 3), np.arange(2.0)
    many = parts.split(workers, step, in_specs=(workers.spec, P()))
    mean, turned, local, same = many(x, y)
    np.testing.assert_array_equal(mean, x.reshape(N, 6).mean(0))
    np.testing.assert_array_equal(turned, x.reshape(N, 3, 2))
    np.testing.assert_array_equal(local, np.stack([y] * N))
    np.testing.assert_array_equal(same, y)


def test_thread_runs_exchanges_where_the_process_has_one_device():
    workers = Workers.devices(1)

    def step(x, y):
        doubled = 2 * primitives.c_fp_s(x, axis_name="workers")
        return doubled + y, primitives.c_fp_s(doubled * y, axis_name="workers")

    specs = (workers.spec, workers.spec)
    many = parts.split(workers, step, in_specs=specs)
    x, y = np.float32([[1, 2]]), np.float32([[3, 4]])
    one = workers.spmd(step, in_specs=specs)(x, y)
    for a, b in zip(one, many(x, y), strict=True):
        np.testing.assert_array_equal(a, b)
    kinds = [part.kind for part in many.parts(x, y)]
    assert kinds.count("exchange") == 2


@pytest.mark.parametrize("shape", [(N, 3, 7), (N, 16), (N, 5), (N, 1), (2 * N, 4)])
@pytest.mark.parametrize("message_bytes", [1, 4, 20, 32, 33, 10**6])
def test_rounds_of_an_all_to_all_bring_every_column_once(shape, message_bytes):
    workers = Workers.devices(N)

    def step(x):
        return jax.lax.all_to_all(x, "workers", 0, 0, tiled=True)

    x = np.random.default_rng(0).standard_normal((N, *shape)).astype(np.float32)
    many = parts.split(workers, step, workers.spec, message_bytes=message_bytes)
    expected = workers.spmd(step, workers.spec)(x)
    np.testing.assert_array_equal(many(x), expected)
    counted = many.count(x)
    assert counted.bytes_per_worker == x[0].nbytes * (N - 1) / N
    largest = max(c.bytes_sent for c in counted.collectives) / (N - 1)
    column = x.itemsize * shape[0] // N
    assert largest <= max(message_bytes, column)


def test_bytes_of_a_message_are_checked():
    with pytest.raises(ValueError, match="message_bytes must be an integer >= 1"):
        parts.split(Workers.devices(N), lambda x: x, message_bytes=0)


def test_failure_of_an_exchange_reaches_the_caller():
    workers = Workers.devices(1)

    def step(x):
        return primitives.c_fp_s(x, axis_name="workers") + 1

    many = parts.split(workers, step, in_specs=workers.spec)
    x = jnp.ones((1, 2))
    many(x)
    x.delete()
    with pytest.raises(RuntimeError, match="deleted"):
        many(x)


def test_simulated_workers_are_refused():
    with pytest.raises(ValueError, match=r"parts\.split: workers must be on devices"):
        parts.split(Workers.simulate(2), lambda x: x)
    with pytest.raises(ValueError, match="one device each"):
        parts.split(Workers.devices(2, shards={"model": 2}), lambda x: x)
