"""MARINA, Adasum, CocktailSGD, traces of delays and pair gossip, in float64.

As in `oracles.algorithms` an oracle is a pair `(init, step)` over worker-stacked flat
vectors `[n, d]`; compressors are functions of `[..., d]` that treat rows apart. What is
drawn at random (coins, masks) is given.
"""

import numpy as np

from oracles.algorithms import Oracle


def marina(lr, buckets, compress, dense, gradient=None):
    """Step along the mean gradient if dense[t], else along u + mean C(difference).

    `gradient(x, t)` is taken at the last x on this step's sample; without it the last
    step's gradients stand for that.
    """

    def init(x0):
        return {"x": x0, "u": np.zeros_like(x0[0]), "before": None, "last_x": x0}

    def step(state, grads, t, rounding):
        del rounding
        x = state["x"]
        if dense[t]:
            u = grads.mean(0)
        else:
            before = gradient(state["last_x"], t) if gradient else state["before"]
            u = state["u"].copy()
            for b in buckets:
                u[b] += compress((grads - before)[:, b]).mean(0)
        return {"x": x - lr * u, "u": u, "before": grads, "last_x": x}

    return Oracle(init, step)


def pairwise(a, b):
    """Combine two vectors; a vector of zeros leaves the other as it is."""
    if not (a @ a) or not (b @ b):
        return a + b
    return (1 - a @ b / (2 * (a @ a))) * a + (1 - a @ b / (2 * (b @ b))) * b


def tree_of_pairs(vectors):
    """Combine [n, d] by halves: the tree ((1 2) (3 4)) ((5 6) (7 8))."""
    if len(vectors) == 1:
        return vectors[0]
    half = len(vectors) // 2
    return pairwise(tree_of_pairs(vectors[:half]), tree_of_pairs(vectors[half:]))


def adasum(lr, scopes):
    """Step along the tree of pairs, apart for each list of positions in `scopes`."""

    def init(x0):
        return {"x": x0}

    def step(state, grads, t, rounding):
        del t, rounding
        update = np.zeros_like(grads[0])
        for s in scopes:
            update[s] = tree_of_pairs(grads[:, s])
        return {"x": state["x"] - lr * update}

    return Oracle(init, step)


def masked_scatter_reduce(mask, compress, delta, unsent):
    """Send what is inside the mask of every part to its owner, and its mean back.

    Args:
        mask: places inside a part of ceil(size / n) entries.
        compress: of what is inside, for each part by itself.
        delta: [n, size], the workers' vectors.
        unsent: [size], what owners have not sent; each entry has one owner.

    Returns:
        The move [size], what workers hold back [n, size], and owners [size].
    """
    n, size = delta.shape
    length = -(-size // n)

    def parts(x):
        filled = np.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, n * length - size)])
        return filled.reshape(*x.shape[:-1], n, length)

    def code(x):
        coded = np.zeros_like(x)
        coded[..., mask] = compress(x[..., mask])
        return coded

    def whole(x):
        return x.reshape(*x.shape[:-2], -1)[..., :size]

    sent = code(parts(delta))
    owned = parts(unsent)
    owned[:, mask] += sent.mean(0)[:, mask]
    move = code(owned)
    return whole(move), delta - whole(sent), whole(owned - move)


def cocktail_sgd(lr, buckets, masks, compress, staleness):
    """SGD on a shared copy; masks[t][k] lists the places that step t sends of bucket k.

    Staleness 0: all stand at the copy. 1: the copy moves by the last step's message,
    and each worker stands at its own step from there.
    """

    def init(x0):
        zeros = np.zeros_like(x0[0])
        own = {"e": np.zeros_like(x0), "owner": zeros, "pending": zeros}
        return own | {"x": x0, "shared": x0[0]}

    def step(state, grads, t, rounding):
        del rounding
        u, move = -lr * grads, np.zeros_like(grads[0])
        new = {name: state[name].copy() for name in ("e", "owner")}
        for mask, b in zip(masks[t], buckets, strict=True):
            move[b], new["e"][:, b], new["owner"][b] = masked_scatter_reduce(
                mask, compress, u[:, b] + state["e"][:, b], state["owner"][b]
            )
        shared = state["shared"] + (state["pending"] if staleness else move)
        x = np.tile(shared, (len(u), 1)) + (u if staleness else 0)
        return new | {"x": x, "shared": shared, "pending": move}

    return Oracle(init, step)


def delayed_gradients(lr, delays):
    """Step along the mean of gradients of delays[t % period][i] steps ago."""

    def init(x0):
        return {"x": x0, "seen": []}

    def step(state, grads, t, rounding):
        del rounding
        seen = [*state["seen"], grads]
        used = np.zeros_like(grads)
        for i, delay in enumerate(delays[t % len(delays)]):
            if delay <= t:
                used[i] = seen[t - delay][i]
        return {"x": state["x"] - lr * used.mean(0), "seen": seen}

    return Oracle(init, step)


def pair_gossip(lr, matrix):
    """x <- W_t x - lr g, with gradients at the x before averaging."""

    def init(x0):
        return {"x": x0}

    def step(state, grads, t, rounding):
        del rounding
        return {"x": matrix(t) @ state["x"] - lr * grads}

    return Oracle(init, step)
