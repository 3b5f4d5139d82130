# %% [markdown]
# # BAGUA's min-max grid is contractive, where the textbook's is not
#
# *Question.* Eight bits an element: 256 levels between the smallest and the largest
# element of d, $D = (\max - \min)/255$ apart. The textbook puts the first level on the
# minimum. BAGUA puts levels on the integer multiples of D, so that zero is one of them
# wherever the range holds it. Does it matter?
#
# *Prediction.* The largest $\|C(x) - x\|^2/\|x\|^2$ of any x is $r = \frac{d - 2}{2
# \cdot 255^2}$ on the textbook's grid, reached by (1, -1, 0, ..., 0), and on BAGUA's
# $\frac{d}{d - 2 + 2 \cdot 255^2}$, which is (but for the endpoints) $r/(1 + r)$ and
# below 1 for every d: a contraction with $\delta = \frac{2 \cdot 255^2 - 2}{d - 2 + 2
# \cdot 255^2}$. The textbook's stops being one at d = 130,052; BAGUA's buckets of 10 MB
# hold 2.6 million elements, 327,680 in each of 8 workers' chunks.

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax

from bagua_jax import compressors
from bagua_jax.algorithms import compressed_mean
from bagua_jax.experiments import studies
from bagua_jax.experiments.studies.measure import AXIS
from bagua_jax.theory import compression

plt.style.use(studies.STYLE)
sizes = studies.choose((64, 1024, 16384, 131072, 327680, 2**20), (64, 4096))
bagua, textbook = compressors.minmax_uint8(), compressors.blockwise(8, 2**21)
Row = studies.Row

# %% [markdown]
# **Why.** *Textbook:* the ends are levels, and every other element is off by D/2 at
# most: an error of at most $(d - 2) D^2/4$. And $\|x\|^2 \ge \max^2 + \min^2 \ge (255
# D)^2/2$. The quotient is r; (1, -1, 0, ...) has $255 D = 2$, and every 0 lies half way
# between two levels.
#
# *BAGUA:* let x be in units of D. Levels are the integers from $u - 255$ to $u$, the
# rounded maximum, and an element becomes the nearest one. So it is off by at most 1/2;
# and by at most its own size: if 0 is a level this is rounding, and if it is none, all
# elements have one sign and are 1/2 or more away from 0. With $s = \sum \min(|x_j|,
# \tfrac12)^2 \le (d - 2)/4$ over the elements that are not the ends, the quotient is at
# most $\frac{1/2 + s}{255^2/2 + s}$, which grows with s: put in the largest s. (1, -1,
# t, ..., t) with t just below half a level reaches it. In this arithmetic the scale's
# $10^{-7}$, which BAGUA adds to the range, is left out: it matters for ranges of that
# size.


# %%
def worst_of_textbook(d):
    """Ones at both ends, and zeros half way between two levels."""
    return np.array([1.0, -1.0, *[0.0] * (d - 2)])


def worst_of_bagua(d):
    """Ones at both ends, and elements of just below half a level."""
    return np.array([1.0, -1.0, *[(1 - 1e-5) / 255] * (d - 2)])


# %%
def loss_of(compressor, x):
    """Relative squared error of one vector."""
    x = jnp.asarray(x, jnp.float32)
    decoded = compressor.decompress(compressor.compress(None, x, ())[0], x)
    error, size = np.float64(decoded) - np.float64(x), np.float64(x)
    return float((error**2).sum() / (size**2).sum())


def largest_loss(compressor, d):
    """Return 1 - delta, from the compressor's facts."""
    delta = compression.constants(compressor, d).delta
    assert delta is not None
    return 1 - delta


# %%
rows, curves = [], {}
names = {"BAGUA's grid": bagua, "textbook's grid": textbook}
for name, compressor in names.items():
    limits = [largest_loss(compressor, d) for d in sizes]
    worst = worst_of_bagua if compressor is bagua else worst_of_textbook
    reached = [loss_of(compressor, worst(d)) for d in sizes]
    curves[name] = (limits, reached)
    rows += [
        Row(f"{name}, d = {d:,}: largest error", limit, found, 0, 1e-3 * limit)
        for d, limit, found in zip(sizes, limits, reached, strict=True)
    ]

# %% [markdown]
# Sparse vectors, such as gradients of embeddings, are where the two differ most; on
# Gaussian ones they lose the same. And no vector exceeds BAGUA's limit: below, 300 of
# all kinds, Gaussian to heavy-tailed, with and without zeros and offsets.

# %%
d = studies.choose(200_000, 20_000)
rng = np.random.default_rng(0)
sparse = worst_of_textbook(d)
rows.append(
    Row(
        "BAGUA's grid, (1, -1, 0, ...)",
        1 / 255**2,
        loss_of(bagua, sparse),
        0,
        1e-7,
    )
)
gauss = rng.standard_normal(d)
step = (gauss.max() - gauss.min()) / 255
rows += [
    Row(f"{name}, Gaussian: D^2/12", step**2 / 12, loss_of(c, gauss), 0, 0.02 * step**2)
    for name, c in names.items()
]

