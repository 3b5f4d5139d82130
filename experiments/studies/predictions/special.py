"""Exact values that need a problem or an observation of their own."""

import functools
import math
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from bagua_jax import algorithms, compressors, theory, topologies
from bagua_jax.experiments.studies.measure import AXIS, average, simulate
from bagua_jax.experiments.studies.predictions.channels import additive, bernoulli
from bagua_jax.experiments.studies.predictions.rows import (
    AT_MOST,
    SIDES,
    Rule,
    exact,
    identity,
    row,
)
from bagua_jax.theory import compression, mixing, modes, moments, rates

__all__: list[str] = []

MONTE_CARLO = Rule("equal", 1e-5)
N = 8
RING = topologies.ring(N)


# --- synchronous ----------------------------------------------------------------------


def heavy_ball(learning_rate):
    tx = algorithms.gradient_allreduce(axis_name=AXIS)
    return optax.chain(tx, optax.sgd(learning_rate, momentum=0.5))


@row(
    "C.1",
    "gamma sigma^2 (1 + beta) / (n h (1 - beta) (2 (1 + beta) - gamma h)), beta = 1/2",
    MONTE_CARLO,
)
def heavy_ball_variance():

    def measure(effort):
        x = simulate(
            heavy_ball,
            steps=120,
            start=np.zeros((N, 32)),
            sigma=1.0,
            knobs=(0.5,),
            replicas=48 * effort,
        )
        return average((x[:, 40:, 0] ** 2).mean((1, 2)))

    def predict():
        return modes.gradient_allreduce(N, 1.0, 0.5, momentum=0.5).variance[0] / N

    return predict, measure


# --- compressed gradients -------------------------------------------------------------


def diana(learning_rate):
    private = compressors.randk(0.25, mask="private")
    tx = algorithms.diana(private, axis_name=AXIS)
    return optax.chain(tx, optax.sgd(learning_rate))


@row(
    "C.1",
    "E|x - x*|^2 after 200 steps, where plain compressed gradients stay above 1",
    AT_MOST,
    quick=False,
)
def diana_comes_to_the_optimum():
    problem = theory.quadratic(4, [1.0] * 32, zeta=2.0, seed=1)

    def measure(effort):
        x = simulate(
            diana,
            steps=200,
            start=np.ones((4, 32)),
            target=problem.target,
            knobs=(0.3,),
            replicas=32 * effort,
        )
        return average((x[:, -1, 0].astype(np.float64) ** 2).sum(-1))

    return lambda: 1e-9, measure


def marina(learning_rate):
    private = compressors.randk(0.25, mask="private")
    tx = algorithms.marina(private, axis_name=AXIS, probability=0.3)
    return optax.chain(tx, optax.sgd(learning_rate))


@row(
    "C.1",
    "E|x - x*|^2 after 2, 4, 8 steps: a linear map of three second moments",
    MONTE_CARLO,
)
def marina_path():
    a, n, times = 0.3, 4, [2, 4, 8]
    problem = theory.quadratic(n, [1.0] * 32, zeta=2.0, seed=1)

    def predict():
        step = moments.marina(a, 3.0 / n, 0.3)
        now, path = np.array([32.0, 0.0, 0.0]), []
        for _ in range(times[-1] + 1):
            path.append(now[0])
            y, now = now[0], step @ now
            del y
        return [path[t] for t in times]

    def measure(effort):
        x = simulate(
            marina,
            steps=times[-1],
            start=np.ones((n, 32)),
            target=problem.target,
            knobs=(a,),
            replicas=256 * effort,
        )
        return average((x[:, times, 0].astype(np.float64) ** 2).sum(-1))

    return predict, measure


def ef21(learning_rate):
    tx = algorithms.ef21(compressors.topk(0.2), axis_name=AXIS)
    return optax.chain(tx, optax.sgd(learning_rate))


def model_and_tracker(params, state):
    return params, optax.tree.get(state, "tracker")


