# %% [markdown]
# # What compressors cost: constants, and the vectors that attain them
#
# *Question.* Theory knows a compressor by one number, $E\|C(x) - x\|^2 \le
# \omega\|x\|^2$ if it is unbiased, $(1 - \delta)\|x\|^2$ if not. Is the number right,
# is it ever reached, and is it what training sees?
#
# *Prediction.* The facts of `bagua_jax.compressors`, each with a vector that attains
# it: random-k loses $d/k - 1$ of every vector; top-k $1 - k/d$ of a flat one; QSGD
# with s levels (Alistarh et al., 2017) $\sqrt d/s - 1$ of a flat one, for $d \ge
# 4s^2$; TernGrad (Wen et al., 2017) $(\sqrt d - 1)/2$; powers of two (Horvath et al.,
# 2019) 1/8; a sign scaled by the mean magnitude all but 1/d of a sparse one, and $1 -
# 2/\pi$ of a Gaussian one. Scaled by the root mean square, as 1-bit Adam does, a sign
# is *no contraction*: $2 - 2/\sqrt d$ of a sparse vector. BAGUA's min-max codec keeps
# zero on its grid, so that zeros stay zero, where the textbook's grid moves every
# zero by half a level.

# %%
import functools

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

from bagua_jax import compressors
from bagua_jax.experiments import studies
from bagua_jax.experiments.studies.measure import average
from bagua_jax.theory.compression import constants

# %%
plt.style.use(studies.STYLE)
d, keys = 256, studies.choose(2048, 128)
shown = {
    "random-k, 1/4": compressors.randk(0.25),
    "top-k, 1/4": compressors.topk(0.25),
    "QSGD, 4 bits": compressors.qsgd(levels=7),
    "TernGrad": compressors.terngrad(),
    "powers of two": compressors.natural(),
    "sign, mean magnitude": compressors.sign("l1"),
    "sign, root mean square": compressors.sign("l2"),
}

# %% [markdown]
# **Prediction.** `theory.compression.constants` reads the facts; nothing is typed
# here.

# %%
known = {name: constants(c, d) for name, c in shown.items()}
predicted = {
    k: v.omega if v.omega is not None else 1 - v.delta for k, v in known.items()
}

# %% [markdown]
# **Measurement** of $E\|C(x) - x\|^2/\|x\|^2$ at the attaining vector, at a Gaussian
# one, and at many others, whose largest shows whether the constant is an upper bound.


# %%
@functools.partial(jax.jit, static_argnums=0)
def lost(compressor, vectors, keys):
    """Relative squared error of each vector under each key, [keys, vectors]."""

    def one(x, key):
        payload, _ = compressor.compress(key, x, compressor.init(x))
        error = compressor.decompress(payload, x) - x
        return jnp.sum(error**2) / jnp.sum(x**2)

    return jax.vmap(jax.vmap(one, (0, None)), (None, 0))(vectors, keys)


rng = np.random.default_rng(0)
gauss = rng.standard_normal((8, d))
heavy = rng.standard_t(1.5, (8, d))
sparse = gauss * (np.arange(d) < 2 ** np.arange(8)[:, None])
steep = 0.5 ** (np.arange(d) * np.linspace(0.01, 0.1, 8)[:, None])

# %%
random = jax.random.split(jax.random.key(0), keys)
found = {}
for name, compressor in shown.items():
    assert compressor.facts.attained
    worst = compressor.facts.attained(d)[None]
    vectors = np.concatenate([worst, gauss, heavy, sparse, steep]).astype(np.float32)
    found[name] = average(lost(compressor, vectors, random))

# %% [markdown]
# **BAGUA's grid.** (1, -1, 0, 0, ...): the textbook's 256 levels from -1 to 1 have
# none at 0. Nearest level, as both codecs do.

# %%
size = studies.choose(200_000, 20_000)
zeros = np.zeros(size, np.float32)
zeros[:2] = 1, -1
level = 2 / 255
textbook = np.round((zeros.astype(float) + 1) / level) * level - 1
lost_textbook = float(((textbook - zeros) ** 2).sum() / 2)
lost_bagua = float(lost(compressors.minmax_uint8(), zeros[None], random[:1])[0, 0])

# %%
figure, (left, right) = plt.subplots(1, 2)
for row, name in enumerate(shown):
    (value, error), limit = found[name], predicted[name]
    left.plot([limit, limit], [row - 0.35, row + 0.35], "k", linewidth=1.5)
    left.errorbar(value[0], row, xerr=error[0], fmt="o", color="#0072B2", markersize=7)
    left.plot(value[1:], np.full(len(value) - 1, row), "|", color="0.55", zorder=1)
    left.plot(value[1], row, "D", color="#D55E00", markersize=5)
    bits = known[name].bits_per_element
    right.plot([bits, bits], [value[1], limit], color="0.7", linewidth=1)
    right.plot(bits, limit, "k_", markersize=12)
    right.plot(bits, value[1], "D", color="#D55E00")

# %%
left.set_yticks(range(len(shown)), list(shown))
left.set(xscale="log", xlabel=r"$E|C(x) - x|^2 / |x|^2$", ylim=(len(shown) - 0.4, -0.6))
left.grid(axis="y", visible=False)
left.set_title("bar: constant, dot: attained, diamond: Gaussian", fontsize=10)

# %%
sides = {"sign, mean magnitude": (6, -12), "TernGrad": (8, 0), "QSGD, 4 bits": (8, 0)}
for name in shown:
    at = known[name].bits_per_element, max(predicted[name], found[name].value[1])
    shift = sides.get(name, (8, 0))
    right.annotate(name, at, shift, textcoords="offset points", va="center", fontsize=9)
right.set(yscale="log", xlabel="bits an element", xlim=(0, 14), ylim=(0.03, 12))
right.set_ylabel("part that is lost")
right.set_title("against bits, d = 256")
studies.save(figure, "compression_constants")

# %% [markdown]
# **The claim.** Constants are attained, and nothing loses more; the L2-scaled sign is
# not contractive, and zero-alignment pays.

# %%
Row = studies.Row
rows = [
    Row(
        f"{name}, d = {d}: constant",
        predicted[name],
        value[0],
        error[0],
        2e-5 * predicted[name],
    )
    for name, (value, error) in found.items()
]
# %%
gaussian = found["sign, mean magnitude"].value[1:9].mean()
rows += [
    Row("sign, mean magnitude: Gaussian vectors", 1 - 2 / np.pi, gaussian, 0, 0.03),
    Row(
        "textbook grid, (1, -1, 0, ...)",
        (size - 2) / (2 * 255**2),
        lost_textbook,
        0,
        0.01,
    ),
    Row("BAGUA's grid, same", (1 / 255) ** 2, lost_bagua, 0, 1e-6),
]
print(studies.compare(rows))

# %%
assert all(studies.agree(row) for row in rows)
for name, (value, error) in found.items():  # many vectors: 5 standard errors
    assert (value <= predicted[name] * 1.0001 + 5 * error).all(), name
assert predicted["sign, root mean square"] > 1
assert lost_bagua < lost_textbook / 1000
