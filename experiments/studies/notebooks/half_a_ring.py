# %% [markdown]
# # BAGUA's rotating pairs mix no better than a ring of half the size
#
# *Question.* `shift_one`, BAGUA's decentralized algorithm with one peer a step, lets
# every worker average with a partner of the other half, and the partner changes at
# every step. One message a step reaches a new worker each time. How fast do workers
# agree?
#
# *Prediction.* After the first step the distance to the mean shrinks by exactly
# $\cos(2\pi/n)$ a step at worst: as on a *directed* ring of n/2 workers that average
# with the one behind, to which it is equal. Two steps, two messages, are exactly one
# step of the undirected ring of n/2 workers with weights 1/4, 1/2, 1/4. The one-peer
# exponential graph (Ying et al., *Exponential graph is provably efficient*, 2021) sends
# as much, and is exact after $\log_2 n$ steps if n is a power of two.

# %%
import matplotlib.pyplot as plt
import numpy as np

from bagua_jax import topologies
from bagua_jax.algorithms import decentralized
from bagua_jax.experiments import studies
from bagua_jax.experiments.studies.measure import AXIS, average, simulate
from bagua_jax.theory import mixing

plt.style.use(studies.STYLE)
sizes = studies.choose((4, 8, 16, 32, 64), (4, 8))
n, steps = studies.choose((32, 160), (8, 16))

# %% [markdown]
# **Why.** Let h = n/2. At step s worker r < h meets worker $h + ((s + r) \bmod h)$, and
# both take the mean. After step 0 the pair (r, h + r) holds one number, $c_r$. At step
# 1 worker r, with $c_r$, meets the worker h + r + 1, with $c_{r+1}$: both hold $c'_r =
# (c_r + c_{r+1})/2$, and again every value is held by two workers, one of each half.
# From step to step the second half is only renumbered, so that this goes on for ever:
# $c' = \tfrac12 (I + S) c$ with the cyclic shift S of h numbers. $\tfrac12 (I + S)$ is
# normal with eigenvalues $\tfrac12 (1 + e^{2\pi i k/h})$ of modulus $\cos(\pi k/h)$;
# the largest beside the mean's 1 is $\cos(\pi/h) = \cos(2\pi/n)$. Its square has the
# moduli $\cos^2(\pi k/h) = \tfrac12 + \tfrac12 \cos(2\pi k/h)$, the eigenvalues of the
# ring with weights 1/4, 1/2, 1/4. From independent models of variance 1 the energy left
# after t steps, of that at first, is therefore $\tfrac1{n-1} \sum_{k=1}^{h-1}
# \cos^{2(t-1)}(\pi k/h)$. The one-peer exponential graph multiplies $\tfrac12 (I +
# S^{2^j})$ for j = 0, 1, ..., $\log_2 n - 1$, whose product is $\tfrac1n \sum_i S^i$,
# the exact mean.


