"""Which keys compressors draw from: their own for every step, bucket, worker and part.

A compressor that sends everything writes down each key it is given. Every algorithm of
the registry that takes a compressor is held to the same contract.
"""

import functools
import inspect
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bagua_jax import algorithms as alg
from bagua_jax import compressors
from bagua_jax.buckets import plan
from bagua_jax.experiments.studies import fits

AXIS, N, STEPS = "workers", 3, 8
LEAVES = {"a": 65, "b": 65}  # two buckets, alike but for their keys
EARLY = {"warmup_steps": 2, "local_steps": 2, "fragments": 1, "var_freeze_step": 4}
PLANS = [
    fits.User("compressed_mean", {"plan": plan}, f"compressed_mean(plan={plan})")
    for plan in ("scatter_reduce", "ring", "linear_sum")
]
USERS = [
    *fits.USERS,
    *PLANS,
    fits.User("ef21", {}, "ef21(linear)"),
    fits.User("marina", {"probability": 0.25}, "marina(linear)"),
]
SHARED = ("compressed_mean(plan=linear_sum)", "ef21(linear)", "marina(linear)")
by_label = pytest.mark.parametrize("user", USERS, ids=lambda user: user.label)


def revealing(seen: list, linear: bool) -> compressors.Compressor:
    """Send everything, and write down the keys."""

    def compress(key, x, state):
        jax.debug.callback(
            lambda words: seen.append(tuple(np.ravel(words).tolist())),
            jax.random.key_data(key),
        )
        return x, state

    whole = compressors.identity()
    facts = whole.facts._replace(name="revealing", linear=linear)
    return whole._replace(compress=compress, facts=facts)


def spied(user):
    """Compile a step of all workers: a function of a seed that lists steps' keys."""
    seen: list[tuple[int, ...]] = []
    early = {k: v for k, v in EARLY.items() if k in user.options}
    options = {**user.options, **early, "bucket_bytes": 4}
    user = user._replace(options=options)
    revealed = revealing(seen, user.label in SHARED)
    tx = user.make(revealed)
    x = {name: jnp.ones((N, size)) for name, size in LEAVES.items()}

    @jax.jit
    @functools.partial(jax.vmap, axis_name=AXIS, in_axes=(0, None, None))
    def step(x, count, key):
        # From the first state, as if steps had passed: only counters and keys matter.
        state = tx.init(x)._replace(count=count, key=key)
        return tx.update(x, state, x)[0]

    def keys_of(seed: int) -> list[list[tuple[int, ...]]]:
        seeded = user._replace(options={**options, "seed": seed}).make(revealed)
        key, found = seeded.init({"a": jnp.ones(3)}).key, []
        for t in range(STEPS):
            seen.clear()
            jax.block_until_ready(step(x, jnp.int32(t), key))
            jax.effects_barrier()
            found.append(list(seen))
        return found

    return keys_of


@by_label
def test_every_draw_has_a_key_of_its_own(user):
    keys_of = spied(user)
    steps = keys_of(seed=5)
    exchanges = [keys for keys in steps if keys]
    assert len(exchanges) >= 3
    for keys in exchanges:
        assert set(Counter(keys).values()) == {1}
        if user.label in SHARED:  # sums need a common mask: vmap calls once for all
            assert len(keys) == len(LEAVES)
        else:
            assert len(keys) >= N * len(LEAVES)
            assert len(keys) % (N * len(LEAVES)) == 0
    # No step draws what another one drew.
    distinct = [set(keys) for keys in exchanges]
    assert len(set.union(*distinct)) == sum(map(len, distinct))

    again, other = keys_of(seed=5), keys_of(seed=6)
    assert [Counter(keys) for keys in again] == [Counter(keys) for keys in steps]
    assert not set.union(*distinct) & {key for keys in other for key in keys}


def test_every_algorithm_with_a_seed_is_here():
    """Or draws once, in ``init``: see below."""
    seeded = {
        name
        for name, entry in alg.REGISTRY.items()
        if "seed" in inspect.signature(entry.factory).parameters
    }
    assert seeded - {user.algorithm for user in USERS} == {"powersgd"}
    takers = {user.algorithm for user in fits.USERS}
    assert takers <= seeded


def test_the_first_bases_of_powersgd_differ_by_leaf_and_seed():
    def bases(seed):
        tx = alg.powersgd(axis_name=AXIS, seed=seed)
        state = tx.init({"a": jnp.ones((30, 20)), "b": jnp.ones((30, 20))})
        return [np.asarray(basis) for basis in jax.tree.leaves(state.basis)]

    first, second = bases(0)
    assert np.abs(first - second).min() > 0
    assert np.abs(first - bases(1)[0]).min() > 0
    np.testing.assert_array_equal(first, bases(0)[0])


def test_the_coin_of_marina_is_tossed_anew():
    """It falls on either side, alike for all workers, unlike for another seed."""
    user = next(user for user in USERS if user.label == "marina")
    keys_of, tosses = spied(user), []
    for seed in range(4):
        called = [len(keys) for keys in keys_of(seed)]
        assert set(called) <= {0, N * len(LEAVES)}  # all workers, or none
        tosses.append(tuple(count > 0 for count in called[1:]))  # the first is dense
    assert len(set(tosses)) > 1
    assert 0 < np.mean(tosses) < 1


def test_the_mask_of_cocktail_sgd_is_drawn_anew():
    """Other places in every bucket and at every step, the same for all workers."""
    options = {"axis_name": AXIS, "ratio": 0.5, "bucket_bytes": 4}

    def moved(seed, count):
        tx = alg.cocktail_sgd(compressors.identity(), seed=seed, **options)

        @jax.jit
        @functools.partial(jax.vmap, axis_name=AXIS)
        def step(x):
            state = tx.init(x)._replace(count=jnp.int32(count))
            return tx.update(x, state, x)[0]

        updates = step({name: jnp.ones((N, size)) for name, size in LEAVES.items()})
        for leaf in jax.tree.leaves(updates):
            np.testing.assert_array_equal(leaf, np.broadcast_to(leaf[0], leaf.shape))
        return [np.asarray(leaf[0]) != 0 for leaf in jax.tree.leaves(updates)]

    one, two = moved(0, 0)
    assert (one != two).any()
    for seed, count in ((0, 1), (1, 0)):
        assert (moved(seed, count)[0] != one).any()
    np.testing.assert_array_equal(moved(0, 0)[0], one)


def test_map_derives_a_key_for_each_bucket():
    tree = {name: jnp.ones(size) for name, size in LEAVES.items()}
    found = []
    layout = plan(tree, 4)
    key = jax.random.key(3)
    layout.map(lambda x, key: found.append(key) or (x,), tree, keys=key)
    data = [jax.random.key_data(k).tolist() for k in found]
    expected = [jax.random.fold_in(key, bucket) for bucket in (0, 1)]
    assert data == [jax.random.key_data(k).tolist() for k in expected]
    (same,) = layout.map(lambda x: (x,), tree)  # and passes none without
    assert jax.tree.structure(same) == jax.tree.structure(tree)
