"""Whole optimizers, in float64 from the equations.

As in `oracles.algorithms` an oracle is a pair `(init, step)` over worker-stacked flat
vectors `[n, d]`. `buckets` lists the flat positions of each bucket's entries, `leaves`
those of each leaf; compressors are functions of `[..., d]` that treat rows apart.
"""

import numpy as np
from scipy import fft

from oracles.algorithms import Oracle
from oracles.gradient_side import scatter_reduced, sign_l2


def variance_steps(kappa, before):
    """List T_v: the gap doubles after every kappa refreshes; none from `before` on."""
    steps, t, gap = [], 0, 1
    while t < before:
        steps.append(t)
        t += gap
        if len(steps) % kappa == 0:
            gap *= 2
    return steps


def sync_steps(start, scaler, clipper, total):
    """List T_u: every step before `start`, then the multiples of a growing interval."""
    steps, interval = [], 1
    for t in range(total):
        if t > start and (t - start) % scaler == 0:
            interval = min(2 * interval, clipper)
        if (t + 1) % interval == 0:
            steps.append(t)
    return steps


def exchanged(compress, x, state, buckets):
    """Average with feedback at both ends: the mean [d], and d and e."""
    mean, d, e = np.zeros(x.shape[1]), state["d"].copy(), state["e"].copy()
    for b in buckets:
        mean[b], d[:, b], e[:, b] = scatter_reduced(
            compress, x[:, b], state["d"][:, b], state["e"][:, b]
        )
    return mean, {"d": d, "e": e}


def zero_one_adam(lr, buckets, refreshes, syncs, b1, b2, eps, compress=sign_l2):
    """Local Adam steps from the last common point, whose sum is averaged now and then.

    `lr` is a function of t. Nothing moves while v = 0.
    """

    def init(x0):
        zeros = {name: np.zeros_like(x0) for name in ("m", "u", "d", "e")}
        return {"x": x0, "common": x0, "s": 0.0, "v": np.zeros(x0.shape[1]), **zeros}

    def step(state, grads, t, rounding):
        del rounding
        v = state["v"]
        size = np.where(v == 0, np.inf, np.sqrt(v) + eps)
        m = b1 * state["m"] + (1 - b1) * grads
        new = {
            **state,
            "m": m,
            "x": state["x"] - lr(t) * m / size,
            "u": state["u"] + lr(t) * m,
            "s": state["s"] + lr(t),
        }
        if t in syncs:
            mean, errors = exchanged(compress, new["u"], state, buckets)
            common = state["common"] - mean / size
            m = np.tile(mean / new["s"], (len(grads), 1))
            new |= {"x": common, "common": common, "m": m, "s": 0.0, **errors}
            new["u"] = np.zeros_like(grads)
        if t in refreshes:
            new["v"] = b2 * v + (1 - b2) * grads.mean(0) ** 2
        return new

    return Oracle(init, step)