@row(
    "C.1",
    "f - f* + gamma/theta mean|h_i - grad f_i|^2, top-2 of 10: largest ratio of a step",
    AT_MOST,
)
def ef21_lyapunov_function_falls():
    rng = np.random.default_rng(3)
    problem = theory.quadratic(4, rng.uniform(0.2, 1, (4, 10)), zeta=2.0, seed=3)
    roots = np.sqrt((problem.curvature.max(1) ** 2).mean())
    smoothness = float(problem.curvature.mean(0).max())
    mu = problem.strong_convexity
    gamma = rates.ef21_learning_rate(0.2, smoothness, float(roots), mu).value

    def measure(effort):
        x, tracker = simulate(
            ef21,
            steps=150,
            start=np.ones((4, 10)),
            curvature=problem.curvature,
            target=problem.target,
            knobs=(gamma,),
            observe=model_and_tracker,
        )
        x, tracker = x[0, :-1].astype(np.float64), tracker[0, 1:].astype(np.float64)
        theta, _ = rates.ef21_constants(0.2)
        off = ((tracker - problem.gradient(x)) ** 2).sum(-1).mean(-1)
        gap = (x[:, 0] - problem.optimum) ** 2 @ problem.curvature.mean(0) / 2
        psi = gap + gamma / theta * off
        return exact((psi[1:] / psi[:-1]).max())

    return lambda: rates.ef21_rate(gamma, mu).value, measure


# --- frozen 1-bit Adam ----------------------------------------------------------------


def one_bit_adam(learning_rate):
    return algorithms.one_bit_adam(
        learning_rate,
        axis_name=AXIS,
        warmup_steps=1,
        b1=0.9,
        b2=0.0,
        compressor=compressors.identity(),
    )


@row(
    "C.1",
    "the path after the freeze: z^2 - (1 + b1 - (1 - b1) gamma h/sqrt(v)) z + b1",
    Rule("equal", 1e-4, 1e-6),
)
def frozen_one_bit_adam_is_heavy_ball():
    gamma, h, times = 0.1, 0.5, [2, 5, 20, 60]

    def predict():
        # The first step is Adam's: m = (1 - b1) g, v = g^2, x moves by gamma sign(g).
        g = h * 2.0
        x, m = 2.0 - gamma, 0.1 * g
        model = modes.frozen_adam(2, h, gamma, second_moment=g**2, b1=0.9)
        path = [2.0, x]
        state = np.array([x, m])
        for _ in range(times[-1]):
            state = model.transition[0] @ state
            path.append(float(state[0]))
        return [path[t] for t in times]

    def measure(effort):
        x = simulate(
            one_bit_adam,
            steps=times[-1],
            start=np.full((2, 4), 2.0),
            curvature=h,
            knobs=(gamma,),
        )
        return exact(x[0, times, 0, 0])

    return predict, measure


# --- PowerSGD on one matrix -----------------------------------------------------------


def matrix_of(singular_values, rows, columns, seed=5) -> np.ndarray:
    """Make a matrix of chosen singular values."""
    rng = np.random.default_rng(seed)
    left = np.linalg.qr(rng.standard_normal((rows, rows)))[0]
    right = np.linalg.qr(rng.standard_normal((columns, columns)))[0]
    k = len(singular_values)
    return left[:, :k] * singular_values @ right[:, :k].T


@functools.partial(jax.jit, static_argnums=1)
def power_iterations(matrix, rank):
    """Send one matrix again and again; give what arrives, [20, rows, columns]."""
    tx = algorithms.powersgd(axis_name=AXIS, rank=rank, min_compression=1.0)

    def worker(_) -> Any:
        def step(state, _):
            # Without feedback: the error is put back to zero.
            found, state = tx.update(matrix, state)
            return optax.tree.set(state, error=jnp.zeros_like(matrix)), found

        return jax.lax.scan(step, tx.init(matrix), None, length=20)[1]

    return jax.vmap(worker, axis_name=AXIS)(jnp.arange(2.0))[0]


@row(
    "C.1",
    "The tangent of the angle to the leading pair shrinks by (s3/s2)^2 a step",
    Rule("equal", 2e-3),
)
def powersgd_angle():
    s = np.array([3.0, 2.0, 1.0, 0.5])

    def measure(effort):
        m = matrix_of(s, 20, 12)
        found = np.asarray(power_iterations(jnp.asarray(m, jnp.float32), 2))
        left = np.linalg.svd(m)[0][:, :2]
        tangents = []
        for estimate in found.astype(np.float64):
            basis = np.linalg.svd(estimate)[0][:, :2]
            cosine = np.linalg.svd(left.T @ basis)[1][-1]
            tangents.append(math.sqrt(1 / cosine**2 - 1))
        return exact(tangents[7] / tangents[6])

    return lambda: compression.subspace_contraction(s, 2), measure


@row(
    "C.1",
    "The squared error on a fixed matrix comes to the sum of s_i^2 beyond the rank",
    Rule("equal", 1e-4),
)
def powersgd_error():
    s = np.array([3.0, 2.0, 1.0, 0.5])

    def measure(effort):
        m = matrix_of(s, 20, 12)
        found = np.asarray(power_iterations(jnp.asarray(m, jnp.float32), 2))[-1]
        return exact(((found - m) ** 2).sum())

    return lambda: (s[2:] ** 2).sum(), measure


