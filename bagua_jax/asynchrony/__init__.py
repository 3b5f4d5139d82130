"""Real asynchrony: local steps that wait for nobody, and threads that mix models.

- :class:`Replica`: a worker's parameters, changed by its training loop and by a thread.
- :class:`Rounds`: any weight-side algorithm in the background, over collectives of
  ``jax.distributed``. Rounds wait for one another, steps do not.
- :class:`PairGossip`: averages of two workers at a time, without ``jax.distributed``,
  so that a worker may die and come back. It needs the extra ``async``.
- :func:`replay`: a run once more in one process, from the events that it logged.

The deterministic counterparts, with a staleness that is stated and not measured, are
the algorithms ``async_model_average``, ``delayed_choco`` and ``delayed_gradients``.
"""

from bagua_jax.asynchrony.events import Event, event, read, replay, staleness
from bagua_jax.asynchrony.pairs import PairArithmetic, PairGossip
from bagua_jax.asynchrony.replica import Moment, Replica
from bagua_jax.asynchrony.rounds import Exchange, Rounds, make_exchange

__all__ = [
    "Event",
    "Exchange",
    "Moment",
    "PairArithmetic",
    "PairGossip",
    "Replica",
    "Rounds",
    "event",
    "make_exchange",
    "read",
    "replay",
    "staleness",
]
