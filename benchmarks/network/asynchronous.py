"""Real asynchronous averaging: a side of its own; see `versus_ddp`."""

import time

from benchmarks.network import problem, process
from benchmarks.network.ours import Case, loss_fn

CASES = {"asynchronous averaging": Case("async_model_average", {"local_steps": 1})}


class Asynchronous:
    """Local steps that wait for nobody, while a thread averages models.

    Rounds end with the last step, and the wait for that is counted; so a measurement
    has many steps.
    """

    steps_at_once = 25  # for one of the others

    def __init__(self, case: Case, images: problem.Images) -> None:
        import jax
        import jax.numpy as jnp

        from bagua_jax import Workers, algorithms, asynchrony

        self._images, self._count = images, 0
        factory = algorithms.REGISTRY[case.algorithm].factory
        self._tx = factory(axis_name="workers", **case.options)
        self._workers, self._rounds = Workers.devices(), asynchrony.Rounds
        first = jax.tree.map(jnp.asarray, problem.first_weights())
        self._replica = asynchrony.Replica(first)
        self._loss = jax.jit(loss_fn)

        @jax.jit
        def local_step(params, images, labels):
            loss, grads = jax.value_and_grad(loss_fn)(params, images, labels)
            step = lambda p, g: p - problem.RATE * g  # noqa: E731
            return jax.tree.map(step, params, grads), loss

        def local(params, batch):
            return jax.block_until_ready(local_step(params, *batch))

        self._local = local

    def steps(self, count: int) -> list[float]:
        """Train; give the seconds of each step, the last wait spread over them."""
        seconds = []
        with self._rounds(self._replica, self._tx, self._workers):
            for _ in range(count):
                batch = self._images.batch(process.worker(), self._count)
                start = time.perf_counter()
                self._replica.step(lambda params, b=batch: self._local(params, b))
                seconds.append(time.perf_counter() - start)
                self._count += 1
            start = time.perf_counter()
        waited = (time.perf_counter() - start) / count
        return [s + waited for s in seconds]

    def held_out_loss(self) -> float:
        """Return the loss on the held-out images; replicas are equal between runs."""
        return float(self._loss(self._replica.params, *self._images.held_out))


def trainer(case: Case, images: problem.Images) -> Asynchronous:
    """Start a case."""
    return Asynchronous(case, images)


def connect() -> None:
    """Join the other workers; a thread more, as rounds hold one while steps go on."""
    process.connect_jax(threads=2, port=200)
