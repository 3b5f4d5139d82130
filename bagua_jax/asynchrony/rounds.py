"""Rounds: a thread exchanges models over collectives while the worker trains."""

import os
import threading
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding

from bagua_jax import primitives
from bagua_jax.asynchrony import events
from bagua_jax.asynchrony.replica import Replica
from bagua_jax.workers import Workers

__all__ = ["Exchange", "Rounds", "make_exchange"]


class Exchange(NamedTuple):
    """One round as two programs of all workers; arrays have a leading worker axis."""

    init: Callable[[Any], Any]  # models -> carry: what the next round must know
    # (carry, models, finished [n]) -> carry, corrections, whether all have finished []
    step: Callable[[Any, Any, Any], tuple[Any, Any, Any]]


def make_exchange(
    tx: optax.GradientTransformation, workers: Workers, params: Any
) -> Exchange:
    r"""Make rounds of a weight-side algorithm.

    To the algorithm a round is a step, whose update is all that the worker has done by
    itself since the last one. With :math:`z_i` the model that the last round left
    behind and :math:`y_i` the worker's snapshot,

    .. math::
        z_i' = z_i + \mathrm{tx}(y_i - z_i;\ z_i),\qquad
        x_i \leftarrow x_i + (z_i' - y_i)

    So every weight-side algorithm keeps its arithmetic, and what it promises of the
    mean, of error feedback or of public copies holds round by round; only the gradients
    are taken elsewhere: at :math:`x_i`, which is ahead of :math:`z_i` by the worker's
    own progress.

    Args:
        tx: a weight-side algorithm over ``workers.axis_name``. What it counts in steps
            it counts in rounds.
        workers: where it runs: devices of many processes, or one process that simulates
            or replays.
        params: of one worker, for shapes and dtypes.

    Returns:
        The programs, not compiled yet.

    Communication:
        What the algorithm sends on a step, and one all-reduce of one number.
    """
    axis = workers.axis_name

    def init(models):
        models = primitives.worker_local(models, axis)
        return models, tx.init(models)

    def step(carry, model, finished):
        last, state = carry
        progress = jax.tree.map(lambda y, z: (y - z).astype(z.dtype), model, last)
        updates, state = tx.update(progress, state, last)
        last = optax.apply_updates(last, updates)
        wide = jnp.float32
        correction = jax.tree.map(
            lambda z, y: z.astype(wide) - y.astype(wide), last, model
        )
        everyone = primitives.c_fp_s(finished[None], axis_name=axis)[0] == 1
        correction = primitives.worker_local(correction, axis)
        return (last, state), correction, everyone

    stacked = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((workers.num_workers, *jnp.shape(x)), x.dtype),
        params,
    )
    specs = workers.specs(init, stacked, in_specs=workers.spec)
    return Exchange(
        init=workers.spmd(init, in_specs=workers.spec),
        step=workers.spmd(step, in_specs=(specs, workers.spec, workers.spec)),
    )


