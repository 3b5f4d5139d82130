"""Data and tasks: split, shards, order, and the facts that tasks promise."""

import jax
import numpy as np
import pytest

from bagua_jax.experiments import tasks
from bagua_jax.experiments.spec.config import ConfigError
from bagua_jax.experiments.tasks.data import Data, Shards, shard, stratified_split

LABELS = np.repeat(np.arange(5), 20)


def test_the_split_is_stratified_seeded_and_complete():
    train, test = stratified_split(LABELS, 0.2, seed=3)
    assert np.bincount(LABELS[test]).tolist() == [4] * 5
    assert sorted([*train, *test]) == [*range(100)]
    again = stratified_split(LABELS, 0.2, seed=3)
    other = stratified_split(LABELS, 0.2, seed=4)
    assert (again[1] == test).all() and not (other[1] == test).all()


@pytest.mark.parametrize("sharding", ["iid", "label"])
@pytest.mark.parametrize("workers", [1, 3, 5, 8])
def test_shards_are_equal_and_disjoint(sharding, workers):
    members = shard(LABELS, workers, sharding, seed=0)
    assert members.shape == (workers, 100 // workers)
    assert len(np.unique(members)) == members.size


def test_label_shards_hold_few_classes_and_iid_shards_nearly_all():
    by_label = shard(LABELS, 5, "label", seed=0)
    assert [np.unique(LABELS[m]).tolist() for m in by_label] == [[k] for k in range(5)]
    iid = shard(LABELS, 5, "iid", seed=0)
    assert all(len(np.unique(LABELS[m])) >= 4 for m in iid)


def test_more_workers_than_samples_are_refused():
    with pytest.raises(ConfigError, match="workers: 100 samples cannot go to 101"):
        shard(LABELS, 101, "iid", seed=0)


def make_shards(batch_size=6, seed=0) -> Shards:
    data = Data({"x": np.arange(100)}, LABELS, None)
    return Shards.deal(data, 4, "iid", batch_size, seed)


def test_the_order_is_a_function_of_seed_and_step():
    forward = [make_shards().indices(step) for step in range(12)]
    for step in reversed(range(12)):
        np.testing.assert_array_equal(make_shards().indices(step), forward[step])
    assert not (make_shards(seed=1).indices(0) == forward[0]).all()


def test_an_epoch_repeats_no_sample_and_the_next_has_another_order():
    shards = make_shards()  # 25 samples each: 4 batches of 6, 1 left out
    epochs = [
        np.concatenate([shards.indices(4 * e + i) for i in range(4)], axis=1)
        for e in range(3)
    ]
    for epoch in epochs:
        for worker, own in enumerate(epoch):
            assert len(np.unique(own)) == 24
            assert np.isin(own, shards.members[worker]).all()
    assert not (epochs[0] == epochs[1]).all()
    batch = shards.batch(5)
    np.testing.assert_array_equal(batch["x"], shards.indices(5))


def test_a_batch_larger_than_a_shard_is_refused():
    with pytest.raises(ConfigError, match="batch_size: a worker has 25 of 100"):
        make_shards(batch_size=26)
    assert make_shards(batch_size=25).indices(7).shape == (4, 25)


# --- tasks ---


@pytest.mark.parametrize("workers", [3, 8])
def test_the_quadratics_optimum_is_exact_and_workers_differ(workers):
    task = tasks.quadratic()
    data = task.data(0, workers)
    gradient = jax.grad(task.loss)
    whole = gradient(data.test["optimum"], data.train)
    np.testing.assert_allclose(whole, 0, atol=2e-6)
    assert task.evaluate(data.test["optimum"], data.test)["distance_to_optimum"] == 0

    shards = Shards.deal(data, workers, "label", 64, seed=0)
    own = jax.vmap(gradient, (None, 0))(data.test["optimum"], shards.batch(0))
    assert np.linalg.norm(own, axis=1).min() > 0.5
    np.testing.assert_allclose(own.mean(0), 0, atol=2e-6)


def test_the_quadratics_excess_loss_is_the_loss_above_the_minimum():
    task = tasks.quadratic()
    data = task.data(1, 4)
    x = np.linspace(-1, 1, 32, dtype=np.float32)
    excess = task.loss(x, data.train) - task.loss(data.test["optimum"], data.train)
    np.testing.assert_allclose(
        task.evaluate(x, data.test)["excess_loss"], excess, rtol=1e-4
    )


@pytest.mark.parametrize(
    ("name", "train", "test", "numbers"),
    [("mnist5k", 4000, 1000, 52266), ("digits", 1438, 359, 4810)],
)
def test_classifiers_have_the_stated_sizes(name, train, test, numbers):
    task = tasks.load(name)
    data = task.data(0, 8)
    assert len(data.labels) == len(data.train["image"]) == train
    assert len(data.test["image"]) == test
    assert data.train["image"].min() == 0 and data.train["image"].max() == 1
    counts = np.bincount(data.test["label"], minlength=10)
    assert counts.max() - counts.min() <= 2
    params = jax.jit(task.init)(jax.random.key(0))
    assert sum(x.size for x in jax.tree.leaves(params)) == numbers
    judged = task.evaluate(params, data.test)
    assert list(judged)[0] == "accuracy"
    assert 0 <= judged["accuracy"] <= 1
    # Logits of unit scale at the start: the loss is near that of a guess.
    assert abs(judged["loss"] - np.log(10)) < 1


def test_mnist5k_is_never_called_mnist():
    title = tasks.load("mnist5k").title
    assert title.replace("MNIST-5k", "").find("MNIST") == -1


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("mnist", ["'mnist'", "'mnist5k'", "module"]),
        (
            "no_such_module:task",
            ["no_such_module", "ModuleNotFoundError", "PYTHONPATH"],
        ),
        ("numpy:pii", ["'pii'", "'pi'"]),
        ("numpy:pi", ["must be a Task", "float"]),
        ("numpy:sqrt", ["failed", "TypeError"]),
    ],
)
def test_tasks_that_are_none_are_refused(name, words):
    with pytest.raises(ConfigError) as caught:
        tasks.load(name)
    for word in words:
        assert word in str(caught.value)
