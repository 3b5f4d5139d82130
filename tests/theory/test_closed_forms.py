"""Modes and moments against closed forms, from the equations: NumPy alone."""

import math

import numpy as np
import pytest

from bagua_jax import compressors, topologies
from bagua_jax.theory import compression, mixing, modes, moments, rates
from bagua_jax.theory.compression import Message
from bagua_jax.theory.moments import ModeMoments

N, H, GAMMA = 8, 1.3, 0.2
A = H * GAMMA
RING = mixing.spectrum(topologies.ring(N)).eigenvalues
LAZY = mixing.spectrum(topologies.ring(N, self_weight=0.5)).eigenvalues


def close(found, expected, **kwargs):
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-12, **kwargs)


def unscaled(q):
    return Message(q, q * (1 - q))


def threshold(model, upper=4.0):
    return modes.largest_stable(lambda k: ModeMoments(model(k)).stable, upper)


# --- deterministic --------------------------------------------------------------------


@pytest.mark.parametrize("beta", [0.0, 0.3, 0.9])
def test_heavy_ball_variance(beta):
    found = modes.gradient_allreduce(N, H, GAMMA, momentum=beta).variance
    close(found[0], GAMMA * (1 + beta) / (H * (1 - beta) * (2 * (1 + beta) - A)))
    close(found[1:], 0)  # equal on all workers


def test_dpsgd_before():
    found = modes.decentralized(RING, H, GAMMA)
    close(found.bias, A / (1 - RING + A))
    close(found.variance, GAMMA**2 / (1 - (RING - A) ** 2))
    limit = threshold(lambda k: modes.decentralized(RING, 1.0, k))
    assert limit == pytest.approx(1 + RING.min())
    assert limit == pytest.approx(2 / 3)


def test_dpsgd_after():
    found = modes.decentralized(RING, H, GAMMA, combine="after")
    close(found.bias, RING * A / (1 - RING + RING * A))
    close(found.variance, RING**2 * GAMMA**2 / (1 - RING**2 * (1 - A) ** 2))
    limit = threshold(lambda k: modes.decentralized(RING, 1.0, k, combine="after"))
    assert limit == pytest.approx(2)


@pytest.mark.parametrize("w", [RING, LAZY])
@pytest.mark.parametrize("combine", ["before", "after"])
def test_the_mean_does_not_know_the_network(w, combine):
    found = modes.decentralized(w, H, GAMMA, combine=combine).variance[0]
    close(found, GAMMA / (H * (2 - A)))


def test_d2():
    found = modes.d2(LAZY, H, GAMMA)
    expected = np.stack([np.ones(N), -LAZY * (2 - A), LAZY * (1 - A)], -1)
    close(found.polynomials[1:], expected[1:])
    close(np.abs(found.poles[0]), [1 - A, 0])  # 1 is conserved, and zero at first
    close(found.bias, np.eye(N)[0])
    lag = math.sqrt(LAZY[1] * (1 - A))
    assert np.abs(found.poles[1]) == pytest.approx([lag, lag])


@pytest.mark.parametrize("smallest", [-0.345, -0.365])
def test_d2_is_stable_above_its_exact_eigenvalue(smallest):
    """-1/(3 - 2 gamma h) is -0.357 at gamma h = 0.1."""
    eigenvalues = np.array([1.0, 0.2, smallest])
    assert modes.d2(eigenvalues, 1.0, 0.1).stable is bool(smallest > -1 / 2.8)
    assert rates.d2_smallest_eigenvalue().value == -1 / 3


def test_exact_diffusion_is_d2_on_a_lazy_matrix():
    one = modes.exact_diffusion(RING, H, GAMMA)
    other = modes.d2((1 + RING) / 2, H, GAMMA)
    close(one.transition, other.transition)
    assert one.stable


def test_gradient_tracking_before():
    found = modes.gradient_tracking(RING, H, GAMMA, combine="before")
    for k in range(1, N):
        matrix = [[RING[k], -1], [A * (RING[k] - 1), RING[k] - A]]
        expected = np.linalg.eigvals(matrix)
        close(np.sort_complex(found.poles[k]), np.sort_complex(expected))
    close(np.abs(found.poles[0]), [1 - A, 0])
    close(found.bias, np.eye(N)[0])


