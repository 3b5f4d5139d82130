"""Predicted timelines: how long a step takes, and what of its communication shows."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from bagua_jax.planning.compiling import Compiled, Constants
from bagua_jax.planning.schedule import Computation, Instruction, Schedule
from bagua_jax.wire import scoped_shares

__all__ = ["Covered", "ScheduledCollective", "Timeline", "timeline"]


class Covered(NamedTuple):
    """Work that lies between the start and the end of a collective."""

    name: str
    path: str
    us: float


class ScheduledCollective(NamedTuple):
    """One communication site in the predicted schedule. All times are predictions.

    Attributes:
        kind: HLO opcode, without ``-start``.
        path: op_name metadata.
        name: of the instruction that starts it.
        start: microseconds, from the start of its computation.
        end: when its end has been handled.
        latency: microseconds that the model gives it alone.
        wait: what of the time between start and end no instruction fills.
        weight: executions per step: loop trips x branch shares.
        covered: the instructions between start and end, in order.
    """

    kind: str
    path: str
    name: str
    start: float
    end: float
    latency: float
    wait: float
    weight: float
    covered: tuple[Covered, ...]

    @property
    def hidden(self) -> float:
        """Share of its latency that lies behind other instructions, in [0, 1]."""
        return 1 - min(self.wait / self.latency, 1.0) if self.latency else 1.0


class Timeline(NamedTuple):
    """A prediction of XLA's cost model: one step, in microseconds.

    Attributes:
        end: the length of the step.
        busy: what instructions take of it, collectives' starts and ends included.
        exposed: what of it waits for collectives, each moment once.
        library_calls: calls of cuDNN and the like, which the model charges a flat 10 us
            whatever they do.
        collectives: in order; those of a loop or branch once, with their weight.
        constants: of the model of links; ``None`` for XLA's own.
        cluster: where.
    """

    end: float
    busy: float
    exposed: float
    library_calls: float
    collectives: tuple[ScheduledCollective, ...]
    constants: Constants | None
    cluster: str

    @property
    def launches(self) -> float:
        """The rest of the step: the model starts few instructions in a microsecond."""
        return self.end - self.busy - self.exposed

    @property
    def hidden(self) -> float:
        """Share of all collectives' latency that lies behind other instructions."""
        total = math.fsum(c.weight * c.latency for c in self.collectives)
        shown = math.fsum(c.weight * min(c.wait, c.latency) for c in self.collectives)
        return 1 - shown / total if total else 1.0

    def __str__(self) -> str:
        """Show a table, one collective a line, then the step and the constants."""
        head = (
            "kind",
            "weight",
            "start",
            "latency",
            "wait",
            "hidden",
            "beside",
            "path",
        )
        rows: list[tuple[str, ...]] = [head]
        for c in self.collectives:
            times = (f"{t:,.1f}" for t in (c.start, c.latency, c.wait))
            weight, hidden = f"{c.weight:.4g}", f"{c.hidden:.0%}"
            beside = str(len(c.covered))
            rows.append((c.kind, weight, *times, hidden, beside, c.path))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(map("{:{}{}}".format, r, "<>>>>>><", widths)) for r in rows]
        model = f"links: {self.constants}" if self.constants else "XLA's own constants"
        if self.library_calls:
            model += f"; {self.library_calls:.4g} library calls at a flat 10 us each"
        return "\n".join(line.rstrip() for line in lines) + (
            f"\npredicted by XLA's cost model: {self.end:,.1f} us a step, "
            f"{self.exposed:,.1f} of them waiting for collectives, {self.busy:,.1f} in "
            f"instructions, {self.launches:,.1f} between them\n{self.cluster}; {model}"
        )


def timeline(
    compiled: Compiled,
    *,
    branch_shares: Mapping[str, Sequence[float]] | None = None,
    trip_counts: Mapping[str, int] | None = None,
) -> Timeline:
    r"""Predict a step's timeline from the schedule that XLA made for a GPU cluster.

    With :math:`s`, :math:`e` the start and end of an instruction by XLA's timestamps,
    a collective from a to b (its start and its end) waits

    .. math:: (s_b - e_a) - \sum_{a < i < b} (e_i - s_i),

    and the step takes as long as the last timestamp of the entry computation says. A
    loop adds its trips times its body, a branch its share of steps times its
    computation. XLA gives times only to computations with collectives; of the others
    the model's costs are added up, at least a microsecond each, as its scheduler does.
    Of branches without collectives and of unknown shares, the longest counts. What is
    in flight across a loop or branch counts as if the loop took no time.

    Args:
        compiled: by :func:`bagua_jax.planning.compile`, for a GPU cluster.
        branch_shares: as in :func:`bagua_jax.wire.count`.
        trip_counts: as in :func:`bagua_jax.wire.count`.

    Raises:
        ValueError: a program for TPU or A100, whose times XLA does not predict; one
            without collectives; a loop of unknown length, or branches that communicate
            and have unknown shares.
    """
    schedule = compiled.schedule
    if schedule is None or not schedule.computations:
        why = "it has no collectives"
        if schedule is None:
            why = "XLA predicts no times for TPU and A100"
        raise ValueError(
            "planning.timeline: the program must have a predicted schedule; "
            f"{compiled.cluster.text} got none, because {why}."
        )
    parts = _Parts(schedule, branch_shares or {}, trip_counts or {})
    total = parts.total(schedule.computations[0].name)
    return Timeline(*total, compiled.constants, str(compiled.cluster))


