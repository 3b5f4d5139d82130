"""A replica loses nothing of what two threads add to it, and keeps what it promises."""

import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bagua_jax.asynchrony import Moment, Replica


def test_nothing_is_lost_between_a_loop_and_a_thread():
    """Whole numbers, so that sums are exact in any order."""
    replica = Replica({"x": jnp.zeros(3), "y": jnp.zeros((2, 2))})
    ones = jax.tree.map(jnp.ones_like, replica.params)
    started = threading.Event()

    def correct():
        for _ in range(200):
            replica.apply(ones)
            started.set()

    thread = threading.Thread(target=correct)
    thread.start()
    started.wait()
    for _ in range(100):
        replica.step(lambda x: (jax.tree.map(lambda v: v + 1000, x), None))
    thread.join()
    for leaf in jax.tree.leaves(replica.params):
        np.testing.assert_array_equal(leaf, 100_200)
    assert replica.steps == 100


def test_a_correction_during_a_step_is_kept_beside_the_step():
    replica = Replica(jnp.array([1.0]))

    def step(x):
        assert replica.apply(jnp.array([8.0])) == Moment(0, in_step=True)
        assert replica.snapshot()[0].tolist() == [9.0]
        return x * 3, "loss"

    assert replica.step(step) == "loss"
    assert replica.params.tolist() == [11.0]  # 9 + (3 - 1)
    assert replica.apply(jnp.array([0.5])) == Moment(1, in_step=False)


def test_an_undisturbed_step_is_taken_over_bit_for_bit():
    """x + (new - x) would round: the new parameters themselves are kept."""
    replica = Replica(jnp.array([1e8]))
    replica.step(lambda x: (jnp.array([0.1]), None))
    assert replica.params.tolist() == jnp.array([0.1]).tolist()


def test_a_snapshot_does_not_change_with_the_replica():
    replica = Replica(jnp.zeros(2, jnp.bfloat16))
    snapshot, moment = replica.snapshot()
    replica.apply(jnp.ones(2))
    assert snapshot.tolist() == [0, 0] and moment == Moment(0, False)
    assert replica.params.tolist() == [1, 1] and replica.params.dtype == jnp.bfloat16


def test_a_step_that_donates_its_parameters_is_refused():
    replica = Replica(jnp.zeros(2))
    step = jax.jit(lambda x: (x + 1, jnp.zeros(())), donate_argnums=0)
    with pytest.raises(ValueError, match=r"Replica\.step: .* donated"):
        replica.step(step)


def test_what_the_thread_died_of_reaches_the_next_step():
    replica = Replica(jnp.zeros(2))
    replica.fail(OSError("the network is gone"))
    replica.fail(ValueError("a later one says less"))
    with pytest.raises(OSError, match="network is gone"):
        replica.step(lambda x: (x, None))


def test_a_pull_comes_before_the_first_step_only():
    replica = Replica(jnp.zeros(2))
    replica.adopt(jnp.ones(2), steps=7)
    replica.step(lambda x: (x + 1, None))
    assert replica.params.tolist() == [2, 2] and replica.steps == 8
    with pytest.raises(RuntimeError, match="8 local steps would be lost"):
        replica.adopt(jnp.ones(2), steps=9)


def test_whole_numbers_are_refused():
    with pytest.raises(ValueError, match="Replica: every leaf must be floating"):
        Replica({"x": jnp.zeros(2, jnp.int32)})