def test_gradient_tracking_after():
    found = modes.gradient_tracking(RING, H, GAMMA)
    expected = np.stack([np.ones(N), -RING * (2 - A), RING * (RING - A)], -1)
    close(found.polynomials[1:], expected[1:])
    close(found.bias, np.eye(N)[0])


@pytest.mark.parametrize("tau", [0, 1, 2, 5, 9])
def test_delay(tau):
    def model(k):
        return modes.delayed_gradients(1, 1.0, k, staleness=tau)

    expected = 2 * math.sin(math.pi / (2 * (2 * tau + 1)))
    assert threshold(model) == pytest.approx(expected, rel=1e-9)
    best = tau**tau / (tau + 1) ** (tau + 1)
    assert model(best).rate == pytest.approx(tau / (tau + 1), abs=2e-3)
    assert min(model(0.9 * best).rate, model(1.1 * best).rate) > tau / (tau + 1)


def test_variance_under_delay_one():
    found = modes.delayed_gradients(N, H, GAMMA, staleness=1).variance[0]
    close(found, GAMMA**2 * (1 + A) / (A * (1 - A) * (2 + A)))


@pytest.mark.parametrize("steps", [1, 3, 8])
def test_local_sgd_with_equal_curvature(steps):
    found = modes.local_sgd(N, H, GAMMA, local_steps=steps)
    close(found.variance, np.eye(N)[0] * GAMMA / (H * (2 - A)))
    close(found.bias, np.eye(N)[0])
    assert found.rate == pytest.approx(1 - A)


def test_local_sgd_with_unequal_curvature():
    h = np.array([[0.2], [0.5], [1.0]])
    b = np.array([[1.0], [-2.0], [0.5]])
    optimum = (h * b).sum() / h.sum()
    one = modes.local_sgd_fixed_point(h, b, 0.1, 1)
    assert one == pytest.approx(optimum)
    assert modes.local_sgd_fixed_point(h, b, 0.9, 2000) == pytest.approx(b.mean())
    small, steps = 1e-5, 7
    bias = modes.local_sgd_fixed_point(h, b, small, steps) - optimum
    first = -small * (steps - 1) / 2 * (h**2 * (b - optimum)).sum() / h.sum()
    assert bias == pytest.approx(first, rel=1e-3)


@pytest.mark.parametrize("outer", [0.5, 1.0])
def test_slowmo(outer):
    s, beta = 1 - (1 - A) ** 5, 0.5
    found = modes.slowmo(
        N, H, GAMMA, local_steps=5, outer_momentum=beta, outer_learning_rate=outer
    )
    close(found.polynomials[0], [1, -(1 + beta - outer * s), beta])
    assert found.rate**5 == pytest.approx(math.sqrt(beta))  # complex roots
    close(found.bias, np.eye(N)[0])

    def model(k):
        return modes.slowmo(
            2, 1.0, 0.5, local_steps=3, outer_momentum=beta, outer_learning_rate=k
        )

    assert threshold(model, 10.0) * 7 / 8 == pytest.approx(2 * (1 + beta))


def test_diloco():
    s = 1 - (1 - A) ** 5
    found = modes.diloco(N, H, GAMMA, local_steps=5)
    close(found.polynomials[0], [1, -1.9 * (1 - 0.7 * s), 0.9 * (1 - 0.7 * s)])
    close(found.bias, np.eye(N)[0])

    def model(k):
        return modes.diloco(2, 1.0, 0.5, local_steps=3, outer_learning_rate=k)

    expected = (2 + 2 * 0.9) / (1 + 2 * 0.9)
    assert threshold(model, 10.0) * 7 / 8 == pytest.approx(expected)
    assert expected == pytest.approx(1.357, abs=1e-3)


def test_frozen_adam():
    found = modes.frozen_adam(N, H, GAMMA, second_moment=0.25, b1=0.9)
    close(found.polynomials[0], [1, -(1.9 - 0.1 * A / 0.5), 0.9])


