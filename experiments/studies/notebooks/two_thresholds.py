# %% [markdown]
# # Where DCD diverges, and CHOCO's largest consensus step, in closed form
#
# *Question.* Workers gossip compressed differences to public copies of their models,
# and the compressor keeps a random part q of the elements. DCD (Tang et al., 2018;
# BAGUA's low-precision decentralized algorithm) diverges if q is small; CHOCO
# (Koloskova et al., 2019) has a consensus step that can be made small. The papers prove
# bounds. Where exactly are the limits?
#
# *Prediction.* Gossip without gradients, a symmetric W that treats all workers alike,
# with eigenvalues $\lambda_k$. DCD, which needs the compressor unbiased (1/q times what
# is kept): stable if and only if $\frac{1-q}{q} \cdot \frac1n \sum_k
# \frac{1-\lambda_k}{1+\lambda_k} < 1$. CHOCO, which takes it as it is, at the consensus
# step $\gamma_c$, with $a_k = \gamma_c (1 - \lambda_k)$: if and only if $\frac{1-q}{q}
# \cdot \frac1n \sum_k \frac{2q + (2+q) a_k}{4 - 2q - q a_k} < 1$ and $q a_k < 4 - 2q$.
# On a long ring of self-weight $w_0$: DCD diverges for $q < 1 - \sqrt{w_0}$, which for
# BAGUA's 1/3 is 42.3 % of the elements, and CHOCO from $\gamma_c = \frac{1}{q (1 -
# w_0)} \big( 2 - q - \frac{16 (1-q)^2}{(2-q)^3} \big)$, which is positive for all q.

# %%
from typing import Any

import matplotlib.pyplot as plt
import numpy as np

from bagua_jax import topologies
from bagua_jax.algorithms import choco_sgd, low_precision_decentralized
from bagua_jax.experiments import studies
from bagua_jax.experiments.studies.measure import AXIS, mean_square_rate
from bagua_jax.experiments.studies.predictions.channels import bernoulli
from bagua_jax.theory import mixing, modes, moments, rates
from bagua_jax.theory.compression import Message

# %%
plt.style.use(studies.STYLE)
n = studies.choose(8, 4)
ring = topologies.ring(n)
spectrum = mixing.spectrum(ring)
w = spectrum.eigenvalues
Row = studies.Row

# %% [markdown]
# **Why.** A compression error has variance v times the energy of what is compressed, is
# uncorrelated with everything before it and independent between workers. On such a W it
# is spread evenly over the modes. So let errors of energy 1 enter every mode once: if
# the messages that follow have the energy G per worker in all, errors of energy v G
# come of them, and so on. All terms are positive, and the second moments stay bounded
# if and only if v G < 1.
#
# *DCD.* In mode k the message is $(\lambda_k - 1) x_k$, and $x_k' = \lambda_k x_k +
# \nu$. An error leaves $\lambda_k^t$ after t steps, whose messages have the energy
# $(1 - \lambda_k)^2 \sum_t \lambda_k^{2t} = \frac{1 - \lambda_k}{1 + \lambda_k}$; v is
# $\omega = 1/q - 1$.

# %% [markdown]
# *CHOCO.* With the public copy y and the message e = x - y a step is $y' = y + q e +
# \nu$, $e' = (1 - q) e - \nu - a y'$. The answer of e to an error is the transfer
# function $-\frac{(1+a) z - 1}{z^2 - (2 - q - aq) z + 1 - q}$, and its energy, by the
# sum of squares of a second-order filter, $\frac{2q + (2+q) a}{q^2 (4 - 2q - qa)}$; v
# is q (1 - q).
#
# *Long rings.* $\lambda = w_0 + (1 - w_0) \cos\theta$, sums become means over $\theta$,
# and the mean of $1/(A + B \cos\theta)$ is $1/\sqrt{A^2 - B^2}$.


# %%
def dcd(q, graph=w):
    """Second moments of gossip with DCD."""
    sent = Message(1.0, 1 / q - 1)
    model = modes.low_precision_decentralized(graph, 0.0, 0.0, message=sent)
    return moments.ModeMoments(model.without_mean())


# %%
def choco(q, gamma_c, graph=w):
    """Second moments of gossip with CHOCO."""
    sent, step = Message(q, q * (1 - q)), {"consensus_step_size": gamma_c}
    model = modes.choco_sgd(graph, 0.0, 0.0, message=sent, **step)
    return moments.ModeMoments(model.without_mean())


def least_kept(graph):
    """Return the q below which DCD diverges."""
    return 1 / (1 + moments.dcd_largest_variance(graph))


def largest_step(q):
    """Return CHOCO's largest consensus step."""
    return moments.choco_largest_consensus_step(w, q)


# %% [markdown]
# **Measurement.** Both algorithms without gradients, with a compressor of traced
# strength: factors of the second moment of all elements of all workers a step
# (`measure.mean_square_rate`), on both sides of the thresholds.


# %%
def make_dcd(q):
    """DCD on the ring."""
    return low_precision_decentralized(
        axis_name=AXIS, topology=ring, compressor=bernoulli(q)
    )


def make_choco(q, gamma_c):
    """CHOCO on the ring; both its knobs are traced."""
    return choco_sgd(
        bernoulli(q, scaled=False),
        axis_name=AXIS,
        topology=ring,
        consensus_step_size=gamma_c,
    )


