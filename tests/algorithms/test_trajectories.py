"""Every algorithm against its NumPy oracle, wherever workers live.

The problem: worker i holds f_i(x) = (x - b_i)' H_i (x - b_i) / 2 with dense H_i, plus
fresh noise in its gradient at every step, over a tree of odd-sized, 0-d, nested and
None leaves. The places: a bare `jax.vmap`, `Workers.simulate`, `Workers.devices` (and
`jax.pmap` for one algorithm).

Three kinds of comparison, because codes are decided at ties:

1. *Unquantized* trajectories are run freely by both sides and must agree at every step
   to a few units in the last place; the maps contract, so nothing accumulates.
2. *Quantized* trajectories on general values are followed step by step: the oracle
   starts every step from the JAX state (hidden state included) and must arrive at the
   next one. A free run would prove less: an entry that lies within rounding noise of a
   tie gets another code in another compiler's order of additions, and error feedback
   and gossip carry that difference on for ever. Such a flip is accepted only where the
   oracle itself saw the entry within `WINDOW` of a tie and where turning just those
   entries reproduces the whole next state; flips are counted and must be few.
3. *Quantized trajectories on a dyadic problem* are run freely and must agree bit for
   bit. Everything there is a small multiple of a power of two and two pinned entries
   make each range 255 of them, so that sums are exact in any order, scales are powers
   of two, and the ties, now frequent, are ties for everybody.
"""

import functools

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P
from oracles import algorithms as oracles
from oracles import buckets
from oracles.algorithms import Sgd
from oracles.codec import Rounding, f32
from oracles.scatter_reduce import bounds

import bagua_jax
from bagua_jax import compressors
from bagua_jax.algorithms import (
    async_model_average,
    bytegrad,
    decentralized,
    gradient_allreduce,
    low_precision_decentralized,
    qadam,
)

AXIS = "workers"
STEPS = 50
SEED = 7
WINDOW = 3e-4  # in codes; the noise of a code's argument is about a tenth of it
ATOL = 4e-6  # states are of order 1 to 10, one quantum is 1e-3 or more

TREE = {
    "bias": np.zeros(()),
    "block": {"absent": None, "kernel": np.zeros((3, 5)), "scale": np.zeros(7)},
    "head": [np.zeros(1), (np.zeros((13,)), None)],
}
SIZES = [leaf.size for leaf in jax.tree.leaves(TREE)]
D = sum(SIZES)
WHOLE, SPLIT, MANY = 10 * 2**20, 72, 40  # bucket_bytes: one bucket; two; four


# --- problems ------------------------------------------------------------------------


class Problem:
    """Heterogeneous noisy quadratics: gradients H_i (x - b_i) + noise_i(t)."""

    def __init__(self, n, h, b, noise, x0):
        self.n, self.x0 = n, np.broadcast_to(x0.astype(f32), (n, D))
        self.data = {"h": h, "b": b, "noise": noise}
        self.data = {name: x.astype(f32) for name, x in self.data.items()}

    def gradient(self, x, t):
        h, b, noise = self.data["h"], self.data["b"], self.data["noise"]
        return (h @ (x - b)[..., None])[..., 0] + noise[:, t]


@functools.cache
def general(n, bucket_bytes=WHOLE, steady=False):
    """Draw a problem; two gradient entries of each partition stay far apart.

    Without them a partition of a few entries has a small range now and then; its grid
    is then so fine that the noise of float32 alone decides codes. The two change roles
    at every step, so that parameters stay small, unless they are to be `steady`, for a
    momentum that travels.
    """
    rng = np.random.default_rng([SEED, n])
    root = rng.standard_normal((n, D, D)) / np.sqrt(D)
    noise = 0.3 * rng.standard_normal((n, STEPS, D))
    apart = np.full(STEPS, 4) if steady else 4 * (-1) ** np.arange(STEPS)
    for lowest, highest in pins(n, bucket_bytes):
        noise[:, :, lowest] -= apart
        noise[:, :, highest] += apart
    return Problem(
        n,
        h=0.2 * np.eye(D) + 0.4 * root @ np.swapaxes(root, 1, 2),
        b=rng.standard_normal((n, D)),
        noise=noise,
        x0=rng.standard_normal(D),
    )


def pins(n, bucket_bytes):
    """List the first two positions of each partition of each bucket."""
    parts = [
        bucket[part]
        for bucket in buckets.indices(SIZES, bucket_bytes)
        for part in bounds(len(bucket), n)
    ]
    return [part[:2] for part in parts if len(part) > 1]


