"""More weight-side algorithms as step functions on worker-stacked flat vectors.

The protocol is that of :mod:`oracles.algorithms`; ``rounding`` is not used. Matrices
are ``w[i, j]``, the weight that worker i puts on worker j's vector; compressors are
functions of ``[n, d]`` that act on each row. What algorithms only imply is held here in
full: every estimate, every message under way, every count.
"""

import numpy as np

from oracles.algorithms import Oracle, mean_over_workers, mix
from oracles.codec import f32


def ecd_psgd(sgd, matrix, compress):
    """x' = W y + u; z = (1 - t/2) x + (t/2) x'; y' = (1 - 2/t) y + (2/t) C(z)."""

    def init(x0):
        return {"x": x0, "y": x0, **sgd.init(x0)}

    def step(state, grads, t, rounding):
        del rounding
        u, inner = sgd.update(state, grads)
        t, x, y = f32(t + 1), state["x"], state["y"]
        new = mix(matrix(len(x)), y) + u
        z = (1 - t / 2) * x + t / 2 * new
        return {"x": new, "y": (1 - 2 / t) * y + 2 / t * compress(z), **inner}

    return Oracle(init, step)


def moniqua(sgd, matrix, theta, bits):
    """Send q = Q((x / B) mod 1); x_hat_j = x_i + (q_j B - x_i, wrapped to B/2)."""
    points = 2**bits
    modulus = f32(2 * theta / (1 - 1 / points))

    def wrap(z):
        return (z + modulus / 2) % modulus - modulus / 2

    def init(x0):
        return {"x": x0, **sgd.init(x0)}

    def step(state, grads, t, rounding):
        del rounding
        u, inner = sgd.update(state, grads)
        x = state["x"]
        w = matrix(len(x), t)
        q = np.rint(x / modulus % 1 * points) % points / points
        new = np.empty_like(x)
        for i, own in enumerate(x):
            recovered = wrap((q * modulus).astype(f32) - own) + own
            linked = (w[i] > 0)[:, None]
            assert (np.abs(x - own) * linked).max() <= theta, "out of the bound"
            new[i] = own + (w[i][:, None] * (recovered - recovered[i])).sum(0)
        return {"x": (new + u).astype(f32), **inner}

    return Oracle(init, step)


def relay_sgd(sgd, edges, n):
    """Sums and counts along the edges of a tree, x_0 for workers not heard yet."""
    ways = [(i, j) for i, j in edges] + [(j, i) for i, j in edges]

    def init(x0):
        return {
            "x": x0,
            "start": x0,
            "messages": {way: np.zeros_like(x0[0]) for way in ways},
            "counts": dict.fromkeys(ways, 0),
            **sgd.init(x0),
        }

    def step(state, grads, t, rounding):
        del t, rounding
        u, inner = sgd.update(state, grads)
        half = state["x"] + u
        messages, counts = {}, {}
        for i, j in ways:
            others = [(k, to) for k, to in ways if to == i and k != j]
            messages[i, j] = half[i] + sum(state["messages"][way] for way in others)
            counts[i, j] = 1 + sum(state["counts"][way] for way in others)
        rows = []
        for i in range(n):
            heard = [way for way in ways if way[1] == i]
            missing = n - 1 - sum(counts[way] for way in heard)
            total = half[i] + sum(messages[way] for way in heard)
            rows.append((total + f32(missing) * state["start"][i]) / f32(n))
        return {
            "x": np.stack(rows).astype(f32),
            "start": state["start"],
            "messages": messages,
            "counts": counts,
            **inner,
        }

    return Oracle(init, step)


