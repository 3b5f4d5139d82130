"""C_LP_S by ScatterReduce: compress, exchange partitions, average, compress, gather.

A partition is the slice of real entries that its owner gets: no padding exists here,
so none can take part in a range. Padding a short tail partition with copies of the
vector's last entry is the same thing (`padded_partitions`, and a test).
"""

import numpy as np

from oracles.codec import f32, minmax_uint8


def bounds(size, n):
    """List the `n` slices of ceil(size / n) entries; tail slices short or empty."""
    m = -(-size // n)
    return [slice(min(k * m, size), min((k + 1) * m, size)) for k in range(n)]


def padded_partitions(x, n):
    """Cut `[N]` into `[n, ceil(N / n)]`, filled up with copies of the last entry."""
    m = -(-len(x) // n)
    return np.concatenate([x, np.repeat(x[-1:], n * m - len(x))]).reshape(n, m)


def c_lp_s(x, worker_error=None, owner_error=None, rounding=np.rint):
    """Average the workers' vectors with both phases compressed.

    worker i: v = x_i + d_i;  c = C(v);  d_i' = v - c
    owner k:  v = mean_i c_i + e_k on partition k;  y = C(v);  e_k' = v - y

    Args:
        x: float32 `[n, N]`.
        worker_error: d, float32 `[n, N]`, or None for no feedback there.
        owner_error: e, float32 `[n, N]`, row k zero outside partition k, or None.
        rounding: see `codec.minmax_uint8`.

    Returns:
        The mean `[N]`, the same for all workers, and the two new errors.
    """
    n, size = x.shape
    mean = np.zeros(size, f32)
    v = x if worker_error is None else x + worker_error
    new_worker = None if worker_error is None else np.zeros_like(x)
    new_owner = None if owner_error is None else np.zeros_like(x)
    for k, part in enumerate(bounds(size, n)):
        sent = minmax_uint8(v[:, part], rounding)
        if new_worker is not None:
            new_worker[:, part] = v[:, part] - sent
        total = np.zeros_like(x[0, part], f32)
        for i in range(n):
            total = total + sent[i]
        owned = total / f32(n)
        if owner_error is not None:
            owned = owned + owner_error[k, part]
        mean[part] = minmax_uint8(owned, rounding)
        if new_owner is not None:
            new_owner[k, part] = owned - mean[part]
    return mean, new_worker, new_owner