def dyadic(n, pinned, pin_scale=1):
    """Build a problem of few-bit numbers with constant gradients at pinned entries.

    `pinned` lists (position of the smallest entry, position of the largest entry).
    """
    rng = np.random.default_rng([SEED, n, 1])
    h = 0.25 * rng.integers(1, 5, (n, D))
    noise = rng.integers(-8, 9, (n, STEPS, D)) / 64
    for lowest, highest in pinned:
        h[:, [lowest, highest]] = 0
        noise[:, :, lowest] = pin_scale * -127 / 64
        noise[:, :, highest] = pin_scale * 128 / 64
    return Problem(
        n,
        h=h[..., None] * np.eye(D),
        b=rng.integers(-16, 17, (n, D)) / 16,
        noise=noise,
        x0=rng.integers(-16, 17, D) / 64,
    )


# --- the JAX side --------------------------------------------------------------------


def flat(tree):
    return jax.flatten_util.ravel_pytree(tree)[0]


def per_worker(make_tx, places_weights, observe):
    """Build the function of one worker: the whole run, as any user would write it."""

    def run(params, data):
        tx = make_tx()
        if places_weights:
            params = bagua_jax.worker_local(params, AXIS)
        opt_state = tx.init(params)

        def step(carry, noise):
            params, opt_state = carry
            x, unravel = jax.flatten_util.ravel_pytree(
                bagua_jax.worker_local(params, AXIS)
            )
            grads = unravel(data["h"] @ (x - data["b"]) + noise)
            updates, opt_state = tx.update(grads, opt_state, params)
            params = optax.apply_updates(params, updates)
            return (params, opt_state), seen(params, opt_state)

        def seen(params, opt_state):
            return {"x": flat(params), **observe(opt_state)}

        _, later = jax.lax.scan(step, (params, opt_state), data["noise"])
        first = seen(params, opt_state)
        return jax.tree.map(lambda a, b: jnp.concatenate([a[None], b]), first, later)

    return run


def run_in(place, run, problem):
    """Run on all workers; `{name: [T + 1, D] if held once, else [n, T + 1, D]}`."""
    n = problem.n
    leaves, structure = jax.tree.flatten(TREE)
    ends = np.cumsum(SIZES)
    params = jax.tree.unflatten(
        structure,
        [
            problem.x0[0, end - leaf.size : end].reshape(leaf.shape)
            for leaf, end in zip(leaves, ends, strict=True)
        ],
    )
    if place == "vmap":
        mapped = jax.jit(jax.vmap(run, in_axes=(None, 0), axis_name=AXIS))
    elif place == "pmap":
        mapped = jax.pmap(run, in_axes=(None, 0), axis_name=AXIS)
    else:
        make = getattr(bagua_jax.Workers, place)
        mapped = make(n, axis_name=AXIS).spmd(run, in_specs=(P(), P(AXIS)))
    return jax.tree.map(np.asarray, mapped(params, problem.data))


def stacked(record, n):
    """Put time first and give every worker its row: `[T + 1, n, D]`."""
    return {
        name: np.moveaxis(np.broadcast_to(x, (n, *x.shape[-2:])), 0, 1)
        for name, x in record.items()
    }


def runs(make_tx, problem, *, weight_side=False, observe=lambda _: {}, places=None):
    """Run everywhere; yield `(place, {name: [T + 1, n, D]})`."""
    run = per_worker(make_tx, weight_side, observe)
    if places is None:  # compilation is what these tests spend their time on
        places = ["vmap", "devices", "simulate"][: 3 if problem.n == 8 else 2]
    for place in places:
        record = run_in(place, run, problem)
        if place in ("simulate", "devices"):  # where equal parameters are proved equal
            assert record["x"].ndim == (3 if weight_side else 2), place
        yield place, stacked(record, problem.n)


def inner(sgd):
    return optax.sgd(sgd.lr, momentum=sgd.momentum or None)


def see_inner_and_errors(state):
    """Read the hidden state that the oracles keep under the same names."""
    names = {
        "trace": optax.tree.get(state, "trace"),
        "m": optax.tree.get(state, "mu"),
    }
    if (error := optax.tree.get(state, "error")) is not None:
        names |= {"worker_error": error.worker, "owner_error": error.owner}
    return {name: flat(tree) for name, tree in names.items() if tree is not None}


# --- the comparisons -----------------------------------------------------------------


