"""What a compiler made of the communication that a program asks for."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from bagua_jax.wire.base import (
    PAIRWISE,
    Collective,
    Nodes,
    WireCount,
    columns,
    num_bytes,
    show,
)
from bagua_jax.wire.hlo import count
from bagua_jax.wire.stablehlo import intended
from bagua_jax.wire.weights import Shares

__all__ = ["Change", "WireComparison", "compare"]


class Change(NamedTuple):
    """Collectives of the source that belong together, and what became of them."""

    intended: tuple[Collective, ...]  # none: the compiler added it
    compiled: tuple[Collective, ...]  # none: the compiler removed it
    differences: tuple[str, ...]  # in words; none: they are the same


class WireComparison(NamedTuple):
    """Intended beside compiled traffic; every collective of both is in one change."""

    changes: tuple[Change, ...]

    @property
    def intended(self) -> WireCount:
        """Everything that the source asks for."""
        return WireCount(tuple(c for change in self.changes for c in change.intended))

    @property
    def compiled(self) -> WireCount:
        """Everything that the compiled program sends."""
        return WireCount(tuple(c for change in self.changes for c in change.compiled))

    @property
    def differences(self) -> dict[str, float]:
        """Each difference, with the bytes per worker that go with it, signed.

        A change with several differences is one entry, its names joined by commas.
        """
        found: dict[str, float] = {}
        for change in self.changes:
            if change.differences:
                name = ", ".join(change.differences)
                sent = WireCount(change.compiled).bytes_per_worker
                meant = WireCount(change.intended).bytes_per_worker
                found[name] = found.get(name, 0.0) + sent - meant
        return found

    def table(self, nodes: Nodes | None = None) -> str:
        """Show intended beside compiled traffic, per worker, and the differences.

        Args:
            nodes: the node of each device. Bytes are then shown in two columns, inside
                a node and between nodes.
        """
        links = ("bytes",) if nodes is None else ("inside", "between")
        side = ("messages", *links)
        rows = [
            ("", "", "", "intended", *("",) * len(links), "compiled")
            + ("",) * (len(links) + 1),
            ("kind", "dtype", "group", *side, *side, "difference"),
        ]
        alike: dict[tuple[str, ...], list[Change]] = defaultdict(list)
        for change in self.changes:
            shown = change.intended or change.compiled
            labels = (
                _joined(c.kind for c in shown),
                _joined(c.dtype for c in shown),
                _joined(str(c.group_size) for c in shown),
            )
            alike[*labels, ", ".join(change.differences)].append(change)
        for (*labels, difference), changes in alike.items():
            part = WireComparison(tuple(changes))
            rows.append((*labels, *part._sides(nodes), difference))
        more = self.compiled.bytes_per_worker - self.intended.bytes_per_worker
        total = f"{more:+,.10g} bytes" if abs(more) > 1e-6 else ""
        rows.append(("total", "", "", *self._sides(nodes), total))
        return columns(rows, "<<>" + ">" * 2 * len(side) + "<")

    def _sides(self, nodes: Nodes | None) -> list[str]:
        shown = []
        for part in (self.intended, self.compiled):
            shown.append(part.messages_per_worker)
            if nodes is None:
                shown.append(part.bytes_per_worker)
            else:
                shown += [part.bytes_inside(nodes), part.bytes_between(nodes)]
        return [show(number) for number in shown]

    def __str__(self) -> str:
        """Show the table."""
        return self.table()


def compare(
    lowered: Any,
    compiled: Any,
    *,
    branch_shares: Mapping[str, Shares] | None = None,
    trip_counts: Mapping[str, int] | None = None,
) -> WireComparison:
    """Name what a compiler changed in the communication of a program.

    Collectives of :func:`intended` and :func:`count` are paired by kind, groups, dtype,
    elements, weight and source path; then by all but one of these, which is the
    difference:

    - *widened* or *narrowed*: another dtype travels (bfloat16 as float32 on CPU; a
      conversion that sank below a collective, or rose above it).
    - *rewritten*: another kind (TPU runs a reduce-scatter, or a small all-gather, as an
      all-reduce).
    - *moved*: it runs more or less often, as out of a loop; *unrolled*: the same runs
      at more sites.
    - *combined*: fewer messages, of the operands of several; *split*: more.
    - *removed*: nothing is sent for it. Its group may be one worker, it may repeat
      another that stays, or nobody uses its result.
    - *added*: no collective of the source asks for it, as for reshards of the
      partitioner.

    Every collective of both programs is in exactly one change, so bytes and messages of
    the changes add up to those of the two counts, whatever the pairs.

    Args:
        lowered: what :func:`intended` takes, or what it gives.
        compiled: what :func:`count` takes, or what it gives.
        branch_shares: as in :func:`count`, by path; for both programs.
        trip_counts: likewise.

    Raises:
        ValueError: as :func:`intended` and :func:`count`.

    Example (a mean in bfloat16, and what XLA for CPU makes of it):
        >>> import jax, jax.numpy as jnp
        >>> from bagua_jax import Workers
        >>> workers = Workers.abstract(4)
        >>> def f(x):
        ...     return jax.lax.psum(x, workers.axis_name)
        >>> total = workers.spmd(f, in_specs=workers.spec)
        >>> x = jax.ShapeDtypeStruct((4, 100), jnp.bfloat16)
        >>> lowered = total.trace(x).lower(lowering_platforms=("cpu",))
        >>> path = intended(lowered).collectives[0].path
        >>> compiled = f'''HloModule jit_f, replica_count=4
        ... ENTRY %main (x: f32[100]) -> f32[100] {{
        ...   %x = f32[100] parameter(0)
        ...   ROOT %y = f32[100] all-reduce(%x), metadata={{op_name="{path}"}}
        ... }}'''
        >>> print(compare(lowered, compiled))
                                  intended         compiled
        kind        dtype  group  messages  bytes  messages  bytes  difference
        all-reduce  bf16       4         1    300         1    600  widened bf16 -> f32
        total                            1    300         1    600  +300 bytes
    """
    named: dict[str, Any] = {"branch_shares": branch_shares, "trip_counts": trip_counts}
    if not isinstance(lowered, WireCount):
        lowered = intended(lowered, **named)
    if not isinstance(compiled, WireCount):
        compiled = count(compiled, **named)
    return _Pairing(lowered.collectives, compiled.collectives).comparison()


class _Part(NamedTuple):
    """What one collective sends of one dtype: an operand, or all of an all-to-all."""

    site: int
    kind: str
    groups: frozenset  # of groups, each in its order; of pairs
    dtype: str
    elements: int  # of the gathered array for an all-gather, as in an all-reduce
    weight: float
    path: str
    anonymous: bool  # its path may be that of another: lost, or one of several


_SAME = ("kind", "groups", "dtype", "elements", "weight")
_ONE_CHANGED = [
    tuple(k for k in _SAME if k not in changed)
    for changed in (
        ("dtype",),
        ("kind",),
        ("kind", "dtype"),
        ("weight",),
        ("weight", "dtype"),
    )
]


class _Pairing:
    """Parts that are not yet paired, and pairs of sites."""

    def __init__(self, meant: Sequence[Collective], sent: Sequence[Collective]):
        self.sites = meant, sent
        self.open = _parts(meant), _parts(sent)
        self.changed: list[tuple[_Part, _Part]] = []
        self.links: list[tuple[int, int]] = []
        self.unrolled: set[int] = set()  # sites of the source

    def comparison(self) -> WireComparison:
        self.one_to_one((*_SAME, "path"))
        for kept in _ONE_CHANGED[:3]:
            self.one_to_one((*kept, "path"))
        self.one_to_one(_SAME)
        self.many_to_many(("kind", "groups", "dtype", "weight"), lambda p: p.elements)
        self.many_to_many(("kind", "groups", "dtype", "elements", "path"), _runs)
        for kept in _ONE_CHANGED[3:]:
            self.one_to_one((*kept, "path"))
        for kept in _ONE_CHANGED:
            self.one_to_one(kept, only=lambda part: part.anonymous)
        return WireComparison(tuple(self.changes()))

    def one_to_one(
        self,
        kept: Sequence[str],
        only: Callable[[_Part], bool] = lambda part: True,
    ) -> None:
        """Pair parts that agree in some respects, in the order of the programs."""
        waiting = _by(kept, self.open[0])
        for part in [p for p in self.open[1] if only(p)]:
            if waiting[_key(kept, part)]:
                self.pair(waiting[_key(kept, part)].pop(0), part)

    def many_to_many(
        self, kept: Sequence[str], amount: Callable[[_Part], float]
    ) -> None:
        """Pair parts that agree in some respects and in their total amount."""
        meant, sent = _by(kept, self.open[0]), _by(kept, self.open[1])
        for key in [k for k in sent if meant[k]]:
            totals = [round(sum(map(amount, parts[key])), 9) for parts in (meant, sent)]
            if totals[0] == totals[1]:
                sets = [(meant[key], sent[key])]
            else:
                sets = _subsets(meant[key], sent[key], amount)
            for sources, results in sets:
                if amount is _runs:
                    self.unrolled.update(part.site for part in sources)
                first, *rest = sources
                for part in results:
                    self.links.append((first.site, part.site))
                for part in rest:
                    self.links.append((part.site, results[0].site))
                self.close(sources, results)

    def pair(self, meant: _Part, sent: _Part) -> None:
        self.changed.append((meant, sent))
        self.links.append((meant.site, sent.site))
        self.close([meant], [sent])

    def close(self, meant: Iterable[_Part], sent: Iterable[_Part]) -> None:
        for side, done in zip(self.open, (meant, sent), strict=True):
            for part in done:
                side.remove(part)

    def changes(self) -> list[Change]:
        """Join sites that are linked, in the order of the compiled program."""
        root: dict[tuple[int, int], tuple[int, int]] = {}

        def find(x: tuple[int, int]) -> tuple[int, int]:
            while root.setdefault(x, x) != x:
                x = root[x]
            return x

        for a, b in self.links:
            root[find((0, a))] = find((1, b))
        sets: dict[tuple[int, int], tuple[list[int], list[int]]] = {}
        for side in (1, 0):
            for site in range(len(self.sites[side])):
                members = sets.setdefault(find((side, site)), ([], []))
                members[side].append(site)
        return [self.change(meant, sent) for meant, sent in sets.values()]

    def change(self, meant: list[int], sent: list[int]) -> Change:
        source = tuple(self.sites[0][i] for i in meant)
        result = tuple(self.sites[1][i] for i in sent)
        if not result:
            kept = {_alike(self.sites[0][site]) for site, _ in self.links}
            if not any(c.bytes_sent for c in source):
                words = ["removed (sends nothing)"]
            elif all(_alike(c) in kept for c in source):
                words = ["removed (another like it stays)"]
            else:
                words = ["removed"]
        elif not source:
            words = ["added"]
        else:
            words = [
                word
                for a, b in self.changed
                if a.site in meant
                for word in _changed(a, b)
            ]
            numbers = f"{len(source)} -> {len(result)}"
            if any(site in self.unrolled for site in meant):
                words.append(f"unrolled {numbers}")
            elif len(source) > len(result):
                words.append(f"combined {numbers}")
            elif len(source) < len(result):
                words.append(f"split {numbers}")
        return Change(source, result, tuple(dict.fromkeys(words)))


_REPEATED = re.compile(r"(while/body/\w+/)\1+")  # once in XLA's names


def _alike(c: Collective) -> tuple:
    """What two collectives share that repeat one another."""
    return c.kind, c.groups, c.arrays, c.weight


def _parts(collectives: Sequence[Collective]) -> list[_Part]:
    parts = []
    for site, c in enumerate(collectives):
        arrays: Iterable[tuple[str, int]] = c.arrays
        if c.kind.endswith("all-to-all"):  # operands may be slices of one array
            sums: dict[str, int] = defaultdict(int)
            for dtype, elements in c.arrays:
                sums[dtype] += elements
            arrays = sums.items()
        groups: Iterable[Any] = c.groups
        if c.kind in PAIRWISE:
            groups = [pair for pair in groups if pair[0] != pair[1]]
        elif c.kind != "collective-broadcast":
            groups = [frozenset(group) for group in groups]
        several = not c.path or c.operands > 1
        for dtype, elements in arrays:
            elements *= c.group_size if c.kind == "all-gather" else 1
            weight = round(c.weight, 9)
            path = _REPEATED.sub(r"\1", c.path)
            row = (c.kind, frozenset(groups), dtype, elements, weight, path, several)
            parts.append(_Part(site, *row))
    return parts


def _runs(part: _Part) -> float:
    return part.weight


def _key(kept: Sequence[str], part: _Part) -> tuple:
    return tuple(getattr(part, name) for name in kept)


def _by(kept: Sequence[str], parts: Iterable[_Part]) -> dict[tuple, list[_Part]]:
    found: dict[tuple, list[_Part]] = defaultdict(list)
    for part in parts:
        found[_key(kept, part)].append(part)
    return found


def _subsets(
    meant: list[_Part], sent: list[_Part], amount: Callable[[_Part], float]
) -> list[tuple[list[_Part], list[_Part]]]:
    """For each compiled part, find source parts of the same total, if there are any."""
    found, left = [], list(meant)
    for part in sent:
        sums: dict[float, list[int]] = {0: []}
        for i, source in enumerate(left):
            for total, chosen in list(sums.items()):
                reached = round(total + amount(source), 9)
                if reached <= amount(part):
                    sums.setdefault(reached, [*chosen, i])
            if round(amount(part), 9) in sums or len(sums) > 10_000:
                break
        if chosen := sums.get(round(amount(part), 9)):
            found.append(([left[i] for i in chosen], [part]))
            left = [source for i, source in enumerate(left) if i not in chosen]
    return found


def _changed(meant: _Part, sent: _Part) -> list[str]:
    words = []
    if meant.kind != sent.kind:
        words.append(f"rewritten {meant.kind} -> {sent.kind}")
    if meant.dtype != sent.dtype:
        sizes = [num_bytes(dtype, 8) for dtype in (meant.dtype, sent.dtype)]
        word = (
            "recast"
            if sizes[0] == sizes[1]
            else ("widened", "narrowed")[sizes[0] > sizes[1]]
        )
        words.append(f"{word} {meant.dtype} -> {sent.dtype}")
    if meant.weight != sent.weight:
        words.append(f"moved {meant.weight:.6g} -> {sent.weight:.6g} runs")
    return words


def _joined(words: Iterable[str]) -> str:
    return "+".join(dict.fromkeys(words))
