"""Which entries of the flattened parameters travel together, and in which order."""

import numpy as np


def split(leaves, bucket_bytes):
    """Split leaves into buckets.

    The last leaf comes first, as its gradient does in the backward pass. Each dtype
    has its own buckets; the dtype met first comes first. A bucket accepts the next
    leaf while at least half of that leaf still fits, and always accepts one.

    Args:
        leaves: `(size, dtype)` of each leaf in flatten order; size 0 carries nothing.
        bucket_bytes: nominal bytes of a bucket.

    Returns:
        A list of buckets, each a list of positions in `leaves`.
    """
    backward = [i for i in reversed(range(len(leaves))) if leaves[i][0] > 0]
    by_dtype = {}
    for i in backward:
        by_dtype.setdefault(np.dtype(leaves[i][1]), []).append(i)
    buckets = []
    for dtype, members in by_dtype.items():
        filled = None  # bytes in the open bucket
        for i in members:
            nbytes = leaves[i][0] * dtype.itemsize
            if filled is None or filled + nbytes / 2 > bucket_bytes:
                buckets.append([])
                filled = 0
            buckets[-1].append(i)
            filled += nbytes
    return buckets


def indices(sizes, bucket_bytes):
    """Return for each bucket the positions of its entries in the flat vector `[d]`.

    Args:
        sizes: number of entries of each float32 leaf, in flatten order.
        bucket_bytes: nominal bytes of a bucket.

    Returns:
        A list of integer arrays that together are a permutation of `range(d)`.
    """
    starts = np.concatenate([[0], np.cumsum(sizes)])
    return [
        np.concatenate([np.arange(starts[i], starts[i + 1]) for i in bucket])
        for bucket in split([(size, np.float32) for size in sizes], bucket_bytes)
    ]