def assert_runs_freely(oracle, make_tx, problem, **kinds):
    expected = oracles.trajectory(oracle, problem.x0, problem.gradient, STEPS)
    assert np.isfinite(expected).all() and np.ptp(expected, axis=0).max() > 0.1
    for place, got in runs(make_tx, problem, **kinds):
        np.testing.assert_allclose(got["x"], expected, rtol=0, atol=ATOL, err_msg=place)


def close(got, expected, atol):
    return all(
        np.allclose(got[name], expected[name], rtol=0, atol=atol) for name in expected
    )


def explain(take_step, expected, atol):
    """Find near-ties whose turning leads to `expected`; None if there are none."""
    tried = {frozenset()}
    frontier = [frozenset()]
    for _ in range(4):  # flips in one step
        grown = []
        for flips in frontier:
            rounding = Rounding(flips, WINDOW)
            if close(take_step(rounding), expected, atol):
                return flips
            for address in rounding.near:
                more = flips | {address}
                if more not in tried:
                    tried.add(more)
                    grown.append(more)
        frontier = grown
    return None


def assert_follows(
    oracle, make_tx, problem, rebuild=lambda own, start: {}, max_flips=3, **kinds
):
    free = oracles.trajectory(oracle, problem.x0, problem.gradient, STEPS)
    assert np.isfinite(free).all() and np.ptp(free, axis=0).max() > 0.1
    kinds = {"observe": see_inner_and_errors, **kinds}
    for place, record in runs(make_tx, problem, **kinds):
        own = oracle.init(problem.x0)
        at_start = {name: x[0] for name, x in record.items()}
        assert close(own, at_start, 0), f"{place}: the initial states differ"
        flipped = 0
        for t in range(STEPS):
            # from the JAX state; what it does not show, the oracle carries itself
            start = {**own, **{name: x[t] for name, x in record.items()}}
            start |= rebuild(own, start)
            arrival = {name: x[t + 1] for name, x in record.items()}
            grads = problem.gradient(start["x"], t)

            def take_step(rounding, start=start, grads=grads, t=t):
                return oracle.step(start, grads, t, rounding)

            flips = explain(take_step, arrival, ATOL)
            if flips is None:
                plain = take_step(np.rint)
                off = {
                    name: float(np.abs(plain[name] - arrival[name]).max())
                    for name in arrival
                }
                pytest.fail(f"{place}, step {t}: off by {off}, not by near-ties")
            flipped += len(flips)
            own = take_step(Rounding(flips, WINDOW))
        assert flipped <= max_flips, f"{place}: {flipped} codes differ"


def assert_equal_bits(oracle, make_tx, problem, **kinds):
    expected = oracles.trajectory(oracle, problem.x0, problem.gradient, STEPS)
    for place, got in runs(make_tx, problem, **kinds):
        np.testing.assert_array_equal(got["x"], expected, err_msg=place)


def test_explain_accepts_turned_near_ties_and_nothing_else():
    problem = general(3)
    oracle = oracles.bytegrad(Sgd(0.1), buckets.indices(SIZES, WHOLE), "both")
    start = oracle.init(problem.x0)
    grads = problem.gradient(problem.x0, 0)
    bucket = buckets.indices(SIZES, WHOLE)[0]
    part = bucket[bounds(D, 3)[0]]
    grads[0, part[2]] = 0.5 / (f32(255) / np.ptp(grads[0, part]))  # code 0.5: a tie

    def take_step(rounding):
        return oracle.step(start, grads, 0, rounding)

    window = Rounding(window=WINDOW)
    plain = take_step(window)
    (tie,) = window.near
    turned = take_step(Rounding({tie}, WINDOW))
    assert not close(plain, turned, ATOL)
    assert explain(take_step, plain, ATOL) == frozenset()
    assert explain(take_step, turned, ATOL) == {tie}
    wrong = {**turned, "x": turned["x"] + 1e-5}
    assert explain(take_step, wrong, ATOL) is None


# --- gradient side -------------------------------------------------------------------


@pytest.mark.parametrize(
    "n, sgd, bucket_bytes",
    [(8, Sgd(0.2), WHOLE), (4, Sgd(0.1, 0.9), MANY), (1, Sgd(0.1), WHOLE)],
)
def test_gradient_allreduce(n, sgd, bucket_bytes):
    def make_tx():
        sync = gradient_allreduce(axis_name=AXIS, bucket_bytes=bucket_bytes)
        return optax.chain(sync, inner(sgd))

    assert_runs_freely(
        oracles.gradient_allreduce(sgd), make_tx, general(n, bucket_bytes)
    )


