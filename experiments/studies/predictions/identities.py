"""Identities that hold at every step, up to the rounding of float32."""

import functools
import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bagua_jax import algorithms, compressors, theory, topologies
from bagua_jax.experiments.studies.measure import AXIS, simulate
from bagua_jax.experiments.studies.predictions.rows import add, exact, identity, row

__all__: list[str] = []

GAMMA = 0.2
N, STEPS = 8, 60
PROBLEM = theory.quadratic(N, np.linspace(0.2, 1, 12), zeta=3.0, sigma=0.3, seed=9)
IDENTITY = compressors.identity()
TOP = compressors.topk(0.25)
LAZY = topologies.ring(N, self_weight=0.5)
ROUNDING = 3e-6
"""Of models of order 1 after 60 steps; each rounds to 6e-8."""
ADDED_UP = 4 * 6e-8 * STEPS
"""The same where no rounding is forgotten: D2's mean has the root 1, and a step of it
rounds four times."""


def gradient_side(name, **options):
    tx = algorithms.REGISTRY[name].factory(axis_name=AXIS, **options)
    return lambda: optax.chain(tx, optax.sgd(GAMMA))


def weight_side(name, **options):
    tx = algorithms.REGISTRY[name].factory(axis_name=AXIS, **options)
    return lambda: optax.chain(optax.sgd(GAMMA), tx)


PARALLEL = gradient_side("gradient_allreduce")


@functools.cache
def run(make, observe=None, sigma=PROBLEM.sigma):
    """Train on one noisy heterogeneous problem, always with the same noise."""
    return jax.tree.map(
        lambda a: np.asarray(a[0], np.float64),
        simulate(
            make,
            steps=STEPS,
            start=np.ones((N, PROBLEM.d)),
            curvature=PROBLEM.curvature,
            target=PROBLEM.target,
            sigma=sigma,
            observe=observe,
            seed=3,
        ),
    )


# --- what reduces to what -------------------------------------------------------------

BEFORE = weight_side("decentralized")
AFTER = weight_side("decentralized", combine="after")
SAME = {
    "diana, identity = parallel SGD": (
        gradient_side("diana", compressor=IDENTITY),
        PARALLEL,
        False,
    ),
    "ef21, identity = parallel SGD": (
        gradient_side("ef21", compressor=IDENTITY),
        PARALLEL,
        False,
    ),
    "marina, p = 1 = parallel SGD": (
        gradient_side("marina", compressor=compressors.randk(0.25), probability=1.0),
        PARALLEL,
        False,
    ),
    "compressed mean, identity = parallel SGD": (
        gradient_side(
            "compressed_mean",
            compressor=IDENTITY,
            plan="scatter_reduce",
            error_feedback="both",
        ),
        PARALLEL,
        True,
    ),
    "delay 0 = parallel SGD": (
        gradient_side("delayed_gradients", staleness=0),
        PARALLEL,
        False,
    ),
    "local SGD, H = 1 = parallel SGD": (
        weight_side("local_sgd", local_steps=1),
        PARALLEL,
        True,
    ),
    "SlowMo, H = 1, beta = 0 = parallel SGD": (
        weight_side("slowmo", local_steps=1, learning_rate=GAMMA, outer_momentum=0.0),
        PARALLEL,
        False,
    ),
    "DiLoCo, H = 1, beta = 0, eta = 1 = parallel SGD": (
        weight_side(
            "diloco", local_steps=1, outer_learning_rate=1.0, outer_momentum=0.0
        ),
        PARALLEL,
        False,
    ),
    "D-PSGD after, complete graph = parallel SGD": (
        weight_side("decentralized", combine="after", topology="complete"),
        PARALLEL,
        False,
    ),
    "D2, complete graph = parallel SGD": (
        weight_side("d2", topology="complete"),
        PARALLEL,
        True,
    ),
    "DCD, identity = D-PSGD before": (
        weight_side("low_precision_decentralized", compressor=IDENTITY),
        BEFORE,
        True,
    ),
    "ECD, identity = D-PSGD before": (
        weight_side("ecd_psgd", compressor=IDENTITY),
        BEFORE,
        False,
    ),
    "CHOCO, identity, gamma_c = 1 = D-PSGD after": (
        weight_side("choco_sgd", compressor=IDENTITY, consensus_step_size=1.0),
        AFTER,
        True,
    ),
    "DeepSqueeze, identity, eta = 1 = D-PSGD after": (
        weight_side("deep_squeeze", compressor=IDENTITY, consensus_step_size=1.0),
        AFTER,
        False,
    ),
    "push-sum, doubly stochastic = D-PSGD after": (
        weight_side("stochastic_gradient_push", topology="ring"),
        AFTER,
        False,
    ),
}


