# %% [markdown]
# # Talking late, and talking seldom
#
# *Question.* How stale may gradients be, how large may DiLoCo's outer step be, and
# what do local steps change where workers differ?
#
# *Prediction.* On a quadratic of curvature h, gradients that are $\tau$ steps late
# give $z^{\tau+1} - z^\tau + \gamma h = 0$, stable if and only if $\gamma h <
# 2\sin\frac{\pi}{2(2\tau+1)}$. DiLoCo (Douillard et al., 2023) is an outer Nesterov
# step on the mean move of H local steps, which is $s = 1 - (1 - \gamma h)^H$ of the
# way: $z^2 - (1+\beta)(1 - \eta s)z + \beta(1 - \eta s) = 0$, stable if and only if
# $\eta s < \frac{2 + 2\beta}{1 + 2\beta}$: momentum narrows the region, from 2 to
# 4/3. Outer heavy ball (SlowMo, Wang et al., 2020) widens it: $\alpha s < 2(1 +
# \beta)$. Local SGD rests at $\sum_i q_i b_i/\sum_i q_i$, $q_i = 1 - (1 - \gamma
# h_i)^H$, not at the optimum.

# %%
import matplotlib.pyplot as plt
import numpy as np
import optax

from bagua_jax import algorithms
from bagua_jax.experiments import studies
from bagua_jax.experiments.studies.measure import AXIS, simulate
from bagua_jax.theory import modes, problems

plt.style.use(studies.STYLE)
delays = studies.choose((0, 1, 2, 5), (1, 2))
betas = studies.choose((0.0, 0.5, 0.9), (0.9,))
n, steps = 2, 120

# %% [markdown]
# **Measuring a rate.** Every parameter of one run has a curvature of its own, so that
# a single run draws a whole curve. A factor a step is read off the largest values
# within two windows; that is exact up to where in a cycle of its oscillation a window
# begins.


# %%
def growth(make, curvature, local_steps=1):
    """Factor of each parameter, from one round of local steps to the next."""
    x = simulate(
        make,
        steps=steps * local_steps,
        start=np.ones((n, len(curvature))),
        curvature=curvature,
    )[0, ::local_steps, 0]
    size, w = np.abs(x.astype(np.float64)), steps // 4
    early, late = size[w : 2 * w].max(0), size[-w:].max(0)
    late = np.where(late > 1e-30, late, np.nan)  # below, float32 rounds to 0
    return (late / early) ** (1 / (steps + 1 - 2 * w))


def rate(model, curvature):
    """Largest modulus of the roots, for each curvature."""
    return np.array([np.abs(model(h).poles[0]).max(initial=0) for h in curvature])


# %% [markdown]
# **Delay.** The learning rate is 1, so that the curvature is $\gamma h$.


# %%
def delayed(tau):
    """SGD on the mean gradient of tau steps ago."""
    stale = algorithms.delayed_gradients(axis_name=AXIS, staleness=tau)
    return lambda: optax.chain(stale, optax.sgd(1.0))


fine, coarse = np.linspace(0.02, 2.2, 219), np.linspace(0.05, 2.15, 22)
late_model = {
    tau: lambda h, tau=tau: modes.delayed_gradients(n, h, 1.0, staleness=tau)
    for tau in delays
}
late_curve = {tau: rate(late_model[tau], fine) for tau in delays}
late_found = {tau: growth(delayed(tau), coarse) for tau in delays}

# %% [markdown]
# **Outer steps.** H = 4 local steps of 0.1, and an outer learning rate $\eta$ of 2.4
# for DiLoCo and 4 for SlowMo, so that curvatures between 0 and 10 reach $\eta s$ in
# (0, $\eta$).

# %%
H, gamma = 4, 0.1
outer = {"DiLoCo": 2.4, "SlowMo": 4.0}
largest = {b: {"DiLoCo": (2 + 2 * b) / (1 + 2 * b), "SlowMo": 2 + 2 * b} for b in betas}


def curvatures(eta, products):
    """Return h for chosen products of eta and s."""
    return (1 - (1 - np.asarray(products) / eta) ** (1 / H)) / gamma


# %%
def outer_make(name, beta):
    """Local SGD with momentum outside, of either kind."""
    eta, given = outer[name], {"axis_name": AXIS, "local_steps": H}
    if name == "DiLoCo":
        given |= {"outer_learning_rate": eta, "outer_momentum": beta}
        tx = algorithms.diloco(**given)
    else:
        given |= {"outer_learning_rate": eta, "outer_momentum": beta}
        tx = algorithms.slowmo(learning_rate=gamma, **given)
    return lambda: optax.chain(optax.sgd(gamma), tx)


