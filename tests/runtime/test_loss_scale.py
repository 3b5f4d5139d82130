"""dynamic_loss_scale: halves, doubles, and the algorithm never sees the scale."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import bagua_jax
from bagua_jax import Workers, accumulate, dynamic_loss_scale, scale_gradient
from bagua_jax.algorithms import bytegrad, decentralized, gradient_allreduce

PLACES = {"simulate": Workers.simulate, "devices": Workers.devices}
both_places = pytest.mark.parametrize("place", PLACES)
AXIS = "workers"
N, D = 4, 5000


def feedback():
    return optax.chain(
        bytegrad(axis_name=AXIS, error_feedback="both"), optax.adam(0.05)
    )


def gossip():
    return optax.chain(optax.sgd(0.05), decentralized(axis_name=AXIS))


CHAINS = {"feedback": (feedback, False), "gossip": (gossip, True)}


def trained(place, tx, targets, *, own=False, factor=1.0):
    """Train in float16 on float32 weights; states after each step, time first.

    ``factor`` multiplies the loss: gradients overflow, or vanish, in float16 alone.
    """
    workers = PLACES[place](targets.shape[0])

    def run(targets):
        x = jnp.zeros(targets.shape[-1])
        x = bagua_jax.worker_local(x, AXIS) if own else x

        def step(carry, target):
            x, state = carry

            def loss(x):
                error = x.astype(jnp.float16) - target.astype(jnp.float16)
                loss = 0.5 * factor * jnp.sum(error.astype(jnp.float32) ** 2)
                return scale_gradient(loss, state.scale)

            loss, grads = jax.value_and_grad(loss)(bagua_jax.worker_local(x, AXIS))
            updates, state = tx.update(grads, state, x)
            x = optax.apply_updates(x, updates)
            return (x, state), (x, state, loss)

        return jax.lax.scan(step, (x, tx.init(x)), targets)[1]

    specs = workers.specs(run, targets, in_specs=workers.spec)
    out = workers.spmd(run, in_specs=workers.spec)(targets)
    return jax.tree.map(lambda x, s: jnp.swapaxes(x, 0, 1) if s else x, out, specs)


def made_targets(steps, n=N, d=D):
    rng = np.random.default_rng(3)
    return (1 + 0.1 * rng.normal(size=(n, steps, d))).astype(np.float32)


@both_places
@pytest.mark.parametrize("chain", CHAINS)
def test_overflow_at_one_worker_halves_the_scale_of_all(place, chain):
    """And nothing else: later steps are those of a run that began with that scale."""
    make, own = CHAINS[chain]
    targets = made_targets(8)
    targets[2] *= 4.0  # of about 4: 2^15 and 2^14 overflow there, and only there
    tx = dynamic_loss_scale(make(), AXIS)
    x, state, losses = trained(place, tx, targets, own=own)
    scales = [2.0**14, *[2.0**13] * 7]
    np.testing.assert_array_equal(state.scale, scales)
    np.testing.assert_array_equal(state.inner_state.last_finite, [0, 0, *[1] * 6])
    np.testing.assert_array_equal(state.good_steps, [0, 0, 1, 2, 3, 4, 5, 6])
    assert np.isfinite(losses).all() and np.asarray(x)[-1].any(-1).all()

    tx = dynamic_loss_scale(make(), AXIS, initial=2.0**13)
    same_x, same, _ = trained(place, tx, targets[:, 2:], own=own)
    np.testing.assert_array_equal(x[2:], same_x)
    chex.assert_trees_all_equal(
        jax.tree.map(lambda s: s[2:], state.inner_state.inner_state),
        same.inner_state.inner_state,
    )


@both_places
def test_gradients_that_would_vanish_are_learnt(place):
    """Below float16's smallest number; with a scale of one nothing moves."""
    targets, factor = made_targets(4), 1e-9
    kinds = {"factor": factor}
    make = lambda: optax.chain(  # noqa: E731
        gradient_allreduce(axis_name=AXIS), optax.sgd(0.1 / factor)
    )
    moved = {}
    for initial in (1.0, 2.0**20):
        tx = dynamic_loss_scale(make(), AXIS, initial=initial)
        moved[initial] = np.asarray(trained(place, tx, targets, **kinds)[0])
    assert not moved[1.0].any()
    x = np.zeros(D)
    for target in targets.mean(0):
        x = x + 0.1 * (target - x)
    np.testing.assert_allclose(moved[2.0**20][-1], x, rtol=2e-2)


