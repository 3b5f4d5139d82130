"""Read the schedule that XLA writes for a GPU program: every instruction's times."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

__all__ = ["Computation", "Instruction", "Schedule", "read_schedule"]


class Instruction(NamedTuple):
    """One instruction of a computation.

    Attributes:
        name: of the instruction.
        opcode: such as ``fusion``; that of a collective that is wrapped for asynchrony
            is the collective's, with ``-start`` or ``-done``.
        path: op_name metadata.
        start: microseconds from the start of its computation; -1 where not scheduled.
        end: likewise.
        cost: microseconds that the model charges: of a collective's start, until it is
            done; -1 where the model has no cost.
        operands: names; only those of the end of a collective.
        calls: computations of a loop or branch.
        trips: of a loop, where the compiler knows them.
    """

    name: str
    opcode: str
    path: str
    start: float
    end: float
    cost: float
    operands: tuple[str, ...] = ()
    calls: tuple[str, ...] = ()
    trips: int | None = None


class Computation(NamedTuple):
    """The instructions of a computation; in order of time where it is scheduled."""

    name: str
    scheduled: bool
    instructions: tuple[Instruction, ...]


class Schedule(NamedTuple):
    """What XLA scheduled: the entry computation first, then what loops and branches do.

    XLA schedules only computations with collectives. The others have costs, no times.
    """

    computations: tuple[Computation, ...]

    @classmethod
    def of_json(cls, rows: Sequence[Any]) -> Schedule:
        """Make one of what :func:`read_schedule` read, as JSON keeps it."""
        return cls(
            tuple(
                Computation(
                    name,
                    scheduled,
                    tuple(
                        Instruction._make(map(_hashable, instruction))
                        for instruction in instructions
                    ),
                )
                for name, scheduled, instructions in rows
            )
        )


def _hashable(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def read_schedule(text: str) -> Schedule:
    """Read the dump of XLA's latency-hiding scheduler, a ScheduleProto in text form.

    Times are its timestamps. Its ``scheduler_statistics`` describe the order before
    the scheduler, and are not read.

    Args:
        text: content of a ``*.schedule.txt``.

    Raises:
        ValueError: text of another form.
    """
    instructions, names, entry, times = _fields(text)
    if entry not in names.values():
        raise ValueError(
            "read_schedule: the text must be a ScheduleProto with an entry computation;"
            f" got {text[:80]!r}."
        )
    by_id = {i["id"]: i for i in instructions}
    wrapped = {  # the collective of a computation that does nothing else
        i["computation"]: i for i in instructions if i["opcode"].startswith(_WRAPPED)
    }

    def opcode(i: dict[str, Any]) -> str:
        if i["opcode"] == "async-start":
            inner = wrapped.get(i["calls"][0], {"opcode": "async"})
            return f"{inner['opcode']}-start"
        if i["opcode"] == "async-done":
            start = by_id[i["operands"][0]]
            return opcode(start).replace("-start", "-done")
        if i["opcode"] == "async-update":
            raise ValueError(f"read_schedule: the form of {i['name']} is not known.")
        return i["opcode"]

    def cost(i: dict[str, Any]) -> float:
        if i["opcode"] == "async-start":
            i = wrapped.get(i["calls"][0], i)
        found = re.search(_COST, i["backend"])
        return float(found[1]) if found else -1.0

    def row(i: dict[str, Any], start: float, end: float) -> Instruction:
        done = i["opcode"].endswith("-done")
        trips = re.search(r'known_trip_count\\":\{\\"n\\":\\"(\d+)', i["backend"])
        branches = i["opcode"] in ("while", "conditional", "call")
        return Instruction(
            name=i["name"],
            opcode=opcode(i),
            path=i["path"],
            start=start,
            end=end,
            cost=cost(i),
            operands=tuple(by_id[o]["name"] for o in i["operands"]) if done else (),
            calls=tuple(names[c] for c in i["calls"]) if branches else (),
            trips=int(trips[1]) if trips else None,
        )

    rows: dict[str, list[Instruction]] = {name: [] for name in names.values()}
    for i in instructions:
        if i["computation"] not in times:
            rows[names[i["computation"]]].append(row(i, -1.0, -1.0))
    for computation, order in times.items():
        rows[names[computation]] = [row(by_id[k], *span) for k, *span in order]
    scheduled = {names[computation] for computation in times}

    found: dict[str, Computation] = {}
    pending = [entry]
    while pending:  # what the entry reaches, through loops, branches and calls
        name = pending.pop()
        if name not in found:
            found[name] = Computation(name, name in scheduled, tuple(rows[name]))
            pending += [call for i in rows[name] for call in i.calls]
    return Schedule(tuple(found.values()))


_WRAPPED = ("all-", "collective-", "ragged-all-", "reduce-scatter")
_COST = r'exec_time_us\\":([\d.e+-]+)[^{}]*\\"name\\":\\"sol\\"'


def _fields(text: str) -> tuple[list[dict[str, Any]], dict[int, str], str, dict]:
    """Pick from the proto, a line a field, what :func:`read_schedule` needs.

    Returns:
        Instructions with the id of their computation; the name of each computation by
        its id; the name of the entry; for each scheduled computation (id of
        instruction, start, end) in order.
    """
    instructions: list[dict[str, Any]] = []
    names: dict[int, str] = {}
    times: dict[int, list[tuple[int, float, float]]] = {}
    entry, name, first = "", "", 0
    order: list[dict[str, float]] = []
    scheduled = -1
    stack: list[str] = []
    for line in text.splitlines():
        line = line.strip()
        if line.endswith("{"):
            stack.append(line[:-1].rstrip(": "))
            where = tuple(stack)
            if where == _INSTRUCTION:
                instructions.append(
                    {"operands": [], "calls": [], "path": "", "backend": ""}
                )
            elif where == _COMPUTATION:
                first = len(instructions)
            elif where == _TIMED:
                order.append({})
            elif where == _TIMES:
                order, scheduled = [], -1
        elif line == "}":
            if tuple(stack) == _TIMES:
                times[scheduled] = [
                    (
                        int(t["id"]),
                        t.get("start_timestamp_cycles", 0.0),  # 0 is not written
                        t.get("end_timestamp_cycles", 0.0),
                    )
                    for t in order
                ]
            stack.pop()
        else:
            key, _, value = line.partition(": ")
            where = tuple(stack)
            if where == _INSTRUCTION:
                if key in ("name", "opcode"):
                    instructions[-1][key] = value[1:-1]
                elif key == "id":
                    instructions[-1]["id"] = int(value)
                elif key == "operand_ids":
                    instructions[-1]["operands"].append(int(value))
                elif key == "called_computation_ids":
                    instructions[-1]["calls"].append(int(value))
                elif key == "backend_config":
                    instructions[-1]["backend"] = value
            elif where == _METADATA and key == "op_name":
                instructions[-1]["path"] = value[1:-1]
            elif where == _COMPUTATION and key == "name":
                name = value[1:-1]
            elif where == _COMPUTATION and key == "id":
                names[int(value)] = name
                for instruction in instructions[first:]:
                    instruction["computation"] = int(value)
            elif where == _MODULE and key == "entry_computation_name":
                entry = value[1:-1]
            elif where == _TIMED and key in _STAMPS:
                order[-1][key] = float(value)
            elif where == _TIMES and key == "computation_id":
                scheduled = int(value)
    return instructions, names, entry, times


_MODULE = ("hlo_module",)
_COMPUTATION = (*_MODULE, "computations")
_INSTRUCTION = (*_COMPUTATION, "instructions")
_METADATA = (*_INSTRUCTION, "metadata")
_TIMES = ("computation_schedules",)
_TIMED = (*_TIMES, "instructions")
_STAMPS = ("id", "start_timestamp_cycles", "end_timestamp_cycles")
