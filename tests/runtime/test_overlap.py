"""The exchange in the backward pass: the numbers of the plain form, everywhere."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bagua_jax
from bagua_jax import Workers, buckets, compressors, overlap, wire
from bagua_jax.algorithms import bytegrad, compressed_mean, gradient_allreduce

WIDTH, LAYERS, MICRO = 8, 2, 2
NAMES = [f"layer_{k}" for k in range(LAYERS)]
PART_BYTES = 4 * WIDTH * (WIDTH + 1)

EXCHANGES = {
    "exact": lambda axis, size: gradient_allreduce(axis_name=axis, bucket_bytes=size),
    "bytegrad": lambda axis, size: bytegrad(
        axis_name=axis, bucket_bytes=size, error_feedback="both"
    ),
    "random": lambda axis, size: compressed_mean(
        compressors.qsgd(16), axis_name=axis, bucket_bytes=size
    ),
}


def part(key):
    return {"w": jax.random.normal(key, (WIDTH, WIDTH)) / 3, "b": jnp.zeros(WIDTH)}


def params():
    keys = jax.random.split(jax.random.key(0), LAYERS + 1)
    return dict(zip([*NAMES, "rest"], map(part, keys), strict=True))


def batches(n, shape=(4,)):
    draws = np.random.default_rng(1).standard_normal((n, *shape, WIDTH))
    return jnp.asarray(draws, jnp.float32)


def layer(p, x):
    return x + jnp.tanh(x @ p["w"] + p["b"][None])


def model(take, call, batch):
    """A shared part used first and last, as a tied embedding, around layers."""
    rest = take("rest")
    x = batch @ rest["w"]
    for name in NAMES:
        x = call(layer, name, x)
    return jnp.mean(jnp.sin(x @ rest["w"].T + rest["b"][None]) ** 2)


def plain_loss(params, batch):
    call = lambda layer, name, x: layer(params[name], x)  # noqa: E731
    return model(params.__getitem__, call, batch)


def chained_loss(exchange, axis, **options):
    def loss(params, state, batch, earlier=None):
        chain = overlap.Chain(
            exchange, params, state, axis_name=axis, earlier=earlier, **options
        )
        return chain.finish(model(chain.__getitem__, chain, batch))

    return loss


def programs(workers, init_exchange, gradients):
    """Compile the start and the step: params, exchange state, optimizer state."""
    optimizer = optax.sgd(0.5, momentum=0.9)

    def init():
        start = params()
        return start, init_exchange(start), optimizer.init(start)

    def step(state, batch):
        old, exchanged, opt = state
        grads, exchanged = gradients(old, exchanged, batch)
        updates, opt = optimizer.update(grads, opt, old)
        return optax.apply_updates(old, updates), exchanged, opt

    specs = workers.specs(init)
    return workers.spmd(init), workers.spmd(step, in_specs=(specs, workers.spec))


def train(workers, init_exchange, gradients, batch, steps=3):
    init, step = programs(workers, init_exchange, gradients)
    state = init()
    for _ in range(steps):
        state = step(state, batch)
    return state


def at_end(exchange, axis):
    """The default form: one transform of all gradients, after the backward pass."""

    def gradients(params, state, batch):
        local = bagua_jax.worker_local(params, axis)
        return exchange.update(jax.grad(plain_loss)(local, batch), state)

    return exchange.init, gradients


def in_chain(exchange, axis, **options):
    grad = jax.grad(chained_loss(exchange, axis, **options), argnums=(0, 1))
    return lambda start: overlap.init(exchange, start), grad


def assert_equal(found, expected):
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, found, expected)


@pytest.mark.parametrize(
    "place, shape, name, lag",
    [
        ("simulate", 4, "bytegrad", 1),
        ("simulate", (2, 2), "exact", 2),
        ("devices", 8, "exact", 1),
        ("devices", 8, "bytegrad", 1),
        ("devices", (2, 4), "bytegrad", 2),
    ],
)
def test_numbers_are_those_of_the_default_form(place, shape, name, lag):
    """Bit for bit, where its buckets are the parts; errors carried for three steps.

    ``specs`` reads P() for params: JAX has proved that replicas stay equal.
    """
    workers = getattr(Workers, place)(shape)
    axis = workers.axis_name
    exchange = EXCHANGES[name](axis, PART_BYTES)
    assert len(buckets.plan(params(), PART_BYTES).buckets) == LAYERS + 1
    batch = batches(workers.num_workers)
    plain = train(workers, *at_end(exchange, axis), batch)
    chained = train(workers, *in_chain(exchange, axis, lag=lag), batch)
    assert_equal(chained[0], plain[0])
    assert not np.array_equal(chained[0]["rest"]["w"], params()["rest"]["w"])
    if name == "bytegrad":
        worker, owner = plain[1].error
        for part_name, state in chained[1].items():
            assert_equal(state.error.worker, worker[part_name])
            assert_equal(state.error.owner, owner[part_name])


@pytest.mark.parametrize("place", ["simulate", "devices"])
def test_a_loss_that_is_averaged_inside_has_the_same_gradients(place):
    workers = getattr(Workers, place)(4)
    exchange = EXCHANGES["exact"]("workers", PART_BYTES)

    def averaged(params, state, batch):
        chain = overlap.Chain(exchange, params, state, axis_name="workers")
        loss = model(chain.__getitem__, chain, batch)
        return chain.finish(jax.lax.pmean(loss, "workers"))

    batch = batches(4)
    init = lambda start: overlap.init(exchange, start)  # noqa: E731
    found = train(workers, init, jax.grad(averaged, argnums=(0, 1)), batch)
    expected = train(workers, *at_end(exchange, "workers"), batch)
    for ours, plain in zip(*map(jax.tree.leaves, (found[0], expected[0])), strict=True):
        np.testing.assert_allclose(ours, plain, rtol=0, atol=1e-6)


def test_state_of_whole_numbers_and_keys_is_carried():
    """Steps are counted, each part draws with a key of its own, as init says."""
    workers = Workers.simulate(4)
    axis = workers.axis_name
    exchange = EXCHANGES["random"](axis, PART_BYTES)

    def by_part(params, state, batch):
        local = bagua_jax.worker_local(params, axis)
        grads = jax.grad(plain_loss)(local, batch)
        new = {k: exchange.update(grads[k], state[k]) for k in grads}
        return {k: v[0] for k, v in new.items()}, {k: v[1] for k, v in new.items()}

    def own_keys(start):
        states = {}
        for index, name in enumerate(sorted(start)):
            state = exchange.init(start[name])
            states[name] = state._replace(key=jax.random.fold_in(state.key, index))
        return states

    batch = batches(4)
    expected = train(workers, own_keys, by_part, batch)
    found = train(workers, *in_chain(exchange, axis), batch)
    assert_equal(found[0], expected[0])
    for state in found[1].values():
        assert int(jax.lax.bitcast_convert_type(state.count, jnp.int32)) == 3


def test_a_nan_of_one_worker_is_seen_by_all():
    workers = Workers.devices(8)
    exchange = EXCHANGES["bytegrad"](workers.axis_name, PART_BYTES)
    batch = batches(8).at[5, 0, 0].set(jnp.nan)
    new, _, _ = train(workers, *in_chain(exchange, workers.axis_name), batch, steps=1)
    assert all(np.isnan(leaf).all() for leaf in jax.tree.leaves(new))


def test_no_number_makes_the_tie_fire():
    patterns = [0, 1, 0x80000000, 0xFFFFFFFF, 0xFFFFFFFE, 0x7F800000, 0x7FC00000]
    patterns += [0xFF800000, 0x7FABCDEF, 0x7F7FFFFF, 0x3F800000]
    bits = np.array(patterns, np.uint32)
    x = {"x": jnp.array([1.5, -0.0, jnp.inf]), "mask": jnp.array([1, 0])}
    for token in jnp.asarray(bits.view(np.float32)):
        assert_equal(jax.jit(overlap._after)(token, x), x)


def test_what_is_sent_is_that_of_the_default_form():
    workers = Workers.devices(8)
    exchange = EXCHANGES["bytegrad"](workers.axis_name, PART_BYTES)
    counts = []
    for form in (at_end, in_chain):
        init, step = programs(workers, *form(exchange, workers.axis_name))
        compiled = step.lower(init(), batches(8)).compile()
        counts.append(wire.count(compiled).by_kind())
    assert counts[0] == counts[1]
    assert counts[1]["all-to-all"][0] == counts[1]["all-gather"][0] == LAYERS + 1


def test_micro_batches_are_exchanged_once():
    """As accumulate(...) in the default form; all but the last take local gradients."""
    workers = Workers.devices(4)
    axis = workers.axis_name
    exchange = EXCHANGES["bytegrad"](axis, PART_BYTES)
    last = in_chain(exchange, axis)

    def gradients(params, state, batch):
        local = bagua_jax.worker_local(params, axis)
        off = jax.grad(chained_loss(None, axis))
        sums = [off(local, None, micro) for micro in batch[:-1]]
        earlier = jax.tree.map(lambda *g: sum(g) / MICRO, *sums)

        def scaled(*args):
            return chained_loss(exchange, axis)(*args) / MICRO

        grad = jax.grad(scaled, argnums=(0, 1))
        return grad(params, state, batch[-1], earlier)

    def reference(params, state, batch):
        local = bagua_jax.worker_local(params, axis)
        tx = bagua_jax.accumulate(exchange, MICRO)
        inner = tx.init(local)._replace(inner_state=state)
        for micro in batch:
            grads, inner = tx.update(jax.grad(plain_loss)(local, micro), inner)
        return grads, inner.inner_state

    batch = batches(4, (MICRO, 4))
    init, step = programs(workers, last[0], gradients)
    kinds = wire.count(step.lower(init(), batch).compile()).by_kind()
    assert kinds["all-to-all"][0] == LAYERS + 1
    found = step(init(), batch)[0]
    expected = train(workers, exchange.init, reference, batch, steps=1)[0]
    # Sums in another order may move a gradient to the next of 256 levels.
    for a, b in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
        np.testing.assert_allclose(a, b, atol=2e-3)


def test_a_recomputed_layer_gives_the_same():
    exchange = EXCHANGES["exact"]("workers", PART_BYTES)

    def loss(params, wrap, batch):
        chain = overlap.Chain(exchange, params, axis_name="workers")
        call = lambda layer, name, x: chain(wrap(layer), name, x)  # noqa: E731
        return chain.finish(model(chain.__getitem__, call, batch))

    for wrap in (jax.checkpoint, lambda f: f):
        step = lambda b, wrap=wrap: jax.grad(loss)(params(), wrap, b)  # noqa: E731
        grads = jax.vmap(step, axis_name="workers")(batches(4))
        plain = jax.vmap(lambda b: jax.grad(plain_loss)(params(), b))(batches(4))
        mean = jax.tree.map(lambda g: np.broadcast_to(g.mean(0), g.shape), plain)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-7),
            grads,
            mean,
        )


# --- what is refused ---

EXACT = gradient_allreduce(axis_name="workers")


@pytest.mark.parametrize(
    "use, message",
    [
        (lambda c: c.finish(0.0), r"\['layer_0', .*'rest'\] never went through"),
        (lambda c: c["embedding"], "no part is named 'embedding'; there are"),
        (
            lambda c: (c["rest"], c(layer, "rest", jnp.ones((1, 8)))),
            "'rest' was used before",
        ),
    ],
)
def test_misuse_is_refused(use, message):
    with pytest.raises(ValueError, match=message):
        use(overlap.Chain(EXACT, params(), axis_name="workers"))


@pytest.mark.parametrize(
    "arguments, options, message",
    [
        ((EXACT, [1]), {}, "params must map the names .* got list"),
        ((EXACT, params(), {"a": 1}), {}, r"state must have the names .* got \['a'\]"),
        ((EXACT, params()), {"lag": 0}, "lag must be an integer >= 1, got 0"),
        ((EXACT, params()), {"earlier": {"b": 1}}, r"earlier must have the names"),
        (
            (EXCHANGES["random"]("workers", 4), params()),
            {},
            r"keeps state between steps. Make it with\s+overlap.init",
        ),
    ],
)
def test_wrong_arguments_are_refused(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        overlap.Chain(*arguments, axis_name="workers", **options)


def test_worker_local_params_are_refused():
    workers = Workers.devices(8)

    def step(batch):
        local = bagua_jax.worker_local(params(), "workers")
        return jax.grad(chained_loss(EXACT, "workers"))(local, None, batch)

    with pytest.raises(ValueError, match="'rest' are worker-local already.*replicated"):
        workers.spmd(step, in_specs=workers.spec)(batches(8))
