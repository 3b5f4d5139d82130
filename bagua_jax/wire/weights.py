"""How often a collective runs: trips of loops and shares of branches around it."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from bagua_jax.wire.base import Collective, WireCount, show

__all__ = ["Shares", "Weights", "counted_trips", "scoped_shares", "weighted"]

Shares = Sequence[float] | np.ndarray


class Weights:
    """Weights from the program, or from the caller where the program states none.

    Args:
        caller: named in errors.
        branch_shares: as in :func:`bagua_jax.wire.count`.
        trip_counts: likewise.
    """

    def __init__(
        self,
        caller: str,
        branch_shares: Mapping[str, Shares] | None,
        trip_counts: Mapping[str, int] | None,
    ):
        self._caller = caller
        self._shares = {k: [*map(float, v)] for k, v in (branch_shares or {}).items()}
        self._trips = dict(trip_counts or {})
        self._conditionals: set[str] = set()
        self._loops: set[str] = set()

    def loop(
        self,
        body: Sequence[Collective],
        condition: Sequence[Collective],
        *,
        name: str,
        path: str,
        known: int | None,
    ) -> list[Collective]:
        """Weight what a loop sends with its trips; the condition runs once more."""
        self._loops.update({name, path} - {""})
        given = self._trips.get(path, self._trips.get(name))
        trips = given if known is None else known
        if trips is not None:
            return weighted(body, int(trips)) + weighted(condition, int(trips) + 1)
        if any(c.bytes_sent for c in [*body, *condition]):
            raise ValueError(
                f"{self._caller}: a loop that communicates needs a known trip count; "
                f"the program states none for {_named(name, path)}. Use lax.scan, or "
                "lax.fori_loop with bounds that are Python integers, or pass "
                f"trip_counts={{{path or name!r}: ...}}."
            )
        return []

    def branches(
        self, parts: Sequence[Sequence[Collective]], *, name: str, path: str
    ) -> list[Collective]:
        """Weight what each branch sends with its share of the runs."""
        self._conditionals.update({name, path} - {""})
        shown = _named(name, path)
        counts = [WireCount(tuple(part)) for part in parts]
        totals = [(c.bytes_per_worker, c.messages_per_worker) for c in counts]
        shares = self._shares.get(path, self._shares.get(name))
        if shares is None:
            shares = scoped_shares(path)
        if shares is None and np.allclose(totals, totals[0], rtol=1e-12):
            shares = [1 / len(parts)] * len(parts)
        if shares is None:
            sent = "; ".join(
                f"branch {i}: {show(b)} bytes in {show(m)} messages"
                for i, (b, m) in enumerate(totals)
            )
            raise ValueError(
                f"{self._caller}: the branches of {shown} send unequally and "
                f"nothing says how often each is taken: {sent}. Write it with "
                "bagua_jax.schedules.switch(..., shares=...), or pass "
                f"branch_shares={{{path or name!r}: (...)}}."
            )
        valid = len(shares) == len(parts) and min(shares) >= 0
        if not valid or not math.isclose(sum(shares), 1, abs_tol=1e-6):
            raise ValueError(
                f"{self._caller}: {shown} needs {len(parts)} shares, one a "
                f"branch, none negative, that sum to 1; got {tuple(shares)}."
            )
        pairs = zip(parts, shares, strict=True)
        return [c for part, share in pairs for c in weighted(part, share)]

    def require_known_names(self) -> None:
        """Refuse names of the caller that the program does not have."""
        for argument, given, known in (
            ("branch_shares", self._shares, self._conditionals),
            ("trip_counts", self._trips, self._loops),
        ):
            if unknown := sorted(given.keys() - known):
                raise ValueError(
                    f"{self._caller}: {argument} must use names of the program, which "
                    f"are {sorted(known)}; got {unknown}."
                )


def _named(name: str, path: str) -> str:
    return f"{name} ({path})" if path not in ("", name) else name


def weighted(collectives: Sequence[Collective], factor: float) -> list[Collective]:
    """Multiply weights."""
    return [c._replace(weight=c.weight * factor) for c in collectives]


def scoped_shares(path: str) -> list[float] | None:
    """Read the shares from the scope that stands directly around a conditional.

    >>> scoped_shares("jit(f)/branch_shares(0.9,0.1)/cond/branch_1_fun/cond")  # outer
    >>> scoped_shares("jit(f)/vmap(branch_shares(0.9,0.1))/cond")
    [0.9, 0.1]
    """
    scope = re.search(r"branch_shares\(([^()]*)\)\)*/[^/]*$", path)
    return [float(share) for share in scope[1].split(",")] if scope else None


def counted_trips(start: Any, step: Any, limit: Any, direction: str) -> int | None:
    """Count the trips of ``i = start; while i < limit: i += step``; None if not known.

    >>> counted_trips(0, 2, 5, "LT"), counted_trips(5, -1, 0, "GT")
    (3, 5)
    >>> counted_trips(0, 1, None, "LT"), counted_trips(0, -1, 5, "LT")
    (None, None)
    """
    if not all(isinstance(x, int) for x in (start, step, limit)):
        return None
    if direction in ("LT", "LE") and step > 0:
        return max(0, math.ceil((limit - start + (direction == "LE")) / step))
    if direction in ("GT", "GE") and step < 0:
        return max(0, math.ceil((start - limit + (direction == "GE")) / -step))
    return None
