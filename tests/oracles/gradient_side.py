"""Gradient-side algorithms and their optimizers, in float64 from the equations.

As in `oracles.algorithms` an oracle is a pair `(init, step)` over worker-stacked flat
vectors `[n, d]`. `buckets` lists the flat positions of each bucket's entries;
compressors are functions of `[..., d]` that treat rows apart.
"""

import numpy as np

from oracles.algorithms import Oracle


def topk(ratio):
    """Keep the ceil(ratio d) entries of largest magnitude of each row."""

    def compress(x):
        k = int(np.ceil(ratio * x.shape[-1]))
        order = np.argsort(-np.abs(x), axis=-1, kind="stable")[..., :k]
        kept = np.zeros_like(x)
        np.put_along_axis(kept, order, np.take_along_axis(x, order, -1), -1)
        return kept

    return compress


def signs(x):
    return np.where(x >= 0, 1.0, -1.0)


def sign_l1(x):
    return np.abs(x).mean(-1, keepdims=True) * signs(x)


def sign_l2(x):
    return np.sqrt((x**2).mean(-1, keepdims=True)) * signs(x)


def gathered(compress, x, worker, owner):
    """All-gather: (mean, errors)."""
    sent = compress(x + worker)
    return sent.mean(0), x + worker - sent, owner