# %%
q_star = least_kept(w)
kept = np.array(studies.choose((0.25, 0.35, 0.41, 0.44, 0.55, 0.8), (0.3, 0.6)))
chosen = np.array(studies.choose((0.2, 0.42, 0.6, 0.8), (0.3,)))
parts = np.array(studies.choose((0.9, 0.97, 1.03), (0.9, 1.2)))
q_grid, part_grid = (a.ravel() for a in np.meshgrid(chosen, parts, indexing="ij"))
step_grid = np.array([largest_step(q) for q in q_grid]) * part_grid
effort: dict[str, Any] = {
    "n": n,
    "d": 16,
    "steps": studies.choose(150, 70),
    "populations": studies.choose(16, 4),
}
effort |= {"replicas": studies.choose(128, 48), "burn": studies.choose(90, 40)}
effort |= {"curvature": 0.0, "conserved": True}
found_dcd: Any = mean_square_rate(make_dcd, knobs=(kept,), **effort)
found_choco: Any = mean_square_rate(make_choco, knobs=(q_grid, step_grid), **effort)

# %%
figure, (left, right) = plt.subplots(1, 2)
grid = np.linspace(0.06, 1, studies.choose(60, 12))
near = [choco(q, 0.9 * largest_step(q)).rate for q in grid]
at = part_grid == 0.9
curves = {
    "DCD": ([dcd(q).rate for q in grid], kept, found_dcd.value, "o"),
    "CHOCO at 0.9 of\nits largest step": (near, chosen, found_choco.value[at], "s"),
}
for name, (curve, where, measured, marker) in curves.items():
    (line,) = left.plot(grid, curve, label=name)
    left.plot(where, measured, marker, color=line.get_color())
left.axvline(q_star, color="0.4", linewidth=0.8)
left.text(q_star + 0.02, 1.85, f"DCD diverges\nbelow q = {q_star:.4f}", fontsize=9)
left.axhline(1, color="0.4", linewidth=0.8)
left.set(xlabel="part q that is sent", ylabel="factor of second moments a step")
left.set(ylim=(0.5, 2.2), title=f"ring of {n}: lines predicted, dots measured")

# %%
bound = [rates.choco_consensus_step(spectrum.gap, spectrum.farthest, q) for q in grid]
right.plot(grid, [largest_step(q) for q in grid], label="largest step,\nexact")
right.plot(
    grid, [b.value for b in bound], "--", label="a bound of\nthe literature\n(recalled)"
)
for sign, fill in ((1, "none"), (-1, "full")):
    side = (sign * (found_choco.value - 1) > 0) & (part_grid != 0.97)
    right.plot(q_grid[side], step_grid[side], "ko", fillstyle=fill)
right.set(xlabel="part q that is sent", ylabel=r"CHOCO's consensus step $\gamma_c$")
right.set_title("measured: full dots shrink, open ones grow")
studies.label_ends(left, gap=26, width=0.5)
studies.label_ends(right, gap=34, width=0.45)
studies.save(figure, "two_thresholds")

# %% [markdown]
# **What is true, and what is not.** For the W at hand DCD has a level of compression
# beyond which it diverges; no learning rate cures it, since gossip alone diverges. It
# does depend on W: a lazier ring moves the wall to $1 - \sqrt{w_0}$, and mixes less a
# step. CHOCO at a *fixed* consensus step has such a wall, too (at $\gamma_c = 1$ near
# q = 0.52); it has none because $\gamma_c$ can follow q. To first order in q its
# largest step is $q/(1 - w_0)$; the part of W - I that DCD stands, $(1 - (1-q)^2)/(1 -
# w_0)$, is twice that, and for q above 0.7 it is the smaller one. The closed forms are
# for masks that every worker draws by itself, and for symmetric W; for directed W, and
# with gradients, `moments.ModeMoments` finds the same limits by root finding. On a ring
# of 8 with q = 1/2, $\gamma h = 0.1$ raises CHOCO's from 0.944 to 1.125; $\gamma h =
# 0.05$ lowers DCD's largest $\omega$ from 1.366 to 1.214. All of these are exact; a
# deterministic compressor, such as top-k, may do better or worse.

# %%
long = mixing.spectrum(topologies.ring(256)).eigenvalues
lazy = mixing.spectrum(topologies.ring(256, self_weight=0.6)).eigenvalues
lifted = modes.largest_stable(lambda g: choco(0.25, g).stable, 4.0)
bracket = 1.75 - 16 * 0.75**2 / 1.75**3
formula = bracket / (0.25 * 2 / 3)
exact = moments.choco_largest_consensus_step(long, 0.25)
dcd_lifted = 1 / (1 + dcd(0.5).largest_variance())
rows = [
    Row(f"DCD, ring of {n}: least q, sum and recursion", q_star, dcd_lifted, 0, 1e-9),
    Row("DCD, long ring: least q", 1 - 3**-0.5, least_kept(long), 0, 1e-9),
    Row("DCD, long ring, w0 = 0.6: least q", 1 - 0.6**0.5, least_kept(lazy), 0, 1e-9),
    Row("CHOCO, q = 1/4: step, sum and recursion", largest_step(0.25), lifted, 0, 1e-8),
    Row("CHOCO, q = 1/4, long ring: largest step", formula, exact, 0, 1e-9),
]

# %%
rows += [
    Row(f"DCD, q = {q:g}: factor", dcd(q).rate, v, e, 3e-3)
    for q, v, e in zip(kept, *found_dcd, strict=True)
]
rows += [
    Row(
        f"CHOCO, q = {q:g}, {part:g} of the largest step: factor",
        choco(q, step).rate,
        v,
        e,
        3e-3,
    )
    for q, part, step, v, e in zip(
        q_grid, part_grid, step_grid, *found_choco, strict=True
    )
]
print(studies.compare(rows))

# %%
assert all(studies.agree(row) for row in rows)
assert np.array_equal(found_dcd.value > 1, kept < q_star)
assert np.array_equal(found_choco.value > 1, part_grid > 1)
assert all(b.value < largest_step(q) for q, b in zip(grid, bound, strict=True))
assert not any(b.confirmed for b in bound)  # hence "recalled"
