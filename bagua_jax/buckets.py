"""Buckets: a parameter tree as a few flat vectors, and back."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bagua_jax import primitives
from bagua_jax.marks import mark
from bagua_jax.primitives import AxisName

__all__ = ["DEFAULT_BUCKET_BYTES", "Plan", "plan"]

DEFAULT_BUCKET_BYTES = 10 * 2**20  # 10 MiB, as BAGUA


class _Leaf(NamedTuple):
    index: int  # position in the flattened tree
    shape: tuple[int, ...]
    dtype: np.dtype
    size: int


class Plan(NamedTuple):
    """Which leaves stand in which bucket; made by :func:`plan`, static.

    Attributes:
        structure: the tree's definition.
        leaves: shape and dtype of every leaf, in flattening order.
        buckets: for each bucket the positions of its leaves, in order.
    """

    structure: Any
    leaves: tuple[_Leaf, ...]
    buckets: tuple[tuple[int, ...], ...]

    @property
    def sizes(self) -> tuple[int, ...]:
        """Elements of each bucket."""
        return tuple(sum(self.leaves[i].size for i in b) for b in self.buckets)

    def pack(self, tree: Any) -> tuple[Any, ...]:
        """Concatenate the leaves of each bucket.

        Args:
            tree: a tree of the plan's structure and shapes, or ``None``. Leaves may
                have another dtype than the plan's, one for each bucket.

        Returns:
            One vector [N] for each bucket; ``None`` for each where the tree is none.

        Raises:
            ValueError: if the tree's structure or a leaf's shape is not the plan's.
        """
        if tree is None:
            return (None,) * len(self.buckets)
        values, structure = jax.tree.flatten(tree)
        shapes = [jnp.shape(value) for value in values]
        if structure != self.structure or shapes != [x.shape for x in self.leaves]:
            raise ValueError(
                "Plan.pack: the tree must have the structure and shapes of the one the "
                f"plan was made for, {self.structure} with shapes "
                f"{[x.shape for x in self.leaves]}; got {structure} with shapes "
                f"{shapes}."
            )

        def join(parts):
            return parts[0] if len(parts) == 1 else jnp.concatenate(parts)

        # Apart: what makes the leaves, what joins them, what reads the vector.
        return tuple(
            mark(join([mark(jnp.ravel(values[k]), f"/bucket{b}") for k in bucket]))
            for b, bucket in enumerate(self.buckets)
        )

    def unpack(self, vectors: Sequence[Any]) -> Any:
        """Cut the vectors into leaves: the exact inverse of :meth:`pack`.

        Args:
            vectors: one vector [N] for each bucket, or ``None`` for each.

        Returns:
            A tree of the plan's structure and shapes, in the vectors' dtypes; ``None``
            for ``None``.

        Raises:
            ValueError: if the vectors do not fit the plan.
        """
        if len(vectors) > 0 and all(vector is None for vector in vectors):
            return None
        shapes = [jnp.shape(vector) for vector in vectors]
        if shapes != [(size,) for size in self.sizes]:
            raise ValueError(
                f"Plan.unpack: the plan has vectors of lengths {list(self.sizes)}; "
                f"got shapes {shapes}."
            )
        values: list[Any] = [None] * len(self.leaves)
        for bucket, vector in zip(self.buckets, vectors, strict=True):
            start = 0
            for index in bucket:
                leaf = self.leaves[index]
                part = vector[start : start + leaf.size]
                values[index] = part.reshape(leaf.shape)
                start += leaf.size
        return jax.tree.unflatten(self.structure, values)

    def map(
        self,
        fn: Callable[..., tuple[jax.Array | None, ...]],
        *trees: Any,
        keys: jax.Array | None = None,
    ) -> tuple[Any, ...]:
        """Apply a function of flat vectors bucket by bucket.

        Args:
            fn: takes one vector of each tree, returns a tuple of vectors as long.
            *trees: of the plan's structure; ``None`` passes ``None`` for each bucket.
            keys: a PRNG key, from which every bucket's own is derived by its number:
                ``fn`` is passed it as ``key``. Where ``None``, ``fn`` is passed none.

        Returns:
            A tree for each result; ``None`` where the function returns ``None``.

        Example:
            >>> p = plan({"a": jnp.zeros(2), "b": jnp.zeros(2)}, bucket_bytes=8)
            >>> draw = lambda x, key: (jax.random.normal(key, x.shape),)
            >>> (noise,) = p.map(draw, {"a": jnp.zeros(2), "b": jnp.zeros(2)},
            ...                  keys=jax.random.key(0))
            >>> bool((noise["a"] == noise["b"]).any())
            False
        """
        columns = enumerate(zip(*map(self.pack, trees), strict=True))
        results = [
            fn(*vectors)
            if keys is None
            else fn(*vectors, key=jax.random.fold_in(keys, bucket))
            for bucket, vectors in columns
        ]
        return tuple(map(self.unpack, zip(*results, strict=True)))


def plan(
    tree: Any, bucket_bytes: float = DEFAULT_BUCKET_BYTES, axis_name: AxisName = ()
) -> Plan:
    """Divide a tree's leaves into buckets, so that messages are few and large.

    Leaves are taken in reverse order of flattening, which is about the order in which
    the backward pass finishes their gradients. A bucket holds one dtype and one varying
    type (:func:`bagua_jax.primitives.leaf_types`), and takes the next leaf as long as
    that brings it nearer to ``bucket_bytes``: it ends within half a leaf of that size,
    or is one larger leaf.

    Args:
        tree: of arrays or ``jax.ShapeDtypeStruct``; ``None`` and masked nodes hold no
            leaves, and leaves without elements take no room.
        bucket_bytes: target size of a bucket in bytes, at least 1; static. Infinity
            makes one bucket of each kind.
        axis_name: the workers' axis, or axes. Over others, such as one of experts,
            leaves may or may not vary: where JAX does not track that (``shard_map``
            with ``check_vma=False``), a bucket holds one leaf.

    Returns:
        The plan, whose ``pack`` and ``unpack`` are exact inverses.

    Raises:
        ValueError: if bucket_bytes < 1.

    Example:
        >>> tree = {"a": jnp.zeros(3), "b": jnp.ones((2, 2)), "c": None}
        >>> p = plan(tree)
        >>> p.pack(tree)[0].tolist()
        [1.0, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0]
        >>> p.unpack(p.pack(tree))["b"].shape
        (2, 2)
    """
    is_number = isinstance(bucket_bytes, int | float | np.number)
    if isinstance(bucket_bytes, bool) or not is_number or not bucket_bytes >= 1:
        raise ValueError(
            f"buckets.plan: bucket_bytes must be at least 1 byte, got "
            f"{bucket_bytes!r}. The default is {DEFAULT_BUCKET_BYTES}."
        )
    values, structure = jax.tree.flatten(tree)
    leaves = tuple(
        _Leaf(
            i, jnp.shape(v), jnp.result_type(v), int(np.prod(jnp.shape(v), dtype=int))
        )
        for i, v in enumerate(values)
    )
    types = primitives.leaf_types(tree, axis_name)
    alike: dict[Any, list[_Leaf]] = {}
    for leaf in sorted(reversed(leaves), key=lambda leaf: leaf.size == 0):
        kind = (leaf.dtype, types[leaf.index])
        alike.setdefault(kind, []).append(leaf)  # without elements: last

    buckets: list[tuple[int, ...]] = []
    for (dtype, _), group in alike.items():
        current: list[int] = []
        filled = 0
        for leaf in group:
            nbytes = leaf.size * dtype.itemsize
            if current and nbytes and filled + nbytes / 2 > bucket_bytes:
                buckets.append(tuple(current))
                current, filled = [], 0
            current.append(leaf.index)
            filled += nbytes
        buckets.append(tuple(current))
    return Plan(structure, leaves, tuple(buckets))