def scatter_reduced(compress, x, worker, owner):
    """ScatterReduce with error feedback at both ends; parts filled up with zeros."""
    n, size = x.shape
    length = -(-size // n)
    corrected = np.zeros((n, n * length))
    corrected[:, :size] = x + worker
    sent = compress(corrected.reshape(n, n, length)).reshape(n, -1)
    owned = sent.mean(0)
    owned[size:] = 0
    owned[:size] += owner.sum(0)
    mean = compress(owned.reshape(n, length)).reshape(-1)
    part = np.repeat(np.arange(n), length) == np.arange(n)[:, None]
    unsent = (corrected - sent)[:, :size], (part * (owned - mean))[:, :size]
    return mean[:size], *unsent


def ring_reduced(compress, x, worker, owner):
    """A ring all-reduce compressed at every hop; the last part filled up with zeros."""
    n, size = x.shape
    length = -(-size // n)
    corrected = np.zeros((n, n * length))
    corrected[:, :size] = x + worker
    mean, unsent = np.zeros(n * length), np.zeros((n, n * length))
    for k in range(n):
        part = slice(k * length, (k + 1) * length)
        share = np.zeros(length)
        for i in [*range(k + 1, n), *range(k + 1)]:  # the owner last
            v = share + corrected[i, part] / n
            v[max(size - k * length, 0) :] = 0
            share = compress(v)
            unsent[i, part] = n * (v - share)
        mean[part] = share
    return mean[:size], unsent[:, :size], owner


def compressed_mean(lr, buckets, compress, exchange):
    """SGD on the compressed mean with feedback wherever something is compressed."""

    def init(x0):
        return {"x": x0, "d": np.zeros_like(x0), "e": np.zeros_like(x0)}

    def step(state, grads, t, rounding):
        del t, rounding
        new = {name: value.copy() for name, value in state.items()}
        for b in buckets:
            mean, new["d"][:, b], new["e"][:, b] = exchange(
                compress, grads[:, b], state["d"][:, b], state["e"][:, b]
            )
            new["x"][:, b] -= lr * mean
        return new

    return Oracle(init, step)


def delayed_gradients(lr, tau):
    """Step along the mean gradient of tau steps ago; stand still before."""

    def init(x0):
        return {"x": x0, "means": []}

    def step(state, grads, t, rounding):
        del rounding
        means = [*state["means"], grads.mean(0)]
        update = means[t - tau] if t >= tau else 0
        return {"x": state["x"] - lr * update, "means": means}

    return Oracle(init, step)


def signum(lr, beta, weight_decay):
    """Step along the sign of the sum of the signs of momenta."""

    def init(x0):
        return {"x": x0, "m": np.zeros_like(x0)}

    def step(state, grads, t, rounding):
        del t, rounding
        m = beta * state["m"] + (1 - beta) * grads
        vote = signs(signs(m).sum(0))
        x = state["x"]
        return {"x": x - lr * (vote + weight_decay * x), "m": m}

    return Oracle(init, step)


def one_bit_adam(lr, buckets, warmup_steps, b1, b2, eps, compress=sign_l2):
    """Adam for W steps; then momentum with two-sided feedback over sqrt(v_W)."""

    def init(x0):
        return {"x": x0} | {name: np.zeros_like(x0) for name in ("m", "v", "d", "e")}

    def step(state, grads, t, rounding):
        del rounding
        new = {name: value.copy() for name, value in state.items()}
        t = t + 1
        if t <= warmup_steps:
            g = grads.mean(0)
            new["m"] = b1 * state["m"] + (1 - b1) * g
            new["v"] = b2 * state["v"] + (1 - b2) * g**2
            m, v = new["m"] / (1 - b1**t), new["v"] / (1 - b2**t)
        else:
            local = b1 * state["m"] + (1 - b1) * grads
            for b in buckets:
                new["m"][:, b], new["d"][:, b], new["e"][:, b] = scatter_reduced(
                    compress, local[:, b], state["d"][:, b], state["e"][:, b]
                )
            m, v = new["m"], state["v"]
        new["x"] = state["x"] - lr * m / (np.sqrt(v) + eps)
        return new

    return Oracle(init, step)


def diana(lr, buckets, compress, alpha):
    """q_i = C(g_i - h_i); step along h + mean q; h_i += alpha q_i."""

    def init(x0):
        return {"x": x0, "h": np.zeros_like(x0)}

    def step(state, grads, t, rounding):
        del t, rounding
        q = np.zeros_like(grads)
        for b in buckets:
            q[:, b] = compress((grads - state["h"])[:, b])
        estimate = (state["h"] + q).mean(0)
        return {"x": state["x"] - lr * estimate, "h": state["h"] + alpha * q}

    return Oracle(init, step)


def ef21(lr, buckets, compress):
    """h_i += C(g_i - h_i); step along mean h."""

    def init(x0):
        return {"x": x0, "h": np.zeros_like(x0)}

    def step(state, grads, t, rounding):
        del t, rounding
        h = state["h"].copy()
        for b in buckets:
            h[:, b] += compress((grads - state["h"])[:, b])
        return {"x": state["x"] - lr * h.mean(0), "h": h}

    return Oracle(init, step)


def dgc(lr, buckets, momentum, ratio, clip=None):
    """Accumulate momenta, send the largest sums, forget what was sent."""

    def init(x0):
        return {"x": x0, "u": np.zeros_like(x0), "v": np.zeros_like(x0)}

    def step(state, grads, t, rounding):
        del t, rounding
        if clip is not None:
            norms = np.linalg.norm(grads, axis=1, keepdims=True)
            grads = grads * np.minimum(1, clip / np.sqrt(len(grads)) / norms)
        u = momentum * state["u"] + grads
        v = state["v"] + u
        chosen = np.zeros(v.shape, bool)
        for b in buckets:
            chosen[:, b] = topk(ratio)(v[:, b]) != 0
        x = state["x"] - lr * (v * chosen).mean(0)
        return {"x": x, "u": u * ~chosen, "v": v * ~chosen}

    return Oracle(init, step)


def powersgd(lr, matrices, warmup_steps=0):
    """Low-rank step of each matrix, exact step of the rest.

    `matrices` lists `(positions, (m, c), Q [c, r])`, one for each compressed leaf.
    """

    def init(x0):
        q = [q.astype(float) for _, _, q in matrices]
        return {"x": x0, "e": np.zeros_like(x0), "q": q}

    def step(state, grads, t, rounding):
        del rounding
        update = np.tile(grads.mean(0), (len(grads), 1))
        if t < warmup_steps:
            return state | {"x": state["x"] - lr * update}
        errors, bases = state["e"].copy(), []
        for (at, shape, _), q in zip(matrices, state["q"], strict=True):
            m = (grads + state["e"])[:, at].reshape(-1, *shape)
            left = np.linalg.qr(m.mean(0) @ q)[0]
            right = m.mean(0).T @ left
            update[:, at] = (left @ right.T).reshape(-1)
            errors[:, at] = (m - left @ right.T).reshape(len(grads), -1)
            bases.append(right)
        return {"x": state["x"] - lr * update, "e": errors, "q": bases}

    return Oracle(init, step)