@pytest.mark.parametrize("tau", [0, 1, 2, 3])
def test_delayed_choco_without_compression(tau):
    def model(k):
        return modes.delayed_choco(
            RING, 0.0, 0.0, consensus_step_size=k, staleness=tau
        ).select(slice(1, None))

    limit = modes.largest_stable(lambda k: model(k).stable, 4.0)
    expected = 2 * math.sin(math.pi / (2 * (2 * tau + 1)))
    assert limit * (1 - RING.min()) == pytest.approx(expected, rel=1e-9)


def test_choco_without_compression_is_dpsgd_after():
    one = modes.choco_sgd(RING, H, GAMMA, consensus_step_size=1.0)
    other = modes.decentralized(RING, H, GAMMA, combine="after")
    close(one.bias, other.bias)
    close(one.variance, other.variance)


# --- random compressors ---------------------------------------------------------------


@pytest.mark.parametrize("q", [0.1, 0.36, 0.5, 0.9])
def test_error_feedback_on_one_worker(q):
    def model(k):
        return modes.compressed_mean(
            1, 1.0, k, message=unscaled(q), error_feedback=True
        )

    assert threshold(model) == pytest.approx(2 * q / (2 - q))
    best = (1 - math.sqrt(1 - q)) ** 2 / q
    assert ModeMoments(model(best)).rate == pytest.approx(math.sqrt(1 - q))
    assert ModeMoments(model(1.05 * best)).rate > math.sqrt(1 - q)
    assert ModeMoments(model(0.95 * best)).rate > math.sqrt(1 - q)
    a = 0.5 * q
    steady = ModeMoments(model(a)).steady(np.zeros(1), 1.0)
    assert steady.mean == pytest.approx(a / (2 - a * (2 - q) / q))


def test_unbiased_masks_on_one_worker():
    """Best factor 1 - q, with feedback sqrt(1 - q); 1/q of its floor of small steps."""
    q, a = 0.36, 0.1
    scaled = Message(1.0, 1 / q - 1)
    found = ModeMoments(modes.compressed_mean(1, 1.0, a, message=scaled))
    assert found.steady(np.zeros(1), 1.0).mean == pytest.approx(a / (2 * q - a))
    best = ModeMoments(modes.compressed_mean(1, 1.0, q, message=scaled))
    assert best.rate == pytest.approx(1 - q)


def test_compressed_gradients():
    n, omega, a = 4, 3.0, 0.3
    scaled = Message(1.0, omega)

    def model(k):
        return modes.compressed_mean(n, 1.0, k, message=scaled)

    factor = (1 - a) ** 2 + a**2 * omega / n
    assert ModeMoments(model(a)).rate == pytest.approx(factor)
    assert threshold(model) == pytest.approx(2 / (1 + omega / n))
    b = np.array([1.0, -1.0, 2.0, -2.0])
    spectrum = mixing.spectrum(topologies.complete(n))
    floor = ModeMoments(model(a)).steady(spectrum.to_modes(b)).mean
    zeta_sq = (b**2).mean()
    assert floor == pytest.approx(a**2 * omega / n * zeta_sq / (1 - factor))
    order = rates.qsgd_floor(a, omega, n, zeta_sq, 1.0)
    assert order.up_to_constant and not order.confirmed


def test_diana_is_a_map_of_three_energies():
    """Of E|y|^2, mean E|u_i|^2, E<y, mean u>; y = x - x*, u_i = h_i - grad f_i(x*)."""
    n, omega, a, alpha = 4, 3.0, 0.2, 0.2
    noise = omega / n
    message = np.array([1.0, 1.0, -2.0])  # mean |y - u_i|^2
    step = np.array(
        [
            [(1 - a) ** 2, 0, 0],
            [alpha**2, (1 - alpha) ** 2, 2 * alpha * (1 - alpha)],
            [(1 - a) * alpha, 0, (1 - a) * (1 - alpha)],
        ]
    ) + np.outer([a**2 * noise, alpha**2 * omega, -a * alpha * noise], message)
    model = modes.diana(n, 1.0, a, message=Message(1.0, omega), alpha=alpha)
    found = ModeMoments(model)
    assert found.rate == pytest.approx(np.abs(np.linalg.eigvals(step)).max())
    b = np.array([1.0, -1.0, 2.0, -2.0])
    spectrum = mixing.spectrum(topologies.complete(n))
    path = found.energies(spectrum.to_modes(np.ones(n)), spectrum.to_modes(b))
    now = np.array([1.0, (b**2).mean(), 0.0])
    for _ in range(6):
        assert next(path).mean == pytest.approx(now[0])
        now = step @ now
    assert found.steady(spectrum.to_modes(b)).mean == pytest.approx(0, abs=1e-12)


