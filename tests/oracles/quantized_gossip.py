"""Quantized gossip in NumPy, from its equation."""

import numpy as np


def quantized_gossip(x0, gradient, matrix, compress, rate, steps):
    """x_i = sum_j W_ij C(x_j - rate g_j); [T + 1, n, d] float32."""
    path = [x0]
    for t in range(steps):
        x = path[-1] - np.float32(rate) * gradient(path[-1], t)
        path.append(np.float32(matrix(len(x), t).astype(np.float32) @ compress(x)))
    return np.stack(path)