def one_bit_lamb(
    lr, buckets, leaves, warmup_steps, b1, b2, eps, decay, limits, compress=sign_l2
):
    """LAMB for W steps; then momentum with two-sided feedback and frozen variances.

    `limits` is (max_coeff, min_coeff, coeff_beta, factor_max, factor_min, threshold).
    """
    max_coeff, min_coeff, beta, factor_max, factor_min, threshold = limits

    def init(x0):
        names = ("m", "v", "frozen", "d", "e")
        zeros = {name: np.zeros_like(x0) for name in names}
        scale, c, r = np.ones(len(leaves)), np.zeros(len(leaves)), np.ones(len(leaves))
        return {"x": x0, "scale": scale, "c": c, "r": r, **zeros}

    def step(state, grads, t, rounding):
        del rounding
        t = t + 1
        new = {name: value.copy() for name, value in state.items()}
        old = state["m"][0]
        if t <= warmup_steps:
            g = grads.mean(0)
            m = b1 * old + (1 - b1) * g
        else:
            scale = np.ones(len(old))
            for leaf, rms in zip(leaves, state["scale"], strict=True):
                scale[leaf] = rms
            local = (b1 * old + (1 - b1) * grads) / scale
            m, errors = exchanged(compress, local, state, buckets)
            m, g = m * scale, (m * scale - b1 * old) / (1 - b1)
            new |= errors
        v = b2 * state["v"][0] + (1 - b2) * g**2
        fresh = v / (1 - b2**t)
        frozen = fresh if t <= warmup_steps else state["frozen"][0]
        x = state["x"][0].copy()
        for i, leaf in enumerate(leaves):
            adam = m[leaf] / (1 - b1**t) / (np.sqrt(frozen[leaf]) + eps)
            update = adam + decay * x[leaf]
            if t <= warmup_steps:
                c = np.linalg.norm(x[leaf]) / np.linalg.norm(update)
                c = min(max(c, min_coeff), max_coeff)
                new["c"][i] = beta * state["c"][i] + (1 - beta) * c
                new["scale"][i] = np.sqrt(np.mean(m[leaf] ** 2))
            else:
                ratios = (np.sqrt(frozen) + eps) / (np.sqrt(fresh) + eps)
                share = np.linalg.norm(adam) / np.linalg.norm(update)
                share = min(1, share)
                r = share * ratios[leaf].max() + (1 - share)
                r, last = min(max(r, factor_min), factor_max), state["r"][i]
                r = min(max(r, last * (1 - threshold)), last * (1 + threshold))
                new["r"][i] = r
                c = r * state["c"][i] / (1 - beta**warmup_steps)
            x[leaf] -= lr * c * update
        n = len(grads)
        stacked = {"x": x, "m": m, "v": v, "frozen": frozen}
        return new | {name: np.tile(value, (n, 1)) for name, value in stacked.items()}

    return Oracle(init, step)


def _blocks(x, chunk):
    """Views of the blocks of a vector or matrix; sides are divisors up to `chunk`."""
    matrix = np.atleast_2d(x)
    sides = [
        max(d for d in range(1, chunk + 1) if size % d == 0) for size in matrix.shape
    ]
    h, w = sides if x.ndim > 1 else (1, sides[1])
    for i in range(0, matrix.shape[0], h):
        for j in range(0, matrix.shape[1], w):
            yield matrix[i : i + h, j : j + w]


def demo(lr, leaves, shapes, decay, k, chunk, weight_decay):
    """Send the k largest cosine coefficients of each block, step by signs of means."""

    def init(x0):
        return {"x": x0, "delta": np.zeros_like(x0)}

    def step(state, grads, t, rounding):
        del t, rounding
        delta = decay * state["delta"] + lr * grads
        n, direction = len(grads), np.zeros(grads.shape[1])
        for leaf, shape in zip(leaves, shapes, strict=True):
            workers = [delta[i, leaf].reshape(shape) for i in range(n)]
            target = np.zeros(shape)
            views = [list(_blocks(x, chunk)) for x in [*workers, target]]
            for *blocks, out in zip(*views, strict=True):
                total, count = np.zeros(out.shape), np.zeros(out.shape)
                for block in blocks:
                    spectrum = fft.dctn(block, norm="ortho")
                    order = np.argsort(-np.abs(spectrum), axis=None, kind="stable")[:k]
                    at = np.unravel_index(order, spectrum.shape)
                    sent = np.zeros(out.shape)
                    sent[at] = spectrum[at]
                    total, count[at] = total + sent, count[at] + 1
                    block -= fft.idctn(sent, norm="ortho")
                out[...] = fft.idctn(total / np.maximum(count, 1), norm="ortho")
            for i, worker in enumerate(workers):
                delta[i, leaf] = worker.reshape(-1)
            direction[leaf] = np.sign(target).reshape(-1)
        x = state["x"]
        return {"x": x - lr * (direction + weight_decay * x), "delta": delta}

    return Oracle(init, step)


def gradient_tracking(lr, matrix):
    """y = W y + g - g_old, at first y = g; x = W (x - lr y)."""

    def init(x0):
        return {"x": x0}

    def step(state, grads, t, rounding):
        del rounding
        n = len(grads)
        y = grads
        if t > 0:
            y = matrix(n, t - 1) @ state["y"] + grads - state["g"]
        return {"x": matrix(n, t) @ (state["x"] - lr * y), "y": y, "g": grads}

    return Oracle(init, step)