def test_ef21_has_the_rate_of_error_feedback_for_linear_masks():
    for a in (0.1, 0.4, 0.9):
        one = modes.ef21(4, 1.0, a, message=unscaled(0.5))
        other = modes.compressed_mean(
            4, 1.0, a, message=unscaled(0.5), error_feedback=True
        )
        assert ModeMoments(one).rate == pytest.approx(ModeMoments(other).rate)


def test_dcd():
    """The largest omega is n / sum (1 - lambda)/(1 + lambda)."""
    model = modes.low_precision_decentralized(
        RING, 0.0, 0.0, message=Message(1.0, 1.0)
    ).without_mean()
    expected = N / ((1 - RING[1:]) / (1 + RING[1:])).sum()
    assert ModeMoments(model).largest_variance() == pytest.approx(expected)
    edge = model._replace(message=Message(1.0, expected))
    assert ModeMoments(edge).rate == pytest.approx(1)


@pytest.mark.parametrize("name", ["ring", "complete", "hypercube"])
def test_thresholds_of_gossip_in_closed_form(name):
    w = mixing.spectrum(topologies.REGISTRY[name](16)).eigenvalues
    idle = modes.low_precision_decentralized(w, 0.0, 0.0).without_mean()
    close(moments.dcd_largest_variance(w), ModeMoments(idle).largest_variance())
    for q in (0.05, 0.5, 0.9, 1.0):

        def choco(step, q=q):
            return modes.choco_sgd(
                w, 0.0, 0.0, consensus_step_size=step, message=unscaled(q)
            ).without_mean()

        found = moments.choco_largest_consensus_step(w, q)
        assert found == pytest.approx(threshold(choco), rel=1e-8)


@pytest.mark.parametrize("self_weight", [1 / 3, 0.6])
def test_thresholds_on_a_long_ring(self_weight):
    """Sums over modes become integrals: 1/mean of 1/(a + b cos) = sqrt(a^2 - b^2)."""
    w = mixing.spectrum(topologies.ring(128, self_weight=self_weight)).eigenvalues
    root = math.sqrt(self_weight)
    close(moments.dcd_largest_variance(w), root / (1 - root))
    for q in (0.02, 0.3, 0.7):
        bracket = (2 - q) - 16 * (1 - q) ** 2 / (2 - q) ** 3
        expected = 2 * bracket / (2 * q * (1 - self_weight))
        found = moments.choco_largest_consensus_step(w, q)
        assert found == pytest.approx(expected, rel=1e-9)


def test_closed_thresholds_refuse_a_directed_graph():
    w = mixing.spectrum(topologies.directed_ring(8)).eigenvalues
    with pytest.raises(ValueError, match="eigenvalues must be real"):
        moments.choco_largest_consensus_step(w, 0.5)


def test_dcd_with_gradients():
    """e' = diag((l - a)^2) e + (omega/n) 1 (l - 1 - a)^2' e + gamma^2 (1 + omega)."""
    omega, gamma = 0.25, 0.1
    model = modes.low_precision_decentralized(
        RING, 1.0, gamma, message=Message(1.0, omega)
    )
    step = np.diag((RING - gamma) ** 2)
    step += omega / N * np.outer(np.ones(N), (RING - 1 - gamma) ** 2)
    energy = np.linalg.solve(np.eye(N) - step, gamma**2 * (1 + omega) * np.ones(N))
    found = ModeMoments(model).steady(np.zeros(N), 1.0)
    assert found.mean == pytest.approx(energy[0] / N)
    assert found.consensus == pytest.approx(energy[1:].sum() / N)
    assert ModeMoments(model).rate == pytest.approx(np.linalg.eigvals(step).max())


