# %% [markdown]
# # Adam under compression
#
# *Question.* Adam divides by a running second moment of the gradient, and compression
# errors enter it squared. How can Adam be compressed to one bit?
#
# *Prediction.* 1-bit Adam (Tang et al., 2021) freezes the second moment v after a
# warm-up, and compresses the momentum with error feedback at both ends. What is left
# is linear: with no compression it is heavy ball with the step $\gamma' =
# (1-\beta_1)\gamma/\sqrt v$, $z^2 - (1 + \beta_1 - \gamma' h)z + \beta_1$ on
# curvature h, and noise of variance $\sigma^2$ at each of n workers leaves $E x^2 =
# \frac{\gamma'\sigma^2 (1 + \beta_1)}{n h (1 - \beta_1)(2(1 + \beta_1) - \gamma'
# h)}$. Feedback hands every error on, so that signs should cost little beyond. What
# is not linear has no such prediction: signs without memory lose how large gradients
# are, so that workers who disagree vote for the wrong point; and v frozen too early
# is no estimate of anything.

# %%
import matplotlib.pyplot as plt
import numpy as np
import optax

from bagua_jax import algorithms, compressors, theory
from bagua_jax.experiments import studies
from bagua_jax.experiments.studies.measure import AXIS, average, simulate
from bagua_jax.theory import modes

plt.style.use(studies.STYLE)
n, d, gamma, b1, b2 = 8, 128, 0.01, 0.9, 0.99
warm, steps, replicas = studies.choose((300, 2000, 16), (150, 500, 4))
problem = theory.quadratic(n, np.geomspace(0.3, 1, d), zeta=20.0, sigma=1.0)
h = problem.curvature[0]

# %% [markdown]
# **Algorithms.** The same Adam in all; `zeta` = 20, so that the workers' gradients at
# the optimum are about twice their noise.

# %%
given = {"axis_name": AXIS, "b1": b1, "b2": b2}
signs = compressors.sign("l1")


def one_bit(compressor, warmup_steps=warm):
    """1-bit Adam with any compressor."""
    more = {"compressor": compressor, "warmup_steps": warmup_steps}
    return lambda: algorithms.one_bit_adam(gamma, **given, **more)


def adam_after(transform):
    """Adam on what a transform makes of the gradients."""
    return lambda: optax.chain(transform, optax.adam(gamma, b1, b2))


# %%
forgetful = {"plan": "all_gather", "error_feedback": "none", "unsafe": True}
cases = {
    "Adam": adam_after(algorithms.gradient_allreduce(axis_name=AXIS)),
    "frozen, not compressed": one_bit(compressors.identity()),
    "1-bit Adam": one_bit(signs),
    "1-bit Adam, no warm-up": one_bit(signs, 1),
    "signs without memory": adam_after(
        algorithms.compressed_mean(signs, axis_name=AXIS, **forgetful)
    ),
}

# %% [markdown]
# **Measurement.** All from models of ones; the optimum is 0. Of worker 0, as all are
# equal.


# %%
def observe(params, state):
    """Parameters, and the second moment."""
    return params, optax.tree.get(state, "nu")


def measure(make):
    """Return squared errors [R, T + 1, d], and the last second moment [R, d]."""
    x, nu = simulate(
        make,
        steps=steps,
        start=np.ones((n, d)),
        curvature=problem.curvature,
        target=problem.target,
        sigma=1.0,
        replicas=replicas,
        observe=observe,
    )
    return x[:, :, 0].astype(np.float64) ** 2, nu[:, -1, 0].astype(np.float64)


# %%
measured = {name: measure(make) for name, make in cases.items()}
rest = slice(warm + (steps - warm) // 2, None)
at_rest = {name: average(x[:, rest].mean(1)) for name, (x, _) in measured.items()}
floor = {name: average(x[:, rest].mean((1, 2))) for name, (x, _) in measured.items()}

# %% [markdown]
# **Prediction** for the frozen algorithm, from the v that each replica froze.


# %%
def heavy_ball_floor(h, v):
    """Variance at rest, of noise of variance 1 at each worker."""
    step = (1 - b1) * gamma / np.sqrt(v)
    return step * (1 + b1) / (n * h * (1 - b1) * (2 * (1 + b1) - step * h))


frozen = measured["frozen, not compressed"][1]
predicted = heavy_ball_floor(h, frozen).mean(0)
model = modes.frozen_adam(n, h[0], gamma, second_moment=frozen[0, 0], b1=b1)
by_modes = model.variance[0] / n
largest = modes.largest_stable(
    lambda step: modes.frozen_adam(n, 1.0, step, second_moment=1.0, b1=b1).stable, 100.0
)

# %%
figure, (left, right) = plt.subplots(1, 2)
shown = np.arange(0, d, 8)
left.semilogy(h, predicted, "k", label="_")
left.text(0.3, 1.5e-3, "line: predicted, frozen", fontsize=9)
colors = {}
for name, (x, _) in measured.items():
    (line,) = right.semilogy(np.maximum(x.mean((0, 2)), 1e-9), label=name)
    colors[name] = line.get_color()
looks = {"frozen, not compressed": ("s", 8), "1-bit Adam": ("o", -8)}
for name, (marker, up) in (looks | {"signs without memory": ("D", 0)}).items():
    (value, error), color = (p[shown] for p in at_rest[name]), colors[name]
    left.errorbar(h[shown], value, error, fmt=marker, color=color, fillstyle="none")
    at = h[shown][-1], value[-1]
    left.annotate(
        name, at, (9, up), textcoords="offset points", va="center", color=color
    )

# %%
left.set(xlabel="curvature h", ylabel=r"$E x^2$ at rest", xlim=(0.25, 1.45))
left.set_title("by parameter; dots measured, ± 1 s.e.")
right.set(xlabel="steps", ylabel="mean squared error", xlim=(0, steps), ylim=(1e-3, 3))
right.set_xticks(range(0, steps + 1, steps // 4))
right.axvline(warm, color="0.4", linewidth=0.8)
right.set_title(f"v is frozen after {warm} steps")
studies.label_ends(right, width=0.55)
studies.save(figure, "adam")

# %% [markdown]
# **The claim.** After the freeze Adam is the predicted heavy ball; one bit with error
# feedback ends close to it, where signs without memory do not, and no warm-up does
# not.

# %%
mean_floor = heavy_ball_floor(h, frozen).mean(1)
excess = measured["frozen, not compressed"][0][:, rest].mean((1, 2)) / mean_floor
ratio = floor["1-bit Adam"].value / floor["frozen, not compressed"].value
# %%
rows = [
    studies.Row("frozen: error at rest, of that predicted", 1.0, *average(excess)),
    studies.Row(
        "frozen: variance by modes",
        heavy_ball_floor(h[0], frozen[0, 0]),
        by_modes,
        0,
        1e-9,
    ),
    studies.Row(
        "frozen: largest gamma h / sqrt(v)", 2 * (1 + b1) / (1 - b1), largest, 0, 1e-6
    ),
    studies.Row("1-bit Adam: error at rest, of that of frozen", 1.0, ratio, 0, 0.25),
]
print(studies.compare(rows))
print({name: f"{value.value:.3g}" for name, value in floor.items()})

# %%
assert all(studies.agree(row) for row in rows)
for name in ("signs without memory", "1-bit Adam, no warm-up"):
    assert not floor[name].value < 3 * floor["1-bit Adam"].value, name  # nan: diverged