def add_reduction(name, one, other, quick):
    def measure(effort):
        return exact(np.abs(run(one) - run(other)).max())

    claim = "largest difference of any model in 60 steps, noisy and heterogeneous"
    rounding = ADDED_UP if name.startswith("D2") else ROUNDING
    add(name, "C.3", claim, identity(rounding), lambda: 0.0, measure, quick)


for _name, (_one, _other, _quick) in SAME.items():
    add_reduction(_name, _one, _other, _quick)


# --- the mean moves by the mean gradient alone ----------------------------------------

SIGN = compressors.sign("l1")
MOVERS = {
    "D-PSGD before": (BEFORE, True),
    "D-PSGD after": (AFTER, False),
    "exact diffusion": (weight_side("exact_diffusion"), False),
    "D2": (weight_side("d2", topology=LAZY), False),
    "CHOCO with signs": (
        weight_side("choco_sgd", compressor=SIGN, consensus_step_size=0.3),
        True,
    ),
    "delayed CHOCO with signs": (
        weight_side("delayed_choco", compressor=SIGN, consensus_step_size=0.2),
        False,
    ),
    "DeepSqueeze with top-k": (
        weight_side("deep_squeeze", compressor=TOP, consensus_step_size=0.3),
        False,
    ),
    "Moniqua with 4 bits": (weight_side("moniqua", theta=4.0, bits=4), False),
    "gradient tracking": (
        lambda: algorithms.gradient_tracking(GAMMA, axis_name=AXIS),
        True,
    ),
}


def add_mover(name, make, quick):
    def measure(effort):
        x = run(make, sigma=0.0)
        moved = np.diff(x, axis=0).mean(1)
        gradient = np.stack([PROBLEM.gradient(now) for now in x[:-1]]).mean(1)
        return exact(np.abs(moved + GAMMA * gradient).max())

    add(
        f"the mean moves by the mean gradient: {name}",
        "C.3",
        "largest difference of the mean's move from -gamma mean grad f_i(x_i)",
        identity(ROUNDING),
        lambda: 0.0,
        measure,
        quick,
    )


for _name, (_make, _quick) in MOVERS.items():
    add_mover(_name, _make, _quick)


# --- error feedback loses nothing -----------------------------------------------------


def model_and_error(params, state):
    error = optax.tree.get(state, "error")
    return params, [e for e in error if e is not None]


def virtual_iterate(make, owner):
    """How far x - gamma (mean e + E) is from summed gradient steps."""
    x, errors = run(make, model_and_error, 0.0)
    virtual = x[:, 0] - GAMMA * errors[0].mean(1)
    if owner:  # each owner has a part, and zeros elsewhere
        virtual = virtual - GAMMA * errors[1].sum(1)
    gradient = np.stack([PROBLEM.gradient(now) for now in x[:-1]]).mean(1)
    return exact(np.abs(np.diff(virtual, axis=0) + GAMMA * gradient).max())


@row(
    "C.3",
    "x - gamma mean(e) takes the exact gradient steps: top-k, error at the worker",
    identity(ROUNDING),
)
def error_feedback_virtual_iterate():
    make = gradient_side("compressed_mean", compressor=TOP, plan="all_gather")
    return lambda: 0.0, lambda effort: virtual_iterate(make, owner=False)


