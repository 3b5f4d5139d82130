"""An assertion about bytes, for tests of users' own programs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from bagua_jax.wire.base import Nodes, WireCount, show
from bagua_jax.wire.hlo import count
from bagua_jax.wire.weights import Shares

__all__ = ["assert_bytes"]

_ROUNDING = 1e-12


def assert_bytes(
    program: Any,
    expected: float,
    *,
    args: Sequence[Any] | None = None,
    kind: str | None = None,
    dtype: str | None = None,
    link: Literal["inside", "between"] | None = None,
    nodes: Nodes | None = None,
    messages: float | None = None,
    rtol: float = 0.0,
    branch_shares: Mapping[str, Shares] | None = None,
    trip_counts: Mapping[str, int] | None = None,
) -> WireCount:
    """Assert how many bytes a worker sends in one run of a program.

    Args:
        program: a ``jax.stages.Compiled`` or the text of its optimized HLO; a
            ``jax.stages.Lowered``, which is compiled; a jitted function with its
            ``args``; or a :class:`WireCount`.
        expected: bytes per worker.
        args: of a jitted function; shapes (``jax.ShapeDtypeStruct``) are enough.
        kind: count only collectives of this kind, such as ``"all-to-all"``.
        dtype: count only collectives of this dtype, such as ``"u8"``.
        link: count only bytes that stay inside a node, or that leave it.
        nodes: the node of each device, in the order of the mesh; with ``link``.
        messages: messages per worker, of the same collectives; not asserted if None.
        rtol: allowed difference of the bytes, as a share of ``expected``. 0 is exact,
            to the rounding of weights such as 1/3. Messages are always exact.
        branch_shares: as in :func:`count`.
        trip_counts: likewise.

    Returns:
        The count of the whole program, for more assertions.

    Raises:
        AssertionError: it sends otherwise; the message shows the table.
        ValueError: as :func:`count`; or arguments that do not fit one another.

    Example:
        >>> text = '''HloModule step, replica_count=4
        ... ENTRY %main (x: u8[100]) -> u8[400] {
        ...   %x = u8[100]{0} parameter(0)
        ...   ROOT %all = u8[400]{0} all-gather(%x), replica_groups={}, dimensions={0}
        ... }'''
        >>> counted = assert_bytes(text, 300, messages=1)
        >>> _ = assert_bytes(counted, 150, link="between", nodes=[0, 0, 1, 1])
        >>> assert_bytes(counted, 400, dtype="u8", rtol=0.1)  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ...
        AssertionError: expected 400 bytes per worker of u8 (within 10%), ...
    """
    _require(rtol >= 0, "rtol must be at least 0", rtol)
    _require(
        link in (None, "inside", "between"), "link must be 'inside' or 'between'", link
    )
    _require(
        (link is None) == (nodes is None), "link and nodes go together", (link, nodes)
    )
    counted = _count(program, args, branch_shares, trip_counts)
    part = WireCount(
        tuple(
            c
            for c in counted.collectives
            if kind in (None, c.kind) and dtype in (None, c.dtype)
        )
    )
    if link is None or nodes is None:
        sent = part.bytes_per_worker
    else:
        between = part.bytes_between(nodes)
        sent = between if link == "between" else part.bytes_per_worker - between
    if not math.isclose(sent, expected, rel_tol=_ROUNDING, abs_tol=rtol * expected):
        of = " ".join(x for x in (dtype, kind) if x)
        where = {"inside": " inside a node", "between": " between nodes", None: ""}
        within = f" (within {100 * rtol:.10g}%)" if rtol else ""
        raise AssertionError(
            f"expected {show(expected)} bytes per worker{' of ' * bool(of)}{of}"
            f"{where[link]}{within}, and the program sends {show(sent)}:\n"
            f"{counted.table(nodes)}"
        )
    number = part.messages_per_worker
    if messages is not None and not math.isclose(number, messages, rel_tol=1e-12):
        raise AssertionError(
            f"expected {show(messages)} messages per worker, and the program sends "
            f"{show(number)}:\n{counted.table(nodes)}"
        )
    return counted


def _count(program: Any, args: Sequence[Any] | None, shares: Any, trips: Any):
    if args is not None:
        _require(
            hasattr(program, "lower"), "args go with a jitted function", type(program)
        )
        program = program.lower(*args)
    elif callable(program) and hasattr(program, "lower"):
        raise ValueError(
            "wire.assert_bytes: a jitted function needs args=(...), its arguments or "
            "their shapes."
        )
    if hasattr(program, "compiler_ir"):
        program = program.compile()
    if isinstance(program, WireCount):
        _require(not (shares or trips), "a WireCount has its weights", (shares, trips))
        return program
    return count(program, branch_shares=shares, trip_counts=trips)


def _require(valid: bool, rule: str, value: object) -> None:
    if not valid:
        raise ValueError(f"wire.assert_bytes: {rule}; got {value!r}.")
