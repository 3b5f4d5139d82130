"""bagua_jax's side: a worker that trains as it is told; see `versus_ddp`."""

import time
from typing import Any, NamedTuple

import numpy as np

from benchmarks.network import problem, process

LOCAL_STEPS = 8


class Case(NamedTuple):
    """One way to train."""

    algorithm: str
    options: dict[str, Any] = {}
    split: bool = True  # by bagua_jax.parts; else one program
    half: bool = False  # gradients are cast to float16 before, and back after
    unshaped: dict[str, Any] = {}  # options that are others where the network is fast
    steps_a_call: int = 1  # of the compiled function


ONE_BUCKET, TWO_BUCKETS = {"bucket_bytes": 2**24}, {"bucket_bytes": 8 * 2**20}
# What an all-to-all sends to one worker at once, where three such messages overflow the
# queue of the switch: at 100 Mbit/s its 40 ms are 500 KB.
MESSAGE_BYTES = {"100mbit": 2**16}
# Several buckets keep the wire busy, and cost more than they bring where it is fast.
RING = {"plan": "ring", "error_feedback": "none", "bucket_bytes": 4 * 2**20}
HALF, WHOLE = {"compressor": ("cast", "float16")}, {"compressor": ("identity",)}
CASES = {
    "gradient_allreduce": Case("gradient_allreduce", ONE_BUCKET, steps_a_call=8),
    "ring_allreduce": Case(
        "compressed_mean", WHOLE | RING, unshaped=ONE_BUCKET, steps_a_call=8
    ),
    "f16": Case("compressed_mean", HALF | RING, unshaped=ONE_BUCKET, steps_a_call=8),
    "f16_allreduce": Case("gradient_allreduce", {"bucket_bytes": 2**21}, half=True),
    "bytegrad": Case("bytegrad", TWO_BUCKETS, unshaped=ONE_BUCKET),
    "qadam": Case("qadam", {"warmup_steps": 6, **TWO_BUCKETS}),
    "decentralized": Case("decentralized", {"topology": "one_peer_exponential"}),
    "low_precision_decentralized": Case("low_precision_decentralized", TWO_BUCKETS),
    "local_sgd": Case("local_sgd", {"local_steps": LOCAL_STEPS}),
    "powersgd1": Case("powersgd", {"rank": 1}),
    "powersgd2": Case("powersgd", {"rank": 2}),
    "powersgd4": Case("powersgd", {"rank": 4}),
}
# QAdam's losses are those of a longer warm-up, of steps in full precision, than a
# measurement of step times would wait for.
LOSSES, LONG_WARM_UP = {"qadam": "qadam, long warm-up"}, 50
CASES[LOSSES["qadam"]] = Case("qadam", {"warmup_steps": LONG_WARM_UP, **TWO_BUCKETS})
CASES |= {
    f"{name}, one program": CASES[name]._replace(split=False)
    for name in ("gradient_allreduce", "ring_allreduce", "f16", "bytegrad", "powersgd1")
}


def loss_fn(params, images, labels):
    """Mean cross entropy of the perceptron."""
    import jax
    import optax

    x = images
    for k, (weight, bias) in enumerate(params):
        # Of all ways to write a layer's three products the one that XLA's CPU runs
        # fastest, as long as it does not join the transpose with the product.
        x = jax.lax.optimization_barrier(weight @ x.T).T + bias
        x = jax.nn.relu(x) if k < len(params) - 1 else x
    losses = optax.softmax_cross_entropy_with_integer_labels(x, labels)
    return losses.mean()


class Lockstep:
    """One case under way: parameters, optimizer and step."""

    steps_at_once = 1

    def __init__(self, case: Case, images: problem.Images) -> None:
        import jax
        import jax.numpy as jnp
        import optax

        from bagua_jax import (
            Workers,
            algorithms,
            compressors,
            parts,
            primitives,
            value_and_grad,
            worker_local,
        )

        def cast(dtype):
            convert = lambda g, _: jnp.asarray(g, dtype)  # noqa: E731
            return optax.stateless_with_tree_map(convert)

        self._jax, self._images, self._count = jax, images, 0
        self._workers = workers = Workers.devices()
        options = dict(case.options)
        if process.network() == "unshaped":
            options |= case.unshaped
        if "compressor" in options:
            name, *of = options["compressor"]
            options["compressor"] = compressors.REGISTRY[name](*of)
        entry = algorithms.REGISTRY[case.algorithm]
        if entry.is_optimizer:
            tx = entry.factory(problem.ADAM_RATE, axis_name="workers", **options)
        else:
            both = [
                entry.factory(axis_name="workers", **options),
                optax.sgd(problem.RATE),
            ]
            if case.half:
                both[0] = optax.chain(cast("float16"), both[0], cast("float32"))
            tx = optax.chain(*(both[::-1] if entry.own_params else both))

        def init(params):
            if entry.own_params:
                params = worker_local(params, "workers")
            return params, tx.init(params)

        def train_step(state, images, labels):
            params, inner = state
            take = value_and_grad(loss_fn, "workers")
            loss, grads = take(params, images, labels)
            updates, inner = tx.update(grads, inner, params)
            return (optax.apply_updates(params, updates), inner), loss

        def train_steps(state, images, labels):
            scanned = lambda state, batch: train_step(state, *batch)  # noqa: E731
            return jax.lax.scan(scanned, state, (images, labels))

        self._steps_a_call = case.steps_a_call
        step = train_step if case.steps_a_call == 1 else train_steps
        first = jax.tree.map(jnp.asarray, problem.first_weights())
        specs = (workers.specs(init, first), workers.spec, workers.spec)
        if case.split:
            most = MESSAGE_BYTES.get(process.network())
            self._step = parts.split(
                workers, step, specs, message_bytes=most, donate_argnums=0
            )
        else:
            self._step = workers.spmd(step, in_specs=specs, donate_argnums=0)
        self._state = workers.spmd(init)(first)
        self._loss = jax.jit(loss_fn)

        def average(state):
            mean = lambda x: primitives.c_fp_s(x, axis_name="workers")  # noqa: E731
            return jax.tree.map(mean, worker_local(state[0], "workers"))

        self._average = workers.spmd(average, in_specs=(specs[0],))

    def steps(self, count: int) -> list[float]:
        """Train; give the seconds of each step. Batches are drawn outside of them."""
        seconds: list[float] = []
        while len(seconds) < count:
            turns = min(count - len(seconds), self._steps_a_call)
            numbers = range(self._count, self._count + turns)
            drawn = [self._images.batch(process.worker(), k) for k in numbers]
            local = drawn[0]
            if self._steps_a_call > 1:
                local = [np.stack(arrays) for arrays in zip(*drawn, strict=True)]
            batch = [
                process.global_array(x, self._workers.spec, self._workers.mesh)
                for x in local
            ]
            start = time.perf_counter()
            self._state, _ = self._step(self._state, *batch)
            seconds += [(time.perf_counter() - start) / turns] * turns
            self._count += turns
        return seconds

    def held_out_loss(self) -> float:
        """Return the loss of the mean model on the held-out images."""
        mean = self._jax.tree.map(
            lambda x: x.addressable_data(0), self._average(self._state)
        )
        return float(self._loss(mean, *self._images.held_out))


def trainer(case: Case, images: problem.Images) -> Lockstep:
    """Start a case."""
    return Lockstep(case, images)


def connect() -> None:
    """Join the other workers."""
    import jax

    # Programs run in the thread that calls them: parts wait for each one anyway, and
    # handing each to another thread costs a twentieth of an unshaped step on two cores.
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    process.connect_jax(threads=1)