class Rounds:
    """Let a weight-side algorithm mix models in the background of training.

    Every process makes one, with one worker on its one device, after
    :func:`bagua_jax.processes.initialize`. The rounds wait for one another; local steps
    wait for nothing. While it is open its thread alone may issue collectives: two
    threads that issue them in different orders wait for ever.

    Args:
        replica: of this worker.
        tx: a weight-side algorithm over ``workers.axis_name``, such as
            ``async_model_average(local_steps=1)`` or
            ``choco_sgd(minmax_uint8(), ...)``; see :func:`make_exchange`.
        workers: ``Workers.devices()``, one device for each process.
        log: where events go, one JSON line each; ``None`` for nowhere.
        interval_s: seconds to rest between rounds.
        timeout_s: how long a round may last. If one lasts longer, because another
            worker hangs or a link is cut, the next local step fails.

    Raises:
        ValueError: if a process has several of the workers' devices, or XLA a single
            thread on CPU.
        RuntimeError: from the next local step, or at the end, if a round fails.
        TimeoutError: likewise, if a round does not end within ``timeout_s``.

    Example:
        In every process, after ``bagua_jax.processes.initialize``::

            workers = Workers.devices()
            tx = async_model_average(axis_name="workers", local_steps=1)
            replica = Replica(params)
            with Rounds(replica, tx, workers):
                for batch in batches:
                    loss = replica.step(lambda params: local_step(params, batch))
            # All have finished: with an exact mean, replicas are equal here.
    """

    def __init__(
        self,
        replica: Replica,
        tx: optax.GradientTransformation,
        workers: Workers,
        *,
        log: events.Log | None = None,
        interval_s: float = 0.0,
        timeout_s: float = 60.0,
    ):
        places = [] if workers.mesh is None else workers.own.tolist()
        if len(places) != 1:
            raise ValueError(
                "Rounds: every process must have one of the workers' devices, and this "
                f"one has {len(places)}. Start as many processes as workers with one "
                "device each, and use Workers.devices()."
            )
        threads = _xla_threads()
        if threads < 2 and jax.default_backend() == "cpu":
            raise ValueError(
                "Rounds: an exchange holds one of XLA's threads while local steps need "
                f"another, and on this CPU XLA has {threads}: both would wait forever. "
                "Set the environment variable NPROC=2 before JAX starts."
            )
        self.worker = places[0]
        self._replica, self._workers, self._log = replica, workers, log
        self._interval_s, self._timeout_s = interval_s, timeout_s
        self._wake, self._over = threading.Event(), threading.Event()
        self._ended = 0.0  # when the last round ended
        self._failure: BaseException | None = None
        self._abandoned = False
        self.rounds = 0

        # Everything is compiled, and every connection open, before the first step: one
        # round is run and thrown away.
        params, _ = replica.snapshot()
        exchange = make_exchange(tx, workers, params)
        self._carry = exchange.init(self._everyone(params))
        self._step = exchange.step
        _, correction, _ = self._round(params, finished=False)
        jax.block_until_ready(replica.add(params, correction))
        self._thread = threading.Thread(target=self._run, name="rounds", daemon=True)

    def __enter__(self) -> "Rounds":
        self._ended = time.monotonic()
        self._thread.start()
        threading.Thread(target=self._watch, name="rounds watch", daemon=True).start()
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        """Finish: mix until every worker has finished; at once if there is an error."""
        if error is not None:
            self._abandoned = True
            return  # the process fails; those who wait for it learn from the runtime
        self._replica.finished = True
        self._wake.set()
        while self._thread.is_alive() and self._failure is None:
            self._thread.join(0.05)
        if self._failure is not None:
            raise self._failure

    def _watch(self) -> None:
        """Fail when a round lasts too long; its own thread is inside a collective."""
        limit = self._interval_s + self._timeout_s
        while not self._over.wait(min(1.0, self._timeout_s / 10)):
            waited = time.monotonic() - self._ended
            if waited > limit and not self._abandoned:
                self._fail(
                    TimeoutError(
                        f"Rounds: worker {self.worker} has waited {waited:.0f} s for "
                        f"round {self.rounds} to end. Another worker has died or "
                        "hangs, and its log says why, or a link is cut. Start all "
                        "workers again from what they saved, or raise timeout_s for "
                        "slower networks."
                    )
                )
                return

    def _fail(self, error: BaseException) -> None:
        self._failure = self._failure or error
        self._replica.fail(error)

    def _run(self) -> None:
        replica = self._replica
        try:
            while not self._abandoned:
                finished = replica.finished  # read first: then the snapshot is final
                snapshot, taken = replica.snapshot()
                self._carry, correction, all_finished = self._round(snapshot, finished)
                moment = replica.apply(correction)
                if self._log is not None:
                    everyone = tuple(range(self._workers.num_workers))
                    fields = taken.steps, moment.steps, moment.in_step
                    event = events.Event(self.worker, self.rounds, everyone, *fields)
                    events.write(self._log, event)
                self.rounds += 1
                self._ended = time.monotonic()
                if all_finished:
                    return
                self._wake.wait(self._interval_s)
        except BaseException as error:
            self._fail(error)
        finally:
            self._over.set()

    def _round(self, snapshot: Any, finished: bool) -> tuple[Any, Any, bool]:
        flag = jnp.asarray(float(finished))
        models, flags = self._everyone(snapshot), self._everyone(flag)
        try:
            carry, correction, all_finished = self._step(self._carry, models, flags)
            is_last = bool(all_finished.addressable_data(0))
        except Exception as error:  # of several types, depending on the backend
            raise RuntimeError(
                f"Rounds: round {self.rounds} of worker {self.worker} failed: {error}. "
                "If that names a connection, another worker has died, and its log says "
                "why, or a link was cut. Start all workers again from what they saved."
            ) from error
        own = jax.tree.map(lambda x: x.addressable_data(0)[0], correction)
        return carry, own, is_last

    def _everyone(self, tree: Any) -> Any:
        """Make arrays of all workers of which this process holds its own row."""
        mesh, n = self._workers.mesh, self._workers.num_workers
        assert mesh is not None
        sharding = NamedSharding(mesh, self._workers.spec)
        return jax.tree.map(
            lambda x: jax.make_array_from_single_device_arrays(
                (n, *x.shape), sharding, [x[None]]
            ),
            tree,
        )


def _xla_threads() -> int:
    """Count the threads of XLA's pool on CPU."""
    if "NPROC" in os.environ:
        return int(os.environ["NPROC"])
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