def test_quantized_gossip():
    model = modes.quantized_gossip(RING).select(slice(1, None))
    close(model.variance.sum(), (RING[1:] ** 2 / (1 - RING[1:] ** 2)).sum())


def test_marina_with_dense_steps_is_gradient_descent():
    step = moments.marina(0.3, 5.0, 1.0)
    assert np.abs(np.linalg.eigvals(step)).max() == pytest.approx(0.7**2)


def test_marina_with_exact_messages_is_gradient_descent():
    now = np.array([1.0, 0.0, 0.0])
    for _ in range(5):
        now = moments.marina(0.3, 0.0, 0.1) @ now
    close(now, [0.7**10, 0, 0])


def test_ecd_estimates():
    variance = 0.0
    for t in range(1, 30):
        variance = (1 - 2 / t) ** 2 * variance + (2 / t) ** 2
        if t > 1:
            assert moments.ecd_error_variance(t) == pytest.approx(variance)
            assert rates.ecd_error_variance(1.0, t).value >= variance


# --- rules of compression -------------------------------------------------------------


def test_interval_lemma():
    low, high = 0.7, 1.9
    x = np.linspace(low, high, 20001)
    assert ((x - low) * (high - x) / x**2).max() == pytest.approx(
        compression.interval_omega(low, high), rel=1e-6
    )
    assert compression.interval_omega(0.0, 1.0) == math.inf
    natural = compression.constants(compressors.natural(), 64).omega
    assert natural == pytest.approx(compression.interval_omega(1.0, 2.0))


def test_rules_of_classes():
    """An unbiased C is divided by 1 + omega; compositions multiply second moments."""
    rng = np.random.default_rng(0)
    x, q, p = 1.0, 0.4, 0.7
    outer = (rng.random(10**6) < p) / p
    inner = (rng.random(10**6) < q) / q
    found = ((outer * inner - x) ** 2).mean()
    expected = compression.composed(1 / p - 1, 1 / q - 1)
    assert found == pytest.approx(expected, rel=0.01)
    delta = compression.scaled_delta(1 / q - 1)
    scaled = inner * delta
    assert ((scaled - x) ** 2).mean() == pytest.approx(1 - delta, rel=0.01)
    assert compression.averaged(3.0, 4) == 0.75
    assert compression.induced(3.0, 0.25) == 2.25


def test_constants_are_those_of_the_facts():
    for name in ("qsgd", "topk", "sign", "identity", "minmax_uint8"):
        compressor = compressors.REGISTRY[name]()
        facts = compressor.facts
        found = compression.constants(compressor, 64)
        if facts.unbiased:
            assert found.omega == facts.omega(64)
            assert found.delta == 1 / (1 + facts.omega(64))
        else:
            assert (found.omega, found.delta) == (None, facts.delta(64))
        sent = compression.payload_bytes(compressor, 64)
        assert sent == facts.payload_bytes(np.zeros(64, np.float32))
        assert found.bits_per_element == 8 * sent / 64


def test_messages_are_exact_or_refused():
    assert compression.message(None, 8) == compression.EXACT
    assert compression.message(compressors.identity(), 8) == compression.EXACT
    scaled = compression.message(compressors.randk(0.25, mask="private"), 8)
    assert scaled == Message(1.0, 3.0, False)
    with pytest.raises(ValueError, match=r"topk.*depends on the vector.*randk"):
        compression.message(compressors.topk(0.25), 8)


# --- spectra --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("topology", "even"),
    [
        (topologies.ring(8), True),
        (topologies.ring(2), True),
        (topologies.torus(12), True),
        (topologies.hypercube(8), True),
        (topologies.complete(5), True),
        (topologies.static_exponential(12), True),
        (topologies.directed_ring(5), True),
        (topologies.star(6), False),
        (topologies.path(5), False),
    ],
    ids=lambda t: getattr(t, "name", t),
)
def test_spectrum(topology, even):
    found = mixing.spectrum(topology)
    w, u = topology.mixing_matrix(), found.basis
    close(u @ np.diag(found.eigenvalues) @ u.conj().T, w)
    close(u.conj().T @ u, np.eye(topology.n))
    close(np.abs(u[:, 0]), topology.n**-0.5)
    assert found.even is even
    assert found.gap == pytest.approx(topology.spectral_gap)
    assert found.farthest == pytest.approx(np.linalg.norm(np.eye(topology.n) - w, 2))