# %%
def outer_model(name, beta):
    """Return its mode polynomial from theory."""
    eta, m = outer[name], {"local_steps": H}
    if name == "DiLoCo":
        m |= {"outer_learning_rate": eta, "outer_momentum": beta}
        return lambda h: modes.diloco(n, h, gamma, **m)
    m |= {"outer_learning_rate": eta, "outer_momentum": beta}
    return lambda h: modes.slowmo(n, h, gamma, **m)


# %%
pairs = [("DiLoCo", beta) for beta in betas] + [("SlowMo", betas[-1])]
product = {name: np.linspace(0.05, min(3.9, 0.97 * outer[name]), 20) for name in outer}
dense = {name: np.linspace(0.01, product[name][-1], 150) for name in outer}
outer_curve, outer_found = {}, {}
for name, beta in pairs:
    model, h = outer_model(name, beta), curvatures(outer[name], dense[name])
    outer_curve[name, beta] = rate(model, h)
    h = curvatures(outer[name], product[name])
    outer_found[name, beta] = growth(outer_make(name, beta), h, H)

# %%
figure, (left, right) = plt.subplots(1, 2, sharey=True)
for tau in delays:
    (line,) = left.plot(fine, late_curve[tau], label=rf"$\tau$ = {tau}")
    left.plot(coarse, late_found[tau], "o", color=line.get_color())
for name, beta in pairs:
    label = rf"{name}, $\beta$ = {beta:g}"
    (line,) = right.plot(dense[name], outer_curve[name, beta], label=label)
    right.plot(product[name], outer_found[name, beta], "o", color=line.get_color())

# %%
left.set(xlabel=r"$\gamma h$", ylabel="factor a round", ylim=(0, 1.6), xlim=(0, 2.2))
left.set_title("late gradients: lines predicted, dots measured")
right.set(xlabel=r"$\eta s$", xlim=(0, 4), title=f"outer momentum over H = {H} steps")
for axes in (left, right):
    axes.axhline(1, color="0.4", linewidth=0.8)
    studies.label_ends(axes)
studies.save(figure, "delay_and_local_steps")

# %% [markdown]
# **Local steps where curvatures differ.** Two workers want different things with
# different force; local SGD rests between, nearer to the mean of the optima as H
# grows.

# %%
uneven = problems.quadratic(2, np.array([[1.0], [0.2]]), targets=[[0.0], [1.0]])
bias = {}
for local_steps in studies.choose((1, 4, 16), (16,)):
    local = algorithms.local_sgd(axis_name=AXIS, local_steps=local_steps)
    x = simulate(
        lambda local=local: optax.chain(optax.sgd(0.2), local),
        steps=320,
        start=np.zeros((2, 1)),
        curvature=uneven.curvature,
        target=uneven.target,
    )
    point = modes.local_sgd_fixed_point(*uneven[:2], 0.2, local_steps)[0]
    bias[local_steps] = point - uneven.optimum[0], x[0, -1, 0, 0] - uneven.optimum[0]

# %% [markdown]
# **The claim.** Thresholds, from both sides: at 0.98 of it the factor is below 1, at
# 1.02 above. Between the sides we interpolate for the table.


# %%
def crossing(make, threshold, to_curvature, rounds=1):
    """Return the product at which the measured factor passes 1, by interpolation."""
    sides = threshold * np.array([0.98, 1.02])
    below, above = growth(make, to_curvature(sides), rounds)
    assert below < 1 < above, (threshold, below, above)
    return float(sides[0] + (1 - below) / (above - below) * (sides[1] - sides[0]))


# %%
rows = []
for tau in delays:
    bound = 2 * np.sin(np.pi / (2 * (2 * tau + 1)))
    found = crossing(delayed(tau), bound, lambda h: h)
    rows.append(
        studies.Row(f"tau = {tau}: largest gamma h", bound, found, 0, 0.02 * bound)
    )
for name, beta in pairs:
    bound, eta = largest[beta][name], outer[name]
    make, what = outer_make(name, beta), f"{name}, beta = {beta:g}: largest eta s"
    found = crossing(make, bound, lambda p, eta=eta: curvatures(eta, p), H)
    rows.append(studies.Row(what, bound, found, 0, 0.02 * bound))
for local_steps, values in bias.items():
    rows.append(studies.Row(f"bias of local SGD, H = {local_steps}", *values, 0, 1e-5))
print(studies.compare(rows))

# %%
assert all(studies.agree(row) for row in rows)
assert all(
    np.nanmax(np.abs(late_found[t] - rate(late_model[t], coarse))) < 0.05
    for t in delays
)
