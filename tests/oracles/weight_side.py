"""Weight-side algorithms as step functions on worker-stacked flat vectors.

The protocol is that of :mod:`oracles.algorithms`; ``rounding`` is not used. Matrices
are ``w[i, j]``, the weight that worker i puts on worker j's vector; compressors are
functions of ``[n, d]`` that act on each row.
"""

import numpy as np

from oracles.algorithms import Oracle, mean_over_workers, mix
from oracles.codec import f32


def local_sgd(sgd, local_steps, warmup_steps=0):
    """x_i += u_i; x_i = mean after every H-th step, before the start after each."""

    def init(x0):
        return {"x": x0, **sgd.init(x0)}

    def step(state, grads, t, rounding):
        del rounding
        update, inner = sgd.update(state, grads)
        x = state["x"] + update
        if t < warmup_steps or (t - warmup_steps) % local_steps == local_steps - 1:
            x = mean_over_workers(x)
        return {"x": x, **inner}

    return Oracle(init, step)


def slowmo(sgd, local_steps, beta, alpha, gamma):
    """v = beta v + (previous - mean) / gamma; x = previous - alpha gamma v."""

    def init(x0):
        return {"x": x0, "previous": x0, "v": np.zeros_like(x0), **sgd.init(x0)}

    def step(state, grads, t, rounding):
        del rounding
        update, inner = sgd.update(state, grads)
        x, previous, v = state["x"] + update, state["previous"], state["v"]
        if t % local_steps == local_steps - 1:
            v = f32(beta) * v + (previous - mean_over_workers(x)) / f32(gamma)
            x = previous = previous - f32(alpha) * f32(gamma) * v
        return {"x": x, "previous": previous, "v": v, **inner}

    return Oracle(init, step)


def diloco(sgd, local_steps, eta, beta, compress=None):
    """After H steps v = beta v + D; theta -= eta (D + beta v), D = mean(theta - x_i).

    ``compress`` is linear, so that how owners partition a vector makes no difference;
    errors of workers ``d`` and of owners ``e`` (once for all workers) are fed back.
    """

    def init(x0):
        zeros = np.zeros_like(x0)
        return {"x": x0, "theta": x0, "v": zeros, "d": zeros, "e": zeros} | sgd.init(x0)

    def step(state, grads, t, rounding):
        del rounding
        update, inner = sgd.update(state, grads)
        x, theta, v = state["x"] + update, state["theta"], state["v"]
        d, e = state["d"], state["e"]
        if t % local_steps == local_steps - 1:
            move = theta - x
            if compress is not None:
                move, d = compress(move + d), move + d - compress(move + d)
            mean = mean_over_workers(move)
            if compress is not None:
                mean, e = compress(mean + e), mean + e - compress(mean + e)
            v = f32(beta) * v + mean
            x = theta = theta - f32(eta) * (mean + f32(beta) * v)
        return {"x": x, "theta": theta, "v": v, "d": d, "e": e, **inner}

    return Oracle(init, step)


def choco_sgd(sgd, matrix, gamma, compress, staleness=0):
    """Gossip on public copies of ``staleness`` steps ago, all of them held here.

    x_i += u_i; x_hat_i += C(x_i - x_hat_i); with the copies h = x_hat of t - staleness
    (0 before the start): x_i += gamma (sum_j W_ij h_j - h_i).
    """

    def init(x0):
        copies = np.zeros((staleness + 1, *x0.shape), f32)  # the newest first
        return {"x": x0, "copies": copies, **sgd.init(x0)}

    def step(state, grads, t, rounding):
        del t, rounding
        update, inner = sgd.update(state, grads)
        x, copies = state["x"] + update, state["copies"]
        newest = copies[0] + compress(x - copies[0])
        copies = np.concatenate([newest[None], copies])[: staleness + 1]
        heard = copies[staleness]
        x = x + f32(gamma) * (mix(matrix(len(x)), heard) - heard)
        return {"x": x, "copies": copies, **inner}

    return Oracle(init, step)


def d2(sgd, matrix):
    """x_{t+1} = W (2 x_t - x_{t-1} + u_t - u_{t-1}); at first W (x + u)."""

    def init(x0):
        zeros = np.zeros_like(x0)
        return {"x": x0, "x_before": zeros, "u_before": zeros, **sgd.init(x0)}

    def step(state, grads, t, rounding):
        del rounding
        u, inner = sgd.update(state, grads)
        x = state["x"]
        if t == 0:
            mixed = x + u
        else:
            mixed = f32(2) * x - state["x_before"] + u - state["u_before"]
        new = mix(matrix(len(x)), mixed)
        return {"x": new, "x_before": x, "u_before": u, **inner}

    return Oracle(init, step)


def exact_diffusion(sgd, matrix):
    """psi = x + u; phi = psi + x - psi_old; x = ((I + W) / 2) phi; psi_old = x_0."""

    def init(x0):
        return {"x": x0, "psi": x0, **sgd.init(x0)}

    def step(state, grads, t, rounding):
        del t, rounding
        u, inner = sgd.update(state, grads)
        psi = state["x"] + u
        phi = psi + state["x"] - state["psi"]
        n = len(psi)
        return {"x": mix((np.eye(n) + matrix(n)) / 2, phi), "psi": psi, **inner}

    return Oracle(init, step)


def deep_squeeze(sgd, matrix, eta, compress):
    """v = x + u + d; d = v - C(v); x = x + u + eta (W - I) C(v)."""

    def init(x0):
        return {"x": x0, "d": np.zeros_like(x0), **sgd.init(x0)}

    def step(state, grads, t, rounding):
        del t, rounding
        u, inner = sgd.update(state, grads)
        half = state["x"] + u
        v = half + state["d"]
        c = compress(v)
        n = len(v)
        x = half + f32(eta) * mix(matrix(n) - np.eye(n), c)
        return {"x": x, "d": v - c, **inner}

    return Oracle(init, step)


def stochastic_gradient_push(sgd, matrix):
    """y += u; y = W y; w = W w; x = y / w; columns of W sum to 1; matrix(n, t)."""

    def init(x0):
        return {"x": x0, "y": x0, "w": np.ones((len(x0), 1), f32), **sgd.init(x0)}

    def step(state, grads, t, rounding):
        del rounding
        u, inner = sgd.update(state, grads)
        w = matrix(len(u), t)
        y, mass = mix(w, state["y"] + u), mix(w, state["w"])
        return {"x": y / mass, "y": y, "w": mass, **inner}

    return Oracle(init, step)