def test_spectrum_refuses_what_has_no_orthogonal_modes():
    given = [[0.5, 0.5], [0.2, 0.8]]
    with pytest.raises(ValueError, match="doubly stochastic"):
        mixing.spectrum(topologies.from_matrix(given, stochastic="row"))
    w = np.array([[0.5, 0.3, 0.2], [0.1, 0.6, 0.3], [0.4, 0.1, 0.5]])
    assert not np.allclose(w @ w.T, w.T @ w)
    with pytest.raises(ValueError, match="not orthogonal"):
        mixing.spectrum(topologies.from_matrix(w))


def test_random_matchings():
    n = 6
    eye, found = np.eye(n), []
    for i in range(n):
        for j in range(i):
            w = eye.copy()
            w[[i, i, j, j], [i, j, i, j]] = 0.5
            found.append(w)
    expected = mixing.consensus_energy_factor(np.stack(found))
    assert mixing.pair_energy_factor(n) == pytest.approx(expected)
    assert mixing.random_matching_energy_factor(8) == pytest.approx(6 / 14)
    lifted = moments.lift_mixture(found, np.full(len(found), 1 / len(found)))
    rest = lifted.without(np.ones(n), np.ones(n) / n)
    start = np.random.default_rng(0).standard_normal(n)
    start -= start.mean()
    path = rest.trajectory(start, 1)
    assert np.trace(path[1]) == pytest.approx(expected * np.trace(path[0]))


# --- bounds ---------------------------------------------------------------------------


def test_bounds_hold_and_say_how_sure_they_are():
    spectrum = mixing.spectrum(topologies.ring(N))
    delta = 0.5
    step = rates.choco_consensus_step(spectrum.gap, spectrum.farthest, delta)
    bound = rates.choco_energy_rate(spectrum.gap, delta)
    model = modes.choco_sgd(
        RING, 0.0, 0.0, consensus_step_size=step.value, message=unscaled(delta)
    )
    assert ModeMoments(model.without_mean()).rate < bound.value < 1
    assert not bound.confirmed and "unconfirmed" in str(bound)

    omega = 1.0
    model = modes.low_precision_decentralized(
        RING, 0.0, 0.0, message=Message(1.0, omega)
    ).without_mean()
    largest = math.sqrt(ModeMoments(model).largest_variance())
    allowed = rates.dcd_largest_error(spectrum.gap, spectrum.farthest)
    assert allowed.value < largest

    gamma = rates.diana_learning_rate(1.0, 3.0, 4)
    alpha = 1 / 4
    diana = modes.diana(4, 1.0, gamma.value, message=Message(1.0, 3.0))
    assert ModeMoments(diana).rate <= rates.diana_rate(gamma.value, 1.0, alpha).value

    p, omega = 0.3, 3.0
    gamma = rates.marina_learning_rate(1.0, omega, 4, p)
    step = moments.marina(gamma.value, omega / 4, p)
    assert np.abs(np.linalg.eigvals(step)).max() < 1

    sharp = compressors.qsgd(4).facts.omega(256)
    assert sharp <= rates.qsgd_omega(256, 4).value

    descent = rates.gradient_descent_rate(0.3, 1.0, 0.2)
    assert descent.confirmed and "unconfirmed" not in str(descent)
    assert descent.value == pytest.approx(0.94)
    error = rates.parallel_sgd_error(50, N, 0.3, 0.2, 1.0, 4.0)
    exact = 0.94 ** (2 * 50) * 4 + 0.3 / (N * 0.2 * (2 - 0.06))
    assert exact < error.value
    assert rates.ef_sgd_rate(100, 4, 0.1, 1.0).up_to_constant
    assert rates.ef21_rate(0.1, 0.5).value == 0.95
