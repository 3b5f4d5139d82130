"""What is known of an algorithm: the entry that lists, docs, tests and what-if read."""

from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple

import optax

from bagua_jax import traffic
from bagua_jax.traffic import Sends

__all__ = ["Contract", "Entry", "Example", "Family", "Late", "Placement"]

Placement = Literal["gradient", "weight", "optimizer", "local optimizer"]
"""Where it stands in a chain: before the optimizer, last, or alone (with parameters
that are equal on all workers, or each worker's own)."""

Family = Literal["mean", "gossip", "local steps"]
"""How much it relaxes: a mean over all workers on every step, exchanges with
neighbours, or exchanges on some steps only."""


class Late(NamedTuple):
    """How late an exchange may come.

    Attributes:
        period: steps between exchanges.
        steps: of compute until one is needed.
        inside: whether what is sent inside the node may be as late.
    """

    period: float
    steps: int
    inside: bool = True


def _by_staleness(options: Mapping[str, Any]) -> Late | None:
    return Late(1, options["staleness"]) if options.get("staleness") else None


class Example(NamedTuple):
    """A configuration as a config file writes it: a row of docs and of what-if.

    Attributes:
        options: its arguments.
        known_as: what the literature calls it, where its name is not the algorithm's.
        peers: other software that has it; in brackets, what has a part of it.
        invariant: what stays true on every step, and is tested to rounding; the
            entry's where empty.
    """

    options: Mapping[str, Any] = {}
    known_as: str = ""
    peers: str = ""
    invariant: str = ""


class Contract(NamedTuple):
    """A configuration that the contracts are tested with, on a small problem.

    Attributes:
        options: keyword arguments of the factory.
        floor: distance to the optimum that compression or heterogeneity leaves; above 1
            it is the workers' spread, and their mean comes closer.
        sends: (n, sizes of buckets) -> bytes and messages of a worker on a step.
        plain: options that switch compression and outer optimizers off, after which one
            worker is the inner optimizer; ``None`` where it never is.
    """

    options: Mapping[str, Any] = {}
    floor: float = 0.0
    sends: Sends = traffic.allreduce()
    plain: Mapping[str, Any] | None = {}


class Entry(NamedTuple):
    """An algorithm, as configs name it and lists, docs and tests walk over it.

    A relaxation of your own needs no more than the first two::

        entry = Entry(my_relaxation, "gradient")

    Attributes:
        factory: with the keyword ``axis_name``; returns an optax transform.
        placement: where the transform stands in a chain.
        family: how much it relaxes.
        invariant: what stays true on every step, and is tested to rounding.
        oracle: the NumPy oracle in ``tests/oracles``, as module.function.
        examples: rows of docs; the first one stands for the algorithm in lists.
        contracts: rows of tests.
        late: how late an exchange may come, from all arguments; ``None`` where it is
            needed in its own step.
    """

    factory: Callable[..., optax.GradientTransformationExtraArgs]
    placement: Placement
    family: Family = "mean"
    invariant: str = ""
    oracle: str = ""
    examples: tuple[Example, ...] = (Example(),)
    contracts: tuple[Contract, ...] = (Contract(),)
    late: Callable[[Mapping[str, Any]], Late | None] = _by_staleness

    @property
    def is_optimizer(self) -> bool:
        """Whether it stands alone, without another optimizer."""
        return self.placement.endswith("optimizer")

    @property
    def own_params(self) -> bool:
        """Whether each worker has parameters of its own (typed as varying)."""
        return self.placement in ("weight", "local optimizer")

    @property
    def summary(self) -> str:
        """One line on what it does: the first of the factory's docstring."""
        return (self.factory.__doc__ or "").strip().partition("\n")[0]
