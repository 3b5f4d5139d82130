"""The lifted operator: brute force, its two forms, and networks that are large."""

import itertools
import time

import numpy as np
import pytest

from bagua_jax import topologies
from bagua_jax.theory import mixing, modes, moments
from bagua_jax.theory.compression import Message
from bagua_jax.theory.moments import ModeMoments


def choco(w, q, gamma_c, a):
    """CHOCO on the whole network: s = (x of all, public copies of all)."""
    n = len(w)
    eye, zero = np.eye(n), np.zeros((n, n))
    mixing_part = gamma_c * (w - eye)
    fixed = np.block([[(1 - a) * eye, mixing_part], [zero, eye]])
    random = []
    for i in range(n):
        pick = np.outer(eye[i], eye[i])
        sent = np.hstack([(1 - a) * pick, -pick])
        random.append(np.vstack([mixing_part @ sent, sent]))
    return fixed, random, q


def test_the_operator_is_the_average_over_all_masks():
    fixed, random, q = choco(topologies.ring(3).mixing_matrix(), 0.3, 0.6, 0.2)
    start = np.random.default_rng(0).standard_normal((6, 6))
    start = start @ start.T
    expected = np.zeros_like(start)
    for mask in itertools.product((0, 1), repeat=3):
        m = fixed + sum(on * part for on, part in zip(mask, random, strict=True))
        probability = np.prod([q if on else 1 - q for on in mask])
        expected += probability * m @ start @ m.T
    found = moments.lift(fixed, random, q).apply(start)
    np.testing.assert_allclose(found, expected, atol=1e-12)


def test_a_shared_mask_is_one_matrix():
    """All workers keep or drop together: half the time each, at q = 1/2."""
    fixed, random, _ = choco(topologies.ring(3).mixing_matrix(), 0.5, 0.6, 0.2)
    together = sum(random)
    start = np.eye(6)
    found = moments.lift(fixed, [together], 0.5).apply(start)
    kept, dropped = fixed + together, fixed
    expected = (kept @ kept.T + dropped @ dropped.T) / 2
    np.testing.assert_allclose(found, expected, atol=1e-12)


@pytest.mark.parametrize("a", [0.0, 0.1])
def test_modes_agree_with_the_whole_network(a):
    n, q, gamma_c = 8, 0.3, 0.5
    graph = topologies.ring(n)
    lifted = moments.lift(*choco(graph.mixing_matrix(), q, gamma_c, a)[:2], q)
    model = modes.choco_sgd(
        mixing.spectrum(graph).eigenvalues,
        1.0 if a else 0.0,
        a,
        consensus_step_size=gamma_c,
        message=Message(q, q * (1 - q)),
    )
    if not a:
        mean = np.r_[np.ones(n) / n, np.zeros(n)]
        lifted, model = lifted.without(np.ones(2 * n), mean), model.without_mean()
    assert ModeMoments(model).rate == pytest.approx(lifted.rate())


def test_steady_states_agree_with_the_whole_network():
    n, q, gamma_c, a = 6, 0.4, 0.5, 0.2
    graph = topologies.ring(n)
    w, eye, zero = graph.mixing_matrix(), np.eye(n), np.zeros((n, n))
    lifted = moments.lift(*choco(w, q, gamma_c, a)[:2], q)
    # A gradient's noise moves x by -a u, and the message with it.
    step = gamma_c * (w - eye)
    through = np.block([[-a * (eye + q * step)], [-a * q * eye]])
    noise = through @ through.T
    for i in range(n):
        pick = np.outer(eye[i], eye[i])
        part = -a * np.vstack([step @ pick, pick])
        noise += q * (1 - q) * part @ part.T
    steady = lifted.steady(noise)
    np.testing.assert_allclose(lifted.apply(steady) + noise, steady, atol=1e-12)
    model = modes.choco_sgd(
        mixing.spectrum(graph).eigenvalues,
        1.0,
        a,
        consensus_step_size=gamma_c,
        message=Message(q, q * (1 - q)),
    )
    found = ModeMoments(model).steady(np.zeros(n), 1.0)
    assert found.total == pytest.approx(np.trace(steady[:n, :n]) / n)
    mean = np.ones(n) / n
    assert found.mean == pytest.approx(mean @ steady[:n, :n] @ mean)
    del zero


