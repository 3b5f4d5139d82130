"""Data over workers: split, shards, and an order that is a function of seed and step.

Everything random is drawn from ``numpy`` generators seeded by (seed, stream, ...), so
that a resumed run sees the batches that an uninterrupted one would have seen.
"""

from functools import lru_cache
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from bagua_jax.experiments.spec.config import ConfigError

__all__ = ["Data", "Shards", "generator", "shard", "stratified_split"]


class Data(NamedTuple):
    """A task's data.

    Attributes:
        train: tree of numpy arrays with N samples along the leading axis.
        labels: [N] int, by which ``sharding: label`` sorts.
        test: what ``evaluate`` is given: any tree.
    """

    train: Any
    labels: np.ndarray
    test: Any


def generator(seed: int, stream: str, *numbers: int) -> np.random.Generator:
    """Make a generator of its own for one use of the seed.

    Args:
        seed: of the run.
        stream: what the numbers are for, such as ``"split"``.
        *numbers: further distinction, such as epoch and worker.
    """
    return np.random.default_rng([seed, *stream.encode(), *numbers])


def stratified_split(
    labels: np.ndarray, test_share: float, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Split sample numbers so that each class gives its share to the test set.

    Args:
        labels: [N] int.
        test_share: in (0, 1); each class gives this share of its samples, rounded.
        seed: of the draw.

    Returns:
        Sample numbers for training and for testing, each sorted.

    Example:
        >>> train, test = stratified_split(np.repeat([0, 1], 10), 0.2, seed=0)
        >>> len(train), np.repeat([0, 1], 10)[test].tolist()
        (16, [0, 0, 1, 1])
    """
    rng = generator(seed, "split")
    test = []
    for label in np.unique(labels):
        members = rng.permutation(np.flatnonzero(labels == label))
        test.append(members[: round(test_share * len(members))])
    test = np.sort(np.concatenate(test))
    return np.setdiff1d(np.arange(len(labels)), test), test


def shard(
    labels: np.ndarray,
    workers: int,
    sharding: Literal["iid", "label"],
    seed: int,
) -> np.ndarray:
    """Deal samples out to workers, equally many to each.

    Args:
        labels: [N] int.
        workers: n.
        sharding: ``"iid"`` deals at random; ``"label"`` sorts by label and cuts, so
            that a worker sees about 1/n of the classes.
        seed: of the draw.

    Returns:
        [n, N // n] sample numbers. Up to n - 1 samples, drawn at random, go to nobody.

    Raises:
        ConfigError: if there are fewer samples than workers.

    Example:
        >>> labels = np.array([1, 0, 1, 0])
        >>> labels[shard(labels, 2, "label", seed=0)].tolist()
        [[0, 0], [1, 1]]
    """
    size = len(labels) // workers
    if size < 1:
        raise ConfigError(f"workers: {len(labels)} samples cannot go to {workers}.")
    order = generator(seed, "shard").permutation(len(labels))[: size * workers]
    if sharding == "label":
        order = order[np.argsort(labels[order], kind="stable")]
    return order.reshape(workers, size)


class Shards(NamedTuple):
    """The training data of all workers, and the order in which they go through it.

    Attributes:
        train: tree of arrays with N samples along the leading axis.
        members: [n, m] sample numbers of each worker.
        batch_size: B, samples per worker and step.
        seed: of the order.
    """

    train: Any
    members: np.ndarray
    batch_size: int
    seed: int

    def indices(self, step: int) -> np.ndarray:
        """Return the samples of a step, a function of seed and step alone.

        A worker goes through its shard in epochs of m // B steps, each in an order of
        its own; what does not fill a batch is left out of that epoch.

        Args:
            step: optimizer steps taken before, from 0.

        Returns:
            [n, B] sample numbers.
        """
        workers, size = self.members.shape
        epoch, position = divmod(step, size // self.batch_size)
        orders = _orders(self.seed, epoch, workers, size)
        start = position * self.batch_size
        chosen = orders[:, start : start + self.batch_size]
        return np.take_along_axis(self.members, chosen, axis=1)

    def batch(self, step: int, workers: Any = slice(None)) -> Any:
        """Return the batches of a step: leaves [n, B, ...], one row for each worker.

        Args:
            step: optimizer steps taken before, from 0.
            workers: numbers of those whose rows are wanted; all by default.
        """
        indices = self.indices(step)[workers]
        return jax.tree.map(lambda x: x[indices], self.train)

    @classmethod
    def deal(
        cls,
        data: Data,
        workers: int,
        sharding: Literal["iid", "label"],
        batch_size: int,
        seed: int,
    ) -> "Shards":
        """Deal a task's training data out.

        Raises:
            ConfigError: if a batch does not fit in a worker's shard.
        """
        members = shard(data.labels, workers, sharding, seed)
        if batch_size > members.shape[1]:
            raise ConfigError(
                f"batch_size: a worker has {members.shape[1]} of {len(data.labels)} "
                f"samples, fewer than a batch of {batch_size}."
            )
        return cls(data.train, members, batch_size, seed)


@lru_cache(maxsize=4)
def _orders(seed: int, epoch: int, workers: int, size: int) -> np.ndarray:
    """Draw the order of an epoch for each worker: [n, m] positions in its shard."""
    return np.stack(
        [
            generator(seed, "order", epoch, worker).permutation(size)
            for worker in range(workers)
        ]
    )
