# %% [markdown]
# # How fast do workers agree?
#
# *Question.* D-PSGD replaces the exact mean by $x_i \leftarrow \sum_j W_{ij} x_j$.
# How many messages must a worker send until all hold nearly the same model, and does
# it matter which graph is used, if every graph costs the same per step?
#
# *Prediction.* From independent random models the disagreement after k steps is
# $E\|X_k - \bar X\|^2 / E\|X_0 - \bar X\|^2 = \|W_k \cdots W_1 - J\|_F^2 / (n-1)$, $J
# = 11^\top/n$, exactly. In the long run it falls by $\|W - J\|_2$ a step (Xiao and
# Boyd, *Fast linear iterations for distributed averaging*, 2004). Two graphs send one
# message a step: BAGUA's rotating pairs (`shift_one`) contract by $\cos(2\pi/n)$, as
# a directed ring of n/2 workers does; the one-peer exponential graph is exact after
# $\log_2 n$ steps (Ying et al., *Exponential graph is provably efficient*, 2021).

# %%
import matplotlib.pyplot as plt
import numpy as np

from bagua_jax import topologies
from bagua_jax.algorithms import decentralized
from bagua_jax.experiments import studies
from bagua_jax.experiments.studies.measure import AXIS, average, simulate

plt.style.use(studies.STYLE)
n, steps, shown = studies.choose((32, 450, 60), (8, 24, 24))
names = ["ring", "shift_one", "torus", "static_exponential", "one_peer_exponential"]
exact = round(np.log2(n))
graphs = {name: topologies.REGISTRY[name](n) for name in names}

# %% [markdown]
# **Prediction.** The matrices of the topologies that the algorithm runs on,
# multiplied in turn; one source for theory and practice.


# %%
def disagreement(graph, steps):
    """Return E|X_k - mean|^2 after 0, 1, ... steps, as a part of that at first."""
    product, path = np.eye(graph.n), []
    for step in range(steps + 1):
        path.append(((product - 1 / graph.n) ** 2).sum() / (graph.n - 1))
        product = graph.mixing_matrix(step) @ product
    return np.array(path)


predicted = {name: disagreement(graph, steps) for name, graph in graphs.items()}

# %% [markdown]
# **Measurement.** `decentralized` with gradients of zero, from models drawn at
# random: 32 independent replicas of n workers with 32 parameters each.


# %%
def measure(graph, steps, replicas=32, d=32, seed=0):
    """Run gossip alone; give the same quantity for each replica, [R, steps + 1]."""
    start = np.random.default_rng(seed).standard_normal((replicas, graph.n, d))
    x = simulate(
        lambda: decentralized(axis_name=AXIS, topology=graph),
        steps=steps,
        start=start,
        curvature=0.0,
        replicas=replicas,
    ).astype(np.float64)
    apart = x - x.mean(2, keepdims=True)
    return (apart**2).sum((2, 3)) / (d * (graph.n - 1))


measured = {name: average(measure(graph, steps)) for name, graph in graphs.items()}

# %% [markdown]
# **Traffic.** What counts is messages, not steps: `Topology.messages` a step. For
# each n we count messages until the disagreement (a root mean square) is a
# thousandth.


# %%
def messages_to(path, graph, eps=1e-3):
    """Messages of a worker until a path of energies falls to eps^2; nan if never."""
    reached = np.flatnonzero(np.asarray(path) <= eps**2)
    return graph.messages * reached[0] if len(reached) else np.nan


sizes = studies.choose((4, 8, 16, 32, 64), (4, 8))
cost = {name: [] for name in names}
for size in sizes:
    for name in names:
        graph = topologies.REGISTRY[name](size)
        cost[name].append(messages_to(disagreement(graph, size**2), graph))
found = {k: messages_to(measured[k].value, graphs[k]) for k in names}

# %%
figure, (left, right) = plt.subplots(1, 2)
for name in names:
    path = np.maximum(predicted[name][: shown + 1], 1e-16)
    label = name.replace("_", " ")
    own = "_" if name == "one_peer_exponential" else ""  # labelled by hand
    (line,) = left.semilogy(np.sqrt(path), label=own + label)
    color = line.get_color()
    mean, error = measured[name]
    seen = np.flatnonzero(mean[: shown + 1] > 1e-11)[:: max(1, shown // 20)]
    bar = error[seen] / (2 * np.sqrt(mean[seen]))
    left.errorbar(seen, np.sqrt(mean[seen]), bar, fmt="o", color=color)
    right.loglog(sizes, cost[name], color=color, label=label, marker=".")
    right.plot(n, found[name], "o", color=color, markersize=8, fillstyle="none")

# %%
left.set(xlabel="steps", ylabel="disagreement, of that at the start", ylim=(1e-5, 1.5))
left.set_title(f"n = {n}: lines predicted, dots measured ± 1 s.e.")
left.text(exact + 0.5, 1.5e-5, "one peer\nexponential", color=color, fontsize=9)
right.set(xlabel="workers n", ylabel="messages of a worker until 1/1000")
right.set_title("circles: measured")
right.set_xticks(sizes, [str(size) for size in sizes], minor=False)
right.minorticks_off()
for axes in (left, right):
    studies.label_ends(axes, width=0.42)
studies.save(figure, "consensus")

# %% [markdown]
# **The claim.** Every measured path is the predicted one. BAGUA's rotation is as slow
# as a directed ring of half the size, although its graph changes at every step; the
# one-peer exponential graph, at the same one message a step, is exact after $\log_2
# n$.

# %%
rows = [
    studies.Row(
        f"{name}, n = {n}: energy left after {k} steps",
        predicted[name][k],
        measured[name].value[k],
        measured[name].error[k],
        1e-12,
    )
    for name in names
    for k in (exact, 2 * exact)
]
late = measured["shift_one"].value
factor = (late[-1] / late[steps // 2]) ** (0.5 / (steps - steps // 2))
rows.append(studies.Row("shift_one: factor a step", np.cos(2 * np.pi / n), factor))
print(studies.compare(rows))

# %%
assert all(studies.agree(row) for row in rows[:-1])
shift_one, half = graphs["shift_one"], topologies.directed_ring(n // 2)
assert np.isclose(shift_one.contraction, np.cos(2 * np.pi / n), rtol=0, atol=1e-12)
assert np.isclose(shift_one.contraction, half.contraction, rtol=0, atol=1e-12)
assert abs(factor - shift_one.contraction) < 0.01
assert measured["one_peer_exponential"].value[exact] < 1e-12
assert found["one_peer_exponential"] == exact