def make_bytegrad(sgd, error_feedback, bucket_bytes):
    sync = bytegrad(
        axis_name=AXIS, bucket_bytes=bucket_bytes, error_feedback=error_feedback
    )
    return optax.chain(sync, inner(sgd))


@pytest.mark.parametrize(
    "n, sgd, error_feedback, bucket_bytes",
    [
        (4, Sgd(0.05, 0.9), "none", SPLIT),
        (4, Sgd(0.1), "worker", WHOLE),
        (5, Sgd(0.1), "owner", WHOLE),
        (8, Sgd(0.1), "both", WHOLE),
        (3, Sgd(0.05, 0.9), "both", SPLIT),
        (1, Sgd(0.1), "both", WHOLE),
    ],
)
def test_bytegrad(n, sgd, error_feedback, bucket_bytes):
    oracle = oracles.bytegrad(sgd, buckets.indices(SIZES, bucket_bytes), error_feedback)
    make_tx = functools.partial(make_bytegrad, sgd, error_feedback, bucket_bytes)
    assert_follows(oracle, make_tx, general(n, bucket_bytes))


@pytest.mark.parametrize(
    "n, error_feedback, bucket_bytes",
    [
        (8, "none", WHOLE),
        (8, "worker", WHOLE),
        (8, "owner", WHOLE),
        (8, "both", WHOLE),
        (4, "both", SPLIT),
    ],
)
def test_bytegrad_bit_for_bit(n, error_feedback, bucket_bytes):
    split = buckets.indices(SIZES, bucket_bytes)
    assert len(split) == (1 if bucket_bytes == WHOLE else 2)
    problem = dyadic(n, pins(n, bucket_bytes))
    sgd = Sgd(0.25)
    oracle = oracles.bytegrad(sgd, split, error_feedback)
    make_tx = functools.partial(make_bytegrad, sgd, error_feedback, bucket_bytes)
    everywhere = (n, error_feedback) == (8, "both")
    places = ["vmap", "devices", "pmap"] if everywhere else ["devices"]
    assert_equal_bits(oracle, make_tx, problem, places=places)


# --- optimizer -----------------------------------------------------------------------


@pytest.mark.parametrize(
    "n, warmup_steps, weight_decay, error_feedback, bucket_bytes",
    [
        (4, 2, 0.0, "none", WHOLE),
        (8, 10, 0.05, "both", WHOLE),
        (3, 25, 0.1, "worker", SPLIT),
        (4, 10, 0.0, "owner", WHOLE),
    ],
)
def test_qadam(n, warmup_steps, weight_decay, error_feedback, bucket_bytes):
    oracle = oracles.qadam(
        2e-2,
        buckets.indices(SIZES, bucket_bytes),
        warmup_steps,
        weight_decay=weight_decay,
        error_feedback=error_feedback,
    )

    def make_tx():
        return qadam(
            2e-2,
            axis_name=AXIS,
            warmup_steps=warmup_steps,
            weight_decay=weight_decay,
            error_feedback=error_feedback,
            bucket_bytes=bucket_bytes,
        )

    assert_follows(oracle, make_tx, general(n, bucket_bytes, steady=True))


def test_qadam_uncompressed():
    """Other betas and eps, and no codes: the whole switch in a free run."""
    settings = dict(warmup_steps=7, weight_decay=0.2, b1=0.8, b2=0.95, eps=1e-3)
    oracle = oracles.qadam(3e-2, [], compressed=False, **settings)

    def make_tx():
        return qadam(
            3e-2, axis_name=AXIS, compressor=compressors.identity(), **settings
        )

    assert_runs_freely(oracle, make_tx, general(4))