def test_the_scale_doubles_after_so_many_good_steps():
    tx = dynamic_loss_scale(feedback(), AXIS, initial=1.0, growth_interval=3)
    targets = made_targets(12, d=5)
    targets[1, 4] = np.inf  # in the middle of the second stretch: it begins again
    _, state, _ = trained("simulate", tx, targets)
    expected = [1, 1, 2, 2, 1, 1, 1, 2, 2, 2, 4, 4]
    np.testing.assert_array_equal(state.scale, expected)
    np.testing.assert_array_equal(
        state.good_steps, [1, 2, 0, 1, 0, 1, 2, 0, 1, 2, 0, 1]
    )
    assert int(state.inner_state.skipped[-1]) == 1


def test_the_scale_stays_a_normal_number():
    """Zero gradients let it grow for ever, and NaN shrink."""

    def last(tx, gradient, steps=300):
        def step(state, _):
            updates, state = tx.update(gradient, state)
            return state, updates

        return jax.lax.scan(step, tx.init(jnp.ones(3)), length=steps)

    tx = dynamic_loss_scale(optax.sgd(1.0), AXIS, growth_interval=1)
    mapped = jax.vmap(lambda g: last(tx, g), axis_name=AXIS)
    state, updates = mapped(jnp.zeros((2, 3)))
    assert (state.scale == 2.0**126).all() and not updates.any()
    state, updates = mapped(jnp.full((2, 3), jnp.nan))
    assert (state.scale == 2.0**-126).all() and not updates.any()


def test_it_gives_up_as_skip_not_finite_does():
    tx = dynamic_loss_scale(feedback(), AXIS, max_consecutive=2)
    targets = made_targets(5, d=5)
    targets[1, 1:] = np.nan
    x, state, _ = trained("simulate", tx, targets)
    np.testing.assert_array_equal(state.inner_state.gave_up, [0, 0, 0, 1, 1])
    assert np.isfinite(x[:3]).all() and np.isnan(x[3:]).all()


@both_places
@pytest.mark.parametrize("around", [True, False])
def test_with_micro_batches(place, around):
    """Each is divided by its own scale; a mean of several by that of all."""
    sync = optax.chain(gradient_allreduce(axis_name=AXIS), optax.sgd(0.1))
    make = lambda tx: dynamic_loss_scale(tx, AXIS, growth_interval=2)  # noqa: E731
    tx = make(accumulate(sync, 2)) if around else None
    if tx is None:
        inside = accumulate(make(sync), 2)
        # The scale is read where `trained` looks for it.
        tx = optax.GradientTransformationExtraArgs(
            lambda p: Outer(inside.init(p)),
            lambda u, s, p: (lambda v, t: (v, Outer(t)))(*inside.update(u, s.state, p)),
        )
    targets = 0.01 * made_targets(4, d=50)
    x, state, _ = trained(place, tx, targets)
    assert float(state.scale[-1]) == (2.0**17 if around else 2.0**16)
    first = 0.1 * targets[:, :2].mean((0, 1))
    np.testing.assert_allclose(x[1], first, rtol=1e-3)
    assert not np.asarray(x[0]).any()


@jax.tree_util.register_pytree_node_class
class Outer:
    """The state of accumulate around a scale."""

    def __init__(self, state):
        self.state = state

    scale = property(lambda self: self.state.inner_state.scale)

    def tree_flatten(self):
        return (self.state,), None

    @classmethod
    def tree_unflatten(cls, _, children):
        return cls(*children)


def test_scale_gradient_keeps_the_value():
    """Where a product would overflow, in the loss's own dtype and beside aux."""
    x = jnp.float16(200.0)

    def loss(x, scale):
        return scale_gradient(x**2, scale), x

    (value, aux), grad = jax.jit(jax.value_and_grad(loss, has_aux=True))(x, 64.0)
    assert (float(value), float(aux)) == (40_000.0, 200.0) and value.dtype == x.dtype
    assert float(grad) == 400.0 * 64 and grad.dtype == x.dtype
    scales = jax.grad(lambda s: scale_gradient(3.0 * jnp.ones(()), s))(2.0)
    assert float(scales) == 0.0


@pytest.mark.parametrize(
    "options, message",
    [
        ({"initial": 1000.0}, r"initial must be a power of two .* got 1000.0"),
        ({"initial": 0.0}, r"initial must be a power of two .* got 0.0"),
        ({"initial": -2.0}, r"initial must be a power of two .* got -2.0"),
        ({"initial": float("inf")}, r"initial must be a power of two .* got inf"),
        ({"initial": float("nan")}, r"initial must be a power of two .* got nan"),
        ({"initial": 2.0**127}, r"initial must be a power of two"),
        ({"initial": "1"}, r"initial must be a power of two .* got '1'"),
        ({"growth_interval": 0}, r"growth_interval must be an integer >= 1, got 0"),
        ({"max_consecutive": -1}, r"max_consecutive must be an integer >= 0, got -1"),
    ],
)
def test_arguments_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        dynamic_loss_scale(optax.sgd(0.1), AXIS, **options)