# %%
def energy_left(n, times):
    """Return the energy of independent models after 1, 2, ... steps of shift_one."""
    moduli = np.cos(2 * np.pi * np.arange(1, n // 2) / n)
    return np.array([(moduli ** (2 * t - 2)).sum() / (n - 1) for t in times])


def multiplied(graph, steps):
    """Return the same from the matrices that the algorithm runs on."""
    product, path = np.eye(graph.n), []
    for step in range(steps + 1):
        path.append(((product - 1 / graph.n) ** 2).sum() / (graph.n - 1))
        product = graph.mixing_matrix(step) @ product
    return np.array(path)


# %% [markdown]
# **Measurement.** `decentralized` without gradients, in float32. First the slowest
# mode: $c_r = \cos(2\pi r/h)$ on both halves, whose distance to the mean nothing
# shrinks faster or slower than $\cos(2\pi/n)$.


# %%
def gossip(graph):
    """Make the algorithm; simulate takes a function of no arguments."""
    return lambda: decentralized(axis_name=AXIS, topology=graph)


def distance(x):
    """Root of the energy around the mean, [R, T + 1]."""
    x = np.asarray(x, np.float64)
    return np.sqrt(((x - x.mean(2, keepdims=True)) ** 2).sum((2, 3)))


# %%
def slowest_factor(n, steps=24):
    """Measure the factor a step of the slowest mode."""
    wave = np.cos(4 * np.pi * np.arange(n) / n)[:, None]
    path = simulate(
        gossip(topologies.shift_one(n)), steps=steps, start=wave, curvature=0.0
    )
    left = distance(path)[0]
    return (left[-1] / left[1]) ** (1 / (steps - 1))


# %%
factors = {k: slowest_factor(k) for k in sizes if k > 4}
other = {  # factor of a step of what it is compared with
    "directed ring of n/2": 1 - mixing.spectrum(topologies.directed_ring(n // 2)).gap,
    "ring of n/2, weights 1/4, 1/2, 1/4": 1
    - mixing.spectrum(topologies.ring(n // 2, self_weight=0.5)).gap,
    "ring of n/2, weights 1/3": 1 - mixing.spectrum(topologies.ring(n // 2)).gap,
    "ring of n, weights 1/3": 1 - mixing.spectrum(topologies.ring(n)).gap,
}

# %% [markdown]
# Then independent random models, 32 replicas of 32 parameters each.

# %%
graphs = {
    "shift_one": topologies.shift_one(n),
    "ring, weights 1/3": topologies.ring(n),
    "one-peer exponential": topologies.one_peer_exponential(n),
}
start = np.random.default_rng(0).standard_normal((32, n, 32))
paths, predicted = {}, {}
for name, graph in graphs.items():
    ran = simulate(gossip(graph), steps=steps, start=start, curvature=0.0, replicas=32)
    energy = distance(ran) ** 2
    paths[name] = energy / energy[:, :1]
    predicted[name] = multiplied(graph, steps)

# %%
figure, (left, right) = plt.subplots(1, 2)
dots = np.unique(np.geomspace(1, steps, 14).astype(int))
for name, marker in zip(graphs, "os^", strict=True):
    messages = graphs[name].messages * np.arange(steps + 1)
    seen, curve = messages <= steps, np.maximum(predicted[name], 1e-20)
    (line,) = left.semilogy(messages[seen], curve[seen], label=name)
    found = average(paths[name][:, dots]).value
    few = messages[dots] <= steps
    left.plot(messages[dots][few], found[few], marker, color=line.get_color())
left.set(ylim=(1e-5, 1.5), xlim=(0, steps), xlabel="messages a worker has sent")
left.set(ylabel="energy left of the disagreement", title=f"{n} workers")
studies.label_ends(left, gap=14, width=0.5)

# %%
grid = np.arange(8, max(sizes) + 1, 2)


def per_message(n):
    """Factor of a ring with weights 1/3, which sends two messages a step."""
    return np.sqrt(1 - mixing.spectrum(topologies.ring(n)).gap)


slow = {
    "shift_one,\n$\\cos(2\\pi/n)$": np.cos(2 * np.pi / grid),
    "ring of n,\nweights 1/3": np.array([per_message(k) for k in grid]),
    "ring of n/2,\nweights 1/3": np.array([per_message(k // 2) for k in grid]),
}

# %%
for name, factor in slow.items():
    right.loglog(grid, -1 / np.log(factor), label=name)
right.plot(list(factors), -1 / np.log(list(factors.values())), "ko", fillstyle="none")
exact = [k for k in sizes if k > 4]
right.plot(exact, np.log2(exact), "^", color="C3", label="one-peer exponential,\nexact")
right.set_xticks(exact, [str(k) for k in exact])
right.minorticks_off()
right.set(xlabel="workers n", ylabel="messages to shrink by e", ylim=(1, None))
studies.label_ends(right, gap=24, width=0.6)
studies.save(figure, "half_a_ring")

# %% [markdown]
# **What is true, and what is not.** The table gives factors of distances a step, and
# energies. The half-sized ring that `shift_one` equals is the one with weights 1/2: on
# the customary weights of 1/3 a ring of n/2 is a little faster still, per message by
# 4/3 for large n, and a ring of n, which sends two messages a step, three times slower.
# With four workers or two `shift_one` is exact too. Where n is no power of two the
# one-peer exponential graph is not exact, but forgets geometrically (row *n = 24*),
# many times faster. And a worker of `shift_one` does meet all n/2 others: it meets them
# in the order in which they have heard the least.

# %%
Row = studies.Row
rows = [
    Row(f"shift_one, n = {k}: factor a step", np.cos(2 * np.pi / k), v, 0, 1e-5)
    for k, v in factors.items()
]
same = factors[n]
rows += [
    Row(
        "directed ring of n/2: its factor", other["directed ring of n/2"], same, 0, 1e-5
    ),
    Row(
        "ring of n/2, weights 1/4, 1/2, 1/4: its factor, and two steps",
        other["ring of n/2, weights 1/4, 1/2, 1/4"],
        same**2,
        0,
        1e-5,
    ),
]

# %%
exact_after = round(np.log2(n))
shown = [t for t in (1, exact_after, 2 * exact_after, 40, 160) if t <= steps]
for t in shown:
    value, error = average(paths["shift_one"][:, t])
    name = f"shift_one, n = {n}: energy left after {t} steps"
    rows.append(Row(name, energy_left(n, [t])[0], float(value), float(error)))
value, _ = average(paths["one-peer exponential"][:, exact_after])
name = f"one-peer exponential, n = {n}: energy left after {exact_after} steps"
rows.append(Row(name, 0, float(value), 0, 1e-12))

# %%
odd = topologies.one_peer_exponential(24)
product = np.linalg.multi_dot([odd.mixing_matrix(t) for t in range(odd.period)])
size = np.abs(np.linalg.eigvals(product - 1 / 24)).max() ** (1 / odd.period)
ran = simulate(gossip(odd), steps=30, start=np.eye(24), curvature=0.0)
left_over = distance(ran)[0]
found = (left_over[30] / left_over[20]) ** (1 / 10)
rows.append(Row("one-peer exponential, n = 24: factor a step", size, found, 0, 2e-3))
print(studies.compare(rows))

# %%
assert all(studies.agree(row) for row in rows)
times = np.arange(1, steps + 1)
assert np.allclose(energy_left(n, times), predicted["shift_one"][1:], atol=1e-12)
assert other["ring of n/2, weights 1/3"] ** 0.5 < same < other["ring of n, weights 1/3"]
assert size < np.cos(2 * np.pi / 24) ** 3  # three steps of shift_one in one