@row(
    "C.1",
    "Of an orthogonal 40 x 40 matrix rank 3 keeps 3/40 of the energy, whatever Q",
    Rule("equal", 1e-5),
    quick=False,
)
def powersgd_on_a_flat_spectrum():

    def measure(effort):
        m = matrix_of(np.ones(40), 40, 40)
        found = np.asarray(power_iterations(jnp.asarray(m, jnp.float32), 3))[:3]
        return exact((found**2).sum((1, 2)) / 40)

    return lambda: np.full(3, 3 / 40), measure


# --- gossip ---------------------------------------------------------------------------


def naive_gossip():
    return _taking_noise(algorithms.quantized_gossip)


def _taking_noise(factory):
    """Build gossip under noise of one size, which is no share of any vector's."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".* state no omega")
        return factory(additive(1.0), axis_name=AXIS)


@functools.cache
def run_naive_gossip(effort):
    return simulate(
        naive_gossip,
        steps=80,
        start=np.zeros((N, 32)),
        curvature=0.0,
        replicas=48 * effort,
    ).astype(np.float64)


@row(
    "C.1",
    "Quantized models: the mean does a random walk of variance T v/n",
    MONTE_CARLO,
)
def naive_gossip_walks():

    def measure(effort):
        return average((run_naive_gossip(effort).mean(2)[:, -1] ** 2).mean(-1))

    return lambda: 80 / N, measure


@row(
    "C.1",
    "Quantized models stay v/n sum lambda^2/(1 - lambda^2) from consensus",
    MONTE_CARLO,
)
def naive_gossip_stalls():

    def predict():
        spectrum = mixing.spectrum(RING).eigenvalues
        return (
            modes.quantized_gossip(spectrum).select(slice(1, None)).variance.sum() / N
        )

    def measure(effort):
        x = run_naive_gossip(effort)[:, 40:]
        apart = x - x.mean(2, keepdims=True)
        return average((apart**2).mean((1, 2, 3)))

    return predict, measure


def ecd():
    return _taking_noise(algorithms.ecd_psgd)


def model_and_estimates(params, state):
    return params, state.mixed_estimates


@row(
    "C.1",
    "Variance (2v/3)(2t - 1)/(t (t - 1)) of estimates, times |w_i|^2 of their mixture",
    MONTE_CARLO,
    quick=False,
)
def ecd_estimates():
    times = [2, 5, 20]
    weight = 1 / 3

    def measure(effort):
        x, mixed = simulate(
            ecd,
            steps=times[-1],
            start=np.zeros((N, 32)),
            curvature=0.0,
            replicas=64 * effort,
            observe=model_and_estimates,
        )
        exactly = np.einsum("ij,rtjd->rtid", RING.mixing_matrix(), x.astype(np.float64))
        off = (mixed - exactly)[:, times] ** 2
        return average(off.mean((2, 3)) / weight)

    return lambda: [moments.ecd_error_variance(t) for t in times], measure


def moniqua():
    return algorithms.moniqua(axis_name=AXIS, theta=1.0, bits=4)


@row(
    "C.1",
    "A model is recovered up to theta/(2^b - 1): largest error of a step of W, b = 4",
    AT_MOST,
    quick=False,
)
def moniqua_error():
    start = 5 + np.random.default_rng(0).uniform(-0.5, 0.5, (N, 4000))

    def measure(effort):
        x = simulate(moniqua, steps=1, start=start, curvature=0.0)[0, 1]
        return exact(np.abs(x - RING.mixing_matrix() @ start).max())

    # Two neighbours of weight 1/3, and one's own model as often.
    return lambda: 4 / 3 / (2**4 - 1) + 1e-5, measure


UNEVEN = topologies.from_matrix(
    np.diag([0.9, 0.5, 0.3, 0.7]) + np.roll(np.diag([0.1, 0.5, 0.7, 0.3]), 1, 0),
    stochastic="column",
)


def push_sum():
    return algorithms.stochastic_gradient_push(axis_name=AXIS, topology=UNEVEN)


def model_and_mass(params, state):
    return params, state.mass


@functools.cache
def run_push_sum():
    return simulate(
        push_sum,
        steps=400,
        start=np.random.default_rng(2).standard_normal((4, 16)),
        curvature=0.0,
        observe=model_and_mass,
    )


@row(
    "C.1",
    "Masses come to n times the Perron vector of W, and their sum is n at every step",
    identity(1e-5),
)
def push_sum_mass():

    def predict():
        values, vectors = np.linalg.eig(UNEVEN.mixing_matrix())
        perron = np.real(vectors[:, np.argmax(np.real(values))])
        return [*(4 * perron / perron.sum()), 4.0, 4.0]

    def measure(effort):
        mass = run_push_sum()[1][0]
        total = mass.sum(1)
        return exact([*mass[-1], total.min(), total.max()])

    return predict, measure


@row(
    "C.1",
    "z comes to the mean on uneven directed edges; w z keeps the Perron vector's bias",
    identity(1e-5),
)
def push_sum_is_unbiased():

    def measure(effort):
        z, mass = run_push_sum()
        mean = z[0, 0].astype(np.float64).mean(0)
        off = np.abs(z[0, -1] - mean).max()
        kept = (mass[0, -1] @ (z[0, -1] / mean)).mean()
        return exact([off, kept / 4])

    return lambda: [0.0, 1.0], measure


def relay():
    return optax.chain(
        optax.sgd(0.2), algorithms.relay_sgd(axis_name=AXIS, topology="path")
    )


@row(
    "C.1",
    "|x_i - x*| on a path of 8 where workers differ, zeta = 2",
    identity(2e-5),
    quick=False,
)
def relay_sgd_has_no_bias():
    problem = theory.quadratic(N, [1.0, 0.5], zeta=2.0, seed=4)

    def measure(effort):
        x = simulate(
            relay,
            steps=400,
            start=np.zeros((N, 2)),
            curvature=problem.curvature,
            target=problem.target,
        )
        return exact(np.abs(x[0, -1] - problem.optimum).max())

    return lambda: 0.0, measure


@row(
    "C.1",
    "A random perfect matching of 8 leaves (n - 2)/(2 (n - 1)) of the energy",
    Rule("equal", 0.0),
)
def random_matching_energy():

    def measure(effort):
        graph = topologies.random_matching(8, period=1000 * effort, seed=11)
        return _energy_left(graph)

    return lambda: mixing.random_matching_energy_factor(8), measure


@row(
    "C.1",
    "One random pair of 8, an event of AD-PSGD, leaves 1 - 1/(n - 1) of the energy",
    Rule("equal", 0.0),
)
def pair_gossip_energy():

    def measure(effort):
        graph = topologies.random_matching(8, period=1000 * effort, seed=12, pairs=1)
        return _energy_left(graph)

    return lambda: mixing.pair_energy_factor(8), measure


def _energy_left(graph):
    """Energy left of a fixed vector after each matrix of a period."""
    x = np.array([1.0, -2, 3, -4, 5, -6, 7, -4])
    w = np.stack([graph.mixing_matrix(t) for t in range(graph.period)])
    return average(((w @ x) ** 2).sum(-1) / (x**2).sum())


ALMOST = topologies.ring(N, self_weight=0.34)  # its smallest eigenvalue is -0.32


def d2_on_almost_too_eager_a_ring():
    d2 = algorithms.d2(axis_name=AXIS, topology=ALMOST)
    return optax.chain(optax.sgd(0.2), d2)


@row(
    "C.1",
    "D2 at lambda = -0.32, near its limit -1/3: root of z^2 - l (2 - a) z + l (1 - a)",
    Rule("equal", 1e-4),
    quick=False,
)
def d2_near_its_limit():
    wave = (-1.0) ** np.arange(N)[:, None]

    def predict():
        lowest = mixing.spectrum(ALMOST).smallest
        return np.abs(modes.d2(np.array([1.0, lowest]), 1.0, 0.2).poles[1]).max()

    def measure(effort):
        x = simulate(d2_on_almost_too_eager_a_ring, steps=60, start=wave)
        size = np.abs(x[0, :, 0, 0]).astype(np.float64)
        return exact((size[60] / size[40]) ** (1 / 20))

    return predict, measure


def choco_with_shrinking_steps():
    tx = algorithms.choco_sgd(
        compressors.sign("l1"), axis_name=AXIS, consensus_step_size=0.3
    )
    return optax.chain(optax.sgd(lambda t: 1 / (t + 1)), tx)


@row(
    "C.1",
    "CHOCO-SGD with signs, gamma_t h = 1/(t + 1): E|mean x|^2 = 1/(n T), T = 10, 160",
    MONTE_CARLO,
    quick=False,
)
def choco_sgd_has_the_rate_of_parallel_sgd():
    times = [10, 160]

    def measure(effort):
        x = simulate(
            choco_with_shrinking_steps,
            steps=times[-1],
            start=np.zeros((N, 32)),
            sigma=1.0,
            replicas=64 * effort,
        )
        return average((x[:, times].astype(np.float64).mean(2) ** 2).mean(-1))

    return lambda: [1 / (N * t) for t in times], measure


# --- local steps ----------------------------------------------------------------------


def local_sgd(learning_rate):
    tx = algorithms.local_sgd(axis_name=AXIS, local_steps=5)
    return optax.chain(optax.sgd(learning_rate), tx)


@row(
    "C.1",
    "sum q_i b_i / sum q_i, q_i = 1 - (1 - gamma h_i)^H: workers differ in curvature",
    Rule("equal", 1e-5, 1e-6),
)
def local_sgd_fixed_point():
    rng = np.random.default_rng(6)
    problem = theory.quadratic(N, rng.uniform(0.1, 1, (N, 4)), zeta=2.0, seed=6)

    def predict():
        return modes.local_sgd_fixed_point(problem.curvature, problem.target, 0.5, 5)

    def measure(effort):
        x = simulate(
            local_sgd,
            steps=300,
            start=np.zeros((N, 4)),
            curvature=problem.curvature,
            target=problem.target,
            knobs=(0.5,),
        )
        return exact(x[0, -1, 0])

    return predict, measure


def slowmo(outer_learning_rate):
    tx = algorithms.slowmo(
        axis_name=AXIS,
        local_steps=3,
        learning_rate=0.5,
        outer_momentum=0.5,
        outer_learning_rate=outer_learning_rate,
    )
    return optax.chain(optax.sgd(0.5), tx)


def diloco(outer_learning_rate):
    tx = algorithms.diloco(
        axis_name=AXIS,
        local_steps=3,
        outer_learning_rate=outer_learning_rate,
        outer_momentum=0.9,
    )
    return optax.chain(optax.sgd(0.5), tx)


def _outer_threshold(model: Any) -> float:
    return modes.largest_stable(lambda k: model(k).stable, 10.0)


def _outer_sides(make, threshold):
    x = simulate(
        make,
        steps=240,
        start=np.ones((2, 1)),
        knobs=(np.array([0.98, 1.02]) * threshold,),
        replicas=2,
    )
    size = np.abs(x[:, ::3, 0, 0]).astype(np.float64)
    return exact(size[:, -20:].sum(1) / size[:, -40:-20].sum(1))


@row(
    "C.1",
    "alpha s < 2 (1 + beta), s = 1 - (1 - gamma h)^H = 7/8, beta = 1/2",
    SIDES,
)
def slowmo_outer_threshold():

    def model(k):
        return modes.slowmo(
            2, 1.0, 0.5, local_steps=3, outer_momentum=0.5, outer_learning_rate=k
        )

    def predict():
        return _outer_threshold(model)

    return predict, lambda effort: _outer_sides(slowmo, predict())


@row(
    "C.1",
    "eta s < (2 + 2 beta)/(1 + 2 beta), s = 7/8, beta = 0.9",
    SIDES,
)
def diloco_outer_threshold():

    def model(k):
        return modes.diloco(
            2, 1.0, 0.5, local_steps=3, outer_learning_rate=k, outer_momentum=0.9
        )

    def predict():
        return _outer_threshold(model)

    return predict, lambda effort: _outer_sides(diloco, predict())


# --- CHOCO without gradients ----------------------------------------------------------


def choco_gossip(consensus_step_size):
    return algorithms.choco_sgd(
        bernoulli(0.5, scaled=False),
        axis_name=AXIS,
        consensus_step_size=consensus_step_size,
    )


@row(
    "C.1",
    "Energy of consensus after 3, 8 and 16 steps, ring of 8, q = 1/2, gamma_c = 0.5",
    MONTE_CARLO,
    quick=False,
)
def choco_gossip_path():
    start = np.random.default_rng(8).standard_normal((N, 32))
    times = [3, 8, 16]

    def predict():
        spectrum = mixing.spectrum(RING)
        model = modes.choco_sgd(
            spectrum.eigenvalues,
            0.0,
            0.0,
            consensus_step_size=0.5,
            message=compression.Message(0.5, 0.25),
        )
        path = moments.ModeMoments(model).energies(spectrum.to_modes(start))
        found = [
            energies.consensus for _, energies in zip(range(17), path, strict=False)
        ]
        return [found[t] for t in times]

    def measure(effort):
        x = simulate(
            choco_gossip,
            steps=times[-1],
            start=start,
            curvature=0.0,
            knobs=(0.5,),
            replicas=192 * effort,
        )[:, times].astype(np.float64)
        apart = x - x.mean(2, keepdims=True)
        return average((apart**2).sum(-1).mean(-1))

    return predict, measure