class _Times(NamedTuple):
    end: float
    busy: float
    exposed: float
    library_calls: float
    collectives: tuple[ScheduledCollective, ...]


def _sum(parts: Sequence[tuple[float, _Times]]) -> _Times:
    """Add up times, each so often as its factor says."""
    return _Times(
        end=math.fsum(f * t.end for f, t in parts),
        busy=math.fsum(f * t.busy for f, t in parts),
        exposed=math.fsum(f * t.exposed for f, t in parts),
        library_calls=math.fsum(f * t.library_calls for f, t in parts),
        collectives=tuple(
            c._replace(weight=c.weight * f) for f, t in parts for c in t.collectives
        ),
    )


class _Parts:
    """Adds up computations, what loops and branches call included."""

    def __init__(self, schedule: Schedule, shares: Mapping, trips: Mapping):
        self.computations = {c.name: c for c in schedule.computations}
        self.shares, self.trips = shares, trips

    def total(self, name: str) -> _Times:
        computation = self.computations[name]
        parts = [(1.0, _own(computation))]
        for i in computation.instructions:
            called = [self.total(call) for call in i.calls]
            if i.opcode == "while":  # known trips: nobody evaluates the condition
                parts.append((self._trips(i), called[0]))
            elif i.opcode == "conditional":
                parts += zip(self._shares(i, called), called, strict=True)
            else:
                parts += [(1.0, times) for times in called]
        return _sum(parts)

    def _trips(self, i: Instruction) -> int:
        trips = i.trips or self.trips.get(i.path, self.trips.get(i.name))
        if trips is None:
            raise ValueError(
                "planning.timeline: a loop needs a known trip count; the compiler "
                f"states none for {i.name} ({i.path}). Pass trip_counts="
                f"{{{i.path or i.name!r}: ...}}."
            )
        return trips

    def _shares(self, i: Instruction, branches: list[_Times]) -> Sequence[float]:
        shares = self.shares.get(i.path, self.shares.get(i.name))
        if shares is None:
            shares = scoped_shares(i.path)
        ends = [branch.end for branch in branches]
        if shares is None and not any(branch.collectives for branch in branches):
            shares = [float(k == np.argmax(ends)) for k in range(len(ends))]
        if shares is None or len(shares) != len(ends):
            raise ValueError(
                f"planning.timeline: the branches of {i.name} ({i.path}) take "
                f"{', '.join(f'{end:,.1f}' for end in ends)} us and nothing says how "
                "often each is taken. Write it with bagua_jax.schedules.switch(..., "
                f"shares=...), or pass branch_shares={{{i.path or i.name!r}: (...)}}."
            )
        return shares


def _own(computation: Computation) -> _Times:
    """Time a computation, without what it calls."""
    order = computation.instructions
    calls = float(sum(i.opcode == "custom-call" for i in order))
    if not computation.scheduled:
        costs = [_FLAT.get(i.opcode, i.cost) for i in order]
        costs = [cost for cost in costs if cost >= 0]
        return _Times(sum(max(c, 1.0) for c in costs), sum(costs), 0.0, calls, ())
    at = {i.name: k for k, i in enumerate(order)}
    lengths = np.array([i.end - i.start for i in order])
    gaps = np.array([0.0] + [b.start - a.end for a, b in pairwise(order)])
    in_flight = np.zeros(len(order), bool)
    collectives = []
    for b, done in enumerate(order):
        if not done.opcode.endswith("-done") or not done.opcode.startswith(_KINDS):
            continue
        a = at[done.operands[0]]
        start = order[a]
        window = done.start - start.end
        collectives.append(
            ScheduledCollective(
                kind=done.opcode.removesuffix("-done"),
                path=start.path,
                name=start.name,
                start=start.start,
                end=done.end,
                latency=start.cost if start.cost >= 0 else window,
                wait=max(window - float(lengths[a + 1 : b].sum()), 0.0),
                weight=1.0,
                covered=tuple(
                    Covered(i.name, i.path, i.end - i.start)
                    for i in order[a + 1 : b]
                    if i.end > i.start
                ),
            )
        )
        in_flight[a + 1 : b + 1] = True
    end = max((i.end for i in order), default=0.0)
    exposed = float(gaps[in_flight].clip(0).sum())
    return _Times(end, float(lengths.sum()), exposed, calls, tuple(collectives))


_FLAT = {"copy": 0.0, "custom-call": 10.0}  # what the model charges without a cost
_KINDS = ("all-", "collective-", "ragged-all-", "reduce-scatter", "send", "recv")
