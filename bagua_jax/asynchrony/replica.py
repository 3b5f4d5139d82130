"""A worker's model, shared by the loop that trains it and the thread that mixes it."""

import threading
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import optax

from bagua_jax import checks

__all__ = ["Moment", "Replica"]

Result = TypeVar("Result")


class Moment(NamedTuple):
    """When something happened to a replica, as its training loop counts."""

    steps: int  # local steps that had ended
    in_step: bool  # whether the next one was under way


class Replica:
    r"""The parameters of one worker, which two threads change by adding to them.

    The training loop calls :meth:`step`; a thread that talks to other workers calls
    :meth:`snapshot` and, when an answer is there, :meth:`apply`. Neither waits for the
    other for longer than an addition takes. What happened in between is kept on both
    sides, because nothing is overwritten:

    .. math::
        x \leftarrow x + (\mathrm{step}(x_0) - x_0) \quad\text{and}\quad
        x \leftarrow x + (\text{mean} - \text{snapshot})

    where :math:`x_0` is what the step started from. A step during which nothing was
    applied leaves :math:`\mathrm{step}(x_0)` itself, bit for bit.

    Args:
        params: the initial parameters, a tree of floating arrays on this worker's
            device.
        steps: local steps that led to them, of a worker that goes on from what it
            saved.

    Raises:
        ValueError: if a leaf is not floating point, or steps is less than 0.

    Attributes:
        add: ``(x, correction) -> x + correction`` in float32, cast back; compiled.

    Example:
        >>> replica = Replica(jnp.zeros(2))
        >>> snapshot, _ = replica.snapshot()
        >>> replica.step(lambda x: (x + 1.0, "loss"))
        'loss'
        >>> replica.apply(jnp.array([0.5, -0.5]) - snapshot)
        Moment(steps=1, in_step=False)
        >>> replica.params.tolist(), replica.steps
        ([1.5, 0.5], 1)
    """

    def __init__(self, params: Any, steps: int = 0):
        checks.require_floats(params, "Replica")
        checks.require_at_least(
            "Replica", "steps", steps, 0, "It counts local steps that were taken."
        )
        self._lock = threading.Lock()
        self._params = jax.tree.map(jnp.asarray, params)
        self._now = Moment(steps, False)
        self._failure: BaseException | None = None
        self.finished = False
        # Compiled here, so that no step waits for a compilation.
        zeros = optax.tree.zeros_like(self._params, dtype=jnp.float32)
        self.add = jax.jit(_add).lower(self._params, zeros).compile()
        self._rebase = jax.jit(_rebase).lower(*(self._params,) * 3).compile()

    @property
    def params(self) -> Any:
        """The parameters now: immutable arrays, which later changes leave alone."""
        with self._lock:
            return self._params

    @property
    def steps(self) -> int:
        """Local steps that have ended; after a pull, those of the peer."""
        with self._lock:
            return self._now.steps

    def step(self, local_step: Callable[[Any], tuple[Any, Result]]) -> Result:
        """Take one local step.

        Args:
            local_step: ``params -> (new params, anything)``. It must not donate its
                argument: a snapshot of it may be on its way to other workers.

        Returns:
            The anything.

        Raises:
            ValueError: if the step donated the parameters.
            Exception: what the exchange thread died of, if it did.
        """
        start = self.begin()
        new, result = jax.block_until_ready(local_step(start))
        if any(leaf.is_deleted() for leaf in jax.tree.leaves(start)):
            raise ValueError(
                "Replica.step: the local step donated the parameters, and a snapshot "
                "of them may be under way to other workers. Donate the optimizer's "
                "state alone."
            )
        self.end(start, new)
        return result

    def begin(self) -> Any:
        """Start a step: give the parameters that it starts from.

        Raises:
            Exception: what the exchange thread died of, if it did.
        """
        with self._lock:
            if self._failure is not None:
                raise self._failure
            self._now = Moment(self._now.steps, True)
            return self._params

    def end(self, start: Any, new: Any) -> None:
        """End a step that went from ``start`` to ``new``."""
        with self._lock:
            if self._params is not start:
                new = jax.block_until_ready(self._rebase(self._params, new, start))
            self._params, self._now = new, Moment(self._now.steps + 1, False)

    def snapshot(self) -> tuple[Any, Moment]:
        """Return the parameters, and the moment."""
        with self._lock:
            return self._params, self._now

    def apply(self, correction: Any) -> Moment:
        """Add a correction, a tree like the parameters in float32; give the moment."""
        with self._lock:
            self._params = jax.block_until_ready(self.add(self._params, correction))
            return self._now

    def adopt(self, params: Any, steps: int) -> None:
        """Take over a peer's parameters and count of steps, before the first step.

        Raises:
            RuntimeError: if a step was taken before.
        """
        with self._lock:
            if self._now != Moment(0, False):
                raise RuntimeError(
                    f"Replica.adopt: {self._now.steps} local steps would be lost. Pull "
                    "before the first one."
                )
            cast = optax.tree.cast_like(params, self._params)
            self._params, self._now = cast, Moment(steps, False)

    def fail(self, error: BaseException) -> None:
        """Hand an error of the exchange thread over: the next step raises it."""
        with self._lock:
            self._failure = self._failure or error


def _add(x: Any, correction: Any) -> Any:
    return jax.tree.map(
        lambda x, c: (x.astype(jnp.float32) + c).astype(x.dtype), x, correction
    )


def _rebase(x: Any, new: Any, start: Any) -> Any:
    """Add to x what a step from ``start`` to ``new`` did."""
    wide = jnp.float32
    return jax.tree.map(
        lambda x, new, start: (
            x.astype(wide) + (new.astype(wide) - start.astype(wide))
        ).astype(x.dtype),
        x,
        new,
        start,
    )