@row(
    "C.3",
    "x - gamma (mean(e) + E) takes the exact gradient steps: top-k both ways",
    identity(ROUNDING),
)
def double_squeeze_virtual_iterate():
    make = gradient_side(
        "compressed_mean", compressor=TOP, plan="scatter_reduce", error_feedback="both"
    )
    return lambda: 0.0, lambda effort: virtual_iterate(make, owner=True)


def model_and_correction(params, state):
    return params, state.correction


@row(
    "C.3",
    "mean(y) = mean(grad): the mean of the corrections W y - g is 0 at every step",
    identity(ROUNDING),
)
def gradient_tracking_mean():
    make = MOVERS["gradient tracking"][0]

    def measure(effort):
        return exact(np.abs(run(make, model_and_correction)[1].mean(1)).max())

    return lambda: 0.0, measure


def replicas(params, state):
    return jnp.stack(optax.tree.get(state, "replicas"))


@row(
    "C.3",
    "DCD, 8-bit codes: what neighbours hold of a worker is what it holds, bit for bit",
    identity(0.0),
)
def replicas_are_bit_identical():
    make = weight_side("low_precision_decentralized")

    def measure(effort):
        held = run(make, replicas)  # [T, n, 3, d]: own, then as heard
        own = held[:, :, 0]
        sends = topologies.ring(N).steps[0].sends
        off = 0.0
        for k, send in enumerate(sends, start=1):
            for source, destination in send.pairs:
                off = max(off, np.abs(held[:, destination, k] - own[:, source]).max())
        return exact(off)

    return lambda: 0.0, measure


def shifts(params, state):
    return optax.tree.get(state, "tracker"), optax.tree.get(state, "mean_tracker")


@row(
    "C.3",
    "The mean of the trackers that all hold is the mean of the workers' trackers",
    identity(ROUNDING),
    quick=False,
)
def ef21_mean_tracker():
    make = gradient_side("ef21", compressor=TOP)

    def measure(effort):
        own, mean = run(make, shifts)
        return exact(np.abs(own.mean(1) - mean[:, 0]).max())

    return lambda: 0.0, measure


# --- PowerSGD -------------------------------------------------------------------------


@jax.jit
def powersgd_step(matrices):
    """Average [n, rows, columns]; give what each worker gets, and what is left."""
    tx = algorithms.powersgd(axis_name=AXIS, rank=2, min_compression=1.0)

    def worker(matrix):
        state: Any
        mean, state = tx.update(matrix, tx.init(matrix))
        return mean, state.error

    return jax.vmap(worker, axis_name=AXIS)(matrices)


@functools.cache
def projected():
    matrices = np.random.default_rng(1).standard_normal((4, 20, 12))
    mean, error = powersgd_step(jnp.asarray(matrices, jnp.float32))
    return matrices, np.asarray(mean, np.float64), np.asarray(error, np.float64)


@row(
    "C.3",
    "|M|^2 = |u|^2 + |M - u|^2 for the mean matrix M and what arrives, relative",
    identity(1e-5),
)
def powersgd_pythagoras():

    def measure(effort):
        matrices, sent, _ = projected()
        m, u = matrices.mean(0), sent[0]
        parts = (u**2).sum() + ((m - u) ** 2).sum()
        return exact(parts / (m**2).sum())

    return lambda: 1.0, measure


@row(
    "C.3",
    "Compressing the mean equals averaging products: all workers hold the mean alone",
    identity(1e-5),
)
def powersgd_is_linear():

    def measure(effort):
        matrices, sent, _ = projected()
        same = np.broadcast_to(matrices.mean(0), matrices.shape)
        alone, _ = powersgd_step(jnp.asarray(same, jnp.float32))
        return exact(np.abs(np.asarray(alone) - sent).max())

    return lambda: 0.0, measure


@row(
    "C.3",
    "Sum of x over 1000 random pair events",
    identity(1e-12),
)
def pair_gossip_conserves_the_sum():

    def measure(effort):
        graph = topologies.random_matching(8, period=1000, seed=4, pairs=1)
        x = np.arange(8.0)
        for t in itertools.islice(itertools.count(), 1000):
            x = graph.mixing_matrix(t) @ x
        return exact(x.sum())

    return lambda: 28.0, measure