# --- weight side ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "n, sgd, topology, interval, combine, bucket_bytes",
    [
        (8, Sgd(0.1), "ring", 1, "before", WHOLE),
        (7, Sgd(0.1), "ring", 2, "after", SPLIT),
        (4, Sgd(0.1), "complete", 3, "before", WHOLE),
        (6, Sgd(0.1), "static_exponential", 1, "after", WHOLE),
        (8, Sgd(0.1), "one_peer_exponential", 1, "before", WHOLE),
        (4, Sgd(0.05, 0.9), "one_peer_exponential", 2, "after", MANY),
        (8, Sgd(0.1), "shift_one", 1, "before", WHOLE),
        (4, Sgd(0.05, 0.9), "shift_one", 3, "after", WHOLE),
        (6, Sgd(0.1), "shift_one", 2, "before", SPLIT),
        (5, Sgd(0.1), "static_exponential", 3, "before", WHOLE),
        (3, Sgd(0.1), "one_peer_exponential", 1, "after", WHOLE),
        (2, Sgd(0.1), "ring", 1, "before", WHOLE),
        (1, Sgd(0.1), "ring", 2, "after", WHOLE),
    ],
)
def test_decentralized(n, sgd, topology, interval, combine, bucket_bytes):
    oracle = oracles.decentralized(sgd, topology, interval, combine)

    def make_tx():
        gossip = decentralized(
            axis_name=AXIS,
            topology=topology,
            local_steps=interval,
            combine=combine,
            bucket_bytes=bucket_bytes,
        )
        return optax.chain(inner(sgd), gossip)

    assert_runs_freely(oracle, make_tx, general(n, bucket_bytes), weight_side=True)


def make_lpd(sgd, topology, bucket_bytes, **more):
    gossip = low_precision_decentralized(
        axis_name=AXIS, topology=topology, bucket_bytes=bucket_bytes, **more
    )
    return optax.chain(inner(sgd), gossip)


def replicas_are_copies(own, start):
    """Rebuild the replicas: each must equal the parameters that it replicates."""
    absent = np.isnan(own["replicas"])
    return {"replicas": np.where(absent, f32(np.nan), start["x"][None])}


@pytest.mark.parametrize(
    "n, sgd, topology, bucket_bytes",
    [
        *[(n, Sgd(0.1), "ring", WHOLE) for n in range(1, 9)],
        (3, Sgd(0.05, 0.9), "ring", SPLIT),
        (4, Sgd(0.1), "complete", WHOLE),
        (3, Sgd(0.1), "static_exponential", WHOLE),
    ],
)
def test_low_precision_decentralized(n, sgd, topology, bucket_bytes):
    oracle = oracles.low_precision_decentralized(
        sgd, buckets.indices(SIZES, bucket_bytes), topology
    )
    make_tx = functools.partial(make_lpd, sgd, topology, bucket_bytes)
    assert_follows(
        oracle,
        make_tx,
        general(n, bucket_bytes),
        rebuild=replicas_are_copies,
        weight_side=True,
        places=["vmap"] if n in (4, 5, 6, 7) else None,
    )


def test_low_precision_decentralized_bit_for_bit():
    n, sgd = 4, Sgd(0.25)
    split = buckets.indices(SIZES, SPLIT)
    # the pinned entries of z are -lr g
    problem = dyadic(n, [bucket[1::-1] for bucket in split], pin_scale=-4)
    oracle = oracles.low_precision_decentralized(sgd, split, "complete")
    make_tx = functools.partial(make_lpd, sgd, "complete", SPLIT)
    assert_equal_bits(oracle, make_tx, problem, weight_side=True)


def test_low_precision_decentralized_uncompressed_is_decentralized():
    """With nothing lost, w = x and the difference coding cancels: x' = W x + u."""
    sgd = Sgd(0.1)
    make_tx = functools.partial(
        make_lpd, sgd, "ring", WHOLE, compressor=compressors.identity()
    )
    oracle = oracles.decentralized(sgd, "ring", combine="before")
    assert_runs_freely(oracle, make_tx, general(5), weight_side=True)


@pytest.mark.parametrize(
    "n, sgd, period, staleness, warmup_steps, bucket_bytes",
    [
        (4, Sgd(0.1), 3, 0, 0, WHOLE),
        (4, Sgd(0.1), 3, 1, 0, WHOLE),
        (8, Sgd(0.1), 3, 2, 5, SPLIT),
        (4, Sgd(0.1), 1, 1, 0, WHOLE),
        (4, Sgd(0.05, 0.9), 2, 2, 3, WHOLE),
        (4, Sgd(0.05, 0.9), 4, 0, 6, SPLIT),
        (4, Sgd(0.1), 5, 4, 1, WHOLE),
    ],
)
def test_async_model_average(n, sgd, period, staleness, warmup_steps, bucket_bytes):
    oracle = oracles.async_model_average(sgd, period, staleness, warmup_steps)

    def make_tx():
        average = async_model_average(
            axis_name=AXIS,
            local_steps=period,
            staleness=staleness,
            warmup_steps=warmup_steps,
            bucket_bytes=bucket_bytes,
        )
        return optax.chain(inner(sgd), average)

    assert_runs_freely(oracle, make_tx, general(n, bucket_bytes), weight_side=True)