# %%
shares = []
for _ in range(studies.choose(300, 30)):
    size = int(rng.choice([3, 17, 300, 5000]))
    x = rng.standard_t(rng.uniform(1, 8), size) + rng.choice([0, 0, 1, 30])
    x = x * (rng.random(size) < rng.choice([1, 0.5, 0.05]))
    x[0] = x[0] or 1.0
    limit = largest_loss(bagua, size)
    shares.append(loss_of(bagua, x) / limit)

# %% [markdown]
# **In training.** Gradient descent on two elements alone, $f = \tfrac12 \|(x_1, x_2) -
# (1.001, -1)\|^2$, from 0, with compressed gradients of two workers: all other elements
# have no gradient at all. (1.001, so that all ties are broken alike.) On the textbook's
# grid zero is 0.436 D from a level, and every other element moves by that at every
# step: $0.436\, D\, \gamma (1 - \gamma)^t$, in all 0.436 D. So descent comes to rest
# off the point where it would without compression, in square nearly r of its way's.


# %%
def descent(compressor):
    """Make gradient descent with compressed gradients, without feedback."""
    how = {"plan": "all_gather", "error_feedback": "none", "unsafe": True}
    return optax.chain(
        compressed_mean(compressor, axis_name=AXIS, **how), optax.sgd(0.1)
    )


# %%
def stray(compressor, d, steps=200):
    """Return how far the model ends from the optimum, in square, of the whole way."""
    tx = descent(compressor)
    goal = jnp.zeros(d).at[0].set(1.001).at[1].set(-1.0)
    active = goal != 0

    def worker(_):
        def step(carry, _):
            x, state = carry
            updates, state = tx.update(active * (x - goal), state, x)
            return (optax.apply_updates(x, updates), state), None

        begin = jnp.zeros(d)
        return jax.lax.scan(step, (begin, tx.init(begin)), length=steps)[0][0]

    x = jnp.asarray(jax.vmap(worker, axis_name=AXIS)(jnp.arange(2)))[0]
    return float(jnp.sum((x - goal) ** 2) / jnp.sum(goal**2))


# %%
strays = {name: stray(compressor, d) for name, compressor in names.items()}
D, at = 2.001 / 255, 255 * 1.001 / 2.001  # a level, and where between them 0 lies
r = (d - 2) * (D * (np.rint(at) - at)) ** 2 / (1.001**2 + 1)
rows += [
    Row(
        "BAGUA's grid: squared distance at the end", 0, strays["BAGUA's grid"], 0, 1e-9
    ),
    Row("textbook's grid: the same", r, strays["textbook's grid"], 0, 2e-3 * r),
]
print(studies.compare(rows))

# %%
figure, (left, right) = plt.subplots(1, 2)
grid = np.unique(np.geomspace(8, 2**20, 60).astype(int))
for (name, (_, reached)), marker in zip(curves.items(), "os", strict=True):
    compressor = names[name]
    limits = [largest_loss(compressor, int(k)) for k in grid]
    (line,) = left.loglog(grid, limits, label=name)
    left.plot(sizes, reached, marker, color=line.get_color())
left.plot([8, 2**20], [1, 1], color="0.4", linewidth=0.8)
left.text(10, 1.15, "above: not a contraction", fontsize=9)
left.set(xlabel="elements d that share a range", ylim=(1e-5, 30))
left.set(
    ylabel=r"largest $\|C(x) - x\|^2 / \|x\|^2$", title="lines predicted, dots measured"
)
studies.label_ends(left, width=0.45)

# %%
t = np.linspace(-2.5, 2.5, 1201)
for low, name, colour in (
    (-4.4, "textbook's grid", "C1"),
    (-4.0, "BAGUA's grid", "C0"),
):
    levels = low + np.arange(9)
    error = np.abs(t[:, None] - levels).min(1)
    right.plot(
        t, error, color=colour, label=name, linestyle="-" if colour == "C0" else "--"
    )
right.plot(t, np.abs(t), color="0.6", linewidth=0.9)
right.text(1.0, 0.9, "the element itself, |x|", fontsize=9, color="0.35")
right.set(xlabel="an element x, in levels", ylim=(0, 1), ylabel="error of x, in levels")
right.set_title("near zero: never above |x|, or up to half a level")
right.text(1.1, 0.53, "BAGUA's grid", fontsize=9, color="C0")
right.text(-2.4, 0.53, "textbook's grid", fontsize=9, color="C1")
studies.save(figure, "zero_on_the_grid")

# %% [markdown]
# **What is true, and what is not.** BAGUA's codec is a contraction at every length, so
# that theorems on error feedback apply to it; with the textbook's grid they do not
# beyond 130,051 elements to a range. It is still biased, $\delta$ falls as 1/d, and per
# element it is no contraction at all: what is below half a level is lost whole. The
# textbook's grid is not worse on dense vectors, does not diverge by itself, and is a
# contraction where ranges are shared by less: blocks of 2,048 (r = 0.016) are as safe.
# The bound is on exact arithmetic with codes clamped to 0..255, as ours are; the
# original's wrap (`compressors.minmax_uint8`).

# %%
assert all(studies.agree(row) for row in rows)
assert max(shares) <= 1 + 1e-4
assert all(limit < 1 for limit in curves["BAGUA's grid"][0])
assert studies.FAST or curves["textbook's grid"][1][-2] > 2
assert largest_loss(textbook, 130_051) < 1 <= largest_loss(textbook, 130_052)