def quasi_global_momentum(sgd, matrix, gamma, beta, mu):
    """x_half = x + u - gamma beta m; x' = W x_half; m = mu m + (1-mu)(x - x')/gamma."""

    def init(x0):
        return {"x": x0, "m": np.zeros_like(x0), **sgd.init(x0)}

    def step(state, grads, t, rounding):
        del rounding
        u, inner = sgd.update(state, grads)
        x, m = state["x"], state["m"]
        new = mix(matrix(len(x), t), x + u - f32(gamma * beta) * m)
        m = f32(mu) * m + f32(1 - mu) * (x - new) / f32(gamma)
        return {"x": new, "m": m, **inner}

    return Oracle(init, step)


def overlapped_push(sgd, matrix, staleness):
    """Keep W_ii of (y, w), and add what was sent to i ``staleness`` steps ago."""

    def init(x0):
        return {
            "x": x0,
            "y": x0,
            "w": np.ones((len(x0), 1), f32),
            "sent": {},
            **sgd.init(x0),
        }

    def step(state, grads, t, rounding):
        del rounding
        u, inner = sgd.update(state, grads)
        y, w = state["y"] + u, state["w"]
        shares = matrix(len(u), t)
        away = shares - np.diag(np.diag(shares))
        own = np.diag(shares).astype(f32)[:, None]
        sent = {**state["sent"], t: (mix(away, y), mix(away, w))}
        y, w = own * y, own * w
        if t >= staleness:
            arrived_y, arrived_w = sent.pop(t - staleness)
            y, w = y + arrived_y, w + arrived_w
        return {"x": y / w, "y": y, "w": w, "sent": sent, **inner}

    return Oracle(init, step)


def hierarchical_averaging(sgd, periods):
    """After step t = 1, 2, ... the largest group whose period divides t averages."""

    def init(x0):
        return {"x": x0, **sgd.init(x0)}

    def step(state, grads, t, rounding):
        del rounding
        u, inner = sgd.update(state, grads)
        x = state["x"] + u
        due = [size for period, size in periods.items() if (t + 1) % period == 0]
        if due:
            groups = x.reshape(-1, max(due), x.shape[1])
            x = np.concatenate([mean_over_workers(group) for group in groups])
        return {"x": x, **inner}

    return Oracle(init, step)


def streaming_diloco(sgd, local_steps, parts, staleness, alpha, eta, beta, compress):
    """Send mean(theta - x_i) of a fragment; when it arrives, step and merge.

    ``parts[p]`` are the flat positions of fragment p. A message stays in ``sent`` until
    it arrives. ``compress`` is linear, so that how owners partition a vector makes no
    difference; errors of workers ``d`` and of owners ``e`` are fed back.
    """
    turns = [(p + 1) * local_steps // len(parts) for p in range(len(parts))]

    def init(x0):
        zeros = np.zeros_like(x0)
        state = {"x": x0, "theta": x0, "v": zeros, "d": zeros, "e": zeros, "sent": {}}
        return state | sgd.init(x0)

    def step(state, grads, t, rounding):
        del rounding
        u, inner = sgd.update(state, grads)
        t = t + 1
        x = state["x"] + u
        theta, v, d, e = (state[name].copy() for name in ("theta", "v", "d", "e"))
        sent = dict(state["sent"])
        for p, part in enumerate(parts):
            if t >= turns[p] and (t - turns[p]) % local_steps == 0:
                v_w = theta[:, part] - x[:, part] + d[:, part]
                c = compress(v_w)
                d[:, part] = v_w - c
                v_o = mean_over_workers(c) + e[:, part]
                sent[p, t + staleness] = compress(v_o)
                e[:, part] = v_o - compress(v_o)
            if (p, t) in sent:
                mean = sent.pop((p, t))
                v[:, part] = f32(beta) * v[:, part] + mean
                theta[:, part] -= f32(eta) * (mean + f32(beta) * v[:, part])
                x[:, part] = f32(alpha) * x[:, part] + f32(1 - alpha) * theta[:, part]
        return {
            "x": x,
            "theta": theta,
            "v": v,
            "d": d,
            "e": e,
            "sent": sent,
            **inner,
        }

    return Oracle(init, step)