def test_iteration_agrees_with_the_formed_operator(monkeypatch):
    fixed, random, q = choco(topologies.ring(5).mixing_matrix(), 0.4, 0.5, 0.2)
    lifted = moments.lift(fixed, random, q)
    rate, steady = lifted.rate(), lifted.steady(np.eye(10))
    monkeypatch.setattr(moments, "_DENSE", 0)
    assert lifted.rate() == pytest.approx(rate, rel=1e-10)
    np.testing.assert_allclose(lifted.steady(np.eye(10)), steady, rtol=1e-9)


def test_64_workers_with_two_states_take_seconds():
    """The operator would have 16384 x 16384 elements; nothing of it is formed."""
    n, q, gamma_c, a = 64, 0.3, 0.3, 0.1
    graph = topologies.ring(n)
    begin = time.process_time()
    model = modes.choco_sgd(
        mixing.spectrum(graph).eigenvalues,
        1.0,
        a,
        consensus_step_size=gamma_c,
        message=Message(q, q * (1 - q)),
    )
    found = ModeMoments(model).rate
    by_modes = time.process_time() - begin
    lifted = moments.lift(*choco(graph.mixing_matrix(), q, gamma_c, a)[:2], q)
    assert lifted.rate() == pytest.approx(found, rel=1e-8)
    assert by_modes < 2 and time.process_time() - begin < 20


def test_irregular_graphs_go_by_the_whole_network():
    """A star has no even modes: the operator itself, against a simulation's mean."""
    n, q, gamma_c, a = 4, 0.5, 0.4, 0.3
    w = topologies.star(n).mixing_matrix()
    fixed, random, _ = choco(w, q, gamma_c, a)
    start = np.r_[np.arange(1.0, n + 1), np.zeros(n)]
    second = moments.lift(fixed, random, q).trajectory(start, 3)[-1]
    rng = np.random.default_rng(0)
    states = np.tile(start, (40000, 1))
    for _ in range(3):
        masks = rng.random((len(states), n)) < q
        new = states @ fixed.T
        for i in range(n):
            new += masks[:, [i]] * (states @ random[i].T)
        states = new
    samples = (states[:, :n] ** 2).sum(1)
    error = samples.std() / np.sqrt(len(samples))
    assert abs(samples.mean() - np.trace(second[:n, :n])) < 4 * error


def test_what_does_not_settle_is_refused():
    lifted = moments.lift(np.array([[1.1]]), [np.zeros((1, 1))], 0.5)
    assert lifted.rate() == pytest.approx(1.21)
    with pytest.raises(ValueError, match="no steady state.*1.21"):
        lifted.steady(np.eye(1))
    model = modes.compressed_mean(1, 1.0, 3.0, message=Message(1.0, 1.0))
    with pytest.raises(ValueError, match="no steady state"):
        ModeMoments(model).steady(np.zeros(1))
    with pytest.raises(ValueError, match="not conserved"):
        modes.decentralized([1.0, 0.5], 1.0, 0.1).without_mean()


@pytest.mark.parametrize("common", [False, True])
def test_modes_agree_with_the_average_over_all_masks(common):
    """DIANA on 2 workers, private masks and one for both, by enumeration."""
    n, q, a = 2, 0.4, 0.3
    omega = 1 / q - 1
    b = np.array([1.0, -0.5])
    model = modes.diana(n, 1.0, a, message=Message(1.0, omega), common=common)
    basis = mixing.spectrum(topologies.complete(n))
    path = ModeMoments(model).energies(basis.to_modes(np.ones(n)), basis.to_modes(b))
    found = [next(path).mean for _ in range(4)]
    alpha = 1 / (1 + omega)
    cases = [(1.0, 1.0, np.zeros(n))]  # probability, x, shifts
    expected = []
    for _ in range(4):
        expected.append(sum(p * (x - b.mean()) ** 2 for p, x, _ in cases))
        new = []
        for p, x, h in cases:
            for mask in itertools.product((0, 1), repeat=1 if common else n):
                chance = np.prod([q if on else 1 - q for on in mask])
                sent = np.array(mask) / q * (x - b - h)
                step = x - a * (h + sent).mean()
                new.append((p * chance, step, h + alpha * sent))
        cases = new
    np.testing.assert_allclose(found, expected, rtol=1e-10)
