# %% [markdown]
# # Coding differences: how much may be lost
#
# *Question.* DCD-PSGD and CHOCO both gossip compressed differences to a public copy
# that all neighbours hold. How coarse may the compressor be?
#
# *Prediction.* Random-k with q = k/d kept; $\lambda$ the eigenvalues of W. DCD (Tang
# et al., 2018; BAGUA's low-precision decentralized algorithm) lets errors into the
# models: on a circulant W with unbiased compression $\omega = 1/q - 1$, gossip alone
# is stable if and only if $\omega < \omega^\star = n / \sum_{k \ge 2}
# \frac{1-\lambda_k}{1+\lambda_k}$. No step size helps beyond. CHOCO (Koloskova et
# al., 2019) has a consensus step $\gamma_c$ that can be made small enough for every q
# > 0; the largest stable one is the root of an exact second-moment recursion, and
# lies far above what the paper's theorem guarantees (a bound, whose constants
# `theory.rates` marks as unconfirmed).

# %%
import matplotlib.pyplot as plt
import numpy as np
import optax

from bagua_jax import algorithms, topologies
from bagua_jax.experiments import studies
from bagua_jax.experiments.studies.measure import AXIS, mean_square_rate
from bagua_jax.experiments.studies.predictions.channels import bernoulli
from bagua_jax.theory import mixing, modes, moments, rates
from bagua_jax.theory.compression import Message

plt.style.use(studies.STYLE)
n = studies.choose(16, 4)
gamma = 0.2  # learning rate, at curvature 1
ring = topologies.ring(n)
spectrum = mixing.spectrum(ring)
w = spectrum.eigenvalues

# %% [markdown]
# **Prediction.** The compressor keeps each element with probability q: DCD needs it
# unbiased, so divided by q; CHOCO takes it as it is.


# %%
def dcd(q):
    """Second moments of DCD-PSGD."""
    sent = Message(1.0, 1 / q - 1)
    return moments.ModeMoments(
        modes.low_precision_decentralized(w, 1.0, gamma, message=sent)
    )


def choco(q, gamma_c):
    """Second moments of CHOCO-SGD."""
    sent = Message(q, q * (1 - q))
    return moments.ModeMoments(
        modes.choco_sgd(w, 1.0, gamma, consensus_step_size=gamma_c, message=sent)
    )


# %%
def largest_consensus_step(q):
    """Where CHOCO's second moments begin to grow."""
    return modes.largest_stable(lambda g: choco(q, g).stable, 4.0)


ratio = (1 - w[1:]) / (1 + w[1:])
omega_star = n / ratio.sum()  # of gossip alone
idle = modes.low_precision_decentralized(w, 0.0, 0.0).without_mean()
lifted_omega = moments.ModeMoments(idle).largest_variance()
q_star = modes.largest_stable(lambda x: dcd(1 - x).stable, 0.999)
q_star = 1 - q_star  # with gradients, at this learning rate

# %% [markdown]
# **Measurement.** Factors of second moments a step, of all elements of all workers
# (`measure.mean_square_rate`: particles, drawn anew by energy).


# %%
def make_dcd(q):
    """DCD-PSGD with a compressor of traced strength."""
    tx = algorithms.low_precision_decentralized(
        axis_name=AXIS, topology=ring, compressor=bernoulli(q)
    )
    return optax.chain(optax.sgd(gamma), tx)


def make_choco(q, gamma_c):
    """CHOCO-SGD; both its knobs are traced."""
    tx = algorithms.choco_sgd(
        bernoulli(q, scaled=False),
        axis_name=AXIS,
        topology=ring,
        consensus_step_size=gamma_c,
    )
    return optax.chain(optax.sgd(gamma), tx)


# %%
kept = np.array(studies.choose((0.15, 0.25, 0.35, 0.5, 0.65, 0.8, 0.95), (0.3, 0.8)))
parts = np.array(studies.choose((0.5, 0.9, 1.1), (0.5, 1.3)))
chosen = np.array(studies.choose((0.15, 0.5, 0.75), (0.3,)))
limit = np.array([largest_consensus_step(q) for q in chosen])
q_grid, part_grid = (a.ravel() for a in np.meshgrid(chosen, parts, indexing="ij"))
step_grid = (limit[:, None] * parts).ravel()
effort = {"n": n, "d": 16, "steps": 60, "burn": 30, "populations": 6}
effort |= {"replicas": studies.choose(64, 32)}
found_dcd = mean_square_rate(make_dcd, knobs=(kept,), **effort)
found_choco = mean_square_rate(make_choco, knobs=(q_grid, step_grid), **effort)

# %%
figure, (left, right) = plt.subplots(1, 2)
grid = np.linspace(0.1, 1, studies.choose(60, 12))
small = [choco(q, 0.5 * largest_consensus_step(q)).rate for q in grid]
curves = {"DCD": ([dcd(q).rate for q in grid], kept, found_dcd)}
half = part_grid == 0.5
curves["CHOCO, half its largest step"] = (
    small,
    q_grid[half],
    type(found_dcd)(found_choco.value[half], found_choco.error[half]),
)
for name, (curve, at, found) in curves.items():
    (line,) = left.plot(grid, curve, label=name)
    left.errorbar(at, found.value, found.error, fmt="o", color=line.get_color())

# %%
left.axvline(q_star, color="0.4", linewidth=0.8)
left.text(q_star + 0.01, 1.7, f"DCD diverges\nbelow q = {q_star:.3f}", fontsize=9)
left.axhline(1, color="0.4", linewidth=0.8)
left.set(xlabel="part q that is sent", ylabel="factor of second moments a step")
left.set(ylim=(0.55, 2), title=f"ring of {n}: lines predicted, dots measured")
largest = np.array([largest_consensus_step(q) for q in grid])
given = spectrum.gap, spectrum.farthest
bound = [rates.choco_consensus_step(*given, q).value for q in grid]
right.semilogy(grid, largest, label="largest stable\n(exact)")
right.semilogy(grid, bound, label="a bound of\nthe literature")
for sign, fill in ((1, "none"), (-1, "full")):
    side = sign * (found_choco.value - 1) > 0
    right.plot(q_grid[side], step_grid[side], "ko", fillstyle=fill)
right.set(xlabel="part q that is sent", ylabel=r"CHOCO's consensus step $\gamma_c$")
right.set_title("measured: full dots shrink, open ones grow")
studies.label_ends(left, width=0.5)
studies.label_ends(right, gap=22)
studies.save(figure, "difference_coding")

# %% [markdown]
# **The claim.** DCD has a level of compression at which it diverges whatever the
# step; CHOCO has a stable consensus step at every level, and its exact limit is many
# times the bound.

# %%
Row = studies.Row
rows = [Row("omega* of gossip on the ring", omega_star, lifted_omega, 0, 1e-6)]
# %%
rows += [
    Row(f"DCD, q = {q:g}: factor", dcd(q).rate, v, e, 3e-3)
    for q, v, e in zip(kept, *found_dcd, strict=True)
]
rows += [
    Row(
        f"CHOCO, q = {q:g}, {part:g} of the largest step: factor",
        choco(q, gamma_c).rate,
        v,
        e,
        3e-3,  # what is left of the start
    )
    for q, part, gamma_c, v, e in zip(
        q_grid, part_grid, step_grid, *found_choco, strict=True
    )
]
print(studies.compare(rows))

# %%
assert all(studies.agree(row) for row in rows)
assert np.array_equal(found_dcd.value > 1, kept < q_star)
assert np.array_equal(found_choco.value > 1, part_grid > 1)
assert (np.array(bound) < largest).all()
