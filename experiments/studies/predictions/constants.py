"""Constants of compressors at the inputs that attain them, and of mixing."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bagua_jax import algorithms, compressors, theory, topologies
from bagua_jax.experiments.studies.measure import AXIS, Estimate, average, simulate
from bagua_jax.experiments.studies.predictions.rows import (
    Rule,
    add,
    exact,
    identity,
    row,
)

__all__: list[str] = []

D = 64


# --- A: compressors -------------------------------------------------------------------


def random_error(compressor, effort) -> Estimate:
    """Relative squared error at the attaining input, over many draws."""
    attained = compressor.facts.attained
    x = jnp.asarray(attained(D), jnp.float32)

    @jax.jit
    @jax.vmap
    def draw(key):
        decoded = compressor.decompress(compressor.compress(key, x, ())[0], x)
        return jnp.sum((decoded - x) ** 2) / jnp.sum(x**2)

    return average(draw(jax.random.split(jax.random.key(1), 4000 * effort)))


def error_bound(compressor, d) -> float:
    """Largest relative squared error of a biased compressor, 1 - delta."""
    delta = theory.compression.constants(compressor, d).delta
    assert delta is not None
    return 1 - delta


UNBIASED = {
    "QSGD, max norm, s = 4": (compressors.qsgd(4, "max"), True),
    "QSGD, L2 norm, s = 2": (compressors.qsgd(2, "l2"), False),
    "TernGrad without clip": (compressors.terngrad(None), False),
    "natural compression": (compressors.natural(), False),
    "random-k, scaled": (compressors.randk(0.25, mask="private"), False),
}
BIASED = {
    "top-k": compressors.topk(0.125),
    "block top-k": compressors.block_topk(0.125, block=16),
    "signs, L1 scale": compressors.sign("l1"),
    "signs, L2 scale": compressors.sign("l2"),
    "DCT top-k": compressors.dct_topk(chunk=16, k=4),
}


def add_unbiased(name, compressor, quick):
    add(
        f"omega of {name}",
        "A",
        f"E|C(x) - x|^2/|x|^2 at the x of {D} elements that attains omega",
        Rule("equal", 1e-5),
        lambda: theory.compression.constants(compressor, D).omega,
        lambda effort: random_error(compressor, effort),
        quick,
    )


def add_biased(name, compressor):
    def measure(effort):
        x = jnp.asarray(compressor.facts.attained(D), jnp.float32)
        decoded = compressor.decompress(compressor.compress(None, x, ())[0], x)
        return exact(float(jnp.sum((decoded - x) ** 2) / jnp.sum(x**2)))

    add(
        f"delta of {name}",
        "A",
        f"1 - delta = |C(x) - x|^2/|x|^2 at the x of {D} elements that attains it",
        Rule("equal", 1e-4, 1e-6),
        lambda: error_bound(compressor, D),
        measure,
        name == "top-k",
    )


for _name, (_compressor, _quick) in UNBIASED.items():
    add_unbiased(_name, _compressor, _quick)
for _name, _compressor in BIASED.items():
    if _compressor.facts.attained is not None:
        add_biased(_name, _compressor)


def _zeros_between(compressor, d=200_000):
    """Relative squared error of (1, -1, 0, 0, ...)."""
    x = jnp.zeros(d).at[0].set(1.0).at[1].set(-1.0)
    decoded = compressor.decompress(compressor.compress(None, x, ())[0], x)
    return exact(float(jnp.sum((decoded - x) ** 2) / 2))


@row(
    "A",
    "BAGUA's grid holds 0: (1, -1, 0, ...), d = 2e5, costs (step/2)^2, two elements'",
    Rule("equal", 1e-2),
)
def zero_aligned_min_max_is_contractive():
    return lambda: (2 / 255) ** 2 / 4, lambda effort: _zeros_between(
        compressors.minmax_uint8()
    )


@row(
    "A",
    "lo + j step: every 0 lies half way, (d - 2)/(2 255^2) > 1 of the vector's energy",
    Rule("equal", 1e-2),
    quick=False,
)
def textbook_min_max_is_not_contractive():
    textbook = compressors.blockwise(8, 2**20)

    def predict():
        return error_bound(textbook, 200_000)

    return predict, lambda effort: _zeros_between(textbook)


# --- B: mixing ------------------------------------------------------------------------


def gossip(topology):
    tx = algorithms.decentralized(axis_name=AXIS, topology=topology)
    return lambda: optax.chain(optax.sgd(0.0), tx)


def run_gossip(topology, start, steps):
    """Mix without gradients; give the distance to the mean at each step."""
    x = simulate(gossip(topology), steps=steps, start=start, curvature=0.0)[0]
    x = np.asarray(x, np.float64)
    return np.sqrt(((x - x.mean(1, keepdims=True)) ** 2).sum((1, 2)))


def slowest(topology) -> np.ndarray:
    """Return an eigenvector of W whose disagreement lasts, [n, 1 or 2]."""
    spectrum = theory.mixing.spectrum(topology)
    k = 1 + int(np.argmax(np.abs(spectrum.eigenvalues[1:])))
    vector = spectrum.basis[:, k]
    return np.stack([np.real(vector), np.imag(vector)], -1)


STATIC = {
    "ring of 16": (topologies.ring(16), True, lambda: (1 + 2 * np.cos(np.pi / 8)) / 3),
    "torus of 4 x 4": (topologies.torus(16), False, lambda: 3 / 5),
    "hypercube of 16": (topologies.hypercube(16), False, lambda: 3 / 5),
    "star of 8": (topologies.star(8), False, lambda: 1 - 1 / 8),
    "static exponential of 16": (
        topologies.static_exponential(16),
        True,
        lambda: 3 / 5,
    ),
    "path of 8": (
        topologies.path(8),
        False,
        lambda: (1 + 2 * np.cos(np.pi / 8)) / 3,
    ),
}


def add_static(name, topology, formula, quick):
    def predict():
        found = 1 - theory.mixing.spectrum(topology).gap
        return [found, formula()]

    def measure(effort):
        left = run_gossip(topology, slowest(topology), 3)
        return exact([left[3] / left[2]] * 2)

    add(
        f"contraction of the {name}",
        "B",
        "distance to the mean after a step of the slowest mode, and the closed form",
        Rule("equal", 1e-5),
        predict,
        measure,
        quick,
    )


for _name, (_topology, _quick, _formula) in STATIC.items():
    add_static(_name, _topology, _formula, _quick)


@functools.cache
def start(n):
    return np.random.default_rng(n).standard_normal((n, 8))


@row(
    "B",
    "BAGUA's rotating pairs, n = 16: distance to the mean falls by cos(2 pi/n) a step",
    Rule("equal", 1e-4),
)
def shift_one_is_a_ring_of_half_the_size():

    def measure(effort):
        left = run_gossip(topologies.shift_one(16), start(16), 64)
        return exact((left[64] / left[48]) ** (1 / 16))

    return lambda: np.cos(2 * np.pi / 16), measure


@row(
    "B",
    "n = 16, one message a step: distance to the mean after log2 n = 4 steps",
    identity(1e-6),
)
def one_peer_exponential_is_exact():

    def measure(effort):
        return exact(run_gossip(topologies.one_peer_exponential(16), start(16), 4)[-1])

    return lambda: 0.0, measure


@row(
    "B",
    "(1, -1, 1, ...) on an even ring of weights 1/3 is mixed to exactly -1/3 of itself",
    Rule("equal", 1e-5),
    quick=False,
)
def ring_of_even_size_has_a_negative_mode():

    def measure(effort):
        wave = (-1.0) ** np.arange(8)[:, None]
        x = simulate(gossip(topologies.ring(8)), steps=1, start=wave, curvature=0.0)
        return exact(x[0, 1, 0, 0])

    return lambda: theory.mixing.spectrum(topologies.ring(8)).smallest, measure
